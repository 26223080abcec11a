"""signs.py: words that can be read, in pictures that depend on their key only."""

import numpy as np
import pytest

import signs
from data import Signs


def test_a_sign_picture_depends_on_split_seed_index_and_size_only():
    first = Signs("train", 64).image(5)
    Signs("val", 64).image(9)
    again = Signs("train", 64).image(5, np.random.default_rng(3))
    assert np.array_equal(first, again)
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    others = (Signs("train", 64), 6), (Signs("val", 64), 5), (Signs("train", 64, 1), 5)
    for dataset, index in others:
        assert not np.array_equal(first, dataset.image(index))


def test_sign_pictures_are_all_different():
    datasets = Signs("train", 64), Signs("val", 64)
    pictures = {dataset.image(i).tobytes() for dataset in datasets for i in range(200)}
    assert len(pictures) == 400


@pytest.mark.parametrize("size", [32, 48, 64, 100, 128, 256])
def test_signs_can_be_drawn_at_any_size(size):
    for index in range(30):
        assert Signs("val", size).image(index).shape == (size, size, 3)


@pytest.fixture
def scenes(monkeypatch):
    """Every scene drawn in the test."""
    drawn, start = [], signs.Scene.__init__

    def keep(scene, *args):
        start(scene, *args)
        drawn.append(scene)

    monkeypatch.setattr(signs.Scene, "__init__", keep)
    return drawn


def test_every_picture_has_one_to_three_boards_that_fill_a_large_part_and_do_not_overlap(scenes):
    shares = []
    for index in range(200):
        Signs("train", 64).image(index)
        boards, cover = scenes[-1].boards, np.zeros((64, 64), int)
        for x0, y0, x1, y1 in boards:
            cover[y0:y1, x0:x1] += 1
        assert 1 <= len(boards) <= 3
        assert cover.max() == 1
        shares.append(cover.mean())
    assert np.mean(shares) > 0.15


def test_the_words_are_in_the_picture_pixel_by_pixel(monkeypatch):
    """The ink of a board is one colour and all around it another."""
    hung, hang = [], signs._hang

    def keep(scene, x, y, inks, colours):
        box = hang(scene, x, y, inks, colours)
        soft = any(((np.asarray(ink) % 255) > 0).any() for ink in inks)  # letters of double size
        if box and not soft:
            hung.append((box, inks, colours))
        return box

    monkeypatch.setattr(signs, "_hang", keep)
    for index in range(300):
        image = Signs("train", 64).image(index)
        for (x0, y0, x1, y1), inks, (ground, colour) in hung:
            inside = image[y0 + 1:y1 - 1, x0 + 1:x1 - 1].astype(int)
            is_ink = (inside == colour).all(-1)
            assert is_ink.sum() == sum((np.asarray(ink) > 0).sum() for ink in inks)
            assert (inside[~is_ink] == ground).all()
            assert abs(np.dot(np.subtract(ground, colour), (0.299, 0.587, 0.114))) > 60
        hung.clear()


def test_held_out_pictures_show_pairs_of_words_that_training_never_shows():
    def pairs(held_out):
        return set(signs._sign_texts(1, 54, held_out)[1])

    assert not pairs(True) & pairs(False)
    assert len(pairs(True)) > 50
    assert all(signs.is_held_out(*pair) for pair in pairs(True))


def test_letters_are_told_apart():
    shapes = {signs.word_mask(letter, 1).tobytes() for letter in signs.GLYPHS}
    assert len(shapes) == 26
    assert signs.word_mask("STOP", 1).size == (23, 7)
    assert signs.word_mask("STOP", 2).size == (46, 14)
    assert signs.word_mask("STOP", 1, upright=True).size == (5, 34)
