"""Time a training step of each stage at small sizes: float32 and bf16, NCHW and channels_last.

    python benchmarks/step.py [--device cuda] [--threads 2] [--batch-size 8] [--size 64]

A step is forward, backward and the optimisers, on one batch of street scenes that is already on the
device. Half of its masks are full. "+ D" is a step with the discriminator. There is no perceptual
loss, as in the run on signs. All forms run in turns and medians are compared, so that a slow moment
of the machine affects all of them. benchmarks/signs.py times the loading.
"""

import argparse
import statistics
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_autoencoder
from data import Signs, TrainingItems, training_batches
from distributed import keep_freed_memory
from recipes import RECIPES
from run_folder import Run
from seeding import STAGE_IDS
from vqgan import VQGAN, VQGAN_PRESETS

FORMS = {                                # precision, channels_last
    "fp32, NCHW": ("fp32", False),
    "fp32, channels_last": ("fp32", True),
    "bf16, channels_last": ("bf16", True),
}
STAGES = {"vqgan": train_autoencoder.FirstStage, "decoder": train_autoencoder.DecoderStage}
LR = 1e-5                                # so small that the network stays nearly untrained


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on the CPU")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=21, help="runs of each form")
    parser.add_argument("--system-malloc", action="store_true", help="do not keep freed memory")
    return parser.parse_args(argv)


def build(name, precision, channels_last, device):
    """Build an untrained stage of preset tiny."""
    torch.manual_seed(0)
    config = VQGAN_PRESETS["tiny"]
    first_stage = SimpleNamespace(model=VQGAN(config), parent=None)
    train_autoencoder.trained_first_stage = lambda *_: (first_stage, None)
    settings = {"seed": 0, "precision": precision, "perceptual": "none", "weights": None,
                "checkpointing": False, "compile": False, "first_stage": asdict(config),
                "decoder": {"preset": "tiny", "blend": "add"}}
    run = Run(settings, None, device, workers=0, train_set=None, val_set=None)
    run.channels_last = channels_last
    recipe = replace(RECIPES[name]["tiny"], lr=LR, start="plain")    # which needs no images
    return STAGES[name](run, recipe, None)


def half_full(size, batch_size):
    """Give the first training batch of signs with half of its masks full."""
    items = TrainingItems(Signs("train", size), 0, STAGE_IDS["decoder"], masks=True)
    batches = training_batches(items, 0, 1000, batch_size)
    return next(batch for batch in batches
                if batch["mask"].flatten(1).all(1).sum() == batch_size // 2)


def one_step(stage, batch, gan_on):
    stage.step(batch, gan_on)
    stage.update(gan_on)


def cases(device, drawn):
    """Give {(stage and players, form): a function that runs one step}."""
    steps = {}
    for form, (precision, channels_last) in FORMS.items():
        for stage_name in STAGES:
            stage = build(stage_name, precision, channels_last, device)
            batch = stage.batch(drawn)
            for name, gan_on in ((stage_name, False), (f"{stage_name} + D", True)):
                steps[name, form] = partial(one_step, stage, batch, gan_on)
    return steps


def seconds(step, device):
    """Measure the wall time of one step."""
    start = time.perf_counter()
    step()
    torch.get_device_module(device).synchronize()
    return time.perf_counter() - start


def main(argv=None):
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    if not args.system_malloc:
        keep_freed_memory()
    steps = cases(args.device, half_full(args.size, args.batch_size))
    runs = [[seconds(step, args.device) for step in steps.values()]
            for _ in range(args.rounds + 2)][2:]
    medians = dict(zip(steps, map(statistics.median, zip(*runs))))
    print(f"torch {torch.__version__}, {args.device}, CPU threads: {args.threads} "
          f"({torch.backends.cpu.get_cpu_capability()}), {args.size} px, batch {args.batch_size}, "
          f"median of {args.rounds} interleaved runs; images/s (ms per image)\n")
    print("| step | " + " | ".join(FORMS) + " |\n|---" + "|---" * len(FORMS) + "|")
    for name in dict.fromkeys(name for name, _ in steps):
        each = [medians[name, form] / args.batch_size for form in FORMS]
        print(f"| {name} | " + " | ".join(f"{1 / t:.0f} ({t * 1e3:.2f})" for t in each) + " |")


if __name__ == "__main__":
    main()
