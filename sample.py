"""Pictures from nothing: VQ-DDM's samples, and how many steps they need.

    python sample.py --run RUN -n 16 -o samples.png
    python sample.py --run RUN --steps 1,4,10,25,100 --sampler both      the table of DDM Fig. 5

    (seed, i) --MultinomialDiffusion.sample--> codes (h,w) --lookup--> z (d,h,w) --decoder--> x_hat

Sample i is a function of the seed and i alone: all rows of the picture begin with the same noise.
Writes the picture and, with .json for .png, the table's numbers. Not here: the process
(diffusion.py).
"""

import argparse
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from asym_decoder import AsymVQGAN
from convert import STEPS, chosen_steps, load, load_prior, run_of
from data import open_dataset
from diffusion import SAMPLERS, held_out_bound
from distributed import (
    UserError,
    exact_float32,
    exit_on_user_error,
    print0,
    setup,
    wait_for,
    world_size,
)
from fid import FeatureStatistics, InceptionV3
from metrics import FEATURES
from originals import originals, shares
from paper_tables import steps_table
from pictures import image_rows
from run_folder import Progress, make_folder, write_text
from seeding import SAMPLE, keyed_generators

# -- drawing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn; sample i is a function of `seed` and i alone."""

    steps:       int                # 1..T
    sampler:     str   = "strided"  # or "route"
    temperature: float = 1.0        # below 1 likelier and less diverse
    seed:        int   = 0
    batch_size:  int   = 16

    def codes(self, prior, positions):
        """The codes of samples `positions`, by a prior.Prior: (B,h,w) int64, on its device."""
        generators = keyed_generators((SAMPLE, self.seed, i) for i in positions)
        return prior.diffusion.sample(
            prior.unet, (len(positions), *prior.grid), self.steps, generators, sampler=self.sampler,
            temperature=self.temperature, device=prior.device)

    def batches(self, prior, n):
        """(positions, codes (b,h,w), seconds it took) of samples 0..n-1, this process's share.

        What a device does once, at its first batch, is not in the seconds.
        """
        for number, positions in enumerate(shares(n, self.batch_size)):
            if number == 0:
                replace(self, steps=1).codes(prior, positions)
            wait_for(prior.device)
            start = time.perf_counter()
            codes = self.codes(prior, positions)                                    # (b, h, w)
            wait_for(prior.device)
            yield positions, codes, time.perf_counter() - start

    def __str__(self):
        return f"{self.steps} step{'s' * (self.steps > 1)}, {self.sampler}"


def open_decoder(path, prior, choice=None):
    """The AsymVQGAN or VQGAN whose `decode` makes pictures of a prior's codes.

    path: of the prior. choice: "asym", the run's own; "vanilla", the first stage; None is the
    former where there is one. Raises UserError: none there, or one on another first stage.
    """
    run = run_of(path)
    there = any((run / "decoder" / name).exists() for name in ("last.pt", "previous.pt"))
    if choice == "asym" and not there:
        raise UserError(f"--decoder asym: {run} has no decoder of ours; train one with train.py "
                        "--stage decoder, or give --decoder vanilla")
    if choice == "vanilla" or not there:
        return prior.first_stage
    loaded = load(run, prior.device)
    if loaded.parent != prior.parent:
        raise UserError(f"the decoder and the prior in {run} stand on different first stages; "
                        "train one of them again, or give --decoder vanilla")
    return loaded.model


def decoder_name(model):
    """What open_decoder gave, in words."""
    return "ours, without a mask" if isinstance(model, AsymVQGAN) else "the first stage's decoder"


# -- measuring -------------------------------------------------------------------------------------


@dataclass
class Reference:
    """What FID is measured with and against."""

    inception:  InceptionV3
    statistics: FeatureStatistics       # of n pictures of the data set
    n:          int

    def features(self, x):
        """(B,3,H,W) in about [-1,1] -> (B,2048)."""
        return self.inception(x.clamp(-1, 1))[0].cpu()


def open_reference(inception, dataset, n, batch_size, device):
    """The Reference of the first n pictures of a data set."""
    reference = Reference(inception, FeatureStatistics(FEATURES), n)
    for pictures in originals(dataset, n, batch_size, device):
        reference.statistics.update(reference.features(pictures.x))
    return reference


def measure(prior, model, drawing, n, reference=None):
    """(a row of the table of steps, the first n samples (n,3,H,W) on the CPU). [DDM Fig. 5]

    model: open_decoder's. The row: {"n": steps, "sampler", "seconds": of one batch's codes, "nats":
    the prior's own bound of the first n samples, a map, "fid": of as many samples as the reference
    has pictures, or None}.
    """
    total = max(n, reference.n if reference else 0)
    shown, nats, seconds, statistics = [], 0.0, 0.0, FeatureStatistics(FEATURES)
    progress = Progress(str(drawing), 0, len(shares(total, drawing.batch_size)), drawing.batch_size)
    for positions, codes, took in drawing.batches(prior, total):
        x_hat = model.decode(prior.first_stage.quantize.lookup(codes))              # (b, 3, H, W)
        seconds, first = seconds + took, positions[0]
        if first < n:
            shown.append(x_hat[:n - first].cpu())
            codes = codes[:n - first]
            nats += held_out_bound(prior.diffusion, prior.unet, codes, first).sum().item()
        if reference and first < reference.n:
            statistics.update(reference.features(x_hat[:reference.n - first]))
        progress.show(first // drawing.batch_size + 1, {})
    progress.close()
    row = {"n": drawing.steps, "sampler": drawing.sampler,
           "seconds": seconds / total * min(drawing.batch_size, total), "nats": nats / n,
           "fid": statistics.frechet(reference.statistics) if reference else None}
    return row, torch.cat(shown)                                                    # (n, 3, H, W)


# -- the program -----------------------------------------------------------------------------------


def main():
    args = _parser().parse_args()
    _check(args)
    device, path, out = setup(args.device), Path(args.run), Path(args.output)
    if world_size() > 1:
        raise UserError("sample.py works in one process: start it without torchrun; eval.py RUN "
                        "--table 6 measures samples in several")
    prior = load_prior(path, device)
    model = open_decoder(path, prior, args.decoder)
    make_folder(out.parent, "-o")
    samplers = SAMPLERS if args.sampler == "both" else (args.sampler,)
    drawings = [Drawing(steps, sampler, args.temperature, args.seed, args.batch_size)
                for steps in _steps(args.steps, prior.diffusion.T) for sampler in samplers]
    if not prior.finished:
        print0(f"the prior in {path} is not finished (step {prior.step})")
    print0(f"{args.n} samples of {path}, decoded by {decoder_name(model)}, on {device.type}: "
           f"{'; '.join(map(str, drawings))}. The picture goes to {out}")
    with exact_float32(), torch.inference_mode():
        reference, note = _reference(args, prior, device)
        measured = [measure(prior, model, drawing, args.n, reference) for drawing in drawings]
    rows, pictures = zip(*measured)
    batch_size = min(args.batch_size, max(args.n, reference.n if reference else 0))
    held_out = prior.facts.get("score")
    print0(f"\n{steps_table(rows, batch_size)}\n\nnats a map: the prior's own bound, less is "
           "likelier and may be too much alike"
           + (f"; held-out pictures: {held_out:,.1f}" if held_out else "") + f"\nFID: {note}")
    groups = [(str(drawing), list(shown)) for drawing, shown in zip(drawings, pictures)]
    image_rows(groups, out, across=math.isqrt(args.n - 1) + 1 if len(groups) == 1 else None)
    write_text(out.with_suffix(".json"), json.dumps({
        "version": 1, "command": shlex.join(["python", *sys.argv]), "run": str(path),
        "device": device.type, "seed": args.seed, "n": args.n, "batch_size": batch_size,
        "temperature": args.temperature, "decoder": decoder_name(model), "steps": rows,
        "held_out_nats": held_out, "notes": {"fid": note}}, indent=1, allow_nan=False) + "\n")
    print0(f"wrote {out}, {out.with_suffix('.json')}")


def _reference(args, prior, device):
    """(Reference or None, what there is to say of it)."""
    config = prior.config
    if not args.fid_n:
        return None, "not computed: --fid-n N measures it with N samples"
    dataset = open_dataset(config["data"], args.root or config["root"], args.against,
                           config["size"])
    if args.fid_n > len(dataset):
        raise UserError(f"--fid-n {args.fid_n}: there are {len(dataset):,} pictures to compare "
                        "with; give at most so many, or another --against")
    try:
        inception = InceptionV3(args.weights or config.get("weights")).to(device)
    except UserError as error:
        return None, f"n/a: {error}"
    return (open_reference(inception, dataset, args.fid_n, args.batch_size, device),
            f"of {args.fid_n:,} samples against the first {args.fid_n:,} of {dataset.describe()}")


def _steps(text, T):
    """The numbers of --steps, in order, each once. Raises UserError."""
    if text is None:
        return [chosen_steps(None, T)]
    words = [word.strip() for word in text.split(",")]
    numbers = [T if word == "T" else int(word) if word.isdecimal() else 0 for word in words]
    return list(dict.fromkeys(chosen_steps(number, T) for number in numbers))


def _check(args):
    """Raise UserError for values out of range."""
    for flag, value, least in (("-n", args.n, 1), ("--batch-size", args.batch_size, 1),
                               ("--seed", args.seed, 0), ("--fid-n", args.fid_n, 0)):
        if value < least:
            raise UserError(f"{flag} {value}: give a number from {least} on")
    if args.fid_n == 1:
        raise UserError("--fid-n 1: a distance of distributions needs at least 2 samples")
    if not 0 < args.temperature < math.inf:
        raise UserError(f"--temperature {args.temperature}: must be positive")
    if Path(args.output).suffix.lower() != ".png":
        raise UserError(f"-o {args.output}: the picture is a PNG; give a name that ends in .png")


def _parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Samples of a run's prior, decoded; for several --steps, the table of quality "
                    "and time.")
    add = parser.add_argument
    add("--run", metavar="RUN", required=True,
        help="a run folder of train.py with a prior, or the prior's file")
    add("-n", type=int, default=16, metavar="N", help="samples in the picture (default: 16)")
    add("-o", dest="output", default="samples.png", metavar="FILE",
        help="the picture (default: samples.png); the table's numbers go beside it, as .json")
    add("--steps", metavar="S[,S...]",
        help=f"reverse steps, 1 to T, or a list of such numbers (default: {STEPS}; T where that "
             "is less)")
    add("--sampler", choices=(*SAMPLERS, "both"), default="strided",
        help="strided: the paper's, between the steps that are kept; route: the surest cells "
             "first (default: strided)")
    add("--temperature", type=float, default=1.0, metavar="TAU",
        help="below 1 likelier and less diverse (default: 1)")
    add("--seed", type=int, default=0, help="sample i is a function of it and i (default: 0)")
    add("--decoder", choices=("asym", "vanilla"),
        help="asym: the run's own, without a mask; vanilla: the first stage's (default: asym "
             "where the run has one)")
    add("--fid-n", type=int, default=0, metavar="N",
        help="measure FID with N samples against as many pictures (default: 0, none)")
    add("--against", choices=("val", "train"), default="val",
        help="which pictures of the run's data set: held out, or seen (default: val)")
    add("--root", metavar="DIR", help="their folder (default: the run's --root)")
    add("--weights", metavar="DIR",
        help="folder of the Inception network's file (default: the run's --weights, else torch "
             "hub's cache)")
    add("--batch-size", type=int, default=16, metavar="B", help="samples at once (default: 16)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    return parser


if __name__ == "__main__":
    exit_on_user_error(main)
