"""Fill a hole in a photo: VQ-DDM draws the codes, the asymmetric decoder draws the pixels.

    python inpaint.py PHOTO MASK --run RUN -o out.png

    photo, mask --pad--> x, mask: multiples of f; mask --known_cells--> known, on the grid of codes
    x, its hole in one colour --encode--> indices --complete, window by window--> indices --> z
    z, x, mask --decode--> x_hat --crop, round--> picture               DDM Sec. 4.4, AVQ Sec. 3.2

The photo's pixels under the mask have no influence. In a large photo all this is done piece by
piece around the hole, and the rest stays as it is.
"""

import argparse
import itertools
import math
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from convert import DEFAULT_STEPS, SMALL_RUN, chosen_steps, load, load_prior
from data import pixels, read_pair, views
from diffusion import known_cells
from distributed import UserError, end_at_once, exit_on_user_error, print0, setup
from masks import box_mask, evaluation_mask
from pictures import image_grid, show_masked
from quantize import exact_float32
from run_folder import Progress, duration, make_folder
from seeding import COMPLETION, FIGURE, keyed_generators

CAPTIONS = {"asym": "ours", "vanilla": "vanilla decoder"}        # {decoder: caption}
NEAR = 256                          # px around the hole, in the picture of --compare
RESAMPLE = 5                        # each step five times for the report's figures; the paper: once
MOST_CELLS, MOST_PIXELS = 64, 512   # sides of a piece of a large photo: the smaller one counts
IMAGES, COMPLETIONS, ROWS = 2, 3, 6       # for each of DDM's masks, of each; in inpainting.png


def fill_with_mean(x, mask):
    """Paint the hole of x (B,3,H,W) in the mean colour of its known pixels.  deviation D50

    The encoder's receptive field reaches into the hole from every cell, so the original there must
    not be encoded. An image without known pixels becomes mid-grey.
    """
    known = 1 - mask
    mean = (x * known).sum((2, 3), True) / known.sum((2, 3), True).clamp(min=1)     # (B, 3, 1, 1)
    return x * known + mean * mask


def windows(unknown, grid):
    """List the windows of `grid` (h,w) cells in which to complete a map: [(rows, columns)], slices.

    unknown: bool (H,W), at least as large as the grid. If a window can hold the hole and a quarter
    of its own length as context on each side, it is centred on the hole. Otherwise windows lie half
    a window apart, from the top left. A window whose cells are all known or drawn is left out.
    """
    left, chosen, starts = unknown.cpu().numpy().copy(), [], []                     # (H, W)
    if not left.any():
        return chosen
    for axis, length in enumerate(grid):
        n, where = left.shape[axis], left.any(1 - axis).nonzero()[0].tolist()
        first, end, context = where[0], where[-1] + 1, length // 4
        low, high = max(0, first - context), min(n, end + context)
        middle = min(max(0, (first + end - length) // 2), n - length)
        several = [*range(low, high - length, max(1, length // 2)), high - length]
        starts.append([middle] if high - low <= length else several)
    for top, side in itertools.product(*starts):
        window = slice(top, top + grid[0]), slice(side, side + grid[1])
        if left[window].any():
            left[window] = False
            chosen.append(window)
    return chosen


def complete(prior, indices, known, generators, steps=None, resample=1):
    """Draw the codes of all cells that are not known by a convert.Prior: (B,h,w). [DDM Sec. 4.4]

    indices: codes (B,h,w), arbitrary where unknown; known: bool (B,h,w).
    """
    indices, known = indices.clone(), known.clone()
    for rows, columns in windows(~known.all(0), prior.grid):
        window = (slice(None), rows, columns)
        indices[window] = prior.diffusion.inpaint(prior.unet, indices[window], known[window], steps,
                                                  resample, generators)
        known[window] = True
    return indices


@torch.no_grad()
def inpaintings(model, photo, hole, prior=None, *, decoders=("asym",), composite=False, samples=1,
                seed=0, steps=None, resample=1, show=False):
    """Yield {decoder: the filled photo, uint8 (H,W,3)} for each sample, a function of (seed, i).

    show: print progress; the others are inpaint_photo's. [DDM Sec. 4.4] [AVQ Sec. 3.2] [AVQ Fig. 2]
    """
    # Check that the models fit.
    first_stage, f, device = model.first_stage, model.config.f, next(model.parameters()).device
    lacks = {"asym": model is first_stage, "vanilla": first_stage.decoder is None}
    for name in decoders:
        if name not in CAPTIONS:
            raise ValueError(f"decoder {name!r}: choose from {', '.join(CAPTIONS)}")
        if lacks[name]:
            raise UserError(f"the model has no decoder {name}: choose another --decoder, or train "
                            "one by train.py --stage decoder")
    if prior and (first_stage.config.latent != "vq" or not torch.equal(
            first_stage.quantize.embedding.weight, prior.first_stage.quantize.embedding.weight)):
        raise UserError("the prior has another codebook than the model: train one by train.py "
                        "--stage prior --vqgan RUN --out NEW_RUN, and give --prior NEW_RUN")

    # Cut out the hole, with a quarter of the cut's length as context on each side. The rest stays
    # as it is, because the cost of attention grows with the square of the area.
    grid, whole, most = prior.grid if prior else (1, 1), photo, min(MOST_CELLS, MOST_PIXELS // f)
    lengths = [min(n, max(2 * np.ptp(hole.any(1 - axis).nonzero()) + 2, f * max(most, grid[axis])))
               for axis, n in enumerate(hole.shape)]
    (cut,) = windows(torch.from_numpy(hole), lengths)
    photo, hole = photo[cut], hole[cut]

    # Mirror photo and hole outwards, to multiples of f and to at least the prior's grid. A mirrored
    # hole is a hole, so nothing that the mask hides becomes known.
    H, W = hole.shape
    ends = [(0, max(cells, math.ceil(side / f)) * f - side) for side, cells in zip((H, W), grid)]
    padded = partial(np.pad, pad_width=[*ends, (0, 0)], mode="symmetric")  # (H,W,C) -> (H',W',C)

    def tensor(array):                                              # (h, w, C) -> (1, C, h, w)
        return torch.from_numpy(array).permute(2, 0, 1)[None].to(device)
    mirrored, hidden = padded(photo), padded(hole[..., None])       # (H', W', 3), (H', W', 1)
    unknown = ~known_cells(tensor(hidden).float(), f)[0]            # (H'/f, W'/f)
    steps = prior and chosen_steps(steps, prior.diffusion.T)

    # Draw a large hole in a copy whose short side is the grid's, because the prior has learnt this
    # field of view; enlarge the picture.  deviation D49
    scale, copies = max(cells * f / side for cells, side in zip(grid, (H, W))), None
    if prior and scale < 1 and len(windows(unknown, grid)) > 1:
        size = [round(W * scale), round(H * scale)]
        if show:
            print0(f"the hole is large: drawn in a copy of {size[0]} x {size[1]} px, enlarged")
        # The box filter averages. Pixels that it mixes with hidden ones lie in small_hole.
        small, small_hole = (np.array(Image.fromarray(array).resize(size, Image.Resampling.BOX))
                             for array in (photo, hole.astype(np.float32)))
        own = "vanilla" if model is first_stage else "asym"
        copies = inpaintings(model, small, small_hole > 0, prior, decoders=(own,), seed=seed,
                             samples=samples, steps=steps, resample=resample, show=show)

    # Choose pieces that cover the hole. Show them as progress, or the steps of a single one.
    area = [min(n, max(most, cells)) for n, cells in zip(unknown.shape, grid)]      # in cells
    pieces, progress, count = windows(unknown, area), None, itertools.count(1)
    if show and (photo.shape != whole.shape or len(pieces) > 1):
        print0(f"works on {W} x {H} px around the hole, in {len(pieces)} piece(s); keeps the rest")
    if show and len(pieces) > 1:
        progress = Progress("pieces", 0, samples * len(pieces), 1 / len(pieces))
    elif show and prior and copies is None:
        calls = samples * len(windows(unknown, grid)) * (steps + (steps - 1) * (resample - 1))
        progress, denoise = Progress("denoising", 0, calls, samples / calls), prior.unet

        def unet(z_t, t):
            logits = denoise(z_t, t)
            progress.show(next(count), {})
            return logits
        prior = replace(prior, unet=unet)

    for i in range(samples):
        left, generators = hidden.copy(), keyed_generators([(COMPLETION, seed, i)])
        seen, pictures = mirrored.copy(), {name: mirrored.copy() for name in decoders}
        if copies:
            large = Image.fromarray(next(copies)[own]).resize((W, H), Image.Resampling.BICUBIC)
            seen = np.where(hidden, padded(np.asarray(large)), mirrored)
        for rows, columns in pieces:
            # Complete the latents of the piece, z (1,d,h,w).
            piece = tuple(slice(f * part.start, f * part.stop) for part in (rows, columns))
            x, mask = pixels(tensor(seen[piece]), device), tensor(left[piece]).float()
            if prior is None or copies:
                z = model.encode(x if copies else fill_with_mean(x, mask))
            else:
                indices = first_stage.indices(fill_with_mean(x, mask))              # (1, h, w)
                codes = complete(prior, indices, known_cells(mask, f), generators, steps, resample)
                z = first_stage.quantize.lookup(codes)
            # Decode them, and round to 8 bits. What the last decoder drew, further pieces see.
            for name in decoders:
                x_hat = (model.decode(z, image=x, mask=mask) if name == "asym"
                         else first_stage.decode(z))                                # (1, 3, h, w)
                unit = (x_hat[0].clamp(-1, 1) + 1) / 2                              # (3, h, w)
                picture = (unit * 255).round().byte().permute(1, 2, 0).cpu().numpy()
                pictures[name][piece] = picture                                     # (h, w, 3)
            np.copyto(seen[piece], picture, where=left[piece])
            left[piece] = False
            if progress and len(pieces) > 1:
                progress.show(next(count), {})
        if progress and i == samples - 1:
            progress.close()
        for name, picture in pictures.items():
            pictures[name] = whole.copy()
            np.copyto(pictures[name][cut], picture[:H, :W], where=hole[..., None] | (not composite))
        yield pictures


def inpaint_photo(model, photo, mask, prior=None, *, decoder="asym", **options):
    """Fill the hole of a photo: uint8 (H,W,3), the photo itself if the mask is all zeros.

    model: an AsymVQGAN, or a VQGAN for decoder "vanilla". photo: uint8 (H,W,3); mask: (H,W), not 0
    = to be generated. prior: from load_prior, or None: the hole keeps one colour. options: seed,
    steps, resample, composite (paste known pixels). Raises UserError, and ValueError for shapes.
    """
    hole = np.asarray(mask) != 0                                                    # (H, W)
    if photo.shape != (*hole.shape, 3):
        raise ValueError(f"photo of {photo.shape} and mask of {hole.shape}: sizes differ")
    if not hole.any():
        return photo.copy()
    (pictures,) = inpaintings(model, photo, hole, prior, decoders=(decoder,), **options)
    return pictures[decoder]


def completion_rows(prior, dataset, steps):
    """Complete held-out images under three masks each: groups for image_rows. [DDM Fig. 8]"""
    size, half, quarter, groups = dataset.size, dataset.size // 2, dataset.size // 4, []
    masks = {"the upper 62.5 %": box_mask(size, 0, 0, 5 * size // 8, size),
             "all but the lower right quarter": 1 - box_mask(size, half, half, half, half),
             "all but the centre quarter": 1 - box_mask(size, quarter, quarter, half, half)}
    how = f"original, masked, {COMPLETIONS} completions ({steps} steps, resample {RESAMPLE})"
    for k, (hidden, mask) in enumerate(masks.items()):
        places = range(k * IMAGES, (k + 1) * IMAGES)                   # other images for each mask
        x, m, codes = _completed(prior, dataset, places, [mask] * IMAGES, k, steps, COMPLETIONS)
        drawn = prior.first_stage.decode_indices(codes).unflatten(0, (IMAGES, COMPLETIONS))
        rows = torch.cat([torch.stack([x, show_masked(x, m)], 1), drawn], 1)       # (2, 5, 3, H, W)
        groups.append((f"{hidden} hidden: {how}", list(rows.flatten(0, 1))))
    return groups


def inpainting_columns(prior, model, dataset, steps):
    """Inpaint held-out images by the prior and both decoders: columns. [AVQ Fig. 1]"""
    places = range(0, 10 * ROWS, 10)         # because neighbours often have equal evaluation masks
    masks = [evaluation_mask(dataset.size, i) for i in places]
    x, mask, codes = _completed(prior, dataset, places, masks, 3, steps)
    z = prior.first_stage.quantize.lookup(codes)                                    # (R, d, h, w)
    return {"original": list(x), "masked": list(show_masked(x, mask)),
            "codes by VQ-DDM, vanilla decoder": list(prior.first_stage.decode(z)),
            "the same codes, ours": list(model.decode(z, image=x, mask=mask))}


def _completed(prior, dataset, places, masks, number, steps, times=1):
    """Complete held-out images: x (B,3,H,W), mask (B,1,H,W), codes (B*times,h,w).

    The noise of completion i is a function of (number, i).
    """
    image = next(views(dataset, [[i % len(dataset) for i in places]]))
    x = pixels(image, prior.device)                                                 # (B, 3, H, W)
    mask = torch.from_numpy(np.stack(masks)).float()[:, None].to(prior.device)      # (B, 1, H, W)
    indices = prior.first_stage.indices(fill_with_mean(x, mask)).repeat_interleave(times, 0)
    known = known_cells(mask, prior.first_stage.config.f).repeat_interleave(times, 0)
    generators = keyed_generators((FIGURE, number, i) for i in range(len(indices)))
    return x, mask, complete(prior, indices, known, generators, steps, RESAMPLE)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(
        "Fill the hole in a photo: RUN's prior draws the codes of the hole, and RUN's asymmetric "
        "decoder draws all pixels from the codes and the photo's known pixels."))
    add = parser.add_argument
    add("photo", metavar="PHOTO", help="a photo of any size")
    add("mask", metavar="MASK", help="white (>= 128) = to be generated; of PHOTO's aspect ratio")
    add("--run", default=SMALL_RUN, metavar="RUN",
        help="a run folder, or a file that convert.py reads (default: notebooks/run, the demo's)")
    add("-o", "--out", metavar="FILE.png", help="(default: PHOTO's name with -inpainted.png)")
    add("--samples", type=int, default=1, metavar="N", help="to FILE-1.png, ... (default: 1)")
    add("--steps", type=int, metavar="N",
        help=f"reverse steps (default: {DEFAULT_STEPS}, or T if less)")
    add("--resample", type=int, default=1, metavar="U", help="take each step U times (default: 1)")
    add("--seed", type=int, default=0, metavar="S", help="of the completions (default: 0)")
    add("--prior", metavar="RUN2", help="a prior on the same first stage (default: RUN's)")
    add("--no-prior", action="store_true", help="fill with the mean colour (default: draw codes)")
    add("--decoder", choices=CAPTIONS, default="asym", help="ours or the vanilla (default: asym)")
    add("--composite", action="store_true", help="paste the known pixels over it (default: no)")
    add("--compare", action="store_true", help="write FILE-compare.png as well (default: no)")
    add("--invert-mask", action="store_true", help="black = to be generated (default: white)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    args = parser.parse_args()

    # Check the flags and read the photo.
    device, start = setup(args.device), time.perf_counter()
    if min(args.samples, args.resample) < 1 or args.seed < 0:
        raise UserError("--samples and --resample are at least 1, --seed at least 0")
    if args.no_prior and (args.prior or args.samples > 1):
        raise UserError("--no-prior draws nothing: leave out --prior and --samples")
    out = args.out or f"{Path(args.photo).stem}-inpainted.png"
    if not out.lower().endswith(".png"):
        raise UserError(f"-o {out}: give a name that ends with .png, which keeps pixels exactly")
    photo, hole = read_pair(args.photo, args.mask, args.invert_mask)
    outputs, comparison = [out], f"{out[:-4]}-compare.png"
    if args.samples > 1:
        outputs = [f"{out[:-4]}-{i}.png" for i in range(1, args.samples + 1)]
    for path in filter(os.path.exists, [*outputs, comparison] if args.compare else outputs):
        if os.path.samefile(path, args.photo) or os.path.samefile(path, args.mask):
            raise UserError(f"{path} is the photo or the mask; choose another -o")
    make_folder(Path(out).parent, "-o")
    if not hole.any():
        for path in outputs:
            Image.fromarray(photo).save(path)
        print0(f"nothing to generate: wrote the photo unchanged to {', '.join(outputs)}")
        return

    # Load the models, and say what will be done.
    loaded, prior, where = load(args.run, device), None, args.prior or args.run
    model, how = loaded.model, "no prior: the hole in one colour"
    if not args.no_prior:
        if model.config.latent != "vq":
            raise UserError(f"{args.run} has a KL latent, hence no codes for a prior: give "
                            "--no-prior, or fill the hole by Stable Diffusion (README)")
        prior = load_prior(where, device)
        how = (f"codes by the prior in {where}, {chosen_steps(args.steps, prior.diffusion.T)} of "
               f"{prior.diffusion.T:,} steps, resample {args.resample}, seed {args.seed}")
    for name, opened in ((args.run, loaded), (f"the prior in {where}", prior)):
        if opened and not opened.finished:
            print0(f"warning: training of {name} is not finished (step {opened.step})")
    pasted = ", photo pasted" if args.composite else ""
    print0(f"{args.photo}: {hole.shape[1]} x {hole.shape[0]} px, {hole.mean():.1%} to be generated;"
           f" {how}; pixels by {args.run}, decoder {args.decoder}{pasted}")
    end_at_once()

    # Draw and write each sample.
    decoders, columns = [args.decoder], {}
    near = tuple(slice(max(0, where[0] - NEAR), where[-1] + 1 + NEAR)
                 for where in (hole.any(1).nonzero()[0], hole.any(0).nonzero()[0]))
    if args.compare and args.decoder == "asym" and model.first_stage.decoder is not None:
        decoders = ["vanilla", "asym"]
    drawn = inpaintings(model, photo, hole, prior, decoders=decoders, composite=args.composite,
                        samples=args.samples, seed=args.seed, steps=args.steps,
                        resample=args.resample, show=True)
    with exact_float32(), torch.inference_mode():
        for path, pictures in zip(outputs, drawn):
            Image.fromarray(pictures[args.decoder]).save(path)
            if args.compare:
                x, *shown = (pixels(torch.from_numpy(picture[near]).permute(2, 0, 1), "cpu")
                             for picture in (photo, *map(pictures.get, decoders)))  # (3, h, w)
                masked = show_masked(x, torch.from_numpy(hole[near]).float())
                captions = "original", "masked", *(CAPTIONS[name] + pasted for name in decoders)
                for caption, image in zip(captions, (x, masked, *shown)):
                    columns.setdefault(caption, []).append(image)
    if args.compare:
        image_grid(columns, comparison)
        outputs.append(comparison)
    print0(f"wrote {', '.join(outputs)} ({duration(time.perf_counter() - start)})")


if __name__ == "__main__":
    exit_on_user_error(main)
