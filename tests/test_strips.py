import numpy as np
import pytest
import torch
from PIL import Image

from figures import GAP, LINE
from strips import strips

RED, DARK = torch.tensor([1.0, -1.0, -3.0]), torch.tensor([-1.0, -1.0, -1.0])      # -3 is clamped


def _plain(colour, size=64):
    return colour[:, None, None].expand(3, size, size)


def test_each_group_stands_under_its_line_in_rows_of_so_many(tmp_path):
    path = tmp_path / "new" / "strips.png"
    strips([("one", [_plain(RED)] * 3), ("two", [_plain(DARK)])], path, across=2)
    picture, step = np.array(Image.open(path)), 128 + GAP
    assert picture.shape == (GAP + 2 * LINE + 3 * step, GAP + 2 * step, 3)
    tops = (GAP + LINE, GAP + LINE + step, GAP + 2 * LINE + 2 * step)
    for top, left, colour in ((tops[0], GAP, (255, 0, 0)), (tops[0], GAP + step, (255, 0, 0)),
                              (tops[1], GAP, (255, 0, 0)), (tops[1], GAP + step, (255, 255, 255)),
                              (tops[2], GAP, (0, 0, 0)), (tops[2], GAP + step, (255, 255, 255))):
        assert (picture[top:top + 128, left:left + 128] == colour).all()
    for top in (GAP, tops[2] - LINE):
        assert (picture[top:top + LINE] != 255).any()                # the lines of text


def test_pixels_become_squares_and_large_pictures_stay_as_they_are(tmp_path):
    checks = torch.ones(3, 64, 64)
    checks[:, ::2, ::2] = -1
    strips([("", [checks])], tmp_path / "s.png")
    shown = np.array(Image.open(tmp_path / "s.png"))[GAP + LINE:, GAP:][:128, :128]
    values = (checks.permute(1, 2, 0).numpy() + 1) * 127.5
    assert (shown == values.repeat(2, 0).repeat(2, 1)).all()
    strips([("", [torch.zeros(3, 300, 200)] * 2)], tmp_path / "s.png")
    assert Image.open(tmp_path / "s.png").width == 2 * (200 + GAP) + GAP


def test_a_long_line_makes_the_picture_wider(tmp_path):
    strips([("a" * 200, [_plain(RED)])], tmp_path / "s.png")
    assert Image.open(tmp_path / "s.png").width > 1000


def test_pictures_of_several_sizes_or_none_are_refused(tmp_path):
    for images in ([_plain(RED), _plain(RED, 32)], []):
        with pytest.raises(ValueError, match="strips need one"):
            strips([("", images)], tmp_path / "s.png")
