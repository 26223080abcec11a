import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import pictures
from pictures import GAP, LINE, image_grid, image_rows


def test_the_grid_shows_each_pixel_as_a_square_of_its_colour(tmp_path):
    red = torch.tensor([1.0, -1.0, -3.0])[:, None, None].expand(3, 8, 8)      # -3 is clamped
    checks = torch.ones(3, 8, 8)
    checks[:, ::2, ::2] = -1
    image_grid({"a": [red, red], "b": [checks, red]}, tmp_path / "new" / "grid.png", zoom=5)
    grid = np.array(Image.open(tmp_path / "new" / "grid.png"))
    height, width = grid.shape[0] - 2 * (40 + GAP), 2 * 40 + 3 * GAP
    assert grid.shape[1] == width
    left, right = grid[height:height + 40, 6:46], grid[height:height + 40, 52:92]
    assert (left == (255, 0, 0)).all()
    expected = np.full((8, 8, 3), 255)
    expected[::2, ::2] = 0
    assert (right == expected.repeat(5, 0).repeat(5, 1)).all()


def test_small_pictures_are_enlarged_to_about_256_px_and_large_ones_not(tmp_path):
    for size, zoom in ((32, 8), (64, 4), (300, 1)):
        image_grid({"x": [torch.zeros(3, size, size)]}, tmp_path / "g.png")
        assert Image.open(tmp_path / "g.png").width == zoom * size + 2 * GAP


def test_columns_that_do_not_match_are_refused(tmp_path):
    small, large = torch.zeros(3, 8, 8), torch.zeros(3, 16, 16)
    for columns in ({"a": [small], "b": [small, small]}, {"a": [small], "b": [large]}):
        with pytest.raises(ValueError, match="one length and one shape"):
            image_grid(columns, tmp_path / "g.png")


def test_captions_fit_their_column_and_lose_no_letter():
    font = ImageFont.load_default(pictures.FONT_SIZE)
    caption = "ours, with mask\nruns/a-run-with-a-very-long-name-of-its-own"
    lines = pictures._wrap(caption, font, 120)
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == caption.replace(" ", "").replace("\n", "")


def test_the_hole_is_mid_grey_and_the_rest_untouched():
    x = torch.rand(2, 3, 4, 4) * 2 - 1
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, 1:3] = 1
    shown = pictures.show_masked(x, mask)
    assert (shown[0, :, 1:3] == 0).all()
    assert torch.equal(shown[0, :, 0], x[0, :, 0])
    assert torch.equal(shown[1], x[1])


def _log(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_every_number_of_the_log_has_a_panel_with_train_and_val_together(tmp_path, monkeypatch):
    panels = []
    monkeypatch.setattr(pictures, "_panel", lambda axes, train, val: panels.append((train, val)))
    log = _log(tmp_path / "log.jsonl", [
        {"step": 1, "images": 4, "pixel": 0.5, "note": "text", "flag": True},
        {"step": 2, "images": 8, "pixel": 0.4, "val_pixel": 0.45, "gan": None}])
    pictures.curves(log, tmp_path / "curves.png")
    assert panels == [([(1, 0.5), (2, 0.4)], [(2, 0.45)])]


def test_curves_of_a_long_log_are_drawn_and_an_empty_log_makes_no_picture(tmp_path):
    records = [{"step": s, "pixel": 1 / s, "lambda": float(s % 3)} for s in range(1, 2000)]
    pictures.curves(_log(tmp_path / "log.jsonl", [*records, {"step": 2000, "val_pixel": 0.1}]),
                   tmp_path / "curves.png")
    assert np.array(Image.open(tmp_path / "curves.png").convert("L")).std() > 10
    pictures.curves(_log(tmp_path / "log.jsonl", []), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.filterwarnings("error")
def test_a_log_of_the_state_before_the_first_step_is_drawn(tmp_path):
    pictures.curves(_log(tmp_path / "log.jsonl", [{"step": 0, "images": 0, "val_pixel": 0.4}]),
                   tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_binning_keeps_the_mean_and_the_number_of_points_small():
    points = [(s, float(s)) for s in range(1, 1201)]
    steps, values = pictures._binned(points)
    assert len(steps) == pictures.MAX_POINTS
    np.testing.assert_allclose(values, steps)
    assert steps[0] == 2                                     # the mean of 1, 2, 3


def test_the_running_mean_is_the_mean_of_what_is_there():
    values = np.arange(100.0) ** 2
    slow = [values[max(0, i - 2):i + 3].mean() for i in range(100)]
    np.testing.assert_allclose(pictures._running_mean(values), slow)


RED, DARK = torch.tensor([1.0, -1.0, -3.0]), torch.tensor([-1.0, -1.0, -1.0])      # -3 is clamped


def _plain(colour, size=64):
    return colour[:, None, None].expand(3, size, size)


def test_each_group_stands_under_its_line_in_rows_of_so_many(tmp_path):
    path = tmp_path / "new" / "rows.png"
    image_rows([("one", [_plain(RED)] * 3), ("two", [_plain(DARK)])], path, across=2)
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
    image_rows([("", [checks])], tmp_path / "s.png")
    shown = np.array(Image.open(tmp_path / "s.png"))[GAP + LINE:, GAP:][:128, :128]
    values = (checks.permute(1, 2, 0).numpy() + 1) * 127.5
    assert (shown == values.repeat(2, 0).repeat(2, 1)).all()
    image_rows([("", [torch.zeros(3, 300, 200)] * 2)], tmp_path / "s.png")
    assert Image.open(tmp_path / "s.png").width == 2 * (200 + GAP) + GAP


def test_a_long_line_makes_the_picture_wider(tmp_path):
    image_rows([("a" * 200, [_plain(RED)])], tmp_path / "s.png")
    assert Image.open(tmp_path / "s.png").width > 1000


def test_rows_of_several_sizes_or_none_are_refused(tmp_path):
    for images in ([_plain(RED), _plain(RED, 32)], []):
        with pytest.raises(ValueError, match="rows need one"):
            image_rows([("", images)], tmp_path / "s.png")
