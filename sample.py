"""Draw pictures from nothing by VQ-DDM's prior, and see what fewer steps cost.

    python sample.py --run RUN -n 16 -o samples.png
    python sample.py --run RUN -n 64 --steps 1,4,10,25,100         DDM Fig. 5 and 6
    python sample.py --run RUN -n 1000 -o FOLDER/ --decoder asym   a PNG each, for eval.py --pred

    (seed, i) --draw_codes--> codes (h,w) --lookup--> z (d,h,w) --decoder--> x_hat (3,H,W)

Sample i is a function of (seed, i) alone: all rows of a picture begin with the same noise.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from PIL import Image

from asym_decoder import AsymVQGAN
from convert import STEPS, chosen_steps, load, load_prior, run_of
from diffusion import held_out_bound
from distributed import UserError, exit_on_user_error, print0, setup, wait_for
from paper_tables import steps_table
from pictures import image_rows
from quantize import exact_float32
from run_folder import Progress, make_folder
from seeding import SAMPLE, keyed_generators


def draw_codes(prior, positions, steps, seed=0):
    """Draw the codes of samples `positions` by a convert.Prior: (B,h,w), on its device."""
    generators = keyed_generators((SAMPLE, seed, i) for i in positions)
    return prior.diffusion.sample(prior.unet, (len(positions), *prior.grid), steps, generators,
                                  device=prior.device)


def draw(prior, model, steps, n, seed=0, batch_size=16):
    """Yield (positions, codes (b,h,w), x_hat (b,3,H,W), seconds that the codes took) by batches."""
    draw_codes(prior, range(min(batch_size, n)), 1, seed)      # what a device does once, untimed
    progress = Progress(f"{steps} steps", 0, math.ceil(n / batch_size), batch_size)
    for done, first in enumerate(range(0, n, batch_size), 1):
        positions = range(first, min(first + batch_size, n))
        wait_for(prior.device)
        start = time.perf_counter()
        codes = draw_codes(prior, positions, steps, seed)                           # (b, h, w)
        wait_for(prior.device)
        seconds = time.perf_counter() - start
        yield positions, codes, model.decode(prior.first_stage.quantize.lookup(codes)), seconds
        progress.show(done, {})
    progress.close()


def measure(prior, model, steps, n, seed=0, batch_size=16):
    """Measure what samples 0..n-1 cost in `steps`: (row, images (n,3,H,W)). [DDM Fig. 5]

    row: {"n": steps, "seconds": of one batch's codes, "nats": the prior's own bound, a map}.
    """
    images, nats, seconds = [], 0.0, 0.0
    for positions, codes, x_hat, took in draw(prior, model, steps, n, seed, batch_size):
        seconds += took
        nats += held_out_bound(prior.diffusion, prior.unet, codes, positions.start).sum().item()
        images.append(x_hat.cpu())
    row = {"n": steps, "seconds": seconds / n * min(batch_size, n), "nats": nats / n}
    return row, torch.cat(images)                                                   # (n, 3, H, W)


def open_decoder(path, prior, choice=None):
    """Load the AsymVQGAN or VQGAN whose `decode` makes pictures of the codes of `path`'s prior.

    choice: "asym", the run's own; "vanilla", the first stage's; None: the run's own if there.
    """
    run = run_of(Path(path))
    there = any((run / "decoder" / name).exists() for name in ("last.pt", "previous.pt"))
    if choice == "vanilla" or (choice is None and not there):
        return prior.first_stage
    if not there:
        raise UserError(f"--decoder asym: {run} has none; train one, or give --decoder vanilla")
    loaded = load(run, prior.device)
    if loaded.parent != prior.parent:
        raise UserError(f"{run}: decoder and prior stand on different first stages; train one of "
                        "them again, or give --decoder vanilla")
    return loaded.model


def decoder_name(model):
    return "ours, without a mask" if isinstance(model, AsymVQGAN) else "the first stage's decoder"


def main():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Samples of a run's prior; what fewer --steps cost.")
    add = parser.add_argument
    add("--run", metavar="RUN", required=True, help="a run folder with a prior, or a prior's file")
    add("-n", type=int, default=16, metavar="N", help="samples (default: 16)")
    add("-o", dest="output", default="samples.png", metavar="FILE.png|FOLDER/",
        help="a picture of all, or a folder with a PNG each (default: samples.png)")
    add("--steps", metavar="S[,S...]", help=f"reverse steps (default: {STEPS}, or T if less)")
    add("--seed", type=int, default=0, help="sample i is a function of it and i (default: 0)")
    add("--decoder", choices=("asym", "vanilla"), help="(default: asym if the run has one)")
    add("--batch-size", type=int, default=16, metavar="B", help="samples at once (default: 16)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    args = parser.parse_args()
    if min(args.n, args.batch_size) < 1 or args.seed < 0:
        raise UserError("-n and --batch-size are at least 1, --seed at least 0")
    device, out, drawing = setup(args.device), Path(args.output), (args.seed, args.batch_size)
    prior = load_prior(args.run, device)
    numbers = [None] if args.steps is None else [
        int(word) if word.strip().isdecimal() else 0 for word in args.steps.split(",")]
    steps = [chosen_steps(number, prior.diffusion.T) for number in dict.fromkeys(numbers)]
    model = open_decoder(args.run, prior, args.decoder)
    if not prior.finished:
        print0(f"warning: the prior in {args.run} is not trained to its end (step {prior.step})")
    print0(f"{args.n} samples of {args.run}, decoded by {decoder_name(model)}, in "
           f"{', '.join(map(str, steps))} of {prior.diffusion.T:,} steps, on {device.type}")

    # Write a folder of PNGs, as eval.py --pred takes it, or a picture with a table of steps.
    if args.output.endswith("/") or out.is_dir() or not out.suffix:
        if len(steps) > 1 or any(make_folder(out, "-o").iterdir()):
            raise UserError(f"-o {out}: give an empty folder and one --steps, or a .png")
        with exact_float32(), torch.inference_mode():
            for positions, _, x_hat, _ in draw(prior, model, *steps, args.n, *drawing):
                pictures = ((x_hat.clamp(-1, 1) + 1) / 2 * 255).round().byte()      # (b, 3, H, W)
                for i, picture in zip(positions, pictures.permute(0, 2, 3, 1).cpu().numpy()):
                    Image.fromarray(picture).save(out / f"{i:05}.png")
    else:
        if out.suffix.lower() != ".png":
            raise UserError(f"-o {out}: give a .png, or a folder: FOLDER/")
        make_folder(out.parent, "-o")
        with exact_float32(), torch.inference_mode():
            rows, images = zip(*(measure(prior, model, S, args.n, *drawing) for S in steps))
        score = prior.facts.get("score")
        print0(f"\n{steps_table(rows, min(args.batch_size, args.n))}\n\nnats a map: the prior's "
               "own bound; less is likelier, and may be too much alike"
               + (f"; held-out pictures: {score:,.1f}" if score else ""))
        across = math.isqrt(args.n - 1) + 1 if len(steps) == 1 else None
        image_rows([(f"{S} steps", list(shown)) for S, shown in zip(steps, images)], out, across)
    print0(f"wrote {out}")


if __name__ == "__main__":
    exit_on_user_error(main)
