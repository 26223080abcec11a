"""Train the papers' four stages: the table of stages, the one visible loop.

    python train.py                                        embedded data, all stages, the report
    python train.py --data imagenet --root /data/imagenet  the papers' job
    torchrun --nproc_per_node=8 train.py ...               the same on eight GPUs

What a stage starts from is in begin.py, what a step does in stages.py, what is kept of it in
resume.py; flags and what they resolve to, in options.py. Everything random is a function of the
seed, the stage and an image's position in the run, so a run that was killed goes on to the same
weights as one that was not.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial

import torch

from begin import (
    SAMPLE_IMAGES,
    Run,
    begin_decoder,
    begin_prior,
    begin_refit,
    begin_vqgan,
    code_items,
    held_out_codes,
    held_out_pictures,
    picture_items,
)
from budget import DAY, fitting_micro_batch, free_memory, local_batch, trial
from data import open_dataset, training_batches
from distributed import (
    any_rank,
    close,
    exit_on_user_error,
    no_sync,
    on_rank0,
    print0,
    rank,
    setup,
    world_size,
)
from eval import evaluate_runs
from options import HOW, chosen_stages, parse, resolve, smaller_command
from pictures import curves, image_grid
from resume import save, start_or_resume, stop_unless_finite
from run_folder import Log, Progress, duration, open_run, stop_signals
from seeding import stage_seed
from stages import (
    RECIPES,
    Recipe,
    code_batch,
    decoder_step,
    first_gan_step,
    global_terms,
    gradient_norm,
    optimizer_step,
    prior_step,
    refit_step,
    run_length,
    set_learning_rates,
    training_batch,
    vqgan_step,
)
from validation import (
    decoder_columns,
    prior_columns,
    validate_decoder,
    validate_prior,
    validate_vqgan,
    vqgan_columns,
)


def image_batch(run, trainee, part):
    """A training loader's dict -> Batch."""
    return training_batch(part, run.settings["seed"], trainee.stage, run.device, run.channels_last)


def map_batch(run, trainee, part):
    """The same of codes -> CodeBatch."""
    return code_batch(part, run.settings["seed"], run.device)


@dataclass(frozen=True)
class Stage:
    """A row of the table of stages."""

    begin:    Callable     # (run, last state or None) -> Trainee
    step:     Callable     # gradients of one micro-batch
    validate: Callable     # {"val_...": value}
    columns:  Callable     # {caption: pictures}
    items:    Callable     # (run, trainee, steps) -> what the positions of the run mean
    batch:    Callable = image_batch           # (run, trainee, loader's dict) -> what step takes
    held_out: Callable = held_out_pictures     # (run, trainee, items, size) -> batches
    reads:    bool = True  # whether making an item is work enough for processes of its own


STAGES = {
    "vqgan": Stage(begin_vqgan, vqgan_step, validate_vqgan, vqgan_columns,
                   partial(picture_items, masks=False)),
    "refit": Stage(begin_refit, refit_step, validate_vqgan, vqgan_columns,
                   partial(picture_items, masks=False)),
    "decoder": Stage(begin_decoder, decoder_step, validate_decoder, decoder_columns,
                     partial(picture_items, masks=True)),
    "prior": Stage(begin_prior, prior_step, validate_prior, prior_columns, code_items,
                   map_batch, held_out_codes, reads=False),
}


def main():
    args = parse()
    settings, first_stage = resolve(args)
    device = setup(args.device)
    names, why_not_others = chosen_stages(args, settings, first_stage)
    for name in names:               # a mistake in a later stage shows now
        local_batch(settings["recipes"][name]["batch_size"], world_size(), args.micro_batch)
    train_set, val_set = open_datasets(settings)
    workers = args.workers if args.workers is not None else (1 if args.data == "signs" else 4)
    settings["images"] = {"train": len(train_set), "val": len(val_set)}
    print0(f"{train_set.describe()}\n{val_set.describe()}\n{', '.join(names)} at "
           f"{settings['size']} px on {world_size()} x {device.type}; writing to {args.out}")
    if why_not_others:
        print0(why_not_others)
    if names[0] == "vqgan" and len(names) > 1 and args.data != "signs":
        print0("no --vqgan was given: the first stage is trained first, then the others on it")
    with open_run(args.out, settings, args.restart, may_change=HOW):
        with stop_signals() as signals:
            run = start(args, settings, device, workers, signals, train_set, val_set)
            for name in names:
                train_stage(name, run)
        close()                      # the others need not wait while rank 0 evaluates
        if (args.out / "decoder" / "last.pt").exists() and not args.overfit and rank() == 0:
            report_unless_there(run)
    return 0


def open_datasets(settings):
    """(train, val); with --overfit N both are the first N images."""
    where, size, limit = (settings["data"], settings["root"]), settings["size"], settings["overfit"]
    train_set = open_dataset(*where, "train", size, limit=limit)
    return train_set, train_set if limit else open_dataset(*where, "val", size)


def start(args, settings, device, workers, signals, train_set, val_set):
    """The Run of this call, with its defaults for how it is run."""
    channels_last = device.type != "mps" if args.channels_last is None else args.channels_last
    save_every = args.save_every or (200 if settings["decoder"]["preset"] == "tiny" else 1000)
    deadline = time.monotonic() + 3600 * args.max_hours if args.max_hours else math.inf
    return Run(settings, args.out, device, channels_last, workers, args.micro_batch, save_every,
               deadline, signals, train_set, val_set)


def report_unless_there(run):
    """The table over this run, unless the one that is there is younger than all its weights."""
    report = run.out / "report.json"
    trained = max(path.stat().st_mtime for path in run.out.glob("*/last.pt"))
    if report.exists() and report.stat().st_mtime >= trained:
        print0(f"the report is there already: {run.out / 'report.md'}")
    else:
        evaluate_runs([run.out], device=run.device, root=run.settings["root"],
                      weights=run.settings["weights"], fid=False)


def build(name, run, state):
    """The networks and optimisers of a stage at its start, a Trainee, always the same ones."""
    torch.manual_seed(stage_seed(run.settings["seed"], name))
    return STAGES[name].begin(run, state)


def train_stage(name, run):
    """Train one stage from its last checkpoint, or from the start, to its end."""
    folder, stage, recipe = run.out / name, STAGES[name], Recipe(**run.settings["recipes"][name])
    steps = run_length(recipe, len(run.train_set))
    disc_start = first_gan_step(recipe, steps)
    trainee, done, extra = start_or_resume(run, name, build)
    if done == steps:
        print0(f"{name}: finished before, {done} steps; {folder / 'last.pt'}")
        return
    items = stage.items(run, trainee, steps)
    announce(run, trainee, items, steps, disc_start, done, extra)
    val = held_out(run, trainee, items, extra) if rank() == 0 else None
    log = Log(folder / "log.jsonl", done)
    if done < 0:                     # a stage begins with a checkpoint, so that trouble shows early
        done = 0
        extra |= trainee.facts
        keep(run, trainee, val, log, {"step": 0, "images": 0}, extra)
    if run.settings["compile"]:      # after the trial: its one image is no shape to compile for
        trainee.model.compile()
    batches = training_batches(items, done, steps, recipe.batch_size, rank(), world_size(),
                               run.workers * stage.reads, pin=run.device.type == "cuda")
    leave = False

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
            (leave,) = any_rank(bool(run.signals) or time.monotonic() > run.deadline)
            if leave or done % run.save_every == 0 or done == steps:
                extra["finished"] = done == steps
                keep(run, trainee, val, log, record, extra)
            else:
                log.write(record)
            if leave:
                break
    if leave:
        say_goodbye(name, done, run.signals)
    if run.settings["overfit"] and name != "refit":      # which begins with pictures that are good
        print0(f"{name}: {verdict(name, run.settings['overfit'], extra)}")
    print0(f"{name}: {done} steps done; {folder / 'last.pt'}, {folder / 'curves.png'}, "
           f"{folder / 'samples'}")


def accumulate_gradients(run, trainee, batch, gan_on, size):
    """One step's gradients, `size` images at a time. -> the losses' terms over the global batch.

    Each micro-batch has its own lambda and BatchNorm statistics.  deviation D24
    """
    stage = STAGES[trainee.stage]
    parts = [{key: value[i:i + size] for key, value in batch.items()}
             for i in range(0, len(batch["position"]), size)]
    terms = []
    for part in parts:
        last = part is parts[-1]
        with ExitStack() as held:
            for network in trainee.parallel_networks():
                held.enter_context(no_sync(network, last))
            batch = stage.batch(run, trainee, part)
            terms.append(stage.step(trainee, batch, gan_on, scale=1 / len(parts)))
    norm = gradient_norm(trainee, gan_on)
    return global_terms([part | {"grad_norm": norm} for part in terms])


def held_out(run, trainee, items, extra):
    """The batches of validation, of which the first has the pictures to be shown."""
    size = max(extra["micro_batch"], min(SAMPLE_IMAGES, len(run.val_set)))
    batches = STAGES[trainee.stage].held_out(run, trainee, items, size)
    if "histogram_nats" in trainee.facts:
        print0("prior: a held-out map costs {uniform_nats:.1f} nats by chance, {histogram_nats:.1f}"
               " by how often each code occurs at each cell".format(**trainee.facts))
    return batches


def keep(run, trainee, val, log, record, extra):
    """Validate, log the step, save pictures and the state; the other ranks wait for rank 0."""
    def work():
        folder, step, stage = run.out / trainee.stage, record["step"], STAGES[trainee.stage]
        record.update(stage.validate(trainee, val))
        stop_unless_finite(trainee.stage, step, record)
        columns = stage.columns(trainee, val[0].first(SAMPLE_IMAGES))
        image_grid(columns, folder / "samples" / f"step_{step:07d}.png")
        log.write(record)             # before the checkpoint: a log is cut back, never filled up
        log.sync()
        save(folder, run.settings, trainee, record, extra)
        curves(folder / "log.jsonl", folder / "curves.png")
    on_rank0(work)


def announce(run, trainee, items, steps, disc_start, done, extra):
    """Say what the stage will do, how long that takes here, and with how many images at once.

    The latter is noted in `extra`; a resumed stage keeps it where its processes allow that.
    """
    name, r, done = trainee.stage, trainee.recipe, max(0, done)
    one = {key: value[:1] for key, value in next(training_batches(items, 0, 1, 1)).items()}
    image_bytes, seconds = trial(trainee, STAGES[name].step, STAGES[name].batch(run, trainee, one))
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
           f"{min(r.warmup, steps // 10)} steps"
           + (f", discriminator from step {disc_start}" if trainee.discriminator else "") +
           f"; {size} "
           f"images at a time in each process ({image_bytes / 2**20:.0f} MiB an image)")
    warn(run, trainee, steps, disc_start)
    say_how_long(run, name, seconds * local, steps - done)


def warn(run, trainee, steps, disc_start):
    """What a reader of the results must know about this stage."""
    name = trainee.stage
    recipe = RECIPES[name][run.settings["recipe_names"][name]]
    ours, full = steps * trainee.recipe.batch_size, run_length(recipe, len(run.train_set))
    if ours < full * recipe.batch_size:
        print0(f"{name}: a short run, not the reported one of {full} steps of {recipe.batch_size} "
               "images")
    if trainee.discriminator and disc_start >= steps:
        print0(f"{name}: warning: --disc-start {disc_start} lies beyond the end ({steps} steps): "
               "no GAN loss in this run")
    if trainee.discriminator and world_size() > 1 and run.device.type == "cpu":
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


def verdict(name, images, extra):
    """What --overfit N has shown: whether the networks can learn a few images by heart."""
    first, last = extra["first_score"], extra["score"]
    what = "bound, nats a map," if name == "prior" else "L1"
    healthy = "healthy" if last < 0.5 * first else "not healthy: below half of it was expected"
    return (f"held-out = train {what} on {images} images: {first:.4f} at the start, {last:.4f} at "
            f"the end; {healthy}")


def say_goodbye(name, done, signals):
    """Leave as the signal asks, 128 + its number; 0 after --max-hours."""
    print0(f"{name}: saved at step {done}; the same command continues from here")
    close()
    sys.exit(128 + signals[0] if signals else 0)


if __name__ == "__main__":
    exit_on_user_error(main)
