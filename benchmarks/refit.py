"""Compare seeds by AFK-MC², k-means++ and uniform draws, then Lloyd's passes: time and inertia.

    python benchmarks/refit.py [--rows 20000 100000] [--threads 1]

The features have low rank and noise, in as many clusters as there are codes. For each seed,
k-means++ computes the distance of every feature, here by one matrix-vector product, the fastest
form we know. AFK-MC² computes 200 distances. The ways of seeding run in turns and medians are
compared. Lloyd's algorithm then starts from the seeds of the first round. Times are CPU seconds of
all threads together, so that a busy machine adds little to them.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from refit import afkmc2_seeds, kmeans


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 100_000],
                        help="features, P")
    parser.add_argument("--width", type=int, default=256, help="of a feature, d")
    parser.add_argument("--codes", type=int, default=1024, help="K")
    parser.add_argument("--passes", type=int, default=10, help="of Lloyd's algorithm")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each seeding")
    return parser.parse_args(argv)


def plain_seeds(features, K, generator):
    """Draw the seeds of k-means++ by its definition: indices (K,) of features (n,d)."""
    square = features.square().sum(1)                                       # (n)
    chosen = torch.randint(len(features), (1,), generator=generator).tolist()
    nearest = torch.full_like(square, torch.inf)                            # (n), d(x,C)²
    for level in torch.rand(K - 1, dtype=torch.float64, generator=generator):
        seed = features[chosen[-1]]                                         # (d)
        distance = torch.addmv(square, features, seed, alpha=-2) + square[chosen[-1]]
        nearest = torch.minimum(nearest, distance.clamp_min(0))             # (n)
        cdf = nearest.double().cumsum(0)                                    # (n)
        chosen.append(torch.searchsorted(cdf, level * cdf[-1]).item())
    return torch.tensor(chosen)


def data(rows, width, codes):
    """Draw features (n,d) of rank 32, in clusters, with noise."""
    generator = torch.Generator().manual_seed(0)
    rank = min(32, width)
    centres = torch.randn(codes, rank, generator=generator)
    inner = centres[torch.randint(codes, (rows,), generator=generator)]
    inner += 0.5 * torch.randn(rows, rank, generator=generator)
    features = inner @ torch.randn(rank, width, generator=generator) / rank**0.5
    return features + 0.1 * torch.randn(rows, width, generator=generator)


def timed(function, *arguments):
    """Call a function: (its result, CPU seconds)."""
    start = time.process_time()
    result = function(*arguments)
    return result, time.process_time() - start


def compare(args, rows):
    """Yield the table's lines for `rows` features."""
    features = data(rows, args.width, args.codes)
    seedings = {
        "AFK-MC²": lambda g: afkmc2_seeds(features, args.codes, generator=g),
        "k-means++": lambda g: plain_seeds(features, args.codes, g),
        "uniform": lambda g: torch.randperm(rows, generator=g)[:args.codes],
    }
    runs = [{name: timed(seeding, torch.Generator().manual_seed(number))
             for name, seeding in seedings.items()} for number in range(args.rounds)]
    for name in seedings:
        seconds = statistics.median(run[name][1] for run in runs)
        start = features[runs[0][name][0]]
        (_, inertia), moving = timed(kmeans, features, start, args.passes, 0.0)
        yield (f"| {rows:,} x {args.width} | {name} | {seconds:.2f} s | {inertia[0]:.4g} | "
               f"{len(inertia) - 1} | {moving / len(inertia):.3f} s | {inertia[-1]:.4g} |")


def main(argv=None):
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, CPU threads: {args.threads} "
          f"({torch.backends.cpu.get_cpu_capability()}), K = {args.codes}, "
          f"median of {args.rounds} interleaved seedings\n")
    print("| features | seeding | time | inertia | passes | time per pass | inertia after them |")
    print("|---" * 7 + "|")
    for rows in args.rows:
        for line in compare(args, rows):
            print(line, flush=True)


if __name__ == "__main__":
    main()
