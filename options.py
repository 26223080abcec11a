"""The command line of train.py: flags, and the settings they resolve to.

    argv --parse--> argparse.Namespace --resolve--> settings, a plain dict, the run's config.json

A flag that is not given takes its value from the recipe (stages.RECIPES) of the model at hand, so
what a run will do depends on the data and the sizes only through the table that `--help` prints.
What a run computes is in the settings; how it is run (HOW) may change from one call to the next.
"""

import argparse
import math
import shlex
import textwrap
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from asym_decoder import ASYM_PRESETS, AsymDecoder
from convert import load_first_stage
from data import default_root
from distributed import UserError
from seeding import STAGE_IDS
from stages import OURS, RECIPES, Recipe
from unet import UNET_PRESETS
from vqgan import VQGAN_PRESETS

# Flags that may change from one call of the same run to the next.
HOW = {"device", "workers", "micro_batch", "save_every", "max_hours", "restart",
       "stage", "out", "channels_last", "root", "weights"}
# Flags that are in the settings as numbers of the recipes, or of a stage.
NESTED = {"steps", "epochs", "batch_size", "lr", "gan", "lambda_rule", "disc_start", "preset",
          "blend", "codes", "refit_samples", "unet", "timesteps", "ema"}
OVERFIT_STEPS = 500
TINY_CODES = 128        # of the rebuilt codebook; half as many, as in DDM Tab. 1

ABOUT = """Train the papers' stages: a first stage (vqgan), its codebook built anew (refit), and on
these the asymmetric decoder (decoder) and the diffusion model of the codes (prior). With no flags:
all of them, on embedded data, in minutes on a laptop, then the table of results. The same command
again continues a run that was stopped."""


ALSO = """and:
  lambda          paper: |grad pixel| / (|grad GAN| + 1e-4); taming: |grad (pixel + LPIPS)| in the
                  numerator, at most 1e4, x 0.8; norms at the last layer's weight
  losses          pixel L1, LPIPS weight 1; beta 0.25 on the commitment term
  learning rate   warm-up from 1 % of it, over at most a tenth of the run; cosine to min_lr, if any
  crops           squares of 0.5 to 1 of the short side, resized to --size; no flip; the prior and
                  the rebuilt codebook see the centre square"""


def parse(argv=None):
    """Command line -> argparse.Namespace."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=ABOUT, epilog=recipe_table(), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to train").add_argument
    add("--data", choices=["signs", "imagenet", "folder"], default="signs",
        help="signs: embedded, needs no files; folder: any photos, searched recursively "
             "(default: signs)")
    add("--root", metavar="DIR",
        help="where the photos are (default for imagenet: $IMAGENET, else data/imagenet)")
    add("--size", type=int, metavar="PX",
        help="side of the square training images (default: 64 for signs, else 256)")
    add("--stage", choices=["all", *STAGE_IDS], default="all",
        help="default: all, in this order; on a first stage with a KL latent, which has no codes, "
             "vqgan and decoder")
    add("--first-stage", choices=list(VQGAN_PRESETS), help="default: tiny for signs, else vq-f16")
    add("--preset", choices=list(ASYM_PRESETS),
        help="the decoder's size relative to its first stage (default: tiny on a tiny first "
             "stage, else base)")
    add("--blend", choices=["add", "concat"], default="add",
        help="add: Eq. 4, the paper's choice; concat: Tables 7 and 8 (default: add)")
    add("--vqgan", metavar="PATH",
        help="a trained first stage, instead of training one: a run folder, a file of ours, or a "
             "public checkpoint (see convert.py)")
    add("--overfit", type=int, metavar="N",
        help="train and validate on the first N images only, by default for "
             f"{OVERFIT_STEPS} steps a stage: a health check")
    _add_codes(parser.add_argument_group("codes and their prior").add_argument)

    add = parser.add_argument_group("how to train (default: the recipe's, below)").add_argument
    add("--steps", type=int, metavar="N", help="optimiser steps of each stage")
    add("--epochs", type=float, metavar="N",
        help="passes over the data of each stage, instead of --steps")
    add("--batch-size", type=int, metavar="N",
        help="images a step, over all processes and micro-batches")
    add("--lr", type=float,
        help="peak learning rate, absolute (the recipe's scales linearly with the batch size)")
    add("--gan", choices=["hinge", "log"], help="log: Eq. 7")
    add("--lambda", dest="lambda_rule", choices=["paper", "taming"],
        help="the adaptive weight: Eq. 9, or taming's")
    add("--disc-start", type=float, metavar="STEP",
        help="when the discriminator starts: below 1 a fraction of the steps, from 1 on a step")
    add("--perceptual", choices=["vgg", "alex", "squeeze", "none"],
        help="LPIPS network (default: none for signs, else vgg)")
    add("--weights", metavar="DIR",
        help="where LPIPS weights are kept (default: torch hub's cache)")
    add("--seed", type=int, default=0, metavar="N", help="default: 0")

    _add_how_to_run(parser.add_argument_group("how to run").add_argument)
    return parser.parse_args(argv)


def _add_codes(add):
    add("--codes", type=int, metavar="K",
        help=f"size of the rebuilt codebook (default: {TINY_CODES} for a tiny first stage, else as "
             "large as before)")
    add("--refit-samples", type=int, metavar="P",
        help="features that it is built from (default: 5000 for a tiny first stage, else 20000, or "
             "16 a code where that is more)")
    add("--unet", choices=list(UNET_PRESETS),
        help="the prior's network (default: tiny on a tiny first stage, else paper117)")
    add("--timesteps", type=int, metavar="T",
        help="steps of its diffusion (default: 100 for --unet tiny, else 4000)")
    add("--ema", type=float, metavar="DECAY",
        help="of the average of its weights, which is what samples are drawn with (default: 0.995 "
             "for --unet tiny, else 0.9999; ours)")


def _add_how_to_run(add):
    add("--out", metavar="DIR",
        help="run folder (default: runs/DATA-PRESET, then -concat with --blend concat, then "
             "-overfitN with --overfit N)")
    add("--device", default="auto", help="auto: CUDA, then MPS, then CPU (default: auto)")
    add("--precision", choices=["fp32", "bf16"], default="fp32",
        help="of the networks; code search, losses and lambda are in float32. On CUDA, "
             "float32 convolutions use TF32, as is PyTorch's default; eval.py's do not "
             "(default: fp32)")
    add("--micro-batch", type=int, metavar="N",
        help="images a process takes at once (default: all of its share, or what fits)")
    add("--channels-last", action=argparse.BooleanOptionalAction,
        help="memory layout (default: on, except on MPS)")
    add("--compile", action="store_true", help="torch.compile the model (default: off)")
    add("--checkpointing", action="store_true",
        help="recompute the decoders' activations: less memory, more time (default: off)")
    add("--workers", type=int, metavar="N",
        help="data processes for each training process (default: 1 for signs, else 4)")
    add("--save-every", type=int, metavar="STEPS", help="default: 200 for tiny models, else 1000")
    add("--max-hours", type=float, metavar="H",
        help="save and leave after this long; the same command continues (default: no limit)")
    add("--restart", action="store_true", help="begin anew; an earlier run in --out is kept aside")


def recipe_table():
    """RECIPES as text, for --help, and the numbers of training that are no field of a recipe."""
    shared = asdict(Recipe())
    lines = ["recipes (stages.py; lr holds at the recipe's batch_size):"]
    for stage, recipes in RECIPES.items():
        for name, recipe in recipes.items():
            own = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
            own = {key: value for key, value in own.items()
                   if value != shared[key] or key in ("batch_size", "lr")}
            lines.append(_row(f"{stage} {name}", own, OURS.get((stage, name), ())))
    never = {"batch_size", "lr", "steps", "epochs"}                 # each recipe states its own
    lines.append(_row("otherwise", {k: v for k, v in shared.items() if k not in never}))
    plans = [f"  {name:7} f {plan.f}, ch {plan.ch}, ch_mult {plan.ch_mult}, num_res_blocks "
             f"{plan.num_res_blocks}, " + (f"K {plan.K}, d {plan.embed_dim}"
                                           if plan.latent == "vq" else f"KL, d {plan.embed_dim}")
             for name, plan in VQGAN_PRESETS.items()]
    return "\n".join([*lines, "first stages (vqgan.py; tiny is ours):", *plans, ALSO])


def _row(title, numbers, ours=()):
    items = [f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}"
             for key, value in numbers.items()]
    if ours == "all":
        items[0] = f"(ours) {items[0]}"
    else:
        items = [f"{item} (ours)" if key in ours else item for key, item in zip(numbers, items)]
    tied = ", ".join(item.replace(" ", "\0") for item in items)          # a name with its number
    return textwrap.fill(tied, 98, initial_indent=f"  {title:16}",
                         subsequent_indent=" " * 18).replace("\0", " ")


def resolve(args):
    """Namespace -> (settings: plain dict, the run's config.json; first stage that --vqgan named).

    The latter is a convert.Loaded, or None without --vqgan. Sets args.out. Raises UserError for
    values out of range and for flags that contradict one another.
    """
    _check_ranges(args)
    signs = args.data == "signs"
    trained = load_first_stage(args.vqgan) if args.vqgan else None
    plan, plan_name = _plan(args, trained, signs)
    preset = args.preset or ("tiny" if plan_name == "tiny" else "base")
    _check_preset(preset, args.blend, plan, plan_name)
    settings = {key: value for key, value in vars(args).items() if key not in HOW | NESTED}
    settings |= _code_settings(args, plan, plan_name)
    first = "tiny" if plan_name == "tiny" else plan.latent
    names = {"vqgan": first, "decoder": preset}
    if plan.latent == "vq":
        names = {"vqgan": first, "refit": first, "decoder": preset,
                 "prior": settings["prior"]["unet"]}
    recipes = {stage: recipe_for(stage, name, args) for stage, name in names.items()}
    factor, num_res_blocks = ASYM_PRESETS[preset]
    settings |= {
        "root": _absolute(args.root or default_root(args.data)),
        "weights": _absolute(args.weights),
        "vqgan": _absolute(args.vqgan),
        "size": args.size or (64 if signs else 256),
        "perceptual": args.perceptual or ("none" if signs else "vgg"),
        "first_stage": asdict(plan), "first_stage_name": plan_name,
        "decoder": {"preset": preset, "blend": args.blend, "ch": round(factor * plan.ch),
                    "num_res_blocks": num_res_blocks},
        "recipe_names": names,
        "recipes": {stage: asdict(recipe) for stage, recipe in recipes.items()},
    }
    _check_size(settings["size"], plan, [recipes["vqgan"], recipes["decoder"]])
    concat = "-concat" if args.blend == "concat" else ""
    overfit = f"-overfit{args.overfit}" if args.overfit else ""
    args.out = Path(args.out or f"runs/{args.data}-{preset}{concat}{overfit}")
    return settings, trained


def _code_settings(args, plan, plan_name):
    """The settings of the stages that need codes; None each for a KL latent."""
    if plan.latent != "vq":
        return {"refit": None, "prior": None}
    tiny = plan_name == "tiny"
    K = args.codes or (min(plan.K, TINY_CODES) if tiny else plan.K)
    refit = {"K": K, "samples": args.refit_samples or (5000 if tiny else max(20_000, 16 * K))}
    if refit["samples"] < refit["K"]:
        raise UserError(f"--refit-samples {refit['samples']} cannot make {refit['K']} codes; give "
                        "many more of them, or fewer --codes")
    unet = args.unet or ("tiny" if tiny else "paper117")
    small = unet == "tiny"
    prior = {"unet": unet, "net": asdict(UNET_PRESETS[unet]),
             "T": args.timesteps or (100 if small else 4000), "schedule": "cosine", "form": "theta",
             "residual": "onehot" if unet == "paper117" else "none",
             "ema": args.ema if args.ema is not None else (0.995 if small else 0.9999)}
    return {"refit": refit, "prior": prior}


def chosen_stages(args, settings, trained):
    """(names of the stages that this call runs, in order; a line on those that it cannot, or None).

    trained: the first stage that --vqgan named, a convert.Loaded, or None. Raises UserError for a
    stage asked for by name that cannot be, and for maps of codes that the prior cannot take.
    """
    names, why = list(STAGE_IDS), None
    if settings["refit"] is None:
        names = ["vqgan", "decoder"]
        why = (f"{settings['first_stage_name']} has a KL latent, no codes: refit and prior are for "
               "codes, so there is nothing for them to do")
        if args.stage in ("refit", "prior"):
            raise UserError(f"--stage {args.stage}: {why}; choose a VQ plan by --first-stage or "
                            "--vqgan, or another stage")
    if args.stage != "all":
        names, why = [args.stage], None
    elif trained is not None:
        done = ("vqgan", "refit") if trained.stage == "refit" and trained.finished else ("vqgan",)
        names = [name for name in names if name not in done]
    if "prior" in names:
        _check_grid(settings)
    return names, why


def _check_grid(settings):
    net, f = settings["prior"]["net"], 2 ** (len(settings["first_stage"]["ch_mult"]) - 1)
    side, factor = settings["size"] // f, 2 ** (len(net["mults"]) - 1)
    if side % factor:
        raise UserError(f"--size {settings['size']} makes maps of {side} x {side} codes, and "
                        f"--unet {settings['prior']['unet']} needs multiples of {factor}: choose a "
                        f"--size that is a multiple of {f * factor}, or leave the prior out by "
                        "--stage")


def _absolute(path):
    return str(Path(path).expanduser().resolve()) if path else None


def _check_ranges(args):
    for name in ("steps", "epochs", "batch_size", "lr", "micro_batch", "overfit", "save_every",
                 "max_hours", "size", "codes", "refit_samples"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be positive")
    for name in ("workers", "seed", "disc_start"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value}: must not be negative")
    if args.timesteps is not None and args.timesteps < 2:
        raise UserError(f"--timesteps {args.timesteps}: must be at least 2")
    if args.ema is not None and not 0 <= args.ema < 1:
        raise UserError(f"--ema {args.ema}: must be from 0 to below 1")
    if args.steps is not None and args.epochs is not None:
        raise UserError("--steps and --epochs say the same thing twice; give one")


def _check_preset(preset, blend, plan, plan_name):
    try:
        with torch.device("meta"):
            AsymDecoder.from_preset(plan, preset, blend)
    except ValueError as error:
        raise UserError(f"--preset {preset} does not fit --first-stage {plan_name}: "
                        f"{error}") from None


def _check_size(size, plan, recipes):
    if size % plan.f:
        below = size // plan.f * plan.f
        near = " or ".join(str(n) for n in (below, below + plan.f) if n)
        raise UserError(f"--size {size} is not a multiple of the first stage's f={plan.f}; "
                        f"the nearest that are: {near}")
    least = max(3 * 2**recipe.disc_layers for recipe in recipes)
    if size < least:
        raise UserError(f"--size {size} is too small for the discriminator's patches; "
                        f"at least {least}")


def _plan(args, trained, signs):
    if trained is None:
        name = args.first_stage or ("tiny" if signs else "vq-f16")
        return VQGAN_PRESETS[name], name
    plan = trained.model.config
    names = [name for name, preset in VQGAN_PRESETS.items()
             if preset == replace(plan, K=preset.K)]              # a refit may have changed K
    name = names[0] if names else "own"
    if args.first_stage and args.first_stage != name:
        raise UserError(f"--first-stage {args.first_stage}: {args.vqgan} is {name}; leave the flag "
                        "out, it is read from the file")
    if args.stage == "vqgan":
        raise UserError("--stage vqgan trains a first stage, --vqgan brings one; give only one")
    return plan, name


def recipe_for(stage, name, args):
    """The recipe with the user's numbers in it; its lr is the one that will be used."""
    recipe = RECIPES[stage][name]
    batch_size = args.batch_size or recipe.batch_size
    lr = args.lr if args.lr is not None else recipe.lr * batch_size / recipe.batch_size
    given = {key: getattr(args, key) for key in ("gan", "lambda_rule", "disc_start")
             if getattr(args, key) is not None}
    if args.steps is not None or args.epochs is not None:
        given |= {"steps": args.steps or 0, "epochs": args.epochs or 0}
    elif args.overfit:
        given |= {"steps": OVERFIT_STEPS, "epochs": 0}
    return replace(recipe, batch_size=batch_size, lr=lr, **given)


def smaller_command(argv, settings, affordable):
    """A command line on the same data that takes hours: `argv`'s, with smaller sizes.

    affordable: how many steps of the settings' own sizes take some hours; where these are small
    already, only the number of steps shrinks.
    """
    flags = {"--steps": affordable}
    tiny = settings["decoder"]["preset"] == "tiny"
    if not settings["vqgan"] and (not tiny or settings["size"] > 128):
        flags = {"--first-stage": "tiny", "--preset": "tiny", "--size": min(128, settings["size"]),
                 "--steps": 5000}
        if settings["perceptual"] == "vgg":
            flags["--perceptual"] = "squeeze"
    flags["--out"] = f"runs/{settings['data']}-small"
    gone = {*flags, "--epochs", "--batch-size", "--micro-batch", "--lr", "--disc-start",
            "--unet", "--timesteps", "--ema"}
    kept, dropped = [], False
    for word in argv:                     # each of these flags has a value, as "--x v" or "--x=v"
        name = word.split("=")[0]
        if not dropped and name not in gone:
            kept.append(word)
        dropped = name in gone and "=" not in word
    words = [*kept, *(str(word) for pair in flags.items() for word in pair)]
    return "python train.py " + shlex.join(words)
