"""Compare priors that start from the codebook's axes with priors that start at random (D48).

    python benchmarks/code_start.py --run RUN -o FOLDER [--seeds 0 1] [--steps 2000] [-n 128]

train.py's stage prior trains each on the first stage of RUN, in a folder of FOLDER; finished ones
are not trained again. Both starts of a seed see the same maps in the same order. The table has the
bound over all t on the same n held-out maps, in nats for a map, and the paired difference.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from convert import load_first_stage, load_prior
from data import open_dataset, pixels, views
from diffusion import held_out_bound
from metrics import describe
from paper_tables import markdown, with_error
from quantize import exact_float32
from recipes import RECIPES

BATCH = 16


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="whose first stage gives the codes")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/code-start"),
                        help="folder of the trained priors (runs/code-start)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of training (0 1)")
    parser.add_argument("--steps", type=int, help="of each prior (the recipe's)")
    parser.add_argument("-n", type=int, default=128, help="held-out maps (128)")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="which (val)")
    return parser.parse_args(argv)


def trained(args, config, seed, code_start):
    """Train a prior, or take the finished one: Loaded, as load_prior gives it."""
    out = args.out / f"{'codes' if code_start else 'random'}-{seed}"
    flags = {"stage": "prior", "preset": "tiny", "vqgan": args.run, "out": out, "seed": seed,
             "device": "cpu", "steps": args.steps}
    flags |= {key: config.get(key) for key in ("data", "root", "size", "perceptual")}
    sys.argv = ["train.py", *(f"--{key}={v}" for key, v in flags.items() if v is not None)]
    recipe = replace(RECIPES["prior"]["tiny"], code_start=code_start)
    with patch.dict(RECIPES["prior"], tiny=recipe), patch.object(train, "report_unless_there"):
        train.main()
    return load_prior(out)


@torch.no_grad()
def bounds(prior, dataset, n):
    """Bound each of n held-out maps over all t, the noise the same for all priors: (n) nats."""
    nats = []
    for index, image in zip(starts := range(0, n, BATCH),
                            views(dataset, [range(i, min(i + BATCH, n)) for i in starts])):
        maps = prior.first_stage.indices(pixels(image, prior.device))       # (b, h, w)
        nats.append(held_out_bound(prior.diffusion, prior.unet, maps, index))
    return torch.cat(nats)                                                  # (n)


def main(argv=None):
    args = arguments(argv)
    torch.set_num_threads(1)
    config, rows = load_first_stage(args.run).config, []
    for seed in args.seeds:
        priors = [trained(args, config, seed, code_start) for code_start in (True, False)]
        dataset = open_dataset(config["data"], config["root"], args.split, config["size"])
        n = min(args.n, len(dataset))
        with exact_float32():
            ours, random = (bounds(prior, dataset, n) for prior in priors)
        cells = [describe(zip(values.tolist(), range(n))) for values in
                 (ours, random, ours - random)]
        rows.append([str(seed), *(with_error(mean, error or 0) for mean, error, _ in cells)])
    print(f"\n{n} held-out maps of {dataset.describe()}\n")
    print(markdown(["seed", "from the codes", "at random", "difference, paired"], rows))


if __name__ == "__main__":
    main()
