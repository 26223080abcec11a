"""Held-out pictures completed by a prior, for people to look at. [DDM Fig. 8]

    x, mask --fill_with_mean--> the hole in one colour --indices--> codes, known --complete--> codes
    codes --the first stage's decoder--> the paper's figure, of its three masks   completion_strips
    codes --that decoder; ours, with x and mask--> full inpainting                inpainting_columns

The network never sees what was hidden. Each step is taken RESAMPLE times, which ties the hole
closer to what is known than the paper's one does. Photos and masks of one's own are inpaint.py's.
"""

import numpy as np
import torch

from completion import complete, fill_with_mean
from data import pixels
from diffusion import known_cells
from masks import box_mask, evaluation_mask
from pictures import show_masked
from seeding import FIGURE, keyed_generators

RESAMPLE = 5
PICTURES, COMPLETIONS = 2, 3        # of each of the paper's masks, and of each picture
ROWS = 6                            # of the inpainting

def paper_masks(size):
    """{caption: uint8 (size,size), 1 = hidden} of the three rows of the figure."""
    whole, half, quarter = np.ones((size, size), np.uint8), size // 2, size // 4
    corner = box_mask(size, half, half, size - half, size - half)
    centre = box_mask(size, quarter, quarter, half, half)
    return {"the upper 62.5 % hidden": box_mask(size, 0, 0, 5 * size // 8, size),
            "all but the lower right quarter hidden": whole - corner,
            "all but the centre quarter hidden": whole - centre}


def completion_strips(prior, dataset, steps):
    """Groups for strips.strips: under each of the paper's masks, some pictures and completions.

    dataset: held-out pictures of the prior's size, of which each mask has others.
    """
    groups = []
    for number, (caption, mask) in enumerate(paper_masks(dataset.size).items()):
        x = _read(prior, dataset, range(number * PICTURES, (number + 1) * PICTURES))
        m = _masks(prior, [mask] * PICTURES)                                        # (P, 1, H, W)
        codes = _completed(prior, x.repeat_interleave(COMPLETIONS, 0),
                           m.repeat_interleave(COMPLETIONS, 0), number, steps)      # (P·C, h, w)
        completed = prior.first_stage.decode_indices(codes).split(COMPLETIONS)
        row = [image for i in range(PICTURES)
               for image in (x[i], show_masked(x[i], m[i]), *completed[i])]
        groups.append((f"{caption}: original, masked, {COMPLETIONS} completions ({steps} steps, "
                       f"resample {RESAMPLE})", row))
    return groups


def inpainting_columns(prior, model, dataset, steps):
    """Columns for pictures.image_grid: held-out pictures under their evaluation masks, inpainted.

    model: an AsymVQGAN on the prior's first stage; dataset: as for completion_strips.
    """
    places = range(0, 10 * ROWS, 10)         # neighbours often have the same evaluation mask
    x = _read(prior, dataset, places)                                               # (R, 3, H, W)
    mask = _masks(prior, [evaluation_mask(dataset.size, i) for i in places])        # (R, 1, H, W)
    codes = _completed(prior, x, mask, len(paper_masks(dataset.size)), steps)       # (R, h, w)
    z = prior.first_stage.quantize.lookup(codes)                                    # (R, d, h, w)
    return {"original": list(x), "masked": list(show_masked(x, mask)),
            "codes by VQ-DDM, vanilla decoder": list(prior.first_stage.decode(z)),
            "the same codes, ours": list(model.decode(z, image=x, mask=mask))}


def _completed(prior, x, mask, number, steps):
    """Codes (B,h,w) of x with the hole filled; picture i's noise is a function of (number, i)."""
    generators = keyed_generators((FIGURE, number, i) for i in range(len(x)))
    indices = prior.first_stage.indices(fill_with_mean(x, mask))                    # (B, h, w)
    known = known_cells(mask, prior.first_stage.config.f)                           # (B, h, w)
    return complete(prior, indices, known, generators, steps, RESAMPLE)


def _read(prior, dataset, indices):
    """x (B,3,H,W) of pictures of a data set, from its start again where it is short."""
    images = [dataset.read(index % len(dataset))[0] for index in indices]
    return pixels(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), prior.device)


def _masks(prior, masks):
    return torch.from_numpy(np.stack(masks)).float()[:, None].to(prior.device)      # (B, 1, H, W)
