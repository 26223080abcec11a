"""What Eq. 24 costs as it is printed, beside the closed form that trains.

    python benchmarks/diffusion.py [--device cpu] [--threads 1] [--presets tiny paper117]

`terms` sums q (log q - log p) over all codes, `closed_terms` gives the same without that sum.
"loss" is forward and backward from given logits; "step" is one training step of the network: noise,
forward, backward, Adam. "memory" is the most that one loss or step holds above what it begins with
(CUDA only), in MiB, and for the loss as a multiple of the logits' size. Both forms run in turns.
Medians are given, and of their ratio the quartiles; a CPU's milliseconds are processor time.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diffusion import MultinomialDiffusion
from distributed import setup
from unet import UNET_PRESETS, UNet

# preset: (preset, K, side of the maps, T, maps a step on a CPU, on CUDA)
CASES = {"tiny": [("tiny", 128, 16, 100, 16, 256)],
         "paper117": [("paper117", 1024, 16, 4000, 4, 180), ("paper117", 16384, 32, 4000, 1, 22)]}


def textbook(K, T):
    """A process that trains by the sum over codes."""
    diffusion = MultinomialDiffusion(K, T)
    diffusion.closed_terms = diffusion.terms
    return diffusion


def measure(forms, rounds, device):
    """[(ms of each round, peak MiB above the start)] of each form, run in turns."""
    cuda, runs = device.type == "cuda", [([], []) for _ in forms]
    clock = time.perf_counter if cuda else time.process_time
    for _ in range(rounds + 1):
        for form, (times, peaks) in zip(forms, runs):
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = clock()
            form()
            if cuda:
                torch.cuda.synchronize()
                peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20)
            times.append((clock() - start) * 1e3)
    return [(times[1:], max(peaks, default=0)) for times, peaks in runs]


def compare(preset, K, side, T, B, args):
    """Print the rows of one case."""
    device, diffusions = setup(args.device), (textbook(K, T), MultinomialDiffusion(K, T))
    t, z_0 = torch.randint(2, T + 1, (B,)), torch.randint(K, (B, side, side), device=device)
    t[0], p = 1, torch.full((B,), 1 / T, dtype=torch.float64)
    net = UNet(UNET_PRESETS[preset], K, T).to(device)
    optimizer = torch.optim.Adam(net.parameters())
    logits = 3 * torch.randn(B, K, side, side, device=device)
    generators = [torch.Generator() for _ in range(B)]

    def loss(diffusion, kind=None):
        given = logits.detach().to(kind or logits.dtype).requires_grad_()
        draws = [generator.manual_seed(n) for n, generator in enumerate(generators)]
        value, terms = diffusion.loss(lambda z, t: given * 1.0, z_0, t, p, draws)
        value.backward()
        return terms, given.grad

    def step(diffusion):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            diffusion.loss(net, z_0, t, p, generators)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    kind = torch.float64 if device.type == "cpu" and K < 10_000 else torch.float32
    (value, slope), (other, other_slope) = (loss(diffusion, kind) for diffusion in diffusions)
    differ = (f"{((value - other).abs() / other.abs()).max().item():.0e}, "
              f"{((slope - other_slope).abs().max() / slope.abs().max()).item():.0e}")
    del value, slope, other, other_slope
    size = logits.numel() * 4 / 2**20
    for name, work in (("loss", loss), ("step", step)):
        (ms, mib), (fast, less) = measure([partial(work, diffusion) for diffusion in diffusions],
                                          args.rounds, device)
        low, middle, high = np.percentile([100 * (a / b - 1) for a, b in zip(ms, fast)],
                                          [25, 50, 75])
        memory = f"{mib:.0f} / {less:.0f}" if device.type == "cuda" else "not measured"
        if name == "loss" and device.type == "cuda":
            memory += f" ({mib / size:.1f}x / {less / size:.1f}x)"
        print(f"| {preset}, K = {K}, {side} x {side}, B = {B} | {name} | "
              f"{statistics.median(ms):.1f} | {statistics.median(fast):.1f} | {middle:.1f} % "
              f"({low:.1f} to {high:.1f}) | {memory} | {differ if name == 'loss' else ''} |",
              flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--presets", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=9, help="runs of each form")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    where = (torch.cuda.get_device_name() + ", networks in bf16" if args.device == "cuda" else
             f"CPU, {args.threads} threads ({torch.backends.cpu.get_cpu_capability()})")
    print(f"torch {torch.__version__}, {where}, median of {args.rounds} interleaved runs\n")
    print("| case | | textbook, ms | closed form, ms | more (quartiles of pairs) | memory, MiB: "
          "textbook / closed | values, gradients differ by |")
    print("|---" * 7 + "|")
    for preset in args.presets:
        for *case, cpu, cuda in CASES[preset]:
            compare(*case, cuda if args.device == "cuda" else cpu, args)


if __name__ == "__main__":
    main()
