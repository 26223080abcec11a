"""Draw the pictures of README.md and RESULTS.md from runs.

    python benchmarks/figures.py known assets/known.png --rows RUN 1 6 --holes RUN 4 5
    python benchmarks/figures.py curves HEALTHY_RUN ILL_RUN assets/curves.png

`known` takes rows, counted from 1, of a run's report.png (--rows, --shifted) and inpainting.png
(--holes); each flag may be given for several runs. `curves` draws the logs of two decoder stages
side by side; NOTES are written for the two runs that RESULTS.md names.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import pictures

SIDE = 128                               # px of an image in `known`
# {flag: (picture, the columns to take, their captions)}
GROUPS = {
    "rows": ("report.png", range(6), [
        "original", "masked", "first stage's own decoder", "the same, photo pasted over it",
        "ours, with mask", "ours, without"]),
    "shifted": ("report.png", (0, 1, 6, 7), [
        "original", "masked", "hole in other colours, photo pasted", "the same latents, ours"]),
    "holes": ("inpainting.png", range(4), [
        "original", "masked", "codes by VQ-DDM, own decoder", "the same codes, ours"]),
}
PANELS = ["pixel", "pre_error", "disc", "lambda", "grad_norm"]
# {number: [(column, where: a share of the run, corner of the text in the panel, text), ...]}
NOTES = {
    "pixel": [(0, 0.96, (0.28, 0.6), "falls; the GAN costs a little at the end"),
              (1, 0.1, (0.25, 0.05), "rises, and stays above its start:\nlook here first")],
    "pre_error": [(0, 0.5, (0.3, 0.6), "falls by a factor of 100 and more"),
                  (1, 0.5, (0.3, 0.5), "does not fall: known pixels are not kept")],
    "disc": [(0, 0.88, (0.03, 0.6),
              "the GAN begins at 0.8 of the run;\n1: D cannot tell, below: it can"),
             (1, 0.83, (0.03, 0.6), "D has this rate as well\nand is thrown about")],
    "lambda": [(0, 0.95, (0.03, 0.4), "falls as D's gradient grows;\nits height says little")],
    "grad_norm": [(0, 0.82, (0.1, 0.75), "jumps when D begins: D's gradients count"),
                  (1, 0.5, (0.2, 0.75), "finite and small: no alarm,\nthough the run is ill")],
}


def tiles(run, name, rows, columns):
    """Cut images out of a picture by image_grid: a list of (3,SIDE,SIDE) in [-1,1] for each row.

    rows are counted from 1, columns from 0. Raises ValueError for images that do not divide SIDE.
    """
    size = json.loads((run / "report.json").read_text())["masks"]["size"]
    if SIDE % size:
        raise ValueError(f"{run} has images of {size} px; they must divide {SIDE} px")
    picture, gap = np.asarray(Image.open(run / name)), pictures.GAP
    zoom = max(1, round(256 / size))
    side = zoom * size + gap                                    # of a tile, with the gap after it
    top = (picture.shape[0] - gap) % side + gap                 # the captions end here
    lines = []
    for row in rows:
        y, line = top + (row - 1) * side, []
        for x in (gap + column * side for column in columns):
            tile = picture[y:y + side - gap:zoom, x:x + side - gap:zoom]            # (size,size,3)
            tile = tile.repeat(SIDE // size, 0).repeat(SIDE // size, 1)
            line.append(torch.from_numpy(tile).permute(2, 0, 1) / 127.5 - 1)
        lines.append(line)
    return lines


def known(path, **chosen):
    """Draw rows of runs' pictures, a group for each flag of `chosen`: [[RUN, row, ...], ...]."""
    groups, white = [], torch.ones(3, SIDE, SIDE)
    for flag, (name, columns, captions) in GROUPS.items():
        lines = [line for run, *rows in chosen[flag]
                 for line in tiles(Path(run), name, map(int, rows), columns)]
        if lines:
            rest = 6 - len(captions)                            # columns that stay empty
            groups.append((captions + [""] * rest,
                           [image for line in lines for image in line + [white] * rest]))
    pictures.image_rows(groups, path, 6, SIDE)


def curves(healthy, ill, path):
    """Draw the logs of two decoder stages side by side, a number in each row, with NOTES."""
    figure = Figure(figsize=(10, 1.9 * len(PANELS)), layout="constrained")
    grid = figure.subplots(len(PANELS), 2, sharey="row", sharex="col")
    for column, run in enumerate((healthy, ill)):
        log = [json.loads(line) for line in (run / "decoder" / "log.jsonl").open(encoding="utf-8")]
        last = log[-1]["step"]
        for name, axes in zip(PANELS, grid[:, column]):
            smooth = []
            for key, colour in ((f"val_{name}", pictures.RED), (name, pictures.BLUE)):
                points = [(record["step"], record[key]) for record in log if key in record]
                if points and key == name:
                    axes.plot(*zip(*points), color=colour, alpha=0.25, linewidth=0.7)
                    smooth = pictures._means(points, 60).T
                    axes.plot(*smooth.T, color=colour, label="training")
                elif points:
                    smooth = np.array(points)
                    axes.plot(*smooth.T, color=colour, marker=".", label="held-out images")
            for whose, share, corner, text in NOTES[name]:
                if whose == column:
                    point = min(smooth, key=lambda point: abs(point[0] - share * last))
                    axes.annotate(text, point, corner, textcoords="axes fraction", fontsize=9,
                                  arrowprops={"arrowstyle": "-", "color": "grey"})
            axes.set_yscale("log")
            axes.set_title(pictures.TITLES[name], loc="left", fontsize=10)
            axes.set_xlim(0, 1.02 * last)
            axes.grid(alpha=0.25)
            axes.tick_params(labelsize=8, which="both", labelleft=True)
            axes.spines[["top", "right"]].set_visible(False)
        grid[0, column].legend(frameon=False, fontsize=8, loc="upper right")
        grid[-1, column].set_xlabel("step", fontsize=9)
    for axes, title in zip(grid[0], ("healthy", "ill: a learning rate ten times as high")):
        axes.annotate(title, (0.5, 1.2), xycoords="axes fraction", ha="center", fontsize=13)
    figure.savefig(path, dpi=90)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    figures = parser.add_subparsers(dest="figure", required=True)
    add = figures.add_parser("known").add_argument
    add("path", type=Path)
    for flag, (name, *_) in GROUPS.items():
        add(f"--{flag}", nargs="+", action="append", default=[], metavar=("RUN", "ROW"),
            help=f"rows of RUN/{name}")
    add = figures.add_parser("curves").add_argument
    for name in ("healthy", "ill", "path"):
        add(name, type=Path)
    args = vars(parser.parse_args(argv))
    {"known": known, "curves": curves}[args.pop("figure")](**args)


if __name__ == "__main__":
    main()
