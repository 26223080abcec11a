"""Pictures in strips: groups of images of one size, each under a line that says what they are.

    [(caption, [(3,H,W) in [-1,1], ...]), ...] --strips--> a PNG, the groups one below the other

For what is read from left to right: samples, completions, neighbours. Columns with a caption each,
as decoders are compared in, are figures.image_grid's.
"""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from figures import BACKGROUND, FONT_SIZE, GAP, INK, LINE, enlarge

WIDTH = 128              # px that an image takes, about


def strips(groups, path, across=None):
    """Write a PNG of `groups`: [(caption, list of (3,H,W) in [-1,1])], all images of one size.

    across: images in a row (default: a group is one row). Values outside the range are clamped;
    small images are enlarged by whole numbers, pixel by pixel. Raises ValueError for images of
    several sizes, or none.
    """
    shapes = {tuple(image.shape) for _, images in groups for image in images}
    if len(shapes) != 1:
        raise ValueError(f"images of the shapes {sorted(shapes)}: strips need one")
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
