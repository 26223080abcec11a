"""Pictures for people: grids of images beside each other, and the curves of a run.

    image_grid   {caption: [(3,H,W) in [-1,1], ...]} -> a column each, a row an image   report.png
    image_rows   [(caption, [(3,H,W), ...]), ...] -> groups one below the other         samples.png
    curves       log.jsonl -> a panel a term, training and validation together          curves.png

Small images are enlarged by whole numbers, pixel by pixel: whether a word survived a decoder is
judged on its pixels, and a smooth enlargement would hide the very strokes that matter. What to show
is the caller's choice (train.py, eval.py); the numbers are in log.jsonl and report.json.
"""

import json
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image, ImageDraw, ImageFont

GAP, FONT_SIZE, LINE = 6, 15, 21                     # px
BACKGROUND, INK = (255, 255, 255), (30, 30, 30)

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
NO_CURVES = {"step", "images"}
TRAIN_COLOUR, VAL_COLOUR = "#3b6ea8", "#d1495b"
MAX_POINTS = 400
WIDTH = 128             # px that an image of a row takes, about


def show_masked(x, mask):
    """The picture with its hole in mid-grey, as the condition branch sees it. [AVQ Fig. 3]

    x: (...,3,H,W) in [-1,1]; mask: (...,1,H,W), 1 = to be generated.
    """
    return x * (1 - mask)


def image_grid(columns, path, zoom=None):
    """Write a PNG with one column for each caption; row i shows every column's image i.

    columns: {caption: list of (3,H,W) tensors in [-1,1]}, all lists equally long and all images of
    one size; values outside the range are clamped. zoom: whole-number enlargement; by default
    images become about 256 px wide. Raises ValueError where the columns do not match.
    """
    lengths = {len(images) for images in columns.values()}
    shapes = {tuple(image.shape) for images in columns.values() for image in images}
    if len(lengths) != 1 or len(shapes) != 1:
        raise ValueError(f"columns of {sorted(lengths)} images with shapes {sorted(shapes)}: "
                         "a grid needs one length and one shape")
    rows, (_, H, W) = lengths.pop(), shapes.pop()
    zoom = zoom or max(1, round(256 / W))
    font = ImageFont.load_default(FONT_SIZE)
    captions = [_wrap(caption, font, W * zoom) for caption in columns]
    top = GAP + LINE * max(map(len, captions))
    step_x, step_y = W * zoom + GAP, H * zoom + GAP
    canvas = Image.new("RGB", (GAP + step_x * len(columns), top + step_y * rows), BACKGROUND)
    for column, (lines, images) in enumerate(zip(captions, columns.values())):
        left = GAP + step_x * column
        _caption(canvas, lines, font, left + W * zoom // 2, top)
        for row, image in enumerate(images):
            canvas.paste(enlarge(image, zoom), (left, top + step_y * row))
    canvas.save(_parent_made(path))


def image_rows(groups, path, across=None):
    """Write a PNG of `groups`: [(caption, list of (3,H,W) in [-1,1])], all images of one size.

    across: images in a row (default: a group is one row). Values outside the range are clamped;
    small images are enlarged by whole numbers, pixel by pixel. Raises ValueError for images of
    several sizes, or none.
    """
    shapes = {tuple(image.shape) for _, images in groups for image in images}
    if len(shapes) != 1:
        raise ValueError(f"images of the shapes {sorted(shapes)}: rows need one")
    _, H, W = shapes.pop()
    zoom = max(1, round(WIDTH / W))
    across = across or max(len(images) for _, images in groups)
    font = ImageFont.load_default(FONT_SIZE)
    text = max(math.ceil(font.getlength(caption)) for caption, _ in groups)
    rows = sum(math.ceil(len(images) / across) for _, images in groups)
    width = GAP + max(across * (W * zoom + GAP), text + GAP)
    height = GAP + len(groups) * LINE + rows * (H * zoom + GAP)
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    top = GAP
    for caption, images in groups:
        ImageDraw.Draw(canvas).text((GAP, top), caption, INK, font)
        top += LINE
        for first in range(0, len(images), across):
            for place, image in enumerate(images[first:first + across]):
                canvas.paste(enlarge(image, zoom), (GAP + place * (W * zoom + GAP), top))
            top += H * zoom + GAP
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def enlarge(image, zoom):
    """(3,H,W) in [-1,1] -> a Pillow image, `zoom` times as large, each pixel a square."""
    unit = (image.detach().float().cpu().clamp(-1, 1) + 1) / 2
    pixels = (unit * 255).round().byte().permute(1, 2, 0).numpy()               # (H,W,3)
    return Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1))              # (zoom·H,zoom·W,3)


def _wrap(caption, font, width):
    """The caption's lines, broken between words, and within a word wider than the column."""
    lines = []
    for paragraph in caption.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}".strip()
            while font.getlength(line) > width and len(line) > 1:
                fits = max(n for n in range(1, len(line))
                           if n == 1 or font.getlength(line[:n]) <= width)
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    return lines


def _caption(canvas, lines, font, centre, bottom):
    """Write the lines centred, the last one just above `bottom`."""
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(reversed(lines)):
        draw.text((centre, bottom - GAP - LINE * i), line, INK, font, anchor="ms")


def curves(log_path, png_path):
    """Draw a run's log as small multiples: a panel for each number, train and val together.

    log_path: log.jsonl, one JSON object a line with `step` and numbers; `val_NAME` is NAME on
    held-out images. Long logs are drawn as means of neighbouring steps. A log without numbers
    makes no picture.
    """
    with open(log_path, encoding="utf-8") as file:
        series = _series(json.loads(line) for line in file)
    named = dict.fromkeys([*TITLES, *(key.removeprefix("val_") for key in series)])
    names = [name for name in named if name in series or f"val_{name}" in series]
    if not names:
        return
    across = min(3, len(names))
    down = math.ceil(len(names) / across)
    last = max(1, *(points[-1][0] for points in series.values()))
    width, height = 4.2 * across, 2.6 * down                        # inches, as the margins below
    figure = Figure(figsize=(width, height))
    # Measuring the labels, as a constrained layout does, would take as long as drawing them.
    figure.subplots_adjust(left=0.55 / width, right=1 - 0.1 / width, bottom=0.5 / height,
                           top=1 - 0.3 / height, wspace=0.17, hspace=0.3)
    for position, name in enumerate(names, 1):
        axes = figure.add_subplot(down, across, position)
        _panel(axes, series.get(name), series.get(f"val_{name}"))
        axes.set_title(TITLES.get(name, name), loc="left", fontsize=10)
        axes.set_xlim(0, 1.02 * last)                # one scale for all: what begins late shows it
        if position > len(names) - across:
            axes.set_xlabel("step", fontsize=9)
    figure.savefig(_parent_made(png_path), dpi=110)


def _series(lines):
    """{key: [(step, value), ...]} of every finite number in the log."""
    series = {}
    for line in lines:
        for key, value in line.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and math.isfinite(value) and key not in NO_CURVES:
                series.setdefault(key, []).append((line["step"], value))
    return series


def _panel(axes, train, val):
    """One term; logarithmic where it is positive and spans more than a factor of ten."""
    drawn = []
    if train:
        steps, values = _binned(train)
        axes.plot(steps, values, color=TRAIN_COLOUR, alpha=0.35, linewidth=0.8)
        axes.plot(steps, _running_mean(values), color=TRAIN_COLOUR, label="train", linewidth=1.4)
        drawn.extend(values)
    if val:
        steps, values = np.array(val, float).T
        axes.plot(steps, values, color=VAL_COLOUR, label="val", marker=".", linewidth=1.4)
        drawn.extend(values)
    if min(drawn) > 0 and max(drawn) > 10 * min(drawn):
        axes.set_yscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(labelsize=8, which="both")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _binned(points):
    """(steps, values) of at most MAX_POINTS points, means over equal numbers of neighbours."""
    parts = np.array_split(np.array(points, float), min(len(points), MAX_POINTS))   # of (n,2)
    return np.array([part.mean(0) for part in parts]).T                             # (2,points)


def _running_mean(values):
    """Means over a window of a twentieth of the curve, cut off at both ends."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _parent_made(path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return path
