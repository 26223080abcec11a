"""Show why known pixels are kept, or not: the last GroupNorm's statistics, and what mends them.

    python benchmarks/known_pixels.py --run RUN -o FOLDER        trains the variants, table, picture
    python benchmarks/known_pixels.py --constants                no training: the error against D

**Constants.** Known pixels pass one convolution, the blend, GroupNorm, SiLU and one convolution.
Here their weights are set by hand. A group holds a colour s, -s and the constants D, -D. Because
SiLU(u) - SiLU(-u) = u, the path is exact but for the group's deviation sqrt((mean s² + D²)/2),
which differs between images. What differs falls as 1/D², so the squared error falls as 1/D⁴.

**Variants.** Each change of the pinned start alone and together, on the first stage of RUN, by
train.py's stage decoder in a folder of FOLDER; finished ones are not trained again. Columns, over
held-out images: errors of known pixels with a mask and with all known, in 1e-5, images in [0,1];
the share of the first within 1 px of the hole; L1 without a mask, and in the hole with one, images
in [-1,1]; the spread of the last GroupNorm's deviations: standard deviation over images divided by
the mean, of the group where it is largest.
"""

import argparse
import re
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import convert
import train
import train_autoencoder
from asym_decoder import AsymDecoder, ConditionBranch
from convert import load, load_first_stage
from data import Signs, held_out_batches, open_dataset
from metrics import describe, pre_error
from paper_tables import markdown, with_error
from quantize import exact_float32
from recipes import RECIPES

CPU, BATCH = torch.device("cpu"), 16
SIZES = (0.5, 1, 2, 4, 8)                                # D of --constants; colours are in [-1,1]
NO_CONSTANTS = {"pin_statistics": lambda run, model: None}      # in train_autoencoder


class GatedDecoder(AsymDecoder):
    """Concatenate [h·m, f_E, m] at every level, so that h is off at known pixels, as in Eq. 4."""

    def _blend(self, index, h, conditions):
        if conditions is not None:
            h = h * conditions[index][1].to(h.dtype)                    # (B, C, h, w)
        return super()._blend(index, h, conditions)


class PassingDecoder(AsymDecoder):
    """Start each fusion as h + f_E in place of h + W f_E, W random."""

    def pass_trunk(self):
        super().pass_trunk()
        for fuse in self.fuse:
            width = len(fuse.weight)
            torch.nn.init.dirac_(fuse.weight[:, width:2 * width])       # of [h, f_E, m]: f_E


class GatedPassingDecoder(PassingDecoder, GatedDecoder):
    """Both, so that known pixels start from f_E alone, as in Eq. 4."""


class PartialDecoder(AsymDecoder):
    """Add, as ever, but with the partial convolutions of "concat" in the branch."""

    def __init__(self, config, ch, num_res_blocks, blend):
        super().__init__(config, ch, num_res_blocks, blend)
        self.encoder = ConditionBranch([ch * config.ch_mult[0], *self.in_widths], partial=True)


# Changes of the tiny recipe, of train_autoencoder's names, and the blend.
VARIANTS = {
    "plain (the paper's code)": ({"start": "plain"}, NO_CONSTANTS, "add"),
    "rates only": ({}, NO_CONSTANTS, "add"),
    "constants only": ({"known_factor": 1.0}, {}, "add"),
    "pinned: both": ({}, {}, "add"),
    "plain, l2": ({"start": "plain", "pixel": "l2"}, NO_CONSTANTS, "add"),
    "constants only, l2": ({"known_factor": 1.0, "pixel": "l2"}, {}, "add"),
    "pinned, l2": ({"pixel": "l2"}, {}, "add"),
    "partial": ({}, {"AsymDecoder": PartialDecoder}, "add"),
    "concat": ({}, {}, "concat"),
    "concat, gated": ({}, {"AsymDecoder": GatedDecoder}, "concat"),
    "concat, f passed": ({}, {"AsymDecoder": PassingDecoder}, "concat"),
    "concat, gated, f passed": ({}, {"AsymDecoder": GatedPassingDecoder}, "concat"),
}


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="the run whose first stage is decoded")
    parser.add_argument("--constants", action="store_true", help="print the error against D only")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS),
                        metavar="NAME", help=f"some of {', '.join(VARIANTS)} (all)")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/known-pixels"),
                        help="folder of the runs and the picture (runs/known-pixels)")
    parser.add_argument("-n", type=int, default=128, help="held-out images")
    parser.add_argument("--split", default="val", choices=("val", "test"))
    parser.add_argument("--steps", type=int, help="of each variant (the recipe's)")
    parser.add_argument("--seed", type=int, help="of each variant (the run's)")
    parser.add_argument("--size", type=int, help="side of the images (the run's; 64)")
    return parser.parse_args(argv)


# -- constants -------------------------------------------------------------------------------------


def by_hand(x, mask, D, deviation):
    """Pass known pixels through a path set by hand: x_hat (B,3,H,W), right only where mask is 0.

    deviation: (3), what the weights after the norm take each group's deviation to be.
    """
    colour = x * (1 - mask) + F.avg_pool2d(x, 9, 1, 4) * mask           # a blurred hole, (B,3,H,W)
    constant = torch.full_like(colour, D)
    h = torch.stack([colour, -colour, constant, -constant], 2)          # (B, 3, 4, H, W)
    h = F.silu(F.group_norm(h.flatten(1, 2), 3, eps=1e-6)).unflatten(1, (3, 4))
    return deviation[:, None, None] * (h[:, :, 0] - h[:, :, 1])         # (B, 3, H, W)


def constants(dataset, n):
    """Measure the path by hand on n images: {D: (mean, standard error)} of pre_error."""
    found = {D: [] for D in SIZES}
    batches = list(held_out_batches(dataset, n, BATCH, CPU))
    colours = torch.cat([batch.x for batch in batches]).square().mean((2, 3))       # (n, 3)
    for D in SIZES:
        deviation = ((colours + D * D) / 2).sqrt().mean(0)              # (3), the mean over images
        for batch in batches:
            found[D] += pre_error(by_hand(batch.x, batch.mask, D, deviation), batch.x,
                                  batch.mask).tolist()
    return {D: describe(zip(values, range(n)))[:2] for D, values in found.items()}


# -- variants --------------------------------------------------------------------------------------


@contextmanager
def variant(changes, names):
    """Let train.py train by a changed tiny recipe and other objects behind names."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(train, "report_unless_there"))     # measured here
        recipe = replace(RECIPES["decoder"]["tiny"], **changes)
        stack.enter_context(patch.dict(RECIPES["decoder"], tiny=recipe))
        for name, value in names.items():
            for module in (train_autoencoder, convert):
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, value))
        yield


def trained(name, args, config):
    """Train a variant, or take the finished one: (AsymVQGAN, minutes or None)."""
    out, start = args.out / re.sub(r"\W+", "-", name), time.process_time()
    changes, names, blend = VARIANTS[name]
    with variant(changes, names):
        if not (out / "decoder" / "last.pt").exists() or not load(out).finished:
            flags = {"stage": "decoder", "preset": "tiny", "vqgan": args.run, "out": out,
                     "device": "cpu", "steps": args.steps, "workers": 0, "blend": blend}
            flags |= {key: config.get(key) for key in ("data", "root", "size", "seed",
                                                       "perceptual", "weights", "precision")}
            flags["size"] = args.size or flags["size"]
            flags["seed"] = flags["seed"] if args.seed is None else args.seed
            sys.argv = ["train.py", *(f"--{key}={v}" for key, v in flags.items() if v is not None)]
            train.main()
            return load(out).model, (time.process_time() - start) / 60
        return load(out).model, None


@torch.no_grad()
def measure(model, dataset, n):
    """Measure one decoder: {column: values (n)}, and the deviations (n,G) of its last norm."""
    values, deviations, decoder = {}, [], model.decoder
    for batch in held_out_batches(dataset, n, BATCH, CPU):
        x, mask, z = batch.x, batch.mask, model.encode(batch.x)
        with_mask, without = model.decode(z, image=x, mask=mask), model.decode(z)
        known = model.decode(z, image=x, mask=torch.zeros_like(mask))
        errors = [(y.clamp(-1, 1) - x).abs() for y in (without, with_mask)]
        squared, near = errors[1].square() * (1 - mask), F.max_pool2d(mask, 3, 1, 1)
        for name, column in {"with mask": 1e5 * pre_error(with_mask, x, mask),
                             "of it at the hole, %": 100 * (squared * near).sum((1, 2, 3))
                             / squared.sum((1, 2, 3)),
                             "all known": 1e5 * pre_error(known, x, torch.zeros_like(mask)),
                             "L1 without mask": errors[0].mean((1, 2, 3)),
                             "L1 in the hole": (errors[1] * mask).sum((1, 2, 3))
                             / (3 * mask.sum((1, 2, 3)))}.items():
            values.setdefault(name, []).extend(column.tolist())
        h = decoder.blended(model.first_stage.post_quant_conv(z), x, mask)          # (B, ch, H, W)
        groups = h.unflatten(1, (decoder.norm_out.num_groups, -1)).flatten(2)
        deviations.append(groups.std(2, correction=0))                              # (B, G)
    return values, torch.cat(deviations)


def plot(by_D, spreads, path):
    """Draw the error against D, and the deviations of plain and pinned, divided by their mean."""
    from matplotlib.figure import Figure
    figure = Figure((9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    D, mean = list(by_D), [each[0] for each in by_D.values()]
    left.loglog(D, mean, "o-", color="C0", label="measured")
    left.loglog(D, [mean[2] * (D[2] / d) ** 4 for d in D], "--", color="0.5", label="1/D⁴")
    left.set(xlabel="constants D on two channels of a group (colours in [-1,1])",
             ylabel="error of known pixels, [0,1]", title="weights set by hand: error against D")
    left.set_xticks(D, [f"{d:g}" for d in D])
    left.set_xticks([], minor=True)
    left.legend(frameon=False)
    for row, (name, values) in enumerate(spreads.items()):
        ratio = (values / values.mean(0)).flatten()                                 # (n·G)
        right.hist(ratio, bins=60, range=(0.6, 1.4), density=True, histtype="stepfilled",
                   alpha=0.6, color=f"C{row + 1}", label=name)
    right.set(xlabel="a group's deviation in an image / its mean", yticks=[],
              title="trained decoders: the last GroupNorm's deviations")
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv=None):
    args = arguments(argv)
    torch.set_num_threads(1)
    config = load_first_stage(args.run).config if args.run else {}
    size = args.size or config.get("size", 64)
    dataset = (open_dataset(config["data"], config["root"], args.split, size) if args.run
               else Signs(args.split, size))
    with exact_float32():
        by_D = constants(dataset, args.n)
        rows = [[f"{D:g}", with_error(1e5 * mean, 1e5 * (error or 0))]
                for D, (mean, error) in by_D.items()]
        print(f"{args.n} images of {dataset.describe()}, {size} px\n")
        print(markdown(["D", "pre_error/1e-5"], rows), flush=True)
        if args.constants or not args.run:
            return
        rows, spreads = [], {}
        for name in args.variants:
            model, minutes = trained(name, args, config)
            values, deviations = measure(model, dataset, args.n)
            if name.startswith(("plain (", "pinned: ")):
                spreads[name] = deviations
            columns = {key: describe(zip(column, range(len(column)))) for key, column in
                       values.items()}
            rows.append([name, *(with_error(mean, error) for mean, error, _ in columns.values()),
                         f"{(deviations.std(0) / deviations.mean(0)).max():.3f}",
                         "" if minutes is None else f"{minutes:.1f}"])
        print("\n" + markdown(["decoder", *columns, "spread", "minutes"], rows))
    if spreads:
        plot(by_D, spreads, args.out / "pinned.png")
        print(f"\nwrote {args.out / 'pinned.png'}")


if __name__ == "__main__":
    main()
