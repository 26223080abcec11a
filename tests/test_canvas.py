"""inpaint.py: any size in, the same size out, and nothing that the hole hides among the known."""

import numpy as np
import pytest
import torch

from diffusion import known_cells
from inpaint import prepare, shrink


def pair(height, width, seed=0):
    """A photo of noise and a hole of a few boxes."""
    rng = np.random.default_rng(seed)
    photo = rng.integers(0, 256, (height, width, 3), np.uint8)
    hole = np.zeros((height, width), bool)
    for _ in range(2):
        top, left = rng.integers(0, (height, width))
        hole[top:top + height // 3 + 1, left:left + width // 3 + 1] = True
    return photo, hole


@pytest.mark.parametrize(("size", "f", "grid", "padded"), [
    ((8, 12), 4, (2, 3), (8, 12)), ((8, 12), 4, (1, 1), (8, 12)), ((9, 12), 4, (2, 3), (12, 12)),
    ((1, 1), 4, (4, 5), (16, 20)), ((30, 7), 2, (4, 4), (30, 8)), ((5, 40), 8, (4, 4), (32, 40))])
def test_a_photo_is_padded_to_multiples_of_f_and_to_the_grid_at_least(size, f, grid, padded):
    photo, hole = pair(*size)
    canvas = prepare(photo, hole, f, grid)
    assert canvas.x.shape == (1, 3, *padded)
    assert canvas.mask.shape == (1, 1, *padded)
    assert canvas.known.shape == (1, padded[0] // f, padded[1] // f)
    assert canvas.x.dtype == canvas.mask.dtype == torch.float32
    back = ((canvas.cut(canvas.x) + 1) * 127.5).round().byte().permute(1, 2, 0)
    assert np.array_equal(back.numpy(), photo)
    assert np.array_equal(canvas.cut(canvas.mask)[0].bool().numpy(), hole)


def test_the_padding_is_a_mirror_for_photo_and_hole_alike():
    photo, hole = pair(5, 6)
    canvas = prepare(photo, hole, 4, (4, 4))
    rows, columns = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0, 0, 1, 2, 3, 4, 4], [*range(6), *range(5, -1, -1)]
    columns += range(4)
    expected = torch.tensor(photo[rows][:, columns]).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.equal(canvas.x, expected)
    assert canvas.mask[0, 0].bool().tolist() == hole[rows][:, columns].tolist()


def test_a_cell_is_known_unless_one_of_its_pixels_is_in_the_hole():
    photo, hole = pair(21, 34)
    canvas = prepare(photo, hole, 4)
    for i, row in enumerate(canvas.known[0].tolist()):
        for j, known in enumerate(row):
            assert known == (not canvas.mask[0, 0, 4 * i:4 * i + 4, 4 * j:4 * j + 4].any())


@pytest.mark.parametrize(("size", "small"), [
    ((100, 200), (32, 64)), ((200, 100), (64, 32)), ((33, 32), (33, 32)), ((33, 47), (32, 46)),
    ((20, 400), (20, 400)), ((800, 1000), (32, 40))])
def test_a_shrunk_photos_short_side_is_the_grids_and_small_ones_are_left_alone(size, small):
    canvas = prepare(*pair(*size), 4, (8, 8))
    shrunk = shrink(canvas, 4, (8, 8))
    assert shrunk.hole.shape == shrunk.photo.shape[:2] == small
    assert (shrunk is canvas) == (small == size)


@pytest.mark.parametrize("size", [(100, 130), (41, 37), (600, 640)])
def test_a_shrunk_photo_shows_nothing_of_what_its_hole_hides(size):
    photo, hole = pair(*size)
    hole[size[0] // 2, size[1] // 2] = True                      # one pixel among hundreds
    shrunk = shrink(prepare(photo, hole, 4, (8, 8)), 4, (8, 8))
    assert shrunk.hole.any()
    assert not shrunk.hole.all()
    other = np.where(hole[..., None], 255 - photo, photo)
    again = shrink(prepare(other, hole, 4, (8, 8)), 4, (8, 8))
    assert np.array_equal(again.photo[~again.hole], shrunk.photo[~shrunk.hole])
    assert not np.array_equal(again.photo, shrunk.photo)


def test_shrinking_keeps_the_mean_colour():
    photo, hole = pair(96, 128)
    shrunk = shrink(prepare(photo, hole, 4, (8, 8)), 4, (8, 8))
    assert shrunk.photo.mean() == pytest.approx(photo.mean(), abs=1)
    assert shrunk.hole.mean() == pytest.approx(hole.mean(), abs=0.05)


@pytest.mark.parametrize("margin", [0, 1])
def test_a_margin_is_kept_on_the_photo_and_on_its_smaller_copy(margin):
    canvas = prepare(*pair(200, 240), 4, (8, 8), margin=margin)
    for each in (canvas, shrink(canvas, 4, (8, 8), margin)):
        assert torch.equal(each.known, known_cells(each.mask, 4, margin))
    assert (~canvas.known).sum() > (~known_cells(canvas.mask, 4)).sum() or margin == 0
