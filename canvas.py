"""A photo and its mask as networks take them: of any size in, multiples of f out, and back.

    photo, hole --prepare--> Canvas: x, mask, padded; known, on the grid of codes
    Canvas --shrink--> Canvas of a smaller copy of the photo
    (1,C,H',W') --Canvas.cut--> (C,H,W)

What the photo shows where the hole is may lie in x, as ever, but nothing of it gets into what
counts as known. Not here: what is drawn on it (completion.py, inpaint.py).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from diffusion import known_cells


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
    ends = [(0, padded - side) for side, padded in zip(hole.shape, sides)]
    pixels = torch.from_numpy(np.pad(photo, [*ends, (0, 0)], mode="symmetric"))     # (H', W', 3)
    mask = torch.from_numpy(np.pad(hole, ends, mode="symmetric"))                   # (H', W')
    x = pixels.to(device).permute(2, 0, 1)[None] / 127.5 - 1                        # (1,3,H',W')
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
