"""Draw samples by VQ-DDM's prior, measure its bound and what fewer reverse steps cost.

    python sample.py --run RUN -n 16 -o samples.png
    python sample.py --run RUN -n 64 --steps 1,4,10,25,100         as DDM's Fig. 5 and 6
    python sample.py --run RUN -n 1000 -o FOLDER/ --decoder asym   one PNG each, for eval.py --pred

    (seed, i) --sample_codes--> codes (h,w) --lookup--> z (d,h,w) --decoder--> x_hat (3,H,W)

Sample i depends on (seed, i) alone, so with several --steps all rows start from the same noise.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from asym_decoder import AsymVQGAN
from convert import DEFAULT_STEPS, SMALL_RUN, chosen_steps, load, load_prior, run_of
from data import pixels, views
from diffusion import frequency_nats, held_out_bound
from distributed import UserError, end_at_once, exit_on_user_error, print0, setup, wait_for
from metrics import describe
from paper_tables import steps_table
from pictures import image_rows
from quantize import exact_float32
from run_folder import Progress, make_folder
from seeding import SAMPLE, keyed_generators

BOUND_MAPS = 128         # most maps of each kind for measure_bound


def sample_codes(prior, positions, steps, seed=0):
    """Draw the codes of samples `positions` by a convert.Prior: (B,h,w). [DDM Fig. 7]"""
    generators = keyed_generators((SAMPLE, seed, i) for i in positions)
    return prior.diffusion.sample(prior.unet, (len(positions), *prior.grid), steps, generators,
                                  device=prior.device)


def draw_samples(prior, model, steps, n, seed=0, batch_size=16):
    """Yield batches of samples: (positions, codes (b,h,w), x_hat (b,3,H,W), seconds of codes)."""
    sample_codes(prior, range(min(batch_size, n)), 1, seed)    # warms up the device, untimed
    progress = Progress(f"{steps} steps", 0, math.ceil(n / batch_size), batch_size)
    for done, first in enumerate(range(0, n, batch_size), 1):
        positions = range(first, min(first + batch_size, n))
        wait_for(prior.device)
        start = time.perf_counter()
        codes = sample_codes(prior, positions, steps, seed)                         # (b, h, w)
        wait_for(prior.device)
        seconds = time.perf_counter() - start
        yield positions, codes, model.decode(prior.first_stage.quantize.lookup(codes)), seconds
        progress.show(done, {})
    progress.close()


def measure_steps(prior, model, steps, n, seed=0, batch_size=16):
    """Measure samples 0..n-1, drawn in each number of `steps`. [DDM Fig. 5]

    Returns (rows, [images (n,3,H,W) of each row]). The figure has FID for nats.  deviation D51
    row: {"n": steps, "maps": n, "seconds": for the codes of one batch, "nats": the bound per map,
    "more": what it lies above that of the same samples in the most steps; "..._se": standard error}
    """
    rows, pictures, bounds = [], [], []
    for number in steps:
        images, nats, seconds = [], [], 0.0
        for at, codes, x_hat, took in draw_samples(prior, model, number, n, seed, batch_size):
            seconds += took
            nats.append(held_out_bound(prior.diffusion, prior.unet, codes, at.start))
            images.append(x_hat.cpu())
        pictures.append(torch.cat(images))                                          # (n, 3, H, W)
        bounds.append(torch.cat(nats))                                              # (n)
        rows.append({"n": number, "maps": n, "seconds": seconds / n * min(batch_size, n)})
    most = bounds[steps.index(max(steps))]
    for row, nats in zip(rows, bounds):
        for name, values in (("nats", nats), ("more", nats - most)):
            row[name], row[f"{name}_se"], _ = describe(zip(values.tolist(), range(n)))
    return rows, pictures


def measure_bound(prior, codes, dataset, n=BOUND_MAPS, batch_size=16):
    """Measure the nats of a map under the prior and under models without a network. [DDM Sec. 4.3]

    codes: the prior's training maps (N,h,w), or None. Returns mean and standard error, "vlb_nats"
    and "vlb_se", "unigram_..." and "histogram_..." (frequency_nats) over n images of the dataset,
    and "train_vlb_..." over n training maps by the same estimator: far less means overfitting.
    """
    n, K = min(n, BOUND_MAPS, len(dataset)), prior.diffusion.K
    spread = [i * len(dataset) // n for i in range(n)]
    images = views(dataset, [spread[i:i + batch_size] for i in range(0, n, batch_size)])
    maps = torch.cat([prior.first_stage.indices(pixels(image, prior.device)) for image in images])
    found = {}                                                                      # (n) each
    if codes is not None:
        found = frequency_nats(codes, maps.cpu().numpy(), K)
        some = codes[[i * len(codes) // n for i in range(n)]].astype(np.int64)      # (n, h, w)
        maps = torch.cat([maps, torch.from_numpy(some).to(prior.device)])           # (2n, h, w)
    nats, parts = [], maps.split(batch_size)
    progress = Progress("bound", 0, len(parts), batch_size)
    for done, part in enumerate(parts):
        nats.append(held_out_bound(prior.diffusion, prior.unet, part, done * batch_size))
        progress.show(done + 1, {})
    progress.close()
    found |= zip(("vlb", "train_vlb"), torch.cat(nats).split(n))
    facts = {"maps": n, "uniform_nats": maps[0].numel() * math.log(K)}
    for name, values in found.items():
        facts[f"{name}_nats"], facts[f"{name}_se"], _ = describe(zip(values.tolist(), range(n)))
    return facts


def open_decoder(path, prior, choice=None):
    """Load the AsymVQGAN or VQGAN that decodes the codes of `path`'s prior. [AVQ Fig. 7]

    choice: "asym", the run's own decoder; "vanilla", the first stage's; None: "asym" if it exists.
    """
    run = run_of(Path(path))
    has_own = any((run / "decoder" / name).exists() for name in ("last.pt", "previous.pt"))
    if choice == "vanilla" or (choice is None and not has_own):
        return prior.first_stage
    if not has_own:
        raise UserError(f"--decoder asym: {run} has none; train one, or give --decoder vanilla")
    loaded = load(run, prior.device)
    if loaded.parent != prior.parent:
        raise UserError(f"{run}: decoder and prior have different first stages; train one of "
                        "them again, or give --decoder vanilla")
    return loaded.model


def decoder_name(model):
    return "ours, without a mask" if isinstance(model, AsymVQGAN) else "the first stage's decoder"


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(
        "Draw and decode samples by RUN's prior. With a PNG as -o, print what the --steps cost."))
    add = parser.add_argument
    add("--run", metavar="RUN", default=SMALL_RUN,
        help="a run folder with a prior, or a prior's file (default: notebooks/run, the demo's)")
    add("-n", type=int, default=16, metavar="N", help="number of samples (default: 16)")
    add("-o", dest="output", default="samples.png", metavar="FILE.png|FOLDER/",
        help="one picture of all, or a folder with one PNG each (default: samples.png)")
    add("--steps", metavar="S[,S...]", help=f"reverse steps, one number with a FOLDER/, several to "
        f"compare them (default: {DEFAULT_STEPS}, or T if less)")
    add("--seed", type=int, default=0, help="sample i depends on it and i alone (default: 0)")
    add("--decoder", choices=("asym", "vanilla"),
        help="the run's own or the first stage's (default: asym if the run has one)")
    add("--batch-size", type=int, default=16, metavar="B", help="samples at once (default: 16)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    args = parser.parse_args()
    end_at_once()
    if min(args.n, args.batch_size) < 1 or args.seed < 0:
        raise UserError("-n and --batch-size are at least 1, --seed at least 0")
    device, out = setup(args.device), Path(args.output)
    prior = load_prior(args.run, device)
    numbers = [None] if args.steps is None else [
        int(word) if word.strip().isdecimal() else 0 for word in args.steps.split(",")]
    steps = [chosen_steps(number, prior.diffusion.T) for number in dict.fromkeys(numbers)]
    model = open_decoder(args.run, prior, args.decoder)
    if not prior.finished:
        print0(f"warning: training of the prior in {args.run} is not finished (step {prior.step})")
    print0(f"{args.n} samples of {args.run}, decoded by {decoder_name(model)}, in "
           f"{', '.join(map(str, steps))} of {prior.diffusion.T:,} steps, on {device.type}")

    # Write a folder of PNGs for eval.py --pred, or one picture and a table of steps.
    if args.output.endswith("/") or out.is_dir() or not out.suffix:
        if len(steps) > 1 or any(make_folder(out, "-o").iterdir()):
            raise UserError(f"-o {out}: give an empty folder and one --steps, or a .png")
        with exact_float32(), torch.inference_mode():
            drawn = draw_samples(prior, model, *steps, args.n, args.seed, args.batch_size)
            for positions, _, x_hat, _ in drawn:
                pictures = ((x_hat.clamp(-1, 1) + 1) / 2 * 255).round().byte()      # (b, 3, H, W)
                for i, picture in zip(positions, pictures.permute(0, 2, 3, 1).cpu().numpy()):
                    Image.fromarray(picture).save(out / f"{i:05}.png")
    else:
        if out.suffix.lower() != ".png":
            raise UserError(f"-o {out}: give a .png, or a folder: FOLDER/")
        make_folder(out.parent, "-o")
        with exact_float32(), torch.inference_mode():
            rows, images = measure_steps(prior, model, steps, args.n, args.seed, args.batch_size)
        across = math.isqrt(args.n - 1) + 1 if len(steps) == 1 else None
        image_rows([(f"{S} steps", list(shown)) for S, shown in zip(steps, images)], out, across)
        print0(f"\n{steps_table(rows, min(args.batch_size, args.n))}\n\nnats per map: the prior's "
               "own bound on -log p(codes). Far less than held-out images have, which eval.py "
               "measures, may mean too little variety.")
    print0(f"wrote {out}")


if __name__ == "__main__":
    exit_on_user_error(main)
