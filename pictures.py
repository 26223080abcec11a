"""Draw images under captions, and the curves of a run.

    image_grid   {caption: [(3,H,W) in [-1,1], ...]} -> a column each, a row an image   report.png
    image_rows   [(caption, [(3,H,W), ...]), ...] -> groups one below the other         samples.png
    curves       log.jsonl -> a panel a term, training and validation together          curves.png

Small images are enlarged by whole numbers: a smooth enlargement would hide what a decoder lost.
"""

import json
import math
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image, ImageDraw, ImageFont

GAP, LINE, INK = 6, 21, (30, 30, 30)                 # px, px of a line of text, its colour
TITLES = {                                           # in the order of the panels
    "pixel": "pixel loss, mean |x̂ - x|",
    "pixel_masked": "pixel loss, with the mask",
    "pre_error": "pre_error, [0,1]",
    "perceptual": "perceptual loss (LPIPS)",
    "latent": "latent loss",
    "vlb": "bound on -log p(codes), nats a map",
    "gan": "generator's GAN loss",
    "disc": "discriminator's loss",
    "logits_real": "discriminator's logits, real",
    "logits_fake": "discriminator's logits, generated",
    "lambda": "adaptive weight λ",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
}
BLUE, RED, POINTS, SMOOTH_POINTS = "#3b6ea8", "#d1495b", 400, 40     # at most so many points


def show_masked(x, mask):
    """Paint the hole of x (...,3,H,W) mid-grey, as the condition branch sees it. [AVQ Fig. 3]"""
    return x * (1 - mask)


def image_grid(columns, path):
    """Write a PNG with one column for each caption; row i shows every column's image i.

    Images are about 256 px wide. Raises ValueError for lists of several lengths, and as _draw.
    """
    lengths = {len(images) for images in columns.values()}
    if len(lengths) != 1:
        raise ValueError(f"columns of {sorted(lengths)} images: a grid needs one length")
    _draw([list(columns), *zip(*columns.values())], path, 256)


def image_rows(groups, path, across=None):
    """Write a PNG of groups of images, one below the other, each under its caption.

    across: images in a row, each about 128 px wide (default: all of a group). Raises as _draw.
    """
    lines = []
    for caption, images in groups:
        step = across or max(1, len(images))
        lines += [[caption], *(images[i:i + step] for i in range(0, len(images), step))]
    _draw(lines, path, 128)


def _draw(lines, path, side):
    """Write a PNG of `lines`, each a list of images in [-1,1] (clamped) or of captions.

    Images are enlarged to about `side` px, by a whole number. ValueError: several sizes, or none.
    """
    rows = [line for line in lines if not isinstance(line[0], str)]
    shapes = {tuple(image.shape) for row in rows for image in row}
    if len(shapes) != 1:
        raise ValueError(f"images of the shapes {sorted(shapes)}: a picture needs one")
    _, H, W = shapes.pop()
    zoom, font = max(1, round(side / W)), ImageFont.load_default(15)
    width = max(map(len, rows)) * (W * zoom + GAP)
    strips = [Image.new("RGB", (GAP + width, GAP), "white")]
    for line in lines:
        if isinstance(line[0], str):
            line = [_wrapped(caption, font, width // len(line) - GAP) for caption in line]
            height = LINE * (1 + max(caption.count("\n") for caption in line))
            strips.append(Image.new("RGB", (GAP + width, height), "white"))
            for i, caption in enumerate(line):           # its last line just above the images
                place = GAP + i * width // len(line), height - GAP // 2
                ImageDraw.Draw(strips[-1]).text(place, caption, INK, font, anchor="ld")
        else:
            strips.append(Image.new("RGB", (GAP + width, H * zoom + GAP), "white"))
            for i, image in enumerate(line):
                unit = (image.detach().float().cpu().clamp(-1, 1) + 1) / 2
                pixels = (unit * 255).round().byte().permute(1, 2, 0).numpy()       # (H,W,3)
                square = Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1))
                strips[-1].paste(square, (GAP + i * (W * zoom + GAP), 0))
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


def curves(log_path, png_path):
    """Draw a run's log as small multiples: a panel for each number, train and val together.

    `val_NAME` is NAME on held-out images. Long logs are drawn as means of neighbouring steps; the
    scale is logarithmic for positive values over a factor of ten. Without numbers: no picture.
    """
    series = {}                                      # {key: [(step, value), ...]}
    with open(log_path, encoding="utf-8") as file:
        for record in map(json.loads, file):
            for key, value in record.items():
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if number and math.isfinite(value) and key not in ("step", "images"):
                    series.setdefault(key, []).append((record["step"], value))
    known = dict.fromkeys([*TITLES, *(key.removeprefix("val_") for key in series)])
    names = [name for name in known if name in series or f"val_{name}" in series]
    if not names:
        return
    across, down = min(3, len(names)), math.ceil(len(names) / 3)
    last = max(1, *(points[-1][0] for points in series.values()))
    width, height = 4.2 * across, 2.6 * down         # inches, as the margins below
    figure = Figure(figsize=(width, height))         # a constrained layout would be slower
    figure.subplots_adjust(left=0.55 / width, right=1 - 0.1 / width, bottom=0.5 / height,
                           top=1 - 0.3 / height, wspace=0.17, hspace=0.3)
    for position, name in enumerate(names, 1):
        axes = figure.add_subplot(down, across, position)
        train, val = series.get(name, []), series.get(f"val_{name}", [])
        drawn = [value for _, value in val]
        if train:
            steps, values = _means(train, POINTS)
            axes.plot(steps, values, color=BLUE, alpha=0.35, linewidth=0.8)
            axes.plot(*_means(train, SMOOTH_POINTS), color=BLUE, label="train", linewidth=1.4)
            drawn += list(values)
        if val:
            axes.plot(*zip(*val), color=RED, label="val", marker=".", linewidth=1.4)
        if min(drawn) > 0 and max(drawn) > 10 * min(drawn):
            axes.set_yscale("log")
        axes.set_title(TITLES.get(name, name), loc="left", fontsize=10)
        axes.set_xlim(0, 1.02 * last)                # one scale for all: what begins late shows it
        if position > len(names) - across:
            axes.set_xlabel("step", fontsize=9)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(labelsize=8, which="both")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    Path(png_path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, dpi=110)


def _means(points, count):
    """Average equal numbers of neighbours: (steps, values) of at most `count` points."""
    parts = np.array_split(np.array(points, float), min(len(points), count))      # of (n,2)
    return np.array([part.mean(0) for part in parts]).T                             # (2,count)
