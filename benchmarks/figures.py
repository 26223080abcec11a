"""Draw the README's picture from a run.

    python benchmarks/figures.py known RUN assets/known.png [--rows 1 6] [--holes 4 5]

`known` takes rows (counted from 1) of RUN/report.png and of RUN/inpainting.png.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import pictures

SIDE = 192                               # px of an image in `known`, about
COLUMNS = ("original", "masked", "first stage's own decoder", "ours, with mask", "ours, without")
HOLES = ("original", "masked", "codes by VQ-DDM, first stage's own decoder", "the same codes, ours",
         "")


def tiles(path, rows, size):
    """Cut `rows` (counted from 1) of image_grid's picture: [[(3,size,size) in [-1,1], ...], ...]"""
    picture, gap = np.asarray(Image.open(path)), pictures.GAP
    side = round(256 / size) * size + gap                       # of a tile, with the gap after it
    across = (picture.shape[1] - gap) // side
    top = (picture.shape[0] - gap) % side + gap                 # the captions end here
    found = []
    for row in rows:
        y = top + (row - 1) * side
        line = [picture[y:y + side - gap, x:x + side - gap]
                for x in range(gap, gap + across * side, side)]
        step = (side - gap) // size                             # one pixel of the image
        found.append([torch.from_numpy(tile[::step, ::step].copy()).permute(2, 0, 1) / 127.5 - 1
                      for tile in line])
    return found


def known(run, path, rows, holes, size):
    """Draw rows of a run's two pictures, one group below the other."""
    lines = [list(COLUMNS), *tiles(run / "report.png", rows, size),
             list(HOLES), *tiles(run / "inpainting.png", holes, size)]
    pictures._draw(lines, path, SIDE)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="figure", required=True)
    add = what.add_parser("known").add_argument
    add("run", type=Path)
    add("path", type=Path)
    add("--rows", type=int, nargs="+", default=[1, 6], help="of report.png")
    add("--holes", type=int, nargs="+", default=[4, 5], help="of inpainting.png")
    add("--size", type=int, default=64, help="px of the run's images")
    args = vars(parser.parse_args(argv))
    globals()[args.pop("figure")](**args)


if __name__ == "__main__":
    main()
