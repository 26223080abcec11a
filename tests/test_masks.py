"""masks.py: LaMa's statistics, purity, the schedule and the bins."""

import numpy as np
import pytest

from masks import (
    MASK_KINDS,
    area_bucket,
    box_mask,
    evaluation_mask,
    random_mask,
    training_mask,
)


def areas(kind, size, count, seed=0):
    return np.array([random_mask(kind, size, seed, index).mean() for index in range(count)])


# 6,000 masks have standard errors of 0.003 (mean), 0.002 (std) and 0.006 (share over a half).
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_thick_256_has_lamas_statistics(seed):
    area = areas("thick", 256, 6000, seed)
    assert area.mean() == pytest.approx(0.400, abs=0.01)
    assert area.std() == pytest.approx(0.218, abs=0.01)
    assert (area > 0.5).mean() == pytest.approx(0.350, abs=0.02)


def test_thick_512_has_lamas_statistics():
    area = areas("thick", 512, 1500)
    assert area.mean() == pytest.approx(0.457, abs=0.02)  # three standard errors
    assert area.std() == pytest.approx(0.250, abs=0.015)
    assert (area > 0.5).mean() == pytest.approx(0.445, abs=0.04)


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
        large = random_mask(kind, 256, 5, index)
        small = random_mask(kind, 128, 5, index)
        averaged = large.reshape(128, 2, 128, 2).mean((1, 3))
        assert np.abs(averaged - small).mean() < 0.08  # edges only; unrelated masks differ by 0.35


def test_a_mask_depends_on_its_arguments_only():
    first = random_mask("thick", 64, (3, 1), 17)
    np.random.seed(123)  # noqa: NPY002 - the global stream must not matter
    random_mask("thin", 64, 0, 0)
    assert np.array_equal(first, random_mask("thick", 64, (3, 1), 17))
    for other in (random_mask("thick", 64, (3, 1), 18), random_mask("thick", 64, (4, 1), 17),
                  random_mask("thick", 64, (3, 2), 17), random_mask("medium", 64, (3, 1), 17)):
        assert not np.array_equal(first, other)


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


def test_full_masks_are_half_of_the_schedule():
    drawn = [training_mask(32, (0, 2), index) for index in range(1000)]
    assert np.mean([full for _, full in drawn]) == pytest.approx(0.5, abs=0.05)
    assert all(full == bool(mask.all()) for mask, full in drawn)
    assert all(mask.shape == (32, 32) and mask.dtype == np.uint8 for mask, _ in drawn)


def test_the_probability_of_the_full_mask_can_be_zero_or_one():
    assert all(training_mask(32, 0, index, p_full=1.0)[1] for index in range(50))
    assert not all(training_mask(32, 0, index, p_full=0.0)[1] for index in range(50))
    assert np.array_equal(training_mask(64, 0, 7, "thin", p_full=0.0)[0],
                          random_mask("thin", 64, 0, 7))


def test_evaluation_masks_are_neither_empty_nor_over_half_the_picture():
    for index in range(200):
        mask, wanted = evaluation_mask(64, index), index
        while not 0 < random_mask("thick", 64, 0, wanted).mean() <= 0.5:
            wanted += 1
        assert np.array_equal(mask, random_mask("thick", 64, 0, wanted))


def test_evaluation_masks_differ_by_kind_and_seed():
    first = evaluation_mask(64, 3)
    for kind, seed in (("medium", 0), ("thin", 0), ("thick", 1)):
        assert not np.array_equal(first, evaluation_mask(64, 3, kind, seed))


def test_bins_hold_their_lower_end():
    mask = np.zeros((10, 10), np.uint8)
    names = []
    for count in range(0, 101, 10):
        mask.flat[:count] = 1
        names.append(area_bucket(mask))
    assert names == [f"{a}-{a + 10}" for a in range(0, 100, 10)] + ["90-100"]
    mask[:] = 0
    mask.flat[:39] = 1
    assert area_bucket(mask) == "30-40"


def test_a_box_covers_its_rows_and_columns():
    mask = box_mask(16, top=2, left=3, height=4, width=5)
    assert mask.sum() == 20
    assert mask[2:6, 3:8].all()


@pytest.mark.parametrize("box", [(-1, 0, 4, 4), (0, 0, 17, 4), (14, 0, 4, 4), (0, 0, 0, 4)])
def test_a_box_outside_the_picture_is_an_error(box):
    with pytest.raises(ValueError, match="does not fit into 16 x 16"):
        box_mask(16, *box)


def test_an_unknown_kind_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="thin, medium, thick"):
        random_mask("fat", 64, 0, 0)
