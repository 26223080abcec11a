"""Train the first stage and the asymmetric decoder: the table of stages, the one visible loop.

    python train.py                                        embedded data, both stages, the report
    python train.py --data imagenet --root /data/imagenet  the paper's job
    torchrun --nproc_per_node=8 train.py ...               the same on eight GPUs

What a step does is in stages.py; flags and what they resolve to, in options.py. The state of a
stage is its weights, its optimisers and the number of steps done: everything random is a function
of the seed, the stage and an image's position in the run, so a run that was killed goes on to the
same weights as one that was not.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import checkpoint
from budget import DAY, duration, fitting_micro_batch, free_memory, local_batch, trial
from convert import load_first_stage
from data import (
    BadFiles,
    TrainingItems,
    check_files,
    open_dataset,
    training_batches,
    validation_batches,
)
from distributed import (
    UserError,
    any_rank,
    close,
    exit_on_user_error,
    gather_objects,
    no_sync,
    on_rank0,
    print0,
    rank,
    setup,
    world_size,
)
from eval import Options, evaluate_runs
from figures import curves, image_grid
from losses import LPIPS
from options import HOW, parse, resolve, smaller_command
from run_folder import Log, Progress, open_run, stop_signals
from stages import (
    RECIPES,
    STAGE_IDS,
    Recipe,
    build_decoder,
    build_vqgan,
    decoder_columns,
    decoder_step,
    first_gan_step,
    global_terms,
    gradient_norm,
    load_stage_weights,
    optimizer_step,
    run_length,
    set_learning_rates,
    stage_weights,
    training_batch,
    validate_decoder,
    validate_vqgan,
    validation_batch,
    vqgan_columns,
    vqgan_step,
)
from vqgan import VQGANConfig

VALIDATION_IMAGES, SAMPLE_IMAGES = 64, 6


@dataclass
class Run:
    """What all stages of one call of this program share."""

    settings:      dict             # what the flags resolved to, the run's config.json
    out:           Path
    device:        torch.device
    channels_last: bool
    workers:       int
    micro_batch:   int | None       # as asked for
    save_every:    int              # steps
    deadline:      float            # on time.monotonic's clock
    signals:       list             # that asked this process to leave


def begin_vqgan(run, options):
    return build_vqgan(VQGANConfig(**run.settings["first_stage"]), **options)


def begin_decoder(run, options):
    where = run.settings["vqgan"] or run.out
    first_stage = load_first_stage(where)
    if not first_stage.finished:
        print0(f"decoder: warning: the first stage in {where} is not finished (step "
               f"{first_stage.step}), and a decoder is bound to these very weights: finish it "
               "first, with the command that began it")
    size = run.settings["decoder"]
    trainee = build_decoder(first_stage.model, size["preset"], size["blend"], **options)
    trainee.parent = first_stage.parent
    return trainee


@dataclass(frozen=True)
class Stage:
    """A row of the table of stages."""

    begin:    Callable     # (run, options of stages.build_*) -> Trainee
    step:     Callable     # gradients of one micro-batch
    validate: Callable     # {"val_...": value}
    columns:  Callable     # {caption: pictures}
    masks:    bool         # whether an item comes with a mask


STAGES = {
    "vqgan": Stage(begin_vqgan, vqgan_step, validate_vqgan, vqgan_columns, masks=False),
    "decoder": Stage(begin_decoder, decoder_step, validate_decoder, decoder_columns, masks=True),
}


def main():
    args = parse()
    settings, first_stage = resolve(args)
    device = setup(args.device)
    names = list(STAGES) if args.stage == "all" else [args.stage]
    if first_stage is not None:
        names = ["decoder"]
    for name in names:               # a mistake in a later stage shows now
        local_batch(settings["recipes"][name]["batch_size"], world_size(), args.micro_batch)
    train_set, val_set = open_datasets(settings)
    workers = args.workers if args.workers is not None else (1 if args.data == "signs" else 4)
    if args.check_data:
        return report_bad_files([train_set, val_set], workers)
    settings["images"] = {"train": len(train_set), "val": len(val_set)}
    print0(f"{train_set.describe()}\n{val_set.describe()}\n{' and '.join(names)} at "
           f"{settings['size']} px on {world_size()} x {device.type}; writing to {args.out}")
    if names == list(STAGES) and args.data != "signs":
        print0("no --vqgan was given: the first stage is trained first, then the decoder on it")
    with open_run(args.out, settings, args.restart, may_change=HOW):
        with stop_signals() as signals:
            run = start(args, settings, device, workers, signals)
            for name in names:
                train_stage(name, run, train_set, val_set)
        close()                      # the others need not wait while rank 0 evaluates
        if "decoder" in names and not args.overfit and rank() == 0:
            report_unless_there(run)
    return 0


def open_datasets(settings):
    """(train, val); with --overfit N both are the first N images."""
    where, size, limit = (settings["data"], settings["root"]), settings["size"], settings["overfit"]
    train_set = open_dataset(*where, "train", size, limit=limit)
    return train_set, train_set if limit else open_dataset(*where, "val", size)


def start(args, settings, device, workers, signals):
    """The Run of this call, with its defaults for how it is run."""
    channels_last = device.type != "mps" if args.channels_last is None else args.channels_last
    save_every = args.save_every or (200 if settings["decoder"]["preset"] == "tiny" else 1000)
    deadline = time.monotonic() + 3600 * args.max_hours if args.max_hours else math.inf
    return Run(settings, args.out, device, channels_last, workers, args.micro_batch, save_every,
               deadline, signals)


def report_bad_files(datasets, workers):
    """--check-data: decode everything once; exit status 1 where a file is bad."""
    if rank():
        return 0
    bad = [path for dataset in datasets for path in check_files(dataset, workers)]
    print("\n".join([*bad, f"{len(bad)} files cannot be decoded"] if bad
                    else ["every file can be decoded"]))
    return 1 if bad else 0


def report_unless_there(run):
    """The table over this run, unless the one that is there is younger than the weights."""
    report, weights = run.out / "report.json", run.out / "decoder" / "last.pt"
    if report.exists() and report.stat().st_mtime >= weights.stat().st_mtime:
        print0(f"the report is there already: {run.out / 'report.md'}")
    else:
        options = Options(run.device, weights=run.settings["weights"], fid=False)
        evaluate_runs([run.out], options, root=run.settings["root"])


def build(name, run):
    """The networks and optimisers of a stage at its start: a Trainee."""
    settings, net = run.settings, run.settings["perceptual"]
    perceptual = None if net == "none" else LPIPS(net, settings["weights"]).to(run.device)
    options = {"recipe": Recipe(**settings["recipes"][name]), "device": run.device,
               "perceptual": perceptual, "precision": settings["precision"],
               "channels_last": run.channels_last}
    key = np.random.SeedSequence((settings["seed"], STAGE_IDS[name]))
    torch.manual_seed(int(key.generate_state(1)[0]))
    trainee = STAGES[name].begin(run, options)
    trainee.model.decoder.checkpointing = settings["checkpointing"]
    return trainee


def train_stage(name, run, train_set, val_set):
    """Train one stage from its last checkpoint, or from the start, to its end."""
    folder, recipe = run.out / name, Recipe(**run.settings["recipes"][name])
    steps = run_length(recipe, len(train_set))
    disc_start = first_gan_step(recipe, steps)
    trainee, done, extra = start_or_resume(name, run, folder)
    if done == steps:
        print0(f"{name}: finished before, {done} steps; {folder / 'last.pt'}")
        return
    items = TrainingItems(train_set, run.settings["seed"], STAGE_IDS[name], STAGES[name].masks,
                          recipe.p_full, recipe.mask_kind)
    announce(run, trainee, items, steps, disc_start, done, extra)
    val = held_out(run, val_set, extra["micro_batch"]) if rank() == 0 else None
    log = Log(folder / "log.jsonl", done)
    if done < 0:                     # a stage begins with a checkpoint, so that trouble shows early
        done = 0
        keep(run, trainee, val, log, {"step": 0, "images": 0}, extra)
    if run.settings["compile"]:      # after the trial: its one image is no shape to compile for
        trainee.model.compile()
    batches = training_batches(items, done, steps, recipe.batch_size, rank(), world_size(),
                               run.workers, pin=run.device.type == "cuda")
    bad_files, leave = BadFiles(len(train_set)), False
    bad_files.update(extra.get("bad_files", []))

    with closing(log), closing(Progress(name, done, steps, recipe.batch_size)) as progress:
        for step, batch in enumerate(batches, start=done):
            lr = set_learning_rates(trainee, step, steps, disc_start)
            gan_on = step >= disc_start
            terms = accumulate_gradients(run, trainee, batch, gan_on, extra["micro_batch"])
            stop_unless_finite(name, step + 1, terms)
            optimizer_step(trainee, gan_on)

            done = step + 1
            progress.show(done, terms)
            record = {"step": done, "images": done * recipe.batch_size, "lr": lr, **terms}
            leave, unreadable = any_rank(bool(run.signals) or time.monotonic() > run.deadline,
                                         bool(batch["bad"]))
            if unreadable:
                extra["bad_files"] = skip_bad_files(bad_files, batch["bad"])
            if leave or done % run.save_every == 0 or done == steps:
                extra["finished"] = done == steps
                keep(run, trainee, val, log, record, extra)
            else:
                log.write(record)
            if leave:
                break
    if leave:
        say_goodbye(name, done, run.signals)
    if run.settings["overfit"]:
        print0(f"{name}: {verdict(run.settings['overfit'], extra)}")
    print0(f"{name}: {done} steps done; {folder / 'last.pt'}, {folder / 'curves.png'}, "
           f"{folder / 'samples'}")


def accumulate_gradients(run, trainee, batch, gan_on, size):
    """One step's gradients, `size` images at a time. -> the losses' terms over the global batch.

    Each micro-batch has its own lambda and BatchNorm statistics.  deviation D24
    """
    parts = [{key: value[i:i + size] for key, value in batch.items() if key != "bad"}
             for i in range(0, len(batch["position"]), size)]
    terms = []
    for part in parts:
        last = part is parts[-1]
        part = training_batch(part, run.settings["seed"], trainee.stage, run.device,
                              run.channels_last)
        networks = trainee.parallel_model, trainee.parallel_discriminator
        with no_sync(networks[0], last), no_sync(networks[1], last):
            step = STAGES[trainee.stage].step
            terms.append(step(trainee, part, gan_on, scale=1 / len(parts)))
    norm = gradient_norm(trainee, gan_on)
    return global_terms([part | {"grad_norm": norm} for part in terms])


def stop_unless_finite(name, step, terms):
    """Raise UserError, on every rank, where any rank's number is not finite: nothing is saved."""
    broken = [term for term, value in terms.items() if not math.isfinite(value)]
    if broken:
        raise UserError(f"{name} step {step}: {', '.join(broken)} not finite; the last checkpoint "
                        "is good, the weights that led here are not saved. Begin anew with a lower "
                        "--lr (--restart), or with --precision fp32")


def held_out(run, val_set, size):
    """The first validation images with their evaluation masks, as batches on the device."""
    size = max(size, min(SAMPLE_IMAGES, len(val_set)))
    return [validation_batch(batch, run.device, run.channels_last)
            for batch in validation_batches(val_set, VALIDATION_IMAGES, size)]


def keep(run, trainee, val, log, record, extra):
    """Validate, log the step, save pictures and the state; the other ranks wait for rank 0."""
    def work():
        folder, step, stage = run.out / trainee.stage, record["step"], STAGES[trainee.stage]
        record.update(stage.validate(trainee, val))
        stop_unless_finite(trainee.stage, step, record)
        few = replace(val[0], x=val[0].x[:SAMPLE_IMAGES], mask=val[0].mask[:SAMPLE_IMAGES])
        image_grid(stage.columns(trainee, few), folder / "samples" / f"step_{step:07d}.png")
        log.write(record)             # before the checkpoint: a log is cut back, never filled up
        log.sync()
        save(folder, run.settings, trainee, record, extra)
        curves(folder / "log.jsonl", folder / "curves.png")
    on_rank0(work)


def save(folder, settings, trainee, record, extra):
    """last.pt; and best.pt where the held-out L1 (the decoder's: with mask plus without) is lowest.

    extra: what a resumed stage must know besides; the scores are noted in it.
    """
    score = sum(value for key, value in record.items() if key.startswith("val_pixel"))
    extra["score"] = score
    extra.setdefault("first_score", score)
    better = score < extra.get("best", math.inf)
    extra["best"] = score if better else extra["best"]
    optimizers = {key: optimizer.state_dict() for key, optimizer in trainee.optimizers.items()}
    state = {"format": checkpoint.FORMAT, "stage": trainee.stage, "config": settings,
             "model": stage_weights(trainee), "ema": None, "optimizers": optimizers,
             "images": record["images"], "step": record["step"], "parent": trainee.parent,
             "extra": {**extra, "discriminator": trainee.discriminator.state_dict()}}
    if better:              # first: a kill in between repeats the steps after last.pt, and this one
        checkpoint.save(folder / "best.pt", state, keep_previous=False)
    checkpoint.save(folder / "last.pt", state)


def start_or_resume(name, run, folder):
    """(Trainee, steps done, extra); -1 steps where nothing was ever saved.

    Every process reads the checkpoint for itself. Raises UserError where they do not find the same
    one, and where what the stage stands on has changed.
    """
    state = checkpoint.latest(folder)
    found = gather_objects(state["step"] if state else -1)
    if len(set(found)) > 1:
        raise UserError(f"{folder}: the processes find different checkpoints there (steps {found});"
                        " --out must be on a file system that all machines share")
    trainee = build(name, run)
    if state is None:
        return trainee, -1, {"finished": False}
    if state["parent"] != trainee.parent:
        where = run.settings["vqgan"] or run.out
        raise UserError(f"{folder} was trained on another first stage than {where} holds now; "
                        "bring the old one back, or train a decoder on the new one: "
                        f"--stage decoder --vqgan {where} --out NEW_RUN")
    load_stage_weights(trainee, state["model"])
    for key, optimizer in trainee.optimizers.items():
        kept = state["optimizers"][key]
        for group in kept["param_groups"]:            # another device may be in use now
            group["fused"] = optimizer.param_groups[0]["fused"]
        optimizer.load_state_dict(kept)
    extra = state["extra"]
    trainee.discriminator.load_state_dict(extra.pop("discriminator"))
    return trainee, state["step"], extra


def announce(run, trainee, items, steps, disc_start, done, extra):
    """Say what the stage will do, how long that takes here, and with how many images at once.

    The latter is noted in `extra`; a resumed stage keeps it where its processes allow that.
    """
    name, r, done = trainee.stage, trainee.recipe, max(0, done)
    one = {key: value if key == "bad" else value[:1]
           for key, value in next(training_batches(items, 0, 1, 1)).items()}
    batch = training_batch(one, run.settings["seed"], name, run.device, run.channels_last)
    image_bytes, seconds = trial(trainee, STAGES[name].step, batch)
    local, kept = local_batch(r.batch_size, world_size()), extra.get("micro_batch")
    if run.micro_batch:
        size = run.micro_batch
    elif kept and local % kept == 0:
        size = kept
    else:
        size = on_rank0(lambda: fitting_micro_batch(local, image_bytes, free_memory(trainee)))
    extra["micro_batch"] = size
    groups = trainee.optimizers["generator"].param_groups
    count = sum(p.numel() for group in groups for p in group["params"])
    print0(f"\n{name}: {count:,} parameters train, {steps} steps of {r.batch_size} images"
           + (f", from step {done}" if done else "") + f"; lr {r.lr:.3g}, warm-up "
           f"{min(r.warmup, steps // 10)} steps, discriminator from step {disc_start}; {size} "
           f"images at a time in each process ({image_bytes / 2**20:.0f} MiB an image)")
    warn(run, name, steps, disc_start, len(items.dataset))
    say_how_long(run, name, seconds * local, steps - done)


def warn(run, name, steps, disc_start, images):
    """What a reader of the results must know about this stage."""
    recipe = RECIPES[name][run.settings["recipe_names"][name]]
    ours = steps * run.settings["recipes"][name]["batch_size"]
    if ours < run_length(recipe, images) * recipe.batch_size:
        print0(f"{name}: a short run, not the reported one of {run_length(recipe, images)} steps "
               f"of {recipe.batch_size} images")
    if disc_start >= steps:
        print0(f"{name}: warning: --disc-start {disc_start} lies beyond the end ({steps} steps): "
               "no GAN loss in this run")
    if world_size() > 1 and run.device.type == "cpu":
        print0(f"{name}: the discriminator's BatchNorm statistics are per process (PyTorch "
               "synchronises them on CUDA only)")


def say_how_long(run, name, seconds, steps):
    """The estimate; where it is days, the command for something smaller on the same data."""
    total = math.ceil(seconds * steps)
    print0(f"{name}: at most about {duration(total)} on this device, by one image's step")
    if total > DAY:
        affordable = max(1, int(2 * 3600 / seconds))
        print0(f"{name}: that is long; it goes on, and can be stopped and continued. For a run of "
               f"hours:\n  {smaller_command(sys.argv[1:], run.settings, affordable)}")


def skip_bad_files(bad_files, paths):
    """Log files that could not be decoded, once over all ranks; all of them until now, sorted.

    Raises UserError where they are too many.
    """
    for path in bad_files.update(set().union(*gather_objects(paths))):
        print0(f"skipped, cannot be decoded: {path}", file=sys.stderr)
    bad_files.check()
    return sorted(bad_files.paths)


def verdict(images, extra):
    """What --overfit N has shown: whether the networks can learn a few images by heart."""
    first, last = extra["first_score"], extra["score"]
    healthy = "healthy" if last < 0.5 * first else "not healthy: below half of it was expected"
    return (f"held-out = train L1 on {images} images: {first:.4f} at the start, {last:.4f} at the "
            f"end; {healthy}")


def say_goodbye(name, done, signals):
    """Leave as the signal asks, 128 + its number; 0 after --max-hours."""
    print0(f"{name}: saved at step {done}; the same command continues from here")
    close()
    sys.exit(128 + signals[0] if signals else 0)


if __name__ == "__main__":
    exit_on_user_error(main)
