import json
import os
import subprocess
import sys
import warnings

import matplotlib as mpl
import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.figure import Figure
from PIL import Image, ImageFont

import pictures
from pictures import GAP, LINE, curves, image_grid, image_rows, show_masked

RED, DARK = torch.tensor([1.0, -1.0, -3.0]), torch.tensor([-1.0, -1.0, -1.0])      # -3 is clamped


def plain(colour, size=64):
    return colour[:, None, None].expand(3, size, size)


def test_a_grid_shows_columns_under_captions_and_each_pixel_as_a_square(tmp_path):
    checks = torch.ones(3, 64, 64)
    checks[:, ::2, ::2] = -1
    path = tmp_path / "new" / "grid.png"
    image_grid({"a": [plain(RED), plain(RED)], "b\nb": [checks, plain(DARK)]}, path)
    grid, step = np.array(Image.open(path)), 256 + GAP
    top = GAP + 2 * LINE
    assert grid.shape == (top + 2 * step, GAP + 2 * step, 3)
    assert (grid[top:top + 256, GAP:step] == (255, 0, 0)).all()
    squares = np.full((64, 64, 3), 255)
    squares[::2, ::2] = 0
    assert (grid[top:top + 256, GAP + step:-GAP] == squares.repeat(4, 0).repeat(4, 1)).all()
    assert (grid[top + step:-GAP, GAP + step:-GAP] == 0).all()
    for left, lines in ((GAP, 1), (GAP + step, 2)):      # captions end just above the images
        ink = (grid[:top, left:left + 256] < 128).any((1, 2)).nonzero()[0]
        assert top - LINE * lines < ink.min() < top - LINE * (lines - 1)
        assert top - LINE < ink.max() < top


def test_rows_stand_under_their_captions_so_many_in_a_row(tmp_path):
    path, step = tmp_path / "rows.png", 128 + GAP
    image_rows([("one", [plain(RED)] * 3), ("two", [plain(DARK)])], path, across=2)
    page = np.array(Image.open(path))
    assert page.shape == (GAP + 2 * LINE + 3 * step, GAP + 2 * step, 3)
    tops = (GAP + LINE, GAP + LINE + step, GAP + 2 * LINE + 2 * step)
    red, dark, white = (255, 0, 0), (0, 0, 0), (255, 255, 255)
    for top, row in zip(tops, ((red, red), (red, white), (dark, white))):
        for left, colour in zip((GAP, GAP + step), row):
            assert (page[top:top + 128, left:left + 128] == colour).all()
    for top in (GAP, tops[2] - LINE):
        assert (page[top:top + LINE] != 255).any()                   # the lines of text


@pytest.mark.parametrize(("size", "grid", "row"), [(32, 256, 128), (300, 300, 300)])
def test_small_images_are_enlarged_and_large_ones_stay(size, grid, row, tmp_path):
    image_grid({"x": [torch.zeros(3, size, size)]}, tmp_path / "g.png")
    image_rows([("x", [torch.zeros(3, size, size)])], tmp_path / "r.png")
    widths = [Image.open(tmp_path / name).width - 2 * GAP for name in ("g.png", "r.png")]
    assert widths == [grid, row]


@pytest.mark.parametrize("draw", [
    lambda path: image_grid({"a": [plain(RED)], "b": [plain(RED)] * 2}, path),
    lambda path: image_grid({"a": [plain(RED)], "b": [plain(RED, 32)]}, path),
    lambda path: image_grid({}, path),
    lambda path: image_rows([("", [plain(RED), plain(RED, 32)])], path),
    lambda path: image_rows([("", [])], path)])
def test_images_that_do_not_match_are_refused(draw, tmp_path):
    with pytest.raises(ValueError, match=r"one shape|zip"):
        draw(tmp_path / "x.png")


@pytest.mark.parametrize("caption", [
    "", "ours, with mask\nruns/a-run-with-a-very-long-name-of-its-own", "w" * 90, "a b " * 40])
def test_captions_fit_their_room_and_lose_no_letter(caption):
    font = ImageFont.load_default(15)
    text = pictures._wrapped(caption, font, 120)
    assert max(map(font.getlength, text.split("\n"))) <= 120
    assert "".join(text.split()) == "".join(caption.split())


def test_the_hole_is_mid_grey_and_the_rest_untouched():
    x, mask = torch.rand(2, 3, 4, 4) * 2 - 1, torch.zeros(2, 1, 4, 4)
    mask[0, :, 1:3] = 1
    shown = show_masked(x, mask)
    assert (shown[0, :, 1:3] == 0).all()
    assert torch.equal(shown[0, :, 0], x[0, :, 0])
    assert torch.equal(shown[1], x[1])


def drawn(records, tmp_path, monkeypatch):
    """{title: (scale, {label: (steps, values)})} of the panels that are drawn of a log."""
    panels = {}

    def saved(figure, path, **_):
        for axes in figure.axes:
            panels[axes.get_title("left")] = axes.get_yscale(), {
                line.get_label(): line.get_data() for line in axes.get_lines()}

    monkeypatch.setattr(Figure, "savefig", saved)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    return panels


def test_every_number_of_the_log_has_a_panel_with_train_and_val_together(tmp_path, monkeypatch):
    panels = drawn([
        {"step": 1, "images": 4, "pixel": 0.5, "note": "text", "flag": True, "other": -1},
        {"step": 2, "images": 8, "pixel": 0.01, "val_pixel": 0.45, "gan": None, "lr": float("nan")},
    ], tmp_path, monkeypatch)
    assert list(panels) == [pictures.TITLES["pixel"], "other"]
    scale, lines = panels[pictures.TITLES["pixel"]]
    assert scale == "log"
    np.testing.assert_allclose(lines["train"], [(1, 2), (0.5, 0.01)])
    np.testing.assert_allclose(lines["val"], [(2,), (0.45,)])
    assert panels["other"][0] == "linear"


def test_a_long_log_is_drawn_as_means_of_neighbours(tmp_path, monkeypatch):
    panels = drawn([{"step": s, "x": float(s)} for s in range(1, 1201)], tmp_path, monkeypatch)
    curve, smooth = panels["x"][1].values()
    assert (len(curve[0]), len(smooth[0])) == (pictures.POINTS, pictures.SMOOTH_POINTS)
    np.testing.assert_allclose(*curve)
    assert (curve[0][0], smooth[0][0]) == (2, 15.5)          # the means of 1, 2, 3 and of 1 .. 30


@pytest.mark.parametrize(("records", "made"), [
    ([{"step": s, "pixel": 1 / s, "val_pixel": 2 / s} for s in range(1, 900)], True),
    ([{"step": 0, "images": 0, "val_pixel": 0.4}], True), ([], False)])
def test_a_picture_is_made_where_there_is_something_to_draw(records, made, tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with warnings.catch_warnings(action="error"):
        curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists() == made
    if made:
        assert np.array(Image.open(tmp_path / "curves.png").convert("L")).std() > 10


def test_a_users_matplotlibrc_changes_no_curves(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "pixel": 0.5}\n{"step": 2, "pixel": 0.4}\n')
    curves(tmp_path / "log.jsonl", tmp_path / "a.png")
    with mpl.rc_context({"text.usetex": True, "font.size": 30, "axes.facecolor": "red"}):
        curves(tmp_path / "log.jsonl", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(("before", "left"), [
    ("", "None"), ("sys.modules['ipykernel'] = sys", "agg")])
def test_a_notebooks_backend_is_no_matter_but_in_its_own_kernel(before, left):
    backend = "agg" if before else "nonsense"            # which matplotlib refuses at import
    program = f"import os, sys; {before}\nimport pictures; print(os.environ.get('MPLBACKEND'))"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"MPLBACKEND": backend}, check=False)
    assert (run.stdout.strip(), run.stderr) == (left, "")
