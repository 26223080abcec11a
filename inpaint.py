"""Photo + mask -> picture: VQ-DDM fills the hole's codes, the asymmetric decoder draws it.

    python inpaint.py PHOTO MASK --run RUN -o out.png

    photo, mask --prepare--> x, mask, padded; known, on the grid of codes
    x, its hole in one colour --encode--> codes --complete, window by window--> codes --> z
    z, x, mask --decode--> x_hat --cut, round--> picture                DDM Sec. 4.4, AVQ Sec. 3.2

Known codes are the photo's, known pixels the asymmetric decoder's own; `--composite` pastes the
photo's over them. What the photo shows under the mask is never looked at.

The prior draws maps of the one size that it was trained on. A hole that is too large for one of
them is drawn in a smaller copy of the photo, enlarged and encoded, so that its content is of one
piece; with `--tile` it is drawn window by window instead, sharper and with less sense. The photo
passes through encoder and decoder as a whole, so memory grows with its area.
"""

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from asym_decoder import AsymVQGAN
from convert import STEPS, chosen_steps, load, load_prior
from data import load_image, pixels
from diffusion import known_cells
from distributed import UserError, exact_float32, exit_on_user_error, print0, setup
from image_pairs import decoded, read_mask
from masks import box_mask, evaluation_mask
from pictures import image_grid, show_masked
from run_folder import Progress, duration
from seeding import COMPLETION, FIGURE, keyed_generators

DECODERS = ("asym", "vanilla", "paste")
TITLES = {"asym": "ours", "vanilla": "vanilla decoder", "paste": "vanilla, photo pasted"}
DRAWING = ("samples", "steps", "resample", "temperature", "seed", "margin", "tile",
           "prior")                              # flags that are about the prior

RESAMPLE = 5
PICTURES, COMPLETIONS = 2, 3        # of each of the paper's masks, and of each picture
ROWS = 6                            # of the inpainting


# -- photo and mask as networks take them ----------------------------------------------------------


@dataclass
class Canvas:
    """A photo and its mask: as they are, and padded, in a batch of one, on the device."""

    photo: np.ndarray         # uint8 (H,W,3)
    hole:  np.ndarray         # bool (H,W), True = to be generated
    x:     torch.Tensor       # (1,3,H',W') in [-1,1], H' and W' multiples of f
    mask:  torch.Tensor       # (1,1,H',W') in {0,1}
    known: torch.Tensor       # bool (1,H'/f,W'/f), True = the photo's code stays

    def cut(self, x):
        """(1,C,H',W') -> (C,H,W), without the padding."""
        return x[0, :, :self.hole.shape[0], :self.hole.shape[1]]


def prepare(photo, hole, f, grid=(1, 1), device="cpu", margin=0):
    """The Canvas of photo, uint8 (H,W,3), and hole, bool (H,W). margin: see known_cells.

    Both are continued to the right and below, as if in a mirror, to multiples of f and to at least
    `grid` (h,w) cells. A mirrored hole is a hole: nothing that it hides comes back as known.
    """
    sides = [max(cells, math.ceil(side / f)) * f for side, cells in zip(hole.shape, grid)]
    ends = [(0, end - side) for side, end in zip(hole.shape, sides)]
    padded = torch.from_numpy(np.pad(photo, [*ends, (0, 0)], mode="symmetric"))     # (H', W', 3)
    mask = torch.from_numpy(np.pad(hole, ends, mode="symmetric"))                   # (H', W')
    x = padded.to(device).permute(2, 0, 1)[None] / 127.5 - 1                        # (1,3,H',W')
    mask = mask.to(device)[None, None].float()                                      # (1,1,H',W')
    return Canvas(photo, hole, x.contiguous(), mask, known_cells(mask, f, margin))


def shrink(canvas, f, grid, margin=0):
    """The Canvas of the photo made so small that a map of `grid` (h,w) spans its short side.

    That is how much of a picture the prior was trained to see. A photo that is no larger is left as
    it is: then the canvas itself. The filter is the box, under which a pixel without any of the
    hole has nothing of what it hides.
    """
    scale = max(cells * f / side for cells, side in zip(grid, canvas.hole.shape))
    if scale >= 1:
        return canvas
    H, W = (round(side * scale) for side in canvas.hole.shape)
    photo, hole = (Image.fromarray(array).resize((W, H), Image.Resampling.BOX)
                   for array in (canvas.photo, canvas.hole.astype(np.float32)))
    return prepare(np.array(photo), np.array(hole) > 0, f, grid, canvas.x.device, margin)

# -- codes for a hole ------------------------------------------------------------------------------


def fill_with_mean(x, mask):
    """x with its hole in the mean colour of its known pixels; mid-grey where there are none.

    x (B,3,H,W), mask (B,1,H,W) in {0,1} -> (B,3,H,W). All codes see the hole a little, so it
    should look like nothing in particular.  deviation D50
    """
    known = 1 - mask
    mean = (x * known).sum((2, 3), True) / known.sum((2, 3), True).clamp(min=1)     # (B, 3, 1, 1)
    return x * known + mean * mask


def windows(unknown, grid):
    """Where maps of `grid` (h,w) cells are to be completed: [(rows, columns)], slices.

    unknown: bool (H,W), at least as large as the grid. One window with the hole in its middle,
    where a quarter of a window of context fits around it; else windows half a window apart, from
    the context's top left on, line by line, of which each sees what is known and what was drawn
    before it. Windows that would find nothing left to draw are left out.
    """
    left, chosen = unknown.cpu().numpy().copy(), []
    if not left.any():
        return chosen
    tops, lefts = (_starts(left.any(1 - axis), grid[axis]) for axis in (0, 1))
    for top in tops:
        for start in lefts:
            window = slice(top, top + grid[0]), slice(start, start + grid[1])
            if left[window].any():
                left[window] = False
                chosen.append(window)
    return chosen


def _starts(unknown, length):
    """Where windows of `length` cells begin along one axis; unknown: bool (n,)."""
    n, where = len(unknown), unknown.nonzero()[0].tolist()
    first, end, context = where[0], where[-1] + 1, length // 4
    low, high = max(0, first - context), min(n, end + context)
    if high - low <= length:
        return [min(max(0, (first + end - length) // 2), n - length)]
    return [*range(low, high - length, max(1, length // 2)), high - length]


def complete(prior, indices, known, generators, steps=None, resample=1, temperature=1.0):
    """Codes (B,h,w) with all cells that are not known drawn by the prior. [DDM Sec. 4.4]

    prior: a prior.Prior; indices: codes (B,h,w), any where unknown; known: bool (B,h,w). Maps of
    the prior's own grid are drawn at once, larger ones window by window. generators, steps,
    resample, temperature: see MultinomialDiffusion.inpaint.
    """
    indices, known = indices.clone(), known.clone()
    for window in windows(~known.all(0), prior.grid):
        window = (slice(None), *window)
        indices[window] = prior.diffusion.inpaint(
            prior.unet, indices[window], known[window], steps, resample, generators, temperature)
        known[window] = True
    return indices


# -- from hole to picture --------------------------------------------------------------------------


def canvas_to_draw_on(canvas, f, grid, tile=False, margin=0):
    """Where the prior draws: this canvas, where one window is enough or `tile`; else a smaller.

    deviation D49
    """
    one = len(windows(~canvas.known[0], grid)) == 1
    return canvas if one or tile else shrink(canvas, f, grid, margin)


def latents(model, canvas, prior=None, drawn=None, *, samples=1, seed=0, steps=None, resample=1,
            temperature=1.0):
    """Yields the latent (1,d,h,w) of each sample; without a prior, that of the filled photo alone.

    drawn: the canvas to draw on, this one (None) or what `shrink` made of it. Sample i depends on
    (seed, i), not on how many there are. steps: as for prior.chosen_steps.
    """
    drawn = drawn or canvas
    filled = fill_with_mean(drawn.x, drawn.mask)                                    # (1,3,H',W')
    if prior is None:
        yield model.encode(filled)                                                  # (1, d, h, w)
        return
    first_stage, steps = _first_stage(model), chosen_steps(steps, prior.diffusion.T)
    indices = first_stage.indices(filled)                                           # (1, h, w)
    for i in range(samples):
        generators = keyed_generators([(COMPLETION, seed, i)])
        codes = complete(prior, indices, drawn.known, generators, steps, resample, temperature)
        z = first_stage.quantize.lookup(codes)                                      # (1, d, h, w)
        yield z if drawn is canvas else model.encode(_enlarged(model, z, drawn, canvas))


def _enlarged(model, z, small, canvas):
    """canvas.x, its hole filled with the picture of z on the smaller canvas: (1,3,H',W')."""
    decoder = "vanilla" if model is _first_stage(model) else "asym"
    (H, W), picture = canvas.hole.shape, Image.fromarray(decode(model, z, small, decoder))
    large = np.array(picture.resize((W, H), Image.Resampling.BICUBIC))              # (H, W, 3)
    photo = np.where(canvas.hole[..., None], large, canvas.photo)
    grid = canvas.known.shape[1:]
    return prepare(photo, canvas.hole, model.config.f, grid, canvas.x.device).x


def _first_stage(model):
    return model.first_stage if isinstance(model, AsymVQGAN) else model


def decode(model, z, canvas, decoder="asym", composite=False):
    """The picture of latent z (1,d,h,w): uint8 (H,W,3), rounded. [AVQ Sec. 3.2]

    decoder: "asym", which is given the known pixels; "vanilla", the first stage's own; "paste",
    the latter with the photo's known pixels over it, bit for bit, as `composite` has them over any.
    """
    if decoder == "asym":
        x_hat = model.decode(z, image=canvas.x, mask=canvas.mask)                   # (1,3,H',W')
    else:
        x_hat = _first_stage(model).decode(z)                                       # (1,3,H',W')
    unit = (canvas.cut(x_hat).clamp(-1, 1) + 1) / 2                                 # (3, H, W)
    picture = (unit * 255).round().byte().permute(1, 2, 0).cpu().numpy()            # (H, W, 3)
    if composite or decoder == "paste":
        picture = np.where(canvas.hole[..., None], picture, canvas.photo)
    return picture


@torch.no_grad()
def inpaint_photo(model, photo, mask, prior=None, *, decoder="asym", composite=False, tile=False,
                  margin=0, **drawing):
    """The photo with its hole filled: uint8 (H,W,3). [DDM Sec. 4.4] [AVQ Sec. 3.2]

    model: an AsymVQGAN, or a VQGAN for the decoders "vanilla" and "paste" (see `decode`).
    photo: uint8 (H,W,3), any size; mask: (H,W), other than 0 = to be generated. prior: what
    load_prior gives; None leaves the codes of the photo with its hole in one colour. tile: see
    `canvas_to_draw_on`; margin: see diffusion.known_cells. drawing: seed, steps, resample,
    temperature of `latents`.
    A mask of zeros gives the photo itself. Raises UserError for a decoder that the model lacks and
    a prior of other codes, and for steps that the prior lacks; ValueError for shapes that differ.
    """
    hole = np.asarray(mask) != 0                                                    # (H, W)
    if photo.shape != (*hole.shape, 3):
        raise ValueError(f"a photo of shape {photo.shape} needs a mask of {photo.shape[:2]}, not "
                         f"{hole.shape}")
    if not hole.any():
        return photo.copy()
    check_models(model, prior, decoder)
    device = next(model.parameters()).device
    f, grid = model.config.f, prior.grid if prior else (1, 1)
    canvas = prepare(photo, hole, f, grid, device, margin)
    drawn = canvas_to_draw_on(canvas, f, grid, tile, margin) if prior else None
    (z,) = latents(model, canvas, prior, drawn, **drawing)
    return decode(model, z, canvas, decoder, composite)


def check_models(model, prior, decoder, name="this model"):
    """Raise UserError unless the model has the decoder, and the prior, if any, knows its codes."""
    first_stage = _first_stage(model)
    if decoder == "asym" and model is first_stage:
        raise UserError(f"{name} has no asymmetric decoder: train one by train.py --stage decoder "
                        "--vqgan RUN --out NEW_RUN, or take the first stage's, --decoder vanilla")
    if decoder != "asym" and first_stage.decoder is None:
        raise UserError(f"{name} came without the first stage's own decoder, so there is no "
                        f"--decoder {decoder}: leave that out for the asymmetric one")
    if prior and not _same_codes(first_stage, prior.first_stage):
        raise UserError(f"the prior is of other codes than those of {name}: both must stand on one "
                        "first stage; train a prior on this one by train.py --stage prior --vqgan "
                        "RUN --out NEW_RUN, and name it by --prior NEW_RUN")


def _same_codes(first_stage, other):
    if first_stage.config.latent != "vq":
        return False
    ours, theirs = (owner.quantize.embedding.weight.cpu() for owner in (first_stage, other))
    return torch.equal(ours, theirs)

# -- held-out pictures completed by a prior --------------------------------------------------------


def paper_masks(size):
    """{caption: uint8 (size,size), 1 = hidden} of the three rows of the figure."""
    whole, half, quarter = np.ones((size, size), np.uint8), size // 2, size // 4
    corner = box_mask(size, half, half, size - half, size - half)
    centre = box_mask(size, quarter, quarter, half, half)
    return {"the upper 62.5 % hidden": box_mask(size, 0, 0, 5 * size // 8, size),
            "all but the lower right quarter hidden": whole - corner,
            "all but the centre quarter hidden": whole - centre}


def completion_rows(prior, dataset, steps):
    """Groups for pictures.image_rows: under each of the paper's masks, completions. [DDM Fig. 8]

    dataset: held-out pictures of the prior's size, of which each mask has others.
    """
    groups = []
    for number, (caption, mask) in enumerate(paper_masks(dataset.size).items()):
        x = _read_pictures(prior, dataset, range(number * PICTURES, (number + 1) * PICTURES))
        m = _masks(prior, [mask] * PICTURES)                                        # (P, 1, H, W)
        codes = _completions(prior, x.repeat_interleave(COMPLETIONS, 0),
                           m.repeat_interleave(COMPLETIONS, 0), number, steps)      # (P·C, h, w)
        completed = prior.first_stage.decode_indices(codes).split(COMPLETIONS)
        row = [image for i in range(PICTURES)
               for image in (x[i], show_masked(x[i], m[i]), *completed[i])]
        groups.append((f"{caption}: original, masked, {COMPLETIONS} completions ({steps} steps, "
                       f"resample {RESAMPLE})", row))
    return groups


def inpainting_columns(prior, model, dataset, steps):
    """Columns for pictures.image_grid: held-out pictures under their evaluation masks, inpainted.

    model: an AsymVQGAN on the prior's first stage; dataset: as for completion_rows.
    """
    places = range(0, 10 * ROWS, 10)         # neighbours often have the same evaluation mask
    x = _read_pictures(prior, dataset, places)                                      # (R, 3, H, W)
    mask = _masks(prior, [evaluation_mask(dataset.size, i) for i in places])        # (R, 1, H, W)
    codes = _completions(prior, x, mask, len(paper_masks(dataset.size)), steps)     # (R, h, w)
    z = prior.first_stage.quantize.lookup(codes)                                    # (R, d, h, w)
    return {"original": list(x), "masked": list(show_masked(x, mask)),
            "codes by VQ-DDM, vanilla decoder": list(prior.first_stage.decode(z)),
            "the same codes, ours": list(model.decode(z, image=x, mask=mask))}


def _completions(prior, x, mask, number, steps):
    """Codes (B,h,w) of x with the hole filled; picture i's noise is a function of (number, i)."""
    generators = keyed_generators((FIGURE, number, i) for i in range(len(x)))
    indices = prior.first_stage.indices(fill_with_mean(x, mask))                    # (B, h, w)
    known = known_cells(mask, prior.first_stage.config.f)                           # (B, h, w)
    return complete(prior, indices, known, generators, steps, RESAMPLE)


def _read_pictures(prior, dataset, indices):
    """x (B,3,H,W) of pictures of a data set, from its start again where it is short."""
    images = [dataset.read(index % len(dataset))[0] for index in indices]
    return pixels(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), prior.device)


def _masks(prior, masks):
    return torch.from_numpy(np.stack(masks)).float()[:, None].to(prior.device)      # (B, 1, H, W)


# -- the program -----------------------------------------------------------------------------------


def main():
    args = _parser().parse_args()
    _check(args)
    outputs, comparison = _outputs(args)
    device = setup(args.device)
    photo, hole = read_pair(args.photo, args.mask, args.invert_mask)
    if not hole.any():
        print0("nothing is to be generated: the photo is written as it is")
        for path in outputs:
            _write(photo, path)
        print0("wrote " + ", ".join(map(str, outputs)))
        return
    model, prior = _open_models(args, device)
    f, grid = model.config.f, prior.grid if prior else (1, 1)
    margin = args.margin or 0
    canvas = prepare(photo, hole, f, grid, device, margin)
    drawn = canvas_to_draw_on(canvas, f, grid, args.tile, margin) if prior else None
    drawing = {"steps": prior and chosen_steps(args.steps, prior.diffusion.T),
               "resample": args.resample or 1, "temperature": args.temperature or 1.0,
               "seed": args.seed or 0}
    _announce(args, canvas, drawn, prior, drawing)
    try:
        _make(args, model, prior, canvas, drawn, drawing, outputs, comparison)
    except torch.OutOfMemoryError:
        raise UserError(f"{args.photo}: {hole.shape[1]} x {hole.shape[0]} px are too many for the "
                        "device's memory; make photo and mask smaller, or --device cpu") from None


def _make(args, model, prior, canvas, drawn, drawing, outputs, comparison):
    """Draw and write all pictures."""
    names = [args.decoder]
    if comparison and args.decoder != "vanilla" and _first_stage(model).decoder is not None:
        names = ["vanilla", args.decoder]
    columns, start = {name: [] for name in names}, time.perf_counter()
    with exact_float32(), torch.inference_mode():
        prior = prior and _with_progress(prior, drawn, len(outputs), drawing)
        made = latents(model, canvas, prior, drawn, samples=len(outputs), **drawing)
        for path, z in zip(outputs, made):
            for name in names:
                pasted = args.composite and name == args.decoder
                columns[name].append(decode(model, z, canvas, name, pasted))
            _write(columns[args.decoder][-1], path)
    if comparison:
        _compare(canvas, columns, args, comparison)
    made = ", ".join(map(str, [*outputs, *([comparison] if comparison else [])]))
    print0(f"wrote {made} ({duration(time.perf_counter() - start)})")


def read_pair(photo_path, mask_path, invert=False):
    """(photo uint8 (H,W,3), hole bool (H,W)) from two files; prints what is to be known of them.

    A mask of another size is resized to the photo's, to the nearest pixel. Raises UserError for a
    file that is missing or cannot be decoded.
    """
    for path in (photo_path, mask_path):
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
    photo = np.array(decoded(photo_path, load_image))                               # (H, W, 3)
    mask, remarks = read_mask(mask_path, invert)                                    # (1, h, w)
    for remark in remarks.values():
        print0(f"warning: {remark}")
    size, own = (photo.shape[1], photo.shape[0]), (mask.shape[2], mask.shape[1])
    if own == size:
        return photo, mask[0].bool().numpy()
    print0(f"{mask_path}: {own[0]} x {own[1]} px, resized to the photo's {size[0]} x {size[1]}, to "
           "the nearest pixel")
    resized = Image.fromarray(mask[0].numpy()).resize(size, Image.Resampling.NEAREST)
    return photo, np.array(resized) != 0


def _open_models(args, device):
    """(model, Prior or None) that the flags name. Raises UserError for what cannot be used."""
    loaded, prior = load(args.run, device), None
    _warn_unless_finished(args.run, loaded)
    if not args.no_prior:
        where = args.prior or args.run
        if loaded.model.config.latent != "vq":
            raise UserError(f"{args.run} has a KL latent, no codes that a prior could draw: fill "
                            "the hole by Stable Diffusion (README), or see by --no-prior what "
                            "the hole in one colour becomes")
        try:
            prior = load_prior(where, device)
        except UserError as error:
            mend = "" if args.prior else "; name one in another run by --prior"
            raise UserError(f"{error}{mend}; or see by --no-prior what the hole in one colour "
                            "becomes") from None
        _warn_unless_finished(f"the prior in {where}", prior)
    check_models(loaded.model, prior, args.decoder, args.run)
    return loaded.model, prior


def _warn_unless_finished(name, model):
    if not model.finished:
        print0(f"warning: {name} is not trained to its end (step {model.step})")


def _announce(args, canvas, drawn, prior, drawing):
    """Print what is going to happen."""
    H, W = canvas.hole.shape
    print0(f"{args.photo}: {W} x {H} px, {canvas.hole.mean():.1%} to be generated; pixels by "
           f"{args.run}, decoder {args.decoder}{', photo pasted' * args.composite}")
    _announce_padding(canvas)
    if prior is None:
        print0("no prior: the codes are those of the photo with its hole in one colour")
        return
    if drawn is not canvas:
        print0(f"the hole is too large for one window of the prior: drawn in a copy of "
               f"{drawn.hole.shape[1]} x {drawn.hole.shape[0]} px and enlarged (--tile draws it at "
               "full size)")
        _announce_padding(drawn)
    (h, w), count = drawn.known.shape[1:], len(windows(~drawn.known[0], prior.grid))
    how = f"one window of {prior.grid[1]} x {prior.grid[0]}" if count == 1 else (
        f"{count} windows of {prior.grid[1]} x {prior.grid[0]}, one after the other")
    how = "all at once" if (h, w) == prior.grid else how
    print0(f"codes by the prior in {args.prior or args.run}: {(~drawn.known).sum():,} of {w} x "
           f"{h}, {how}; {drawing['steps']} of {prior.diffusion.T:,} steps, resample "
           f"{drawing['resample']}, temperature {drawing['temperature']:g}, seed {drawing['seed']}")


def _announce_padding(canvas):
    (H, W), (padded_H, padded_W) = canvas.hole.shape, canvas.mask.shape[2:]
    if (padded_H, padded_W) != (H, W):
        print0(f"{W} x {H} px are padded to {padded_W} x {padded_H}, mirrored, and cut afterwards")


def _with_progress(prior, drawn, samples, drawing):
    """The Prior, its network counting its calls on a progress line."""
    steps, count = drawing["steps"], len(windows(~drawn.known[0], prior.grid))
    calls = samples * count * (steps + (steps - 1) * (drawing["resample"] - 1))
    progress, done = Progress("denoising", 0, calls, samples / calls), 0

    def unet(z_t, t):
        nonlocal done
        logits = prior.unet(z_t, t)
        done += 1
        progress.show(done, {})
        if done == calls:
            progress.close()
        return logits

    return replace(prior, unet=unet)


def _compare(canvas, columns, args, path):
    """Write original, masked picture and what each decoder made of it, a row a sample."""
    x, mask = canvas.cut(canvas.x), canvas.cut(canvas.mask)                         # (C, H, W)
    count = len(columns[args.decoder])
    pictures = {"original": [x] * count, "masked": [show_masked(x, mask)] * count}
    for name, made in columns.items():
        pasted = ", photo pasted" * (args.composite and name == args.decoder)
        pictures[TITLES[name] + pasted] = [
            torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1 for picture in made]
    if "vanilla" not in columns:
        print0("the first stage came without its own decoder, so the comparison has none of it")
    _writing(path, lambda: image_grid(pictures, path))


def _write(picture, path):
    _writing(path, lambda: Image.fromarray(picture).save(path))


def _writing(path, write):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); make room or "
                        "choose another -o") from None


def _outputs(args):
    """([path of each sample], path of the comparison or None). UserError: not to be written to."""
    out = Path(args.out or f"{Path(args.photo).stem}-inpainted.png")
    if out.suffix.lower() != ".png":
        raise UserError(f"-o {out}: pictures are PNG files, so that no pixel changes; give a name "
                        "that ends with .png")
    numbers = range(1, (args.samples or 1) + 1)
    outputs = [out.with_name(f"{out.stem}-{i}.png") for i in numbers] if args.samples else [out]
    comparison = out.with_name(f"{out.stem}-compare.png") if args.compare else None
    for path in [*outputs, *([comparison] if comparison else [])]:
        for source in (args.photo, args.mask):
            if path.exists() and Path(source).exists() and path.samefile(source):
                raise UserError(f"{path} would be written over {source}; choose another -o")
    return outputs, comparison


def _check(args):
    """Raise UserError for numbers out of range and flags that contradict one another."""
    for flag, least in (("samples", 1), ("steps", 1), ("resample", 1), ("seed", 0), ("margin", 0)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: the least is {least}")
    if args.temperature is not None and not 0 < args.temperature < math.inf:
        raise UserError(f"--temperature {args.temperature}: must be positive")
    for flag in DRAWING:
        if args.no_prior and getattr(args, flag) is not None:
            raise UserError(f"--{flag} is for the prior, and --no-prior does without; leave one of "
                            "them out")


def _parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Fill the hole that a mask leaves in a photo: codes by a run's prior, pixels "
                    "by its asymmetric decoder.")
    add = parser.add_argument
    add("photo", metavar="PHOTO", help="the photo, of any size")
    add("mask", metavar="MASK",
        help="white (from 128 on) = to be generated; resized to the photo where it has another "
             "size")
    add("--run", required=True, metavar="RUN",
        help="a run folder of train.py; with --no-prior anything that convert.py reads")
    add("-o", "--out", metavar="FILE",
        help="the picture, a PNG file (default: PHOTO's name with -inpainted.png, here)")
    add("--samples", type=int, metavar="N",
        help="N completions, FILE-1.png to FILE-N.png (default: one, FILE itself)")
    add("--steps", type=int, metavar="N",
        help=f"steps of the prior (default: {STEPS}, or all where it has fewer)")
    add("--resample", type=int, metavar="U",
        help="take each step U times, which ties the hole closer to what is known (default: 1, "
             "the paper's)")
    add("--temperature", type=float, metavar="X",
        help="below 1 likelier and less diverse codes (default: 1)")
    add("--seed", type=int, metavar="S", help="other completions (default: 0)")
    add("--margin", type=int, metavar="R",
        help="draw the known codes within R cells of the hole anew, too: the encoder sees the hole "
             "from there (default: 0, the paper's)")
    add("--tile", action="store_true", default=None,
        help="draw a hole that is too large for the prior at full size, window by window, each "
             "seeing half of what was drawn before (default: in a smaller copy, then enlarged)")
    add("--prior", metavar="RUN2",
        help="a run with another prior on the same first stage (default: RUN)")
    add("--no-prior", action="store_true",
        help="keep the codes of the photo with its hole in the mean colour of the rest")
    add("--decoder", choices=DECODERS, default="asym",
        help="asym; vanilla, the first stage's own; paste, the latter with the photo's known "
             "pixels over it (default: asym)")
    add("--composite", action="store_true",
        help="the photo's known pixels over the decoder's own, bit for bit")
    add("--compare", action="store_true",
        help="write FILE-compare.png, too: original, masked, vanilla decoder, ours, side by side")
    add("--invert-mask", action="store_true", help="the mask is black where to be generated")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    return parser


if __name__ == "__main__":
    exit_on_user_error(main)
