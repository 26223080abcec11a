"""Train the first stage and the asymmetric decoder: flags, the table of stages, the one visible loop.

    python train.py                                        embedded data, both stages, then the report
    python train.py --data imagenet --root /data/imagenet  the paper's job
    torchrun --nproc_per_node=8 train.py ...               the same on eight GPUs

What a step does is in stages.py; what the flags resolve to, in options.py. The state of a stage is its weights, its
optimisers and the number of steps done: everything random is a function of the seed, the stage and an image's position
in the run, so a run that was killed goes on to the same weights as one that was not.
"""

import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from eval import evaluate_runs

import checkpoint
from budget import DAY, duration, free_memory, local_batch, micro_batch, trial
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
    exit_on_user_error,
    gather_objects,
    no_sync,
    on_rank0,
    print0,
    rank,
    setup,
    world_size,
)
from figures import curves, image_grid
from losses import LPIPS
from options import parse, resolve
from run_folder import Log, Progress, open_run, stop_signals
from stages import (
    STAGE_IDS,
    Recipe,
    build_decoder,
    build_vqgan,
    decoder_step,
    global_terms,
    gradient_norm,
    load_stage_weights,
    optimizer_step,
    sample_columns,
    set_learning_rates,
    stage_weights,
    training_batch,
    validate_decoder,
    validate_vqgan,
    validation_batch,
    vqgan_step,
)
from vqgan import VQGANConfig

VALIDATION_IMAGES, SAMPLE_IMAGES = 64, 6


@dataclass(frozen=True)
class Stage:
    """A row of the table of stages."""

    step:     callable     # gradients of one micro-batch
    validate: callable     # {"val_...": value}
    masks:    bool         # whether an item comes with a mask


STAGES = {
    "vqgan": Stage(vqgan_step, validate_vqgan, masks=False),
    "decoder": Stage(decoder_step, validate_decoder, masks=True),
}


def main():
    args = parse()
    settings, first_stage = resolve(args)
    device = setup(args.device)
    train_set = open_dataset(args.data, args.root, "train", settings["size"], limit=args.overfit)
    val_set = train_set if args.overfit else open_dataset(args.data, args.root, "val", settings["size"])
    workers = args.workers if args.workers is not None else (1 if args.data == "signs" else 4)
    if args.check_data:
        return report_bad_files([train_set, val_set], workers)
    print0(f"{train_set.describe()}\n{val_set.describe()}\n"
           f"{world_size()} process(es) on {device.type}; writing to {args.out}")
    names = list(STAGES) if args.stage == "all" else [args.stage]
    if first_stage is not None:
        names = ["decoder"]
    elif args.stage == "all" and args.data != "signs":
        print0("no --vqgan was given: the first stage is trained first, then the decoder on it")
    deadline = time.monotonic() + 3600 * args.max_hours if args.max_hours else math.inf
    save_every = args.save_every or (100 if settings["preset"] == "tiny" else 1000)
    run = Run(settings, args.out, device, workers, save_every, deadline)
    with open_run(args.out, settings, args.restart):
        for name in names:
            train_stage(name, run, train_set, val_set)
        if "decoder" in names and not args.overfit:
            on_rank0(partial(evaluate_runs, [args.out], device=device))
    return 0


def report_bad_files(datasets, workers):
    """--check-data: decode everything once; exit status 1 where a file is bad."""
    bad = [path for dataset in datasets for path in check_files(dataset, workers)]
    print0("\n".join(bad) + f"\n{len(bad)} files cannot be decoded" if bad else "every file can be decoded")
    return 1 if bad else 0


@dataclass
class Run:
    """What all stages of one call of this program share."""

    settings:   dict               # what the flags resolved to, the run's config.json
    out:        Path
    device:     torch.device
    workers:    int
    save_every: int                # steps
    deadline:   float              # on time.monotonic's clock


def build(name, run):
    """(Trainee, parent): the networks of a stage at their start, and the hash of the weights it stands on."""
    settings, seed = run.settings, run.settings["seed"]
    recipe = Recipe(**settings["recipes"][name])
    net, device = settings["perceptual"], run.device
    perceptual = None if net == "none" else LPIPS(net, settings["weights"]).to(device)
    first_stage, parent = None, None
    if name == "decoder":
        first_stage, parent = load_first_stage(settings["vqgan"] or run.out)
    torch.manual_seed(int(np.random.SeedSequence((seed, STAGE_IDS[name])).generate_state(1)[0]))
    if name == "vqgan":
        config = VQGANConfig(**settings["first_stage"])
        trainee = build_vqgan(config, recipe, device, perceptual, settings["precision"])
    else:
        trainee = build_decoder(first_stage, settings["preset"], settings["blend"], recipe, device,
                                perceptual, settings["precision"])
    if settings["channels_last"]:
        trainee.model.to(memory_format=torch.channels_last)
    trainee.model.decoder.checkpointing = settings["checkpointing"]
    if settings["compile"]:
        trainee.model.compile()
    return trainee, parent


def train_stage(name, run, train_set, val_set):
    """Train one stage from its last checkpoint, or from the start, to its end."""
    trainee, parent = build(name, run)
    recipe, folder = trainee.recipe, run.out / name
    steps = recipe.steps or math.ceil(recipe.epochs * len(train_set) / recipe.batch_size)
    disc_start = math.floor(recipe.disc_start * steps) if recipe.disc_start < 1 else int(recipe.disc_start)
    state = on_rank0(partial(checkpoint.latest, folder))
    done, extra = resume(trainee, state, parent, folder) if state else (0, {"best": None})
    if extra.get("finished"):
        print0(f"{name}: finished before, {done} steps")
        return
    items = TrainingItems(train_set, run.settings["seed"], STAGE_IDS[name], STAGES[name].masks)
    announce(name, run, trainee, items, steps, disc_start, done, extra)
    batches = training_batches(items, done, steps, recipe.batch_size, rank(), world_size(), run.workers,
                               pin=run.device.type == "cuda")
    val = held_out(run, val_set, extra["micro_batch"])
    log, progress = Log(folder / "log.jsonl", done), Progress(name, done, steps, recipe.batch_size)
    bad_files = BadFiles(len(train_set))

    with stop_signals() as signals:
        for step, batch in enumerate(batches, start=done):
            lr = set_learning_rates(trainee, step, steps, disc_start)
            gan_on = step >= disc_start
            terms = accumulate_gradients(name, run, trainee, batch, gan_on, extra["micro_batch"])
            stop_unless_finite(name, step, terms)
            optimizer_step(trainee, gan_on)

            done = step + 1
            progress.show(done, terms)
            record = {"step": done, "images": done * recipe.batch_size, "lr": lr, **terms}
            leave, unreadable = any_rank(bool(signals) or time.monotonic() > run.deadline, bool(batch["bad"]))
            if unreadable:
                skip_bad_files(bad_files, batch["bad"])
            saving = leave or done % run.save_every == 0 or done == steps
            if saving:
                record |= validate(name, run, trainee, val, done)
            log.write(record)             # before the checkpoint: a log is cut back on resume, never filled up
            if saving:
                extra["finished"] = done == steps
                on_rank0(partial(save, name, run, trainee, parent, record, extra))
            if leave and done < steps:
                say_goodbye(name, done, signals)
    log.close()
    progress.close()
    on_rank0(partial(curves, folder / "log.jsonl", folder / "curves.png"))
    print0(f"{name}: {done} steps done; {folder / 'last.pt'}, {folder / 'curves.png'}, {folder / 'samples'}")


def accumulate_gradients(name, run, trainee, batch, gan_on, size):
    """One step's gradients, `size` images at a time. -> means of the losses' terms, over the global batch."""
    parts = [{key: value[i:i + size] for key, value in batch.items() if key != "bad"}
             for i in range(0, len(batch["position"]), size)]
    terms = []
    for part in parts:
        last = part is parts[-1]
        part = training_batch(part, run.settings["seed"], name, run.device, run.settings["channels_last"])
        with no_sync(trainee.generator, last), no_sync(trainee.critic, last):
            terms.append(STAGES[name].step(trainee, part, gan_on, scale=1 / len(parts)))
    norm = gradient_norm(trainee, gan_on)
    return global_terms([part | {"grad_norm": norm} for part in terms])


def stop_unless_finite(name, step, terms):
    """Raise UserError, on every rank, if a loss or a gradient of any rank is not finite; nothing has moved yet."""
    broken = [term for term, value in terms.items() if not math.isfinite(value)]
    if broken:
        raise UserError(f"{name} step {step + 1}: {', '.join(broken)} not finite; the last checkpoint is good, the "
                        "weights that led here are not saved. Try a lower --lr, or --precision fp32")


def validate(name, run, trainee, val, step):
    """Held-out values for the log, and a sample grid; on rank 0, while the others wait."""
    def work():
        image_grid(sample_columns(trainee, val[0]), run.out / name / "samples" / f"step_{step:07d}.png")
        return STAGES[name].validate(trainee, val)
    return on_rank0(work)


def held_out(run, val_set, size):
    """The first validation images with their evaluation masks, as batches on the device."""
    size = max(size, min(SAMPLE_IMAGES, len(val_set)))
    return [validation_batch(batch, run.device, run.settings["channels_last"])
            for batch in validation_batches(val_set, VALIDATION_IMAGES, size)]


def save(name, run, trainee, parent, record, extra):
    """last.pt, and best.pt where the held-out pixel error (for the decoder: with mask plus without) is the lowest."""
    score = sum(value for key, value in record.items() if key.startswith("val_pixel"))
    better = extra["best"] is None or score < extra["best"]
    extra["best"] = score if better else extra["best"]
    state = {"format": checkpoint.FORMAT, "stage": name, "config": run.settings,
             "model": stage_weights(trainee), "ema": None,
             "optimizers": {key: optimizer.state_dict() for key, optimizer in trainee.optimizers.items()},
             "images": record["images"], "step": record["step"], "parent": parent,
             "extra": {**extra, "discriminator": trainee.discriminator.state_dict()}}
    checkpoint.save(run.out / name / "last.pt", state)
    if better:
        checkpoint.save(run.out / name / "best.pt", state, keep_previous=False)


def resume(trainee, state, parent, folder):
    """Load a stage's state into the trainee -> (steps done, extra). UserError where what it stands on has changed."""
    if state["parent"] != parent:
        raise UserError(f"{folder} was trained on another first stage than the one there is now; bring the old one "
                        "back, or give --restart to train on the new one")
    load_stage_weights(trainee, state["model"])
    for key, optimizer in trainee.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][key])
    extra = dict(state["extra"])
    trainee.discriminator.load_state_dict(extra.pop("discriminator"))
    return state["step"], extra


def announce(name, run, trainee, items, steps, disc_start, done, extra):
    """Say what the stage will do, how long that takes here, and with how many images at once; keep the latter."""
    r, device = trainee.recipe, run.device
    one = {key: value if key == "bad" else value[:1] for key, value in next(training_batches(items, 0, 1, 1)).items()}
    batch = training_batch(one, run.settings["seed"], name, device, run.settings["channels_last"])
    image_bytes, seconds = trial(trainee, STAGES[name].step, batch)
    local = local_batch(r.batch_size, world_size())
    kept = extra.get("micro_batch")          # a resumed run goes on as it began, where its processes allow that
    extra["micro_batch"] = kept if kept and local % kept == 0 else on_rank0(
        lambda: micro_batch(local, run.settings["micro_batch"], image_bytes, free_memory(device)))
    count = sum(p.numel() for group in trainee.optimizers["generator"].param_groups for p in group["params"])
    print0(f"\n{name}: {count:,} parameters train, {steps} steps of {r.batch_size} images"
           + (f", from step {done}" if done else "")
           + f"; lr {r.lr:.3g}, warm-up {min(r.warmup, steps // 10)} steps, discriminator from step {disc_start}; "
           f"{extra['micro_batch']} images at a time in each process ({image_bytes / 2**20:.0f} MiB an image)")
    total = seconds * (steps - done) * local
    print0(f"{name}: at most about {duration(total)} on this device, by one image's step")
    if total > DAY:
        print0(f"{name}: that is long. A run for hours: --first-stage tiny --preset tiny --size 128 --epochs 40")
    if disc_start >= steps:
        print0(f"{name}: warning: --disc-start {disc_start} lies beyond the end ({steps} steps): no GAN loss in this run")
    if world_size() > 1 and device.type == "cpu":
        print0(f"{name}: the discriminator's BatchNorm statistics are per process (PyTorch synchronises them on CUDA only)")


def skip_bad_files(bad_files, paths):
    """Log files that could not be decoded, once over all ranks; UserError where they are too many."""
    for path in bad_files.update(set().union(*gather_objects(paths))):
        print0(f"skipped, cannot be decoded: {path}", file=sys.stderr)
    bad_files.check()


def say_goodbye(name, done, signals):
    """Leave as the signal asks, 128 + its number; 0 after --max-hours."""
    print0(f"{name}: saved at step {done}; the same command continues from here")
    sys.exit(128 + signals[0] if signals else 0)


if __name__ == "__main__":
    exit_on_user_error(main)
