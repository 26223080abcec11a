"""masks.py: LaMa's statistics, purity, the schedule and the bins."""

import numpy as np
import pytest

from masks import MASK_KINDS, area_bucket, box_mask, evaluation_mask, random_mask, training_mask


def areas(kind, size, count, seed=0):
    return np.array([random_mask(kind, size, seed, index).mean() for index in range(count)])


# The tolerances are at least three standard errors of so many masks.
@pytest.mark.parametrize(("size", "count", "seed", "statistics", "tolerances"), [
    (256, 6000, 0, (0.400, 0.218, 0.350), (0.01, 0.01, 0.02)),
    pytest.param(256, 6000, 1, (0.400, 0.218, 0.350), (0.01, 0.01, 0.02), marks=pytest.mark.slow),
    (512, 1500, 0, (0.457, 0.250, 0.445), (0.02, 0.015, 0.04))])
def test_thick_masks_have_lamas_mean_deviation_and_share_over_a_half(
        size, count, seed, statistics, tolerances):
    area = areas("thick", size, count, seed)
    errors = np.abs(np.subtract((area.mean(), area.std(), (area > 0.5).mean()), statistics))
    assert (errors < tolerances).all()


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


def test_stroke_ends_are_round(monkeypatch):
    with_ends = areas("thick", 256, 300).mean()
    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.ellipse", lambda *args, **kwargs: None)
    assert areas("thick", 256, 300).mean() < with_ends - 0.04


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


@pytest.mark.parametrize(("kind", "seed"), [("thick", 0), ("thick", 1), ("medium", 0), ("thin", 0)])
def test_evaluation_masks_are_neither_empty_nor_over_half_the_picture(kind, seed):
    for index in range(100):
        wanted = index
        while not 0 < random_mask(kind, 64, seed, wanted).mean() <= 0.5:
            wanted += 1
        assert np.array_equal(evaluation_mask(64, index, kind, seed),
                              random_mask(kind, 64, seed, wanted))


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


@pytest.mark.parametrize(("kind", "size", "complaint"), [
    ("fat", 64, "'fat': choose from thin, medium, thick"), ("thin", 7, "7 px is too small")])
def test_an_unknown_kind_or_a_tiny_size_is_an_error(kind, size, complaint):
    with pytest.raises(ValueError, match=complaint):
        random_mask(kind, size, 0, 0)
