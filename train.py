"""Train the papers' four stages with one loop, `train_stage`, and read the flags.

    python train.py                                        tiny models on drawn signs, then a report
    python train.py --data imagenet --root /data/imagenet  the papers' sizes
    torchrun --nproc_per_node=8 train.py ...               the same on eight GPUs

Each stage is a class in train_autoencoder.py or train_prior.py. Everything random is a function of
the seed, the stage and an image's position in the run. So a CPU run repeats bit for bit, also if it
was killed and continued, on the same machine, with the same torch, number of processes and threads
and --micro-batch. Otherwise, and on a GPU, rounding may differ.
"""

import argparse
import math
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

import distributed
import run_folder
from asym_decoder import ASYM_PRESETS, AsymDecoder
from convert import load_first_stage
from data import DATASETS, default_root, open_dataset, training_batches
from distributed import UserError, exit_on_user_error, on_rank0, print0, rank, setup, world_size
from eval import evaluate
from pictures import curves, image_grid
from recipes import RECIPES, Recipe, first_gan_step, run_length, set_learning_rates
from run_folder import Log, Progress, Run, open_run
from seeding import STAGE_IDS, stage_seed
from train_autoencoder import DecoderStage, FirstStage, Refit
from train_prior import PriorStage
from unet import UNET_PRESETS
from vqgan import VQGAN_PRESETS, VQGANConfig

STAGES = {"vqgan": FirstStage, "refit": Refit, "decoder": DecoderStage, "prior": PriorStage}
SAMPLE_IMAGES = 6              # rows of samples/step_N.png
VALIDATION_BATCH = 8           # held-out images at once
OVERFIT_STEPS = 500
RHYTHM, TINY_RHYTHM = (1000, 600), (200, 0)      # steps to validation, least seconds to saving

# Flags that may differ when the same run is continued.
MAY_CHANGE = {"device", "workers", "micro_batch", "save_every", "max_hours", "stage", "out",
              "root", "weights", "checkpointing"}


def main():
    args = parse()
    settings, trained = resolve(args)
    device = setup(args.device)
    torch.backends.cudnn.benchmark = True        # shapes repeat, so trying kernels once pays
    names = chosen_stages(args, settings, trained)
    for name in names:               # before training, so that a later stage's mistake shows now
        micro_batch_size(args.micro_batch, None, settings, name, device)
    # Open the data.
    where = settings["data"], settings["root"]
    train_set = open_dataset(*where, "train", settings["size"], limit=args.overfit)
    val_set = train_set if args.overfit else open_dataset(*where, "val", settings["size"])
    settings["images"] = {"train": len(train_set), "val": len(val_set)}
    settings["data_set"] = {"train": train_set.identity(), "val": val_set.identity()}
    workers = args.workers if args.workers is not None else (1 if args.data == "signs" else 4)
    print0(f"{train_set.describe()}\n{val_set.describe()}\n{', '.join(names)} at "
           f"{settings['size']} px on {world_size()} x {device.type}; writing to {args.out}")
    # Train one stage after another, then write the report.
    run = Run(settings, args.out, device, workers, train_set, val_set)
    with open_run(args.out, settings, may_change=MAY_CHANGE):
        with distributed.stop_signals(args.max_hours):
            for name in names:
                train_stage(run, name, args)
        distributed.close()          # so that no process waits while rank 0 evaluates
        if (args.out / "decoder" / "last.pt").exists() and not args.overfit and rank() == 0:
            report_unless_there(run)
    return 0


def report_unless_there(run):
    """Write the run's report, unless there is one that is newer than every checkpoint."""
    report = run.out / "report.json"
    trained = max(file.stat().st_mtime for file in run.out.glob("*/last.pt"))
    if report.exists() and report.stat().st_mtime >= trained:
        print0(f"the report is there already: {run.out / 'report.md'}")
    else:
        evaluate([run.out], device=run.device, root=run.settings["root"],
                 weights=run.settings["weights"], fid=False)


def train_stage(run, name, args):
    """Train one stage to its end, from its last checkpoint or else from its start.

    Raises Leaving, when all is saved, if a signal or --max-hours asks to stop.
    """
    folder, settings = run.out / name, run.settings
    recipe = Recipe(**settings["recipes"][name])
    steps = run_length(recipe, len(run.train_set))
    disc_start = first_gan_step(recipe, steps)

    # Build the networks, which always start from the same weights.
    state = run_folder.latest(folder)
    found = distributed.gather_objects(state["step"] if state else None)
    if len(set(found)) > 1:
        raise UserError(f"{folder}: the processes find different checkpoints there (steps {found});"
                        " --out must be on a file system that all machines share")
    torch.manual_seed(stage_seed(settings["seed"], name))
    stage = STAGES[name](run, recipe, state)

    # Load the last checkpoint, if there is one.
    done, extra, fresh = 0, {}, state is None
    if not fresh:
        if state["parent"] != stage.parent:
            where = stage.config.get("vqgan") or settings["vqgan"] or run.out
            raise UserError(f"{folder} was trained on another first stage than {where} holds now; "
                            f"restore the old one, or train a {name} on the new one: "
                            f"--stage {name} --vqgan {where} --out NEW_RUN")
        stage.load_state_dict(state)
        for key, optimizer in stage.optimizers.items():
            run_folder.load_optimizer(optimizer, state["optimizers"][key])
        done, extra, state = state["step"], state["extra"], None         # which frees its memory
    if done == steps and not extra.get("owed"):
        print0(f"{name}: finished before, {done} steps; {folder / 'last.pt'}")
        return

    # Prepare the training images, the held-out images and the log.
    micro_batch = micro_batch_size(args.micro_batch, extra.get("micro_batch"), settings, name,
                                   run.device)
    items = stage.items(steps)
    announce(run, stage, steps, disc_start, done, micro_batch)
    val_batches = stage.held_out(VALIDATION_BATCH) if rank() == 0 else None
    log = Log(folder / "log.jsonl", -1 if fresh else done)
    rhythm = TINY_RHYTHM if settings["decoder"]["preset"] == "tiny" else RHYTHM
    validate_every, pause = (args.save_every, 0) if args.save_every else rhythm
    saved, drawn = -math.inf, 0                  # time of the last checkpoint, step of the curves

    def keep(record, due=True, leave=False):
        """Log the step; if `due`, validate and draw sample images; save a checkpoint if it is time.

        When asked to stop, leave what is due for the next start: launchers wait for seconds only.
        The checkpoint then has the unlogged record as `owed`. Returns whether it has.
        """
        nonlocal saved, drawn
        step, measured, owed = record["step"], record.copy(), None
        try:
            if due:
                measured |= stage.validate(val_batches)
                stop_unless_finite(name, step, measured)
                columns = stage.pictures(val_batches, SAMPLE_IMAGES)
                image_grid(columns, folder / "samples" / f"step_{step:07d}.png")
        except distributed.Leaving:
            owed = record
        # Write the log before the checkpoint: resuming can cut a log back but not fill it up.
        if owed is None:
            log.write(measured, durable=True)
        if owed or leave or step == steps or time.monotonic() >= saved + pause:
            parts = stage.state_dict()
            parts["extra"] |= {"finished": step == steps and owed is None, "owed": owed,
                               "micro_batch": micro_batch}
            run_folder.save(folder / "last.pt", {
                "format": run_folder.FORMAT, "stage": name, "config": settings | stage.config,
                "optimizers": {key: o.state_dict() for key, o in stage.optimizers.items()},
                "images": record["images"], "step": step, "parent": stage.parent, **parts})
            saved = time.monotonic()
        if due and owed is None and (step == steps or step >= 1.1 * drawn):
            curves(folder / "log.jsonl", folder / "curves.png")
            drawn = step
        return owed is not None

    # Try now what may fail only later: saving, and the memory of a step with the discriminator.
    if fresh or extra.get("owed"):
        on_rank0(partial(keep, extra.get("owed") or {"step": 0, "images": 0}))
    if run.device.type == "cuda" and "discriminator" in stage.optimizers:
        trial = next(training_batches(items, 0, 1, recipe.batch_size, rank(), world_size()))
        gradients(stage, trial, True, micro_batch)
        for optimizer in stage.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
    if settings["compile"]:          # all but conv_out: lambda is taken at its weight
        stage.model.compile()

    # Train.
    batches = training_batches(items, done, steps, recipe.batch_size, rank(), world_size(),
                               run.workers if stage.reads_files else 0, run.device.type == "cuda")
    with closing(batches), closing(log), \
            closing(Progress(name, done, steps, recipe.batch_size)) as progress:
        batch, error = upcoming(batches)
        leave = any(distributed.gather_objects(bool(distributed.asked() or error)))
        while done < steps and not leave:
            # Compute the gradients of generator and discriminator, then move their weights.
            lr = set_learning_rates(stage.optimizers, recipe, done, steps, disc_start)
            gan_on = done >= disc_start
            terms = gradients(stage, batch, gan_on, micro_batch)
            batch, error = upcoming(batches)             # while a GPU is busy with this one
            terms, leave = agree(terms, distributed.asked() or error)
            stop_unless_finite(name, done + 1, terms)
            stage.update(gan_on)
            # Show and log the step. Validate and save now and then, and at the end.
            done += 1
            progress.show(done, terms)
            record = {"step": done, "images": done * recipe.batch_size, "lr": lr, **terms}
            due = done == steps or done % validate_every == 0
            if due or leave:
                leave = on_rank0(partial(keep, record, due, leave)) or leave
            else:
                log.write(record)

    # Say how the stage ended.
    if isinstance(error, UserError):
        raise UserError(f"{error}. {name} is saved at step {done}")
    if leave:
        raise distributed.Leaving(f"{name}: saved at step {done}")
    print0(f"{name}: {done} steps done; {folder} has last.pt, curves.png and samples/")


def upcoming(batches):
    """Give the next batch, or None at the end, and the UserError or Leaving that stops it, or None.

    A process that cannot go on must not end before the others have heard of it and saved.
    """
    try:
        return next(batches, None), None
    except (UserError, distributed.Leaving) as error:
        return None, error


def agree(terms, leave):
    """Average {name: tensor ()} over all processes; tell if `leave` is true on any. One wait."""
    values = torch.stack([*terms.values()])
    votes = torch.cat([values, values.new_full((1,), bool(leave))])
    *means, leaving = distributed.mean_over_ranks(votes).tolist()
    return dict(zip(terms, means)), leaving > 0


def gradients(stage, batch, gan_on, micro_batch):
    """Compute one step's gradients, `micro_batch` images at a time.

    Each micro-batch has its own lambda and BatchNorm statistics.  deviation D24
    Returns {term of the losses, or "grad_norm": mean over its own images}. Raises UserError where
    the images do not fit into memory.
    """
    local, terms = len(batch["position"]), []
    # Accumulate gradients. DDP averages them over processes in the last micro-batch only.
    try:
        for start in range(0, local, micro_batch):
            part = {key: value[start:start + micro_batch] for key, value in batch.items()}
            with ExitStack() as contexts:
                if world_size() > 1 and start + micro_batch < local:
                    for network in stage.parallel:
                        contexts.enter_context(network.no_sync())
                terms.append(stage.step(stage.batch(part), gan_on, micro_batch / local))
    except torch.OutOfMemoryError as error:
        smaller = [d for d in range(1, micro_batch // 2 + 1) if local % d == 0]
        mend = f"--micro-batch {smaller[-1]}" if smaller else "a smaller --size"
        raise UserError(f"{stage.name}: {str(error).split('. ')[0]}; give {mend}, or "
                        "--checkpointing") from None
    # Average the terms over micro-batches. One NaN makes a mean NaN.
    parameters = [p for o in stage.optimizers.values() for g in o.param_groups for p in g["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    means = {name: torch.stack([term[name].float() for term in terms]).mean()
             for name in sorted(terms[0])}
    return means | {"grad_norm": norm.float()}


def stop_unless_finite(name, step, terms):
    """Raise UserError for a term that is not finite. Terms are means over ranks, so all raise."""
    broken = [term for term, value in terms.items() if not math.isfinite(value)]
    if broken:
        raise UserError(f"{name} step {step}: {', '.join(broken)} not finite; the last checkpoint "
                        "is good. Start a new --out with a lower --lr, or with --precision fp32")


def micro_batch_size(asked, kept, settings, name, device):
    """Choose how many images a process takes at once; kept: the checkpoint's number or None."""
    local, rest = divmod(settings["recipes"][name]["batch_size"], world_size())
    if rest:
        raise UserError(f"{name}: --batch-size {local * world_size() + rest} does not divide over "
                        f"{world_size()} processes; give a multiple of {world_size()}")
    if asked and local % asked:
        near = max(d for d in range(1, asked + 1) if local % d == 0)
        raise UserError(f"{name}: --micro-batch {asked} does not divide the {local} images of a "
                        f"process; {near} does")
    if asked or (kept and local % kept == 0):
        return asked or kept
    # Take what a laptop's memory holds on a CPU, and everything elsewhere.
    most = 8 * (128 / settings["size"])**2 if device.type == "cpu" and name != "prior" else local
    return max(d for d in range(1, local + 1) if local % d == 0 and d <= max(1, most))


def announce(run, stage, steps, disc_start, done, micro_batch):
    """Print what the stage will do, and a warning where its results will not count."""
    name, r, has_gan = stage.name, stage.recipe, "discriminator" in stage.optimizers
    count = sum(p.numel() for g in stage.optimizers["generator"].param_groups for p in g["params"])
    begun = f", from step {done}" if done else ""
    gan = f", discriminator from step {disc_start}" if has_gan else ""
    if has_gan and disc_start >= steps:
        gan += ", beyond the end, so no GAN loss in this run"
    print0(f"\n{name}: {count:,} trained parameters; {steps} steps of {r.batch_size} images{begun},"
           f" {micro_batch} at a time in each process; lr {r.lr:.3g}, warm-up "
           f"{min(r.warmup, steps // 10)} steps{gan}")
    full = RECIPES[name][run.settings["recipe_names"][name]]
    full_steps = run_length(full, len(run.train_set))
    if steps * r.batch_size < full_steps * full.batch_size:
        print0(f"{name}: a short run; the recipe's is {full_steps} steps of {full.batch_size} "
               "images")


def number(kind, low=None, below=math.inf):
    """Make an argparse type: a number that is at least `low`, or above 0, and less than `below`."""
    def parse_number(text):
        value = kind(text)
        if not (value < below and (value > 0 if low is None else value >= low)):
            least = "above 0" if low is None else f"at least {low}"
            limit = f" and less than {below}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text}: must be {least}{limit}")
        return value
    parse_number.__name__ = kind.__name__                # what argparse says is invalid
    return parse_number


def parse(argv=None):
    """Read the command line into an argparse.Namespace."""
    rows = ["recipes (recipes.py has all of their numbers, with the sources):"]
    for stage, recipes in RECIPES.items():
        for name, r in recipes.items():
            length = f"{r.steps} steps" if r.steps else f"{r.epochs} epochs"
            gan = f", {r.gan}, lambda {r.lambda_rule}, disc-start {r.disc_start:g}"
            rows.append(f"  {stage + ' ' + name:15} batch-size {r.batch_size}, lr {r.lr:.3g}, "
                        f"{length}{gan if stage != 'prior' else ''}")
    parser = argparse.ArgumentParser(
        prog="train.py", usage="train.py [flags]", allow_abbrev=False, add_help=False,
        epilog="\n".join(rows),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=24, width=100),
        description="Train a first stage (vqgan), its rebuilt codebook (refit), the asymmetric "
                    "decoder and the diffusion\nprior; by default all four, on drawn signs. The "
                    "same command continues a run. (...): defaults")

    def choice(group, flag, names, text, default=None, **more):
        names = list(names)
        group.add_argument(flag, choices=names, default=default, metavar="NAME",
                           help=f"{'|'.join(names)}{text}", **more)

    what = parser.add_argument_group("what to train")
    add, count, two = what.add_argument, number(int), number(int, 2)
    choice(what, "--data", DATASETS, ": drawn scenes, ImageNet, your own photos (signs)", "signs")
    add("--root", metavar="DIR", help="folder of the photos (imagenet: $IMAGENET or data/imagenet)")
    add("--size", type=count, metavar="PX", help="side of the square images (signs: 64, else 256)")
    choice(what, "--stage", ["all", *STAGE_IDS], "; a KL latent has no refit or prior (all)", "all")
    choice(what, "--first-stage", VQGAN_PRESETS, " (signs: tiny, else vq-f16)")
    choice(what, "--preset", ASYM_PRESETS, ": size of the decoder (on tiny: tiny, else base)")
    choice(what, "--blend", ["add", "concat"], ": as in AVQ Eq. 4, or in Tables 7-8 (add)", "add")
    add("--vqgan", metavar="PATH", help="trained first stage: run, last.pt, public weights (none)")
    add("--codes", type=two, metavar="K", help="codes after the refit (tiny: 128, else unchanged)")
    add("--refit-samples", type=count, metavar="P",
        help="features to cluster into them (tiny: 5000, else the larger of 20000 and 16 K)")
    choice(what, "--unet", UNET_PRESETS, ": size of the prior (on tiny: tiny, else paper117)")
    add("--timesteps", type=two, metavar="T", help="steps of diffusion (tiny: 100, else 4000)")
    add("--ema", type=number(float, 0, 1), help="prior's average (tiny: 0.995, else 0.9999)")
    add("--overfit", type=count, metavar="N",
        help=f"train on the first N images and validate on the same, {OVERFIT_STEPS} steps (off)")
    how = parser.add_argument_group("how to train (defaults are the recipes' below)")
    add = how.add_argument
    add("--steps", type=count, metavar="N", help="optimiser steps of each stage")
    add("--epochs", type=number(float), metavar="N", help="the same in passes over the data")
    add("--batch-size", type=count, metavar="N", help="images per step, over all processes")
    add("--lr", type=number(float), help="peak learning rate (the recipe's scales with the batch)")
    choice(how, "--start", ["pinned", "plain"], ": of the decoder; plain is AVQ's (tiny: pinned)")
    choice(how, "--pixel", ["l1", "l2"], ": pixel loss; l2 is the squared error of AVQ Eq. 2")
    choice(how, "--gan", ["hinge", "log"], ": GAN loss; log is AVQ Eq. 7")
    choice(how, "--lambda", ["paper", "taming", "ldm"], ": GAN loss's weight; paper is AVQ Eq. 9",
           dest="lambda_rule")
    add("--disc-start", type=number(float, 0), metavar="STEP",
        help="first step of the discriminator; below 1: a fraction of all steps")
    choice(how, "--perceptual", ["vgg", "alex", "squeeze", "none"],
           ": LPIPS network (signs: none, else vgg)")
    add("--weights", metavar="DIR", help="folder of the LPIPS weights (torch hub's cache)")
    add("--seed", type=number(int, 0), default=0, metavar="N", help="seed of training (0)")
    run = parser.add_argument_group("how to run")
    add = run.add_argument
    add("--out", metavar="DIR", help="run folder (runs/DATA-PRESET[-concat][-overfitN])")
    add("--device", default="auto", metavar="NAME",
        help="auto, cpu, cuda or mps; auto takes CUDA, else MPS, else the CPU (auto)")
    choice(run, "--precision", ["fp32", "bf16"],
           ": of what trains; losses, D, frozen parts fp32, on CUDA TF32 (fp32)", "fp32")
    add("--micro-batch", type=count, metavar="N",
        help="images that a process takes at once (all of its own; on a CPU 8 of 128 px)")
    add("--compile", action="store_true", help="run the networks through torch.compile (off)")
    add("--checkpointing", action="store_true", help="less memory, more time in decoders (off)")
    add("--workers", type=number(int, 0), help="data workers per process (signs: 1, else 4)")
    add("--save-every", type=count, metavar="STEPS",
        help="steps from save to save, with validation (tiny: 200; else 1000 and 10 minutes)")
    add("--max-hours", type=number(float), metavar="H", help="save and stop after H hours (never)")
    add("-h", "--help", action="help", help="show this help and exit")
    return parser.parse_args(argv)


def resolve(args):
    """Resolve the flags: (settings, the run's config.json; the Loaded of --vqgan). Set args.out."""
    signs = args.data == "signs"
    if args.steps and args.epochs:
        raise UserError("--steps and --epochs both set the length; give one")
    # Choose the first stage and the decoder's size.
    trained = load_first_stage(args.vqgan) if args.vqgan else None
    plan_name = args.first_stage or ("tiny" if signs else "vq-f16")
    plan = VQGAN_PRESETS[plan_name]
    if trained is not None:
        plan = trained.model.config              # a refit may have changed K
        same = [name for name, p in VQGAN_PRESETS.items() if plan == replace(p, K=plan.K)]
        plan_name = same[0] if same else "own"
        if args.first_stage not in (None, plan_name):
            raise UserError(f"--first-stage {args.first_stage}: {args.vqgan} is {plan_name}; leave "
                            "out the flag, because the file tells its size")
        if args.stage == "vqgan":
            raise UserError("--stage vqgan trains a first stage and --vqgan gives one; choose")
    preset = args.preset or ("tiny" if plan_name == "tiny" else "base")
    factor, num_res_blocks = ASYM_PRESETS[preset]
    try:
        with torch.device("meta"):
            AsymDecoder.from_preset(plan, preset, args.blend)
    except ValueError as error:
        raise UserError(f"--preset {preset} does not fit --first-stage {plan_name}: "
                        f"{error}") from None
    # Choose the sizes of ReFiT and prior, where the latent has codes.
    tiny, refit, prior = plan_name == "tiny", None, None
    recipe_names = {
        "vqgan": "tiny" if tiny else plan.latent,
        "decoder": preset if preset in RECIPES["decoder"] else "tiny" if tiny else "base"}
    if plan.latent == "vq":
        K = args.codes or (min(plan.K, 128) if tiny else plan.K)    # half as many as in DDM Tab. 1
        refit = {"K": K, "samples": args.refit_samples or (5000 if tiny else max(20_000, 16 * K))}
        if refit["samples"] < K:
            raise UserError(f"--refit-samples {refit['samples']} cannot make {K} codes; give more")
        unet = args.unet or ("tiny" if tiny else "paper117")
        small = unet == "tiny"
        prior = {"unet": unet, "net": asdict(UNET_PRESETS[unet]),
                 "T": args.timesteps or (100 if small else 4000),
                 "residual": "none" if small else "onehot",
                 "ema": args.ema if args.ema is not None else (0.995 if small else 0.9999)}
        recipe_names |= {"refit": recipe_names["vqgan"], "prior": unet}
    # Put the user's numbers into the recipes, and scale the learning rate with the batch size.
    recipes = {}
    for stage, name in recipe_names.items():
        r = RECIPES[stage][name]
        batch_size = args.batch_size or r.batch_size
        given = {key: getattr(args, key)
                 for key in ("start", "pixel", "gan", "lambda_rule", "disc_start")
                 if getattr(args, key) is not None}
        if args.steps or args.epochs:
            given |= {"steps": args.steps or 0, "epochs": args.epochs or 0}
        elif args.overfit:
            given |= {"steps": OVERFIT_STEPS, "epochs": 0}
        recipes[stage] = replace(r, batch_size=batch_size,
                                 lr=args.lr or r.lr * batch_size / r.batch_size, **given)
    size = args.size or (64 if signs else 256)
    least = 3 * 2**max(recipes[stage].disc_layers for stage in ("vqgan", "decoder"))
    if size < least:
        raise UserError(f"--size {size} is too small for the discriminator; give at least {least}")

    def absolute(path):
        return str(Path(path).expanduser().resolve()) if path else None

    plain = ("data", "overfit", "seed", "precision", "compile", "checkpointing")
    settings = {key: getattr(args, key) for key in plain} | {
        "root": absolute(args.root or default_root(args.data)), "weights": absolute(args.weights),
        "vqgan": absolute(args.vqgan), "size": size,
        "perceptual": args.perceptual or ("none" if signs else "vgg"),
        "first_stage": asdict(plan), "first_stage_name": plan_name,
        "decoder": {"preset": preset, "blend": args.blend, "ch": round(factor * plan.ch),
                    "num_res_blocks": num_res_blocks},
        "refit": refit, "prior": prior, "recipe_names": recipe_names,
        "recipes": {stage: asdict(recipe) for stage, recipe in recipes.items()}}
    concat = "-concat" if args.blend == "concat" else ""
    overfit = f"-overfit{args.overfit}" if args.overfit else ""
    args.out = Path(args.out or f"runs/{args.data}-{preset}{concat}{overfit}")
    return settings, trained


def chosen_stages(args, settings, trained):
    """List the stages to train, in order. Raises UserError for a --size that does not fit them.

    trained: the Loaded of --vqgan, or None.
    """
    names = list(STAGE_IDS) if args.stage == "all" else [args.stage]
    if settings["refit"] is None and ("refit" in names or "prior" in names):
        why = f"{settings['first_stage_name']} has a KL latent, and refit and prior need codes"
        if args.stage != "all":
            raise UserError(f"--stage {args.stage}: {why}; choose another --first-stage, --vqgan "
                            "or --stage")
        print0(f"{why}: these two stages are left out")
        names = ["vqgan", "decoder"]
    if args.stage == "all" and trained is not None:
        done = ("vqgan", "refit") if trained.stage == "refit" and trained.finished else ("vqgan",)
        names = [name for name in names if name not in done]
    size, unit, why = settings["size"], VQGANConfig(**settings["first_stage"]).f, "the first stage"
    if "prior" in names:
        unit *= UNET_PRESETS[settings["prior"]["unet"]].factor
        why += f" and the prior's --unet {settings['prior']['unet']}"
    if size % unit:
        raise UserError(f"--size {size} is not a multiple of {unit} (needed by {why}); the next "
                        f"one is {size // unit * unit + unit}")
    return names


if __name__ == "__main__":
    exit_on_user_error(main)
