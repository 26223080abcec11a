"""Time PartialConv2d and a plain convolution, forward and backward, on one thread.

    python benchmarks/pconv.py [--rounds 31] [--system-malloc]

The forms run in turns and medians are compared, so that a slow moment of the machine affects all
of them. On Linux the process keeps freed memory, as the programs do. Without that, buffers of 8 MiB
may be requested from the system again, depending on what ran before, and this takes longer than the
arithmetic. `--system-malloc` does not keep it.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from distributed import keep_freed_memory
from pconv import PartialConv2d

CASES = {"k3 s1": (3, 1), "k4 s2": (4, 2)}                 # kernel, stride; padding 1


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128, help="height and width of the features")
    parser.add_argument("--rounds", type=int, default=31, help="runs of each form")
    parser.add_argument("--system-malloc", action="store_true", help="do not keep freed memory")
    return parser.parse_args(argv)


def published(layer, x, valid):
    """Compute what the published layer computes, step by step, for a one-channel mask."""
    kernel = torch.ones(1, 1, *layer.kernel_size)
    count = nn.functional.conv2d(valid, kernel, None, layer.stride, layer.padding)
    updated = count.clamp(0, 1)
    ratio = kernel.numel() / (count + 1e-8) * updated
    bias = layer.bias.view(1, -1, 1, 1)
    raw = nn.functional.conv2d(x * valid, layer.weight, layer.bias, layer.stride, layer.padding)
    return ((raw - bias) * ratio + bias) * updated


def seconds(forward, x):
    """Measure the wall time of one forward and backward pass of `forward(x)`."""
    x.grad = None
    start = time.perf_counter()
    forward(x).sum().backward()
    return time.perf_counter() - start


def main(argv=None):
    args = arguments(argv)
    if not args.system_malloc:
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(2, 64, args.size, args.size, requires_grad=True)
    valid = (torch.rand(2, 1, args.size, args.size) > 0.4).float()
    print(f"torch {torch.__version__}, 1 thread, x {tuple(x.shape)}, "
          f"median of {args.rounds} interleaved runs\n")
    print("| | plain Conv2d | PartialConv2d | published form |\n|---|---|---|---|")
    for name, (kernel, stride) in CASES.items():
        plain = nn.Conv2d(64, 64, kernel, stride, 1)
        partial = PartialConv2d(64, 64, kernel, stride, 1)
        forms = [plain,
                 lambda x, layer=partial: layer(x, valid)[0],
                 lambda x, layer=partial: published(layer, x, valid)]
        runs = [[seconds(form, x) for form in forms] for _ in range(args.rounds + 2)][2:]
        medians = [statistics.median(column) for column in zip(*runs)]
        cells = [f"{t * 1e3:.1f} ms ({t / medians[0]:.2f}x)" for t in medians]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
