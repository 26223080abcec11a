"""Compare two ways to compute the Frechet distance: time and error.

    OMP_NUM_THREADS=1 python benchmarks/fid.py [--dim 2048] [--images 500 5000] [--rounds 1]

Both sets have the same number of images, with normal features mixed at random. The routes differ
only in the trace of the square root of sigma1 sigma2: `frechet_distance` solves the symmetric
eigenproblem, the usual program takes the matrix square root. Errors are relative to the distance
from the singular values of the features' triangular factors. Times are CPU seconds of all threads
together. Routes run in turns and medians are compared, so that a slow moment of the machine affects
all of them. NumPy reads the number of threads when it starts, therefore the variable. By default
the program takes minutes, mostly for the matrix square root.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import scipy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fid import frechet_distance, moments


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=2048, help="dimensions of a feature, D")
    parser.add_argument("--images", type=int, nargs="+", default=[500, 5000], help="on each side")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each route")
    return parser.parse_args(argv)


def by_matrix_root(mu1, sigma1, mu2, sigma2):
    """Compute the distance by its formula, with scipy's matrix square root."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).trace().real
    return np.square(mu1 - mu2).sum() + sigma1.trace() + sigma2.trace() - 2 * root


def exact(*features):
    """Compute the distance from triangular factors R of the features: sigma = R^T R / (n - 1)."""
    mu1, mu2 = (f.mean(0) for f in features)
    R1, R2 = (np.linalg.qr(f - f.mean(0), mode="r") / (len(f) - 1) ** 0.5 for f in features)
    root = np.linalg.svd(R1 @ R2.T, compute_uv=False).sum()
    return np.square(mu1 - mu2).sum() + np.square(R1).sum() + np.square(R2).sum() - 2 * root


def draw(n, dim):
    """Draw two sets of features (n,dim), float64, each with a mixture of its own."""
    generator = np.random.default_rng(0)
    return [generator.standard_normal((n, dim)) @ generator.standard_normal((dim, dim)) / dim ** 0.5
            for _ in range(2)]


def routes(features):
    """Give {name: a function that computes the distance by this route}."""
    given = *moments(features[0]), *moments(features[1])
    return {"frechet_distance, eigh": lambda: frechet_distance(*given),
            "scipy.linalg.sqrtm": lambda: by_matrix_root(*given)}


def timed(route):
    start = time.process_time()
    distance = route()
    return time.process_time() - start, distance


def main(argv=None):
    args = arguments(argv)
    print(f"torch {torch.__version__}, numpy {np.__version__}, scipy {scipy.__version__}, "
          f"OMP_NUM_THREADS: {os.environ.get('OMP_NUM_THREADS', 'not set')}, D = {args.dim}, "
          f"median of {args.rounds} interleaved runs\n")
    print("| images | route | CPU time | relative error |\n|---|---|---|---|")
    for n in args.images:
        features = draw(n, args.dim)
        right, forms = exact(*features), routes(features)
        runs = [[timed(route) for route in forms.values()] for _ in range(args.rounds)]
        for name, column in zip(forms, zip(*runs)):
            seconds = statistics.median(spent for spent, _ in column)
            print(f"| {n} | {name} | {seconds:.2f} s | {column[0][1] / right - 1:+.1e} |")


if __name__ == "__main__":
    main()
