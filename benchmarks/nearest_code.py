"""Compare quantize.nearest_code with the usual expression: time and wrong codes.

    python benchmarks/nearest_code.py [--threads 1] [--cases 1024x256 16384x4]

Codes are uniform in ±1/K, as at the start of training, and encoder outputs are N(3,1). All codes
are then nearly equally far. In z² + e² - 2ze the term z² is over ten million times e² and takes
most of float32's digits. A code is wrong if float64 finds another one. Both forms run in turns and
medians are compared, so that a slow moment of the machine affects both. The largest case needs
about 3 GiB, nearly all of it for the whole matrix of the usual expression.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from quantize import nearest_code

CASES = ["1024x256", "1024x4", "16384x4", "16384x256"]      # K x d


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=16384, help="vectors to be quantised, N")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="KxD", help="codes x width")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each form")
    return parser.parse_args(argv)


def copied(z, codebook):
    """Search by the usual expression, in one matrix: z (N,d), codebook (K,d) -> (N,)."""
    distance = (z.square().sum(1, keepdim=True) + codebook.square().sum(1)
                - 2 * z @ codebook.T)                                       # (N, K)
    return distance.argmin(1)


def exact(z, codebook):
    """Search in float64, without z², 256 rows at once: (N,)."""
    codes = codebook.double()
    square = codes.square().sum(1)                                          # (K)
    return torch.cat([(square - 2 * part.double() @ codes.T).argmin(1) for part in z.split(256)])


def data(rows, K, d):
    """Draw z (N,d) and codebook (K,d) as at the start of training."""
    generator = torch.Generator().manual_seed(0)
    z = 3 + torch.randn(rows, d, generator=generator)
    return z, (2 * torch.rand(K, d, generator=generator) - 1) / K


def seconds(search, *arguments):
    start = time.perf_counter()
    search(*arguments)
    return time.perf_counter() - start


def main(argv=None):
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, CPU threads: {args.threads} "
          f"({torch.backends.cpu.get_cpu_capability()}), N = {args.rows}, "
          f"median of {args.rounds} interleaved runs\n")
    print("| K | d | nearest_code | usual | ratio | wrong codes | wrong codes, usual |")
    print("|---" * 7 + "|")
    for case in args.cases:
        K, d = map(int, case.split("x"))
        given = data(args.rows, K, d)
        right = exact(*given)
        wrong = [(search(*given) != right).sum() for search in (nearest_code, copied)]
        runs = [[seconds(search, *given) for search in (nearest_code, copied)]
                for _ in range(args.rounds)]
        ours, theirs = map(statistics.median, zip(*runs))
        print(f"| {K} | {d} | {ours * 1e3:.1f} ms | {theirs * 1e3:.1f} ms | {ours / theirs:.2f} | "
              f"{wrong[0]} | {wrong[1]} |")


if __name__ == "__main__":
    main()
