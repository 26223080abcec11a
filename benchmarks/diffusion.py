"""The closed forms of diffusion.py against the log-one-hot form the field copies.

    python benchmarks/diffusion.py [--threads 1] [--codes 512 1024] [--size 16] [--batch-size 16]

Both get the same logits, z_0, z_t and t, every fourth t being 1. "loss" is forward and backward
from the logits; "noising" is z_0 to z_t; "step" draws z_{t-1}. The field's form holds maps of codes
as (B,K,h,w) of log(1) and log(1e-30) and normalises by logsumexp. "saved" is what the loss keeps
for its backward pass. Values and gradients are compared in float64, where 1e-30 does not show. Both
forms run in turns and medians are compared, so that a slow moment of the machine falls on both.
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diffusion import MultinomialDiffusion
from seeding import uniforms

T = 1000


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--codes", type=int, nargs="+", default=[512, 1024], metavar="K")
    parser.add_argument("--size", type=int, default=16, help="height and width of the maps")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="runs of each form")
    return parser.parse_args(argv)


class LogOneHot:
    """The usual implementation: every map of codes a log one-hot, every law a (B,K,h,w)."""

    def __init__(self, diffusion):
        self.K, self.log_alpha_bar_t = diffusion.K, diffusion.log_alpha_bar_t

    def encode(self, z, like):
        one_hot = F.one_hot(z, self.K).permute(0, 3, 1, 2).to(like.dtype)           # (B, K, h, w)
        return one_hot.clamp(min=1e-30).log()

    def noised(self, log_x, log_a):
        """log(a x + (1-a)/K), a = exp(log_a), (B,)."""
        log_rest = (-torch.expm1(log_a)).log() - math.log(self.K)
        log_a, log_rest = (part.to(log_x.dtype).view(-1, 1, 1, 1) for part in (log_a, log_rest))
        return torch.logaddexp(log_x + log_a, log_rest.expand_as(log_x))

    def posterior(self, log_x, log_z_t, t):
        first = self.noised(log_z_t, self.log_alpha_bar_t[t] - self.log_alpha_bar_t[t - 1])
        second = self.noised(log_x, self.log_alpha_bar_t[(t - 1).clamp(min=1)])
        second = torch.where((t == 1).view(-1, 1, 1, 1), log_x, second)
        both = first + second
        return both - both.logsumexp(1, keepdim=True)

    def terms(self, logits, z_t, z_0, t):
        log_z_0, log_z_t = self.encode(z_0, logits), self.encode(z_t, logits)
        log_q = self.posterior(log_z_0, log_z_t, t)
        log_p = self.posterior(F.log_softmax(logits, 1), log_z_t, t)
        kl = (log_q.exp() * (log_q - log_p)).sum(1)                                 # (B, h, w)
        nll = -(log_z_0.exp() * log_p).sum(1)
        return torch.where((t == 1).view(-1, 1, 1), nll, kl)

    def draw(self, log_p):
        u = torch.rand_like(log_p)
        return (log_p - torch.log(-torch.log(u + 1e-30) + 1e-30)).argmax(1)

    def noise(self, z_0, t, like):
        return self.draw(self.noised(self.encode(z_0, like), self.log_alpha_bar_t[t]))

    def step(self, logits, z_t, t):
        log_x = F.log_softmax(logits, 1)
        return self.draw(self.posterior(log_x, self.encode(z_t, logits), t))


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def gradient(terms, logits):
    """The terms and the gradient of their sum by the logits."""
    logits = logits.detach().requires_grad_()
    value = terms(logits)
    value.sum().backward()
    return value.detach(), logits.grad


def saved_mib(terms, logits):
    """What autograd keeps between forward and backward, each storage once."""
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    logits = logits.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        terms(logits)
    return sum(kept.values()) / 2**20


def compare(K, args):
    """The rows of one K: (name, our form, the field's, differences and memory as text)."""
    B, side = args.batch_size, args.size
    diffusion = MultinomialDiffusion(K, T)
    field = LogOneHot(diffusion)
    generators = [torch.Generator().manual_seed(n) for n in range(B)]
    t = torch.randint(2, T + 1, (B,))
    t[::4] = 1
    z_0 = torch.randint(K, (B, side, side))
    z_t = diffusion.q_sample(z_0, t, generators)
    logits = torch.randn(B, K, side, side)

    def ours(logits):
        return diffusion.kl(diffusion.log_x0_hat(logits, z_t), z_t, z_0, t, t - 1)

    def theirs(logits):
        return field.terms(logits, z_t, z_0, t)

    def step():
        u = uniforms(generators, 3, side, side)
        diffusion.draw(diffusion.log_x0_hat(logits, z_t), z_t, t, t - 1, u)

    exact = zip(gradient(ours, logits.double()), gradient(theirs, logits.double()))
    value, slope = [f"{(a - b).abs().max().item():.0e}" for a, b in exact]
    saved = " / ".join(f"{saved_mib(form, logits):.0f} MiB" for form in (ours, theirs))
    return [
        ("loss", lambda: gradient(ours, logits), lambda: gradient(theirs, logits),
         [value, slope, saved]),
        ("noising", lambda: diffusion.q_sample(z_0, t, generators),
         lambda: field.noise(z_0, t, logits), ["", "", ""]),
        ("step", step, lambda: field.step(logits, z_t, t), ["", "", ""]),
    ]


def main(argv=None):
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, CPU threads: {args.threads} "
          f"({torch.backends.cpu.get_cpu_capability()}), B = {args.batch_size}, "
          f"{args.size} x {args.size}, T = {T}, median of {args.rounds} interleaved runs\n")
    print("| K | | closed form | log-one-hot | faster | values differ by | gradients by | saved |")
    print("|---" * 8 + "|")
    for K in args.codes:
        for name, ours, theirs, rest in compare(K, args):
            runs = [[seconds(form) for form in (ours, theirs)] for _ in range(args.rounds + 1)][1:]
            fast, slow = map(statistics.median, zip(*runs))
            cells = [K, name, f"{fast * 1e3:.1f} ms", f"{slow * 1e3:.1f} ms",
                     f"{slow / fast:.1f}x", *rest]
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
