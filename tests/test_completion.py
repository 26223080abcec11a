"""inpaint.py: the windows cover the hole and nothing is drawn twice; known codes stay."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from diffusion import MultinomialDiffusion
from inpaint import complete, fill_with_mean, windows


def generators(B):
    return [torch.Generator().manual_seed(n) for n in range(B)]


class Recorder(MultinomialDiffusion):
    """A process that notes what it is asked to inpaint and answers with the number of the call."""

    def __init__(self):
        super().__init__(K=100, T=4)
        self.asked = []

    def inpaint(self, model, indices, known, steps, resample, generator, temperature):
        self.asked.append((indices.clone(), known.clone(), (steps, resample, temperature)))
        return torch.where(known, indices, len(self.asked))


def prior_of(grid, diffusion=None, unet=None):
    return SimpleNamespace(grid=grid, diffusion=diffusion or Recorder(), unet=unet)


def hole(shape, *boxes):
    """bool (H,W), True in each box (top, bottom, left, right)."""
    unknown = torch.zeros(shape, dtype=torch.bool)
    for top, bottom, left, right in boxes:
        unknown[top:bottom, left:right] = True
    return unknown


def random_holes(count=300):
    """(unknown, grid) of all kinds: small and large, one and several, at the borders."""
    random = torch.Generator().manual_seed(0)

    def pick(low, high):
        return torch.randint(low, high + 1, (), generator=random).item()

    for _ in range(count):
        grid = pick(1, 9), pick(1, 9)
        shape = [side + pick(0, 30) for side in grid]
        unknown = torch.zeros(shape, dtype=torch.bool)
        for _ in range(pick(1, 3)):
            top, left = pick(0, shape[0] - 1), pick(0, shape[1] - 1)
            unknown[top:top + pick(1, 20), left:left + pick(1, 20)] = True
        yield unknown, grid


def test_windows_are_of_the_grid_inside_the_map_and_cover_the_hole_exactly_once():
    for unknown, grid in random_holes():
        left = unknown.clone()
        for rows, columns in windows(unknown, grid):
            assert (rows.stop - rows.start, columns.stop - columns.start) == grid
            assert min(rows.start, columns.start) >= 0
            assert rows.stop <= unknown.shape[0]
            assert columns.stop <= unknown.shape[1]
            assert left[rows, columns].any()                     # each one has something to draw
            left[rows, columns] = False
        assert not left.any()


def test_windows_come_line_by_line():
    for unknown, grid in random_holes():
        corners = [(rows.start, columns.start) for rows, columns in windows(unknown, grid)]
        assert corners == sorted(corners)


def test_the_windows_of_one_hole_overlap_by_half_or_more():
    several = 0
    for top, height, length in itertools.product(range(12), range(1, 25), range(1, 10)):
        unknown = hole((40, 9), (top, top + height, 0, 9))
        starts = [rows.start for rows, _ in windows(unknown, (length, 9))]
        assert all(b - a <= max(1, length // 2) for a, b in itertools.pairwise(starts))
        several += len(starts) > 1
    assert several > 1000


def test_a_hole_with_its_context_in_one_window_gets_just_that_one_centred():
    ((rows, columns),) = windows(hole((40, 50), (20, 24, 30, 36)), (16, 12))
    assert (rows, columns) == (slice(14, 30), slice(27, 39))
    ((rows, columns),) = windows(hole((40, 50), (0, 4, 44, 50)), (16, 12))
    assert (rows, columns) == (slice(0, 16), slice(38, 50))      # at the border there is no context
    ((rows, columns),) = windows(hole((16, 12), (0, 16, 0, 12)), (16, 12))
    assert (rows, columns) == (slice(0, 16), slice(0, 12))
    assert windows(hole((16, 12)), (16, 12)) == []


def test_a_larger_hole_is_begun_in_the_context_above_and_left_of_it():
    corners = [(rows.start, columns.start)
               for rows, columns in windows(hole((40, 40), (10, 24, 12, 16)), (16, 16))]
    assert corners == [(6, 6), (12, 6)]


def test_each_window_sees_what_is_known_and_what_was_drawn_before():
    unknown = hole((12, 20), (3, 9, 4, 17))
    indices = torch.arange(50, 290).view(1, 12, 20)
    known, prior = ~unknown[None], prior_of((4, 4))
    before = indices.clone(), known.clone()
    drawn = complete(prior, indices, known, generators(1), 3, 2, 0.5)
    assert torch.equal(indices, before[0])                       # what was given is not changed
    assert torch.equal(known, before[1])
    now, seen = indices.clone(), known.clone()
    places = windows(unknown, (4, 4))
    assert len(places) == len(prior.diffusion.asked) > 4
    for number, ((rows, columns), (codes, given, how)) in enumerate(
            zip(places, prior.diffusion.asked), 1):
        assert how == (3, 2, 0.5)
        assert torch.equal(given, seen[:, rows, columns])
        assert torch.equal(codes[given], now[:, rows, columns][given])
        now[:, rows, columns] = torch.where(given, codes, number)
        seen[:, rows, columns] = True
    assert torch.equal(drawn, now)
    assert torch.equal(drawn[known], indices[known])


def test_a_map_of_the_priors_grid_is_inpainted_at_once_whatever_is_unknown():
    def unet(z_t, t):
        return torch.nn.functional.one_hot(z_t.roll(1, 2), 5).permute(0, 3, 1, 2) * 2.0

    diffusion, known = MultinomialDiffusion(5, 6), torch.rand(3, 6, 8) < 0.4
    indices = torch.randint(5, (3, 6, 8))
    whole = complete(prior_of((6, 8), diffusion, unet), indices, known, generators(3), 4, 2)
    assert torch.equal(whole, diffusion.inpaint(unet, indices, known, 4, 2, generators(3)))
    assert torch.equal(whole[known], indices[known])
    assert not torch.equal(whole, indices)


def test_a_hole_becomes_the_mean_colour_of_what_is_known_in_its_image():
    x = torch.rand(3, 3, 5, 7) * 2 - 1
    mask = (torch.rand(3, 1, 5, 7) < 0.5).float()
    mask[2] = 1
    filled = fill_with_mean(x, mask)
    for image, m, made in zip(x, mask[:, 0], filled):
        for c in range(3):
            known = image[c][m == 0]
            assert torch.equal(made[c][m == 0], known)
            mean = known.mean().item() if len(known) else 0.0
            assert made[c][m == 1].tolist() == pytest.approx([mean] * int(m.sum()), abs=1e-6)
    hidden = torch.where(mask == 1, torch.rand_like(x), x)
    assert torch.equal(fill_with_mean(hidden, mask), filled)
