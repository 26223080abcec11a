"""Draw masks: 1 = to be generated, 0 = known (AVQ Sec. 3.2).

    (kind, seed, index) -> strokes or boxes of LaMa's canvas -> nearest pixels: uint8 (size,size)

The decoder trains on LaMa's random masks (strokes of a thick brush, or boxes). Half of the samples
get the full mask instead, so that it learns to decode the latent alone. Evaluation masks cover at
most half the image. Every mask is a pure function of its arguments.
"""

from collections import namedtuple
from itertools import count
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

from seeding import MASK_EVALUATION, MASK_FULL, MASK_SHAPE, numpy_generator

# As LaMa states them: a brush is 5 to 5 + width px wide, a segment 10 to 10 + length px long.
Strokes = namedtuple("Strokes", "min_times max_times width length")
Boxes = namedtuple("Boxes", "max_times min_side max_side margin")

LAMA_MASKS = {
    ("thick", 256): (Strokes(1, 5, 100, 200), Boxes(3, 30, 150, 10)),
    ("thick", 512): (Strokes(1, 5, 250, 450), Boxes(4, 30, 300, 10)),
    ("medium", 256): (Strokes(4, 5, 50, 100), Boxes(5, 10, 50, 0)),
    ("medium", 512): (Strokes(4, 10, 100, 200), Boxes(5, 30, 150, 0)),
    ("thin", 256): (Strokes(4, 50, 10, 40), None),
    ("thin", 512): (Strokes(4, 70, 20, 100), None),
}
MASK_KINDS = ("thin", "medium", "thick")
BOX_SHARE = 0.3 / 1.3  # LaMa's weights: strokes 1, boxes 0.3


def random_mask(kind, size, seed, index, stream=MASK_SHAPE):
    """Draw LaMa's random mask: uint8 (size,size), 1 = to be generated.

    kind: one of MASK_KINDS. Sizes below 512 px show LaMa's mask of 256 px, larger ones its mask of
    512 px, in the nearest pixels. seed: ints >= 0, one or a tuple. stream: of seeding.py.
    """
    side = 512 if size >= 512 else 256
    strokes, boxes = LAMA_MASKS[kind, side]
    rng = _generator(stream, seed, index)
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    if boxes and rng.random() < BOX_SHARE:
        for _ in range(rng.integers(1, boxes.max_times + 1)):
            width, height = rng.integers(boxes.min_side, boxes.max_side + 1, size=2).tolist()
            left, top = rng.integers(boxes.margin, (side - boxes.margin - width + 1,
                                                    side - boxes.margin - height + 1)).tolist()
            draw.rectangle((left, top, left + width - 1, top + height - 1), fill=1)
    else:
        # LaMa says "1-5 times" but draws 1 to 6: its generator adds one to the end.  deviation D18
        for stroke in range(rng.integers(strokes.min_times, strokes.max_times + 2)):
            x, y = rng.integers(side, size=2).tolist()
            segments = rng.integers(1, 6), 3
            for turn, length, width in rng.integers((4, strokes.length, strokes.width),
                                                    size=segments).tolist():
                angle, length, start = 0.01 + turn, 10 + length, (x, y)
                if stroke % 2 == 0:
                    angle = 2 * pi - angle
                x = min(max(int(x + length * sin(angle)), 0), side)
                y = min(max(int(y + length * cos(angle)), 0), side)
                draw_line(draw, start, (x, y), 5 + width)
    return np.array(canvas.resize((size, size), Image.Resampling.NEAREST))          # (size,size)


def _generator(stream, seed, index):
    """Make the generator of a mask. No keys collide, whatever their lengths: the length leads."""
    seed = seed if isinstance(seed, tuple) else (seed,)
    return numpy_generator(stream, len(seed), *seed, index)


def draw_line(draw, start, end, width):
    """Draw a line between two pixels as wide as OpenCV's, with round ends.

    OpenCV's line is 2 r + 1 px wide, r = (width + 1) // 2: 7 px for 5 and for 6.  deviation D18
    """
    r = (width + 1) // 2
    draw.line((start, end), fill=1, width=2 * r + 1)
    for x, y in (start, end):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=1)


def box_mask(size, top, left, height, width):
    """Mark one box: uint8 (size,size). Raises ValueError if it is empty or leaves the image."""
    if min(top, left) < 0 or min(height, width) < 1 or max(top + height, left + width) > size:
        raise ValueError(f"box top={top} left={left} height={height} width={width} "
                         f"does not fit into {size} x {size} px")
    mask = np.zeros((size, size), np.uint8)                                         # (size,size)
    mask[top:top + height, left:left + width] = 1
    return mask


def training_mask(size, seed, index, kind="thick", p_full=0.5):
    """Draw the full mask with probability `p_full`, else a random one: uint8. [AVQ Sec. 3.2]

    The paper alternates. A coin for each sample does not depend on the batch.  deviation D8
    """
    if _generator(MASK_FULL, seed, index).random() < p_full:
        return np.ones((size, size), np.uint8)                                      # (size,size)
    return random_mask(kind, size, seed, index)


def evaluation_mask(size, index, kind="thick", seed=0):
    """Draw image `index`'s mask for every table, not empty, less than half: uint8 (size,size).

    Another mask is drawn again, from the next number of attempt.  deviation D29
    """
    for attempt in count():
        mask = random_mask(kind, size, (seed, index), attempt, MASK_EVALUATION)     # (size,size)
        if 0 < mask.mean() < 0.5:
            return mask


def area_bucket(mask):
    """Name LaMa's bin of the share to be generated: "0-10" .. "90-100". [AVQ Tab. 1]

    Each bin includes its lower end. mask: any array or CPU tensor of zeros and ones.
    """
    mask = np.asarray(mask)
    tenth = min(9, 10 * int(mask.sum()) // mask.size)  # in integers, so that 40 % is exact
    return f"{10 * tenth}-{10 * tenth + 10}"
