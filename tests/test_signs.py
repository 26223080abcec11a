"""signs.py: words that can be read, in pictures that depend on their key only."""

import numpy as np
import pytest

import signs
from data import Signs


def test_a_sign_picture_depends_on_split_seed_index_and_size_only():
    first = Signs("train", 64).image(5)
    Signs("val", 64).image(9)
    assert np.array_equal(first, Signs("train", 64).image(5, np.random.default_rng(3)))
    assert first.dtype == np.uint8
    datasets = *(Signs(split, 64) for split in ("train", "val", "test")), Signs("train", 64, 1)
    assert len({dataset.image(i).tobytes() for dataset in datasets for i in range(130)}) == 520


def test_the_scenes_of_training_and_val_stay_what_runs_and_tables_have_seen():
    for split, number in (("train", 0), ("val", 1), ("test", 2)):
        drawn = signs.draw_scene(np.random.default_rng((201, 0, number, 7)), 64, number > 0)
        assert np.array_equal(Signs(split, 64).image(7), drawn)


@pytest.mark.parametrize("size", [32, 48, 64, 100, 128, 256])
def test_signs_can_be_drawn_at_any_size(size):
    assert {Signs("val", size).image(i).shape for i in range(30)} == {(size, size, 3)}


@pytest.fixture(scope="module")
def pictures():
    """300 pictures: [(image, [(box of a board in px, its lines of ink), ...]), ...]."""
    drawn, hang = [], signs._hang

    def keep(scene, x, y, inks):
        box = hang(scene, x, y, inks)
        if box:
            boards.append((box, [np.asarray(ink) for ink in inks]))
        return box

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signs, "_hang", keep)
        for index in range(300):
            boards = []
            drawn.append((Signs("train", 64).image(index), boards))
    return drawn


def test_every_picture_has_one_to_three_boards_that_fill_a_large_part_and_do_not_overlap(pictures):
    covers = np.zeros((300, 64, 64), int)
    for cover, (_, boards) in zip(covers, pictures):
        assert 1 <= len(boards) <= 3
        for (x0, y0, x1, y1), _ in boards:
            cover[y0:y1, x0:x1] += 1
    assert covers.max() == 1
    assert covers.mean() > 0.15


def test_the_words_are_in_the_picture_pixel_by_pixel(pictures):
    """The ink of a board is one colour and all around it another."""
    boards = [(image, *board) for image, boards in pictures for board in boards]
    for image, (x0, y0, x1, y1), inks in boards:
        if any((ink % 255).any() for ink in inks):       # letters of double size are soft
            continue
        inside = image[y0 + 1:y1 - 1, x0 + 1:x1 - 1].astype(int)
        is_ink = (inside != inside[0, 0]).any(-1)
        ground, colour = inside[0, 0], inside[is_ink][0]
        assert (tuple(ground), tuple(colour)) in signs.BOARDS
        assert is_ink.sum() == sum((ink > 0).sum() for ink in inks)
        assert (inside[is_ink] == colour).all()
        assert abs(np.dot(ground - colour, (0.299, 0.587, 0.114))) > 60


def test_held_out_pictures_show_pairs_of_words_that_training_never_shows(monkeypatch):
    held_out, others = (set(signs._sign_texts(1, 10 ** 6, flag)[1]) for flag in (True, False))
    assert not held_out & others
    assert len(held_out | others) == len(signs.FIRST_WORDS) * len(signs.LAST_WORDS)
    assert len(signs._sign_texts(1, 54, True)[1]) > 50
    shown = {"train": set(), "val": set(), "test": set()}
    monkeypatch.setattr(signs, "_board", lambda *args: shown[split].add(args[3]))
    for split in shown:
        for index in range(60):
            Signs(split, 64).image(index)
    pairs = {split: {lines for lines in texts if len(lines) == 2} for split, texts in shown.items()}
    assert min(map(len, pairs.values())) > 9
    assert pairs["train"] <= others
    assert pairs["val"] | pairs["test"] <= held_out


def test_letters_are_told_apart():
    assert len({signs.word_mask(letter, 1).tobytes() for letter in signs.GLYPHS}) == 27
    assert signs.word_mask("STOP", 1).size == (23, 7)
    assert signs.word_mask("STOP", 2).size == (46, 14)
    assert signs.word_mask("STOP", 1, upright=True).size == (5, 34)
