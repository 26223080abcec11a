"""Measure how fast street scenes are drawn, on one thread.

    python benchmarks/signs.py [--size 64] [--pictures 300]

`Signs.image` draws an image. `TrainingItems` adds its training mask and makes tensors of both. The
aim is at least 300 images/s at 64 px, so that drawing does not slow training down. Both run in
turns, each round with other images. The program prints the median of all rounds and the slowest.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Signs, TrainingItems


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--pictures", type=int, default=300, help="in each round")
    parser.add_argument("--rounds", type=int, default=11)
    return parser.parse_args(argv)


def images_per_second(read, indices):
    start = time.perf_counter()
    for index in indices:
        read(index)
    return len(indices) / (time.perf_counter() - start)


def main(argv=None):
    args = arguments(argv)
    torch.set_num_threads(1)
    signs = Signs("train", args.size)
    items = TrainingItems(signs, seed=0, stage_id=0, masks=True)
    readers = {"Signs.image": signs.image, "TrainingItems": items.__getitem__}
    rounds = [range(start, start + args.pictures)
              for start in range(0, args.rounds * args.pictures, args.pictures)]
    for read in readers.values():
        read(0)                          # letters and the epoch's order are made once
    speeds = [[images_per_second(read, indices) for read in readers.values()]
              for indices in rounds]
    print(f"torch {torch.__version__}, 1 thread, {args.size} px, "
          f"{args.rounds} interleaved rounds of {args.pictures} images\n")
    print("| | images/s, median | slowest round |\n|---|---|---|")
    for name, column in zip(readers, zip(*speeds)):
        print(f"| {name} | {statistics.median(column):.0f} | {min(column):.0f} |")


if __name__ == "__main__":
    main()
