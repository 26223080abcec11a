"""Draw images under captions, and the curves of a run.

    image_grid   {caption: [(3,H,W) in [-1,1], ...]} -> one column for each caption     report.png
    image_rows   [(caption, [(3,H,W), ...]), ...] -> groups one below the other         samples.png
    curves       log.jsonl -> one panel for each number, training and validation        curves.png

Small images are enlarged by a whole number, because a smooth enlargement would hide lost detail.
"""

import json
import math
import os
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# A notebook hands MPLBACKEND to the programs that it starts, where matplotlib may refuse it.
if "ipykernel" not in sys.modules:
    os.environ.pop("MPLBACKEND", None)
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

GAP, LINE, INK = 6, 21, (30, 30, 30)                 # px, px of a line of text, its colour
TITLES = {                                           # in the order of the panels
    "pixel": "pixel loss, mean |x̂ - x|",
    "pixel_masked": "pixel loss, with the mask",
    "pre_error": "pre_error, [0,1]",
    "perceptual": "perceptual loss (LPIPS)",
    "latent": "latent loss",
    "vlb": "bound on -log p(codes), nats per map",
    "gan": "generator's GAN loss",
    "disc": "discriminator's loss",
    "logits_real": "discriminator's logits, real",
    "logits_fake": "discriminator's logits, generated",
    "lambda": "adaptive weight λ",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
}
BLUE, RED, POINTS, SMOOTH_POINTS = "#3b6ea8", "#d1495b", 400, 40     # most points of a line


def show_masked(x, mask):
    """Paint the hole of x (...,3,H,W) mid-grey: the condition branch's input Y. [AVQ Fig. 3]"""
    return x * (1 - mask)


def image_grid(columns, path):
    """Write a PNG with a column of images, about 256 px wide each, under each caption."""
    images = [image for row in zip(*columns.values(), strict=True) for image in row]
    image_rows([(list(columns), images)], path, len(columns), 256)


def image_rows(groups, path, across=None, side=128):
    """Write a PNG of groups of images, one below the other, each under its caption or captions.

    groups: [(a caption, or a list with one for each column; images in [-1,1], clamped)]. across:
    images in a row, None for all of a group. Images are enlarged to about `side` px. Raises
    ValueError for images of several sizes or none.
    """
    shapes = {tuple(image.shape) for _, images in groups for image in images}
    if len(shapes) != 1:
        raise ValueError(f"images of the shapes {sorted(shapes)}: give images of one shape")
    _, H, W = shapes.pop()
    most = max(len(images) for _, images in groups)
    across = min(across or most, most)
    zoom, font = max(1, round(side / W)), ImageFont.load_default(15)
    width = across * (W * zoom + GAP)
    strips = [Image.new("RGB", (GAP + width, GAP), "white")]
    for captions, images in groups:
        line = [captions] if isinstance(captions, str) else captions
        line = [_wrapped(caption, font, width // len(line) - GAP) for caption in line]
        height = LINE * (1 + max(caption.count("\n") for caption in line))
        strips.append(Image.new("RGB", (GAP + width, height), "white"))
        for i, caption in enumerate(line):               # "ld": its last line is above the images
            place = GAP + i * width // len(line), height - GAP // 2
            ImageDraw.Draw(strips[-1]).text(place, caption, INK, font, anchor="ld")
        for i, image in enumerate(images):
            if i % across == 0:
                strips.append(Image.new("RGB", (GAP + width, H * zoom + GAP), "white"))
            unit = (image.detach().float().cpu().clamp(-1, 1) + 1) / 2
            pixels = (unit * 255).round().byte().permute(1, 2, 0).numpy()           # (H,W,3)
            square = Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1))
            strips[-1].paste(square, (GAP + i % across * (W * zoom + GAP), 0))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(strips)).save(path)


def _wrapped(caption, font, room):
    """Break the caption into lines of at most `room` px, between words where that is possible."""
    for letters in range(max(1, len(caption)), 0, -1):
        lines = [line for part in caption.split("\n")
                 for line in textwrap.wrap(part, letters) or [""]]
        if max(map(font.getlength, lines)) <= room:
            break
    return "\n".join(lines)


@style.context("default")        # not a matplotlibrc of the user, which may ask for LaTeX
def curves(log_path, png_path):
    """Draw a panel for each number of a run's log, train and val together.

    `val_NAME` is NAME on held-out images. A long log is averaged over neighbouring steps. Positive
    values over a factor of ten have a logarithmic scale. A log without numbers gives no picture.
    """
    # Read the series, and name the panels in the order of TITLES.
    series = {}                                      # {key: [(step, value), ...]}
    with open(log_path, encoding="utf-8") as file:
        for record in map(json.loads, file):
            for key, value in record.items():
                number = type(value) in (int, float) and math.isfinite(value)
                if number and key not in ("step", "images"):
                    series.setdefault(key, []).append((record["step"], value))
    known = dict.fromkeys([*TITLES, *(key.removeprefix("val_") for key in series)])
    names = [name for name in known if name in series or f"val_{name}" in series]
    if not names:
        return

    # Draw the panels.
    across, down = min(3, len(names)), math.ceil(len(names) / 3)
    last = max(1, *(points[-1][0] for points in series.values()))
    width, height = 4.2 * across, 2.6 * down         # inches, as the margins below
    figure = Figure(figsize=(width, height))         # a constrained layout would be slower
    figure.subplots_adjust(left=0.55 / width, right=1 - 0.1 / width, bottom=0.5 / height,
                           top=1 - 0.3 / height, wspace=0.17, hspace=0.3)
    for position, name in enumerate(names, 1):
        axes = figure.add_subplot(down, across, position)
        train, val = series.get(name, []), series.get(f"val_{name}", [])
        if train:
            axes.plot(*_means(train, POINTS), color=BLUE, alpha=0.35, linewidth=0.8)
            axes.plot(*_means(train, SMOOTH_POINTS), color=BLUE, label="train", linewidth=1.4)
        if val:
            axes.plot(*zip(*val), color=RED, label="val", marker=".", linewidth=1.4)
        low, high = axes.dataLim.intervaly               # of all that is drawn
        if 0 < 10 * low < high:
            axes.set_yscale("log")
        axes.set_title(TITLES.get(name, name), loc="left", fontsize=10)
        axes.set_xlim(0, 1.02 * last)                # one scale, so that a late start can be seen
        if position > len(names) - across:
            axes.set_xlabel("step", fontsize=9)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(labelsize=8, which="both")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(png_path, dpi=110)


def _means(points, count):
    """Average neighbouring (step, value) points to at most `count`: (steps, values)."""
    parts = np.array_split(np.array(points, float), min(len(points), count))      # of (n,2)
    return np.array([part.mean(0) for part in parts]).T                             # (2,count)
