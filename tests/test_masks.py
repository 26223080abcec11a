"""masks.py: LaMa's statistics, purity, streams, the schedule and the bins."""

from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageDraw

import masks
from masks import (
    MASK_KINDS,
    area_bucket,
    box_mask,
    draw_line,
    evaluation_mask,
    random_mask,
    training_mask,
)
from seeding import MASK_EVALUATION, MASK_FULL, MASK_SHAPE

# LaMa's own law, drawn with OpenCV (4.5.5, 4.14 and 5.0 draw the same): mean area, its standard
# deviation and the share of masks over a half, each of 10,000 masks of its configurations.
LAMA_MASKS_DRAWN = 10_000
LAMA_AREAS = {("thick", 256): (0.4007, 0.2201, 0.3503), ("thick", 512): (0.4562, 0.2473, 0.4412),
              ("medium", 256): (0.2402, 0.1343, 0.0102), ("medium", 512): (0.3056, 0.1582, 0.1118),
              ("thin", 256): (0.2950, 0.1323, 0.0272), ("thin", 512): (0.2923, 0.1368, 0.0302)}
# The sum of the pixels of OpenCV's lines of each width from (150, 150) to these five pixels.
LINE_ENDS = (350, 150), (343, 202), (291, 291), (216, 338), (250, 323)
OPENCV_PIXELS = {5: 7092, 6: 7092, 9: 11666, 14: 15727, 55: 69116, 104: 147356, 254: 507767}


def areas(kind, size, count, seed=0):
    return np.array([random_mask(kind, size, seed, index).mean() for index in range(count)])


def errors_in_standard_errors(kind, size, count, seed=0):
    """Compare with LaMa: mean, deviation and share over a half, in standard errors of both."""
    area, lama = areas(kind, size, count, seed), np.array(LAMA_AREAS[kind, size])
    ours = np.array([area.mean(), area.std(), (area > 0.5).mean()])
    spread = np.array([area.std(), ((area - ours[0])**2).std() / (2 * ours[1]),
                       (lama[2] * (1 - lama[2]))**0.5])
    return np.abs(ours - lama) / (spread * (1 / count + 1 / LAMA_MASKS_DRAWN)**0.5)


@pytest.mark.parametrize(("kind", "size"), LAMA_AREAS)
def test_areas_of_each_kind_and_canvas_are_lamas_within_three_standard_errors(kind, size):
    count = 400 if kind == "thin" else 1000 if size == 256 else 700
    assert errors_in_standard_errors(kind, size, count).max() < 3


# Our lines are up to 1 % larger, 0.002 of the picture, which so many masks begin to show.
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), LAMA_AREAS)
def test_areas_of_many_masks_are_lamas_within_four_standard_errors(kind, size):
    assert errors_in_standard_errors(kind, size, 6000, seed=1).max() < 4


@pytest.mark.parametrize(("width", "pixels"), OPENCV_PIXELS.items())
def test_lines_cover_as_many_pixels_as_opencvs(width, pixels):
    drawn = 0
    for end in LINE_ENDS:
        canvas = Image.new("L", (512, 512))
        draw_line(ImageDraw.Draw(canvas), (150, 150), end, width)
        drawn += np.array(canvas).sum(dtype=int)
    assert drawn == pytest.approx(pixels, rel=0.02)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_small_masks_are_as_large_a_share_of_the_picture(kind):
    area = areas(kind, 256, 40)
    for size, tolerance in ((128, 0.001), (64, 0.001), (32, 0.004)):
        small = areas(kind, size, 40)
        assert small.mean() == pytest.approx(area.mean(), abs=tolerance)
        assert np.abs(small - area).max() < 0.02 * 64 / min(size, 64)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_masks_are_zeros_and_ones_of_the_size_asked_for(kind):
    for size in (32, 64, 100, 256, 300, 512, 768):
        mask = random_mask(kind, size, seed=0, index=3)
        assert mask.shape == (size, size)
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 1}


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_a_small_mask_is_the_same_drawing_as_the_large_one(kind):
    for index in range(20):
        averaged = random_mask(kind, 256, 5, index).reshape(128, 2, 128, 2).mean((1, 3))
        error = np.abs(averaged - random_mask(kind, 128, 5, index)).mean()
        assert error < 0.08                              # edges only; unrelated masks: 0.35


def test_a_mask_depends_on_its_arguments_only():
    first = random_mask("thick", 64, (3, 1), 17)
    np.random.seed(123)  # noqa: NPY002 - the global stream must not matter
    random_mask("thin", 64, 0, 0)
    assert np.array_equal(first, random_mask("thick", 64, (3, 1), 17))
    others = ("thick", (3, 1), 18), ("thick", (4, 1), 17), ("thick", (3, 2), 17), (
        "medium", (3, 1), 17)
    assert not any(np.array_equal(first, random_mask(kind, 64, seed, index))
                   for kind, seed, index in others)


def test_keys_of_any_length_give_streams_of_their_own():
    """numpy alone takes (101, 0, 2) and (101, 0, 2, 0) for the same key."""
    seeds = [seed for n in (1, 2, 3) for seed in product(range(3), repeat=n)]
    keys = list(product((MASK_SHAPE, MASK_FULL, MASK_EVALUATION), seeds, range(3)))
    states = {str(masks._generator(*key).bit_generator.state) for key in keys}
    assert len(states) == len(keys) == 3 * 39 * 3


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_no_evaluation_mask_is_a_mask_of_training(kind):
    """Seed 0; stages 0 to 3 and plain seeds; 64 px."""
    trained = {random_mask(kind, 64, seed, index).tobytes()
               for seed in (0, (0, 0), (0, 1), (0, 2), (0, 3)) for index in range(25)}
    assert len(trained) == 125
    assert not trained & {evaluation_mask(64, index, kind).tobytes() for index in range(25)}


def test_boxes_keep_lamas_sides_and_margin():
    boxes = 0
    for index in range(400):
        mask = random_mask("thick", 256, 0, index)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        rectangle = mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
        if rectangle.all() and mask.mean() < 0.9:
            boxes += 1
            assert 30 <= rectangle.shape[0] <= 246
            assert rows[0] >= 10
            assert rows[-1] < 246
    assert boxes > 15  # a third of the boxes come alone, and 23 % of the masks are boxes


def test_full_masks_are_half_of_the_schedule_or_any_other_share():
    drawn = [training_mask(32, (0, 2), index) for index in range(1000)]
    assert np.mean([mask.all() for mask in drawn]) == pytest.approx(0.5, abs=0.05)
    assert {(mask.shape, mask.dtype.name) for mask in drawn} == {((32, 32), "uint8")}
    assert all(training_mask(32, 0, index, p_full=1.0).all() for index in range(50))
    for index in range(50):
        mask = training_mask(64, 0, index, "thin", p_full=0.0)
        assert np.array_equal(mask, random_mask("thin", 64, 0, index))


@pytest.mark.parametrize(("kind", "size", "n", "seed"), [
    ("thick", 64, 500, 0), ("thick", 128, 100, 0), ("thick", 64, 100, 1), ("thick", 32, 100, 0),
    ("medium", 64, 100, 0), ("thin", 64, 100, 0)])
def test_evaluation_masks_are_distinct_neither_empty_nor_over_half_the_picture(
        kind, size, n, seed):
    drawn = [evaluation_mask(size, index, kind, seed) for index in range(n)]
    assert len({mask.tobytes() for mask in drawn}) == n
    assert all(0 < mask.mean() < 0.5 for mask in drawn)
    np.random.seed(123)  # noqa: NPY002 - the global stream must not matter
    assert all(np.array_equal(drawn[index], evaluation_mask(size, index, kind, seed))
               for index in range(n - 1, 0, -9))


@pytest.mark.parametrize(("kind", "seed"), [("thick", 0), ("medium", 1)])
def test_an_evaluation_mask_is_the_first_attempt_that_fits(kind, seed):
    attempts = []
    for index in range(150):
        attempt = 0
        while not 0 < (mask := random_mask(kind, 64, (seed, index), attempt,
                                           MASK_EVALUATION)).mean() < 0.5:
            attempt += 1
        assert np.array_equal(evaluation_mask(64, index, kind, seed), mask)
        attempts.append(attempt)
    assert max(attempts) > 0  # some were drawn again


def test_bins_hold_their_lower_end():
    counts = [*range(0, 101, 10), 39]
    names = [area_bucket(np.arange(100).reshape(10, 10) < count) for count in counts]
    assert names == [f"{a}-{a + 10}" for a in range(0, 100, 10)] + ["90-100", "30-40"]


def test_a_box_covers_its_rows_and_columns():
    mask = box_mask(16, top=2, left=3, height=4, width=5)
    assert mask.sum() == mask[2:6, 3:8].sum() == 20


@pytest.mark.parametrize("box", [(-1, 0, 4, 4), (0, 0, 17, 4), (14, 0, 4, 4), (0, 0, 0, 4)])
def test_a_box_outside_the_picture_is_an_error(box):
    with pytest.raises(ValueError, match="does not fit into 16 x 16"):
        box_mask(16, *box)
