"""The command line of train.py: flags, and the settings they resolve to.

A flag that is not given takes its value from the recipe (stages.RECIPES) of the model at hand, so what a run will do
depends on the data and the sizes only through the table that `--help` prints.
"""

import argparse
from dataclasses import asdict, fields, replace
from pathlib import Path

from asym_decoder import ASYM_PRESETS
from convert import load_first_stage
from distributed import UserError
from stages import RECIPES
from vqgan import VQGAN_PRESETS

# Flags that may change from one call of the same run to the next: they say how it is run, not what it computes.
HOW = ("device", "workers", "save_every", "max_hours", "check_data", "restart", "stage", "out")


def parse(argv=None):
    """Command line -> argparse.Namespace."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc_train__, epilog=recipe_table(), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to train").add_argument
    add("--data", choices=["signs", "imagenet", "folder"], default="signs",
        help="signs: embedded, needs no files; folder: any photos, searched recursively (default: signs)")
    add("--root", metavar="DIR", help="where the photos are (default for imagenet: $IMAGENET, else data/imagenet)")
    add("--size", type=int, help="side of the square training images (default: 64 for signs, else 256)")
    add("--stage", choices=["all", "vqgan", "decoder"], default="all", help="default: all, in order")
    add("--first-stage", choices=list(VQGAN_PRESETS), help="default: tiny for signs, else vq-f16")
    add("--preset", choices=list(ASYM_PRESETS),
        help="the decoder's size relative to its first stage (default: tiny on a tiny first stage, else base)")
    add("--blend", choices=["add", "concat"], default="add",
        help="add: Eq. 4, the paper's choice; concat: Tables 7 and 8 (default: add)")
    add("--vqgan", metavar="PATH", help="a trained first stage, a run folder or a file of ours, instead of training one")
    add("--overfit", type=int, metavar="N", help="train and validate on the first N images only: a health check")

    add = parser.add_argument_group("how to train (default: the recipe's, below)").add_argument
    add("--steps", type=int, help="optimiser steps of each stage")
    add("--epochs", type=float, help="passes over the data of each stage, instead of --steps")
    add("--batch-size", type=int, help="images a step, over all processes and micro-batches")
    add("--lr", type=float, help="peak learning rate, absolute (the recipe's scales linearly with the batch size)")
    add("--gan", choices=["hinge", "log"], help="log: Eq. 7")
    add("--lambda", dest="rule", choices=["paper", "taming"], help="the adaptive weight: Eq. 9, or taming's")
    add("--disc-start", type=float, help="below 1 a fraction of the steps, from 1 on a step")
    add("--perceptual", choices=["vgg", "alex", "squeeze", "none"], help="LPIPS network (default: none for signs, else vgg)")
    add("--weights", metavar="DIR", help="where LPIPS weights are kept (default: torch hub's cache)")
    add("--seed", type=int, default=0, help="default: 0")

    add = parser.add_argument_group("how to run").add_argument
    add("--out", metavar="DIR", help="run folder (default: runs/DATA-PRESET)")
    add("--device", default="auto", help="auto: CUDA, then MPS, then CPU (default: auto)")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of the networks; losses stay fp32 (default: fp32)")
    add("--micro-batch", type=int, metavar="N", help="images a process takes at once (default: what fits)")
    add("--channels-last", action=argparse.BooleanOptionalAction, default=True, help="memory layout (default: on)")
    add("--compile", action="store_true", help="torch.compile the networks (default: off)")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, more time (default: off)")
    add("--workers", type=int, help="data processes for each training process (default: 1 for signs, else 4)")
    add("--save-every", type=int, metavar="STEPS", help="default: 100 for tiny models, else 1000")
    add("--max-hours", type=float, metavar="H", help="save and leave after this long; the same command continues")
    add("--check-data", action="store_true", help="decode every file once, report the bad ones, and stop")
    add("--restart", action="store_true", help="begin anew; an earlier run in --out is kept aside")
    return parser.parse_args(argv)


__doc_train__ = """Train the papers' stages: a first stage (vqgan), then the asymmetric decoder on it (decoder).
With no flags: both, on embedded data, in minutes on a laptop, then the table of results.
The same command again continues a run that was stopped."""


def recipe_table():
    """RECIPES as text, for --help."""
    lines = ["recipes (stages.py; lr holds at the recipe's batch size):"]
    for stage, recipes in RECIPES.items():
        for name, recipe in recipes.items():
            default = type(recipe)()
            numbers = [f"{f.name} {getattr(recipe, f.name):.6g}" if isinstance(getattr(recipe, f.name), float)
                       else f"{f.name} {getattr(recipe, f.name)}" for f in fields(recipe)
                       if getattr(recipe, f.name) != getattr(default, f.name) or f.name in ("batch_size", "lr")]
            lines.append(f"  {stage:8}{name:8}" + ", ".join(numbers))
    shared = asdict(type(recipe)())
    lines.append("  otherwise       " + ", ".join(f"{key} {value}" for key, value in shared.items()))
    return "\n".join(lines)


def resolve(args):
    """Namespace -> (settings: plain dict, the run's config.json; first stage that --vqgan named, or None).

    Raises UserError for flags that contradict one another.
    """
    signs = args.data == "signs"
    trained = load_first_stage(args.vqgan)[0] if args.vqgan else None
    plan, plan_name = _plan(args, trained, signs)
    preset = args.preset or ("tiny" if plan == VQGAN_PRESETS["tiny"] else "base")
    settings = {key: value for key, value in vars(args).items() if key not in HOW}
    settings |= {
        "root": str(Path(args.root).resolve()) if args.root else None,
        "vqgan": str(Path(args.vqgan).resolve()) if args.vqgan else None,
        "size": args.size or (64 if signs else 256),
        "perceptual": args.perceptual or ("none" if signs else "vgg"),
        "first_stage": asdict(plan), "first_stage_name": plan_name, "preset": preset,
        "decoder": {"preset": preset, "blend": args.blend, "ch": round(ASYM_PRESETS[preset][0] * plan.ch),
                    "num_res_blocks": ASYM_PRESETS[preset][1]},
        "recipes": {"vqgan": asdict(recipe_for("vqgan", "tiny" if plan_name == "tiny" else plan.latent, args)),
                    "decoder": asdict(recipe_for("decoder", preset, args))},
    }
    if settings["size"] < plan.f or settings["size"] % plan.f:
        raise UserError(f"--size {settings['size']} is not a multiple of the first stage's f={plan.f}")
    if args.steps is not None and args.epochs is not None:
        raise UserError("--steps and --epochs say the same thing twice; give one")
    for name in ("steps", "epochs", "batch_size", "lr", "micro_batch", "overfit", "save_every", "max_hours"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive")
    args.out = Path(args.out or f"runs/{args.data}-{preset}" + (f"-overfit{args.overfit}" if args.overfit else ""))
    return settings, trained


def _plan(args, trained, signs):
    if trained is None:
        name = args.first_stage or ("tiny" if signs else "vq-f16")
        return VQGAN_PRESETS[name], name
    names = [name for name, preset in VQGAN_PRESETS.items() if preset == trained.config]
    name = names[0] if names else "own"
    if args.first_stage and args.first_stage != name:
        raise UserError(f"--first-stage {args.first_stage}: {args.vqgan} is {name}; leave the flag out, it is read "
                        "from the file")
    if args.stage == "vqgan":
        raise UserError("--stage vqgan trains a first stage, --vqgan brings one; give only one of them")
    return trained.config, name


def recipe_for(stage, name, args):
    """The recipe with the user's numbers in it; its lr is the one that will be used."""
    recipe = RECIPES[stage][name]
    batch_size = args.batch_size or recipe.batch_size
    lr = args.lr if args.lr is not None else recipe.lr * batch_size / recipe.batch_size
    given = {key: getattr(args, key) for key in ("gan", "rule", "disc_start") if getattr(args, key) is not None}
    if args.steps is not None or args.epochs is not None:
        given |= {"steps": args.steps or 0, "epochs": args.epochs or 0}
    return replace(recipe, batch_size=batch_size, lr=lr, **given)
