"""image_pairs.py: which files belong together, what is read of them, LaMa's evaluation set."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import image_pairs
from data import ImageFiles, held_out_batches
from distributed import UserError, exit_on_user_error
from image_pairs import MatchedFolders, PictureFolder, write_evaluation_set
from masks import area_bucket, evaluation_mask

CPU = torch.device("cpu")
SIZE = 32


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, so that messages have short paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fill(folder, *names, size=(12, 8)):
    """Pictures under `names`; the k-th is of colour (k, 2k, 3k)."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (k, 2 * k, 3 * k)).save(folder / name)
    return folder


def draw(path, values):
    """A grey picture of these values (H,W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def half_white(height=8, width=12):
    values = np.zeros((height, width), np.uint8)
    values[:, width // 2:] = 255
    return values


def refused(pattern, *args, **kwargs):
    with pytest.raises(UserError, match=pattern) as error:
        MatchedFolders(*args, **kwargs)
    assert "\n" not in str(error.value)


def colour(picture):
    return picture[:, 0, 0].tolist()


# -- names -----------------------------------------------------------------------------------------


def test_files_match_by_their_path_without_the_extension(here):
    fill(here / "real", "a/x.png", "b/x.png", "b/y.z.png")
    fill(here / "pred", "a/x.bmp", "b/x.PNG", "b/y.z.tif")
    matched = MatchedFolders("real", "pred")
    assert matched.names == ["a/x", "b/x", "b/y.z"]              # by name first, then by path
    assert matched.about == "3 pictures in pred beside real"
    for k in range(3):
        real, pred, mask, ref = matched.read(k)
        assert colour(pred) == colour(real) == [k, 2 * k, 3 * k]
        assert mask is ref is None


def test_a_flat_folder_matches_one_with_classes_by_file_name(here):
    fill(here / "real", "n01/x.png", "n02/y.png")
    fill(here / "pred", "x.png", "y.png")
    matched = MatchedFolders("real", "pred")
    assert [colour(matched.read(k)[1])[0] for k in range(2)] == [0, 1]
    assert matched.names == ["n01/x", "n02/y"]


@pytest.mark.parametrize(("real", "pred", "lacking"), [
    (["a/x.png", "b/x.png"], ["x.png"], "a/x, b/x"),             # names are not unique
    (["a/x.png", "y.png"], ["x.png", "y.png"], "a/x")])          # the path of y agrees
def test_file_names_alone_count_only_where_unique_and_no_path_agrees(here, real, pred, lacking):
    fill(here / "real", *real)
    fill(here / "pred", *pred)
    refused(f"--pred pred has no file for {lacking}; files", "real", "pred")


def test_the_limit_takes_the_first_names_in_sorted_order(here):
    for folder in ("real", "pred"):
        fill(here / folder, "b/1.png", "a/2.png", "a/3.png", "c/0.png")
    assert MatchedFolders("real", "pred", limit=2).names == ["c/0", "b/1"]
    assert len(MatchedFolders("real", "pred", limit=9)) == 4


def test_the_order_does_not_depend_on_extensions(here):
    fill(here / "real", "a.png", "a-b.png")
    fill(here / "other", "a.bmp", "a-b.tif")
    assert MatchedFolders("real").names == MatchedFolders("other").names == ["a", "a-b"]


@pytest.mark.parametrize("names", [("x.png", "y.png"), ("x_mask.png", "y_mask.bmp"),
                                   ("x_mask000.png", "y_mask.png"), ("x_mask.png", "y_mask07.png")])
def test_masks_and_lamas_predictions_bear_the_pictures_name_or_that_with_mask(here, names):
    fill(here / "real", "x.png", "y.png")
    fill(here / "pred", *names)
    draw(here / "masks" / names[0], half_white())
    draw(here / "masks" / names[1], 255 - half_white())
    matched = MatchedFolders("real", "pred", "masks")
    assert [colour(matched.read(k)[1])[0] for k in range(2)] == [0, 1]
    assert matched.read(0)[2][0].tolist() == (half_white() > 0).tolist()
    assert matched.read(1)[2][0].tolist() == (half_white() == 0).tolist()


def test_a_photo_of_a_gas_mask_is_a_photo(here):
    for folder in ("real", "pred", "masks"):
        fill(here / folder, "gas.png", "gas_mask.png")
    matched = MatchedFolders("real", "pred", "masks")
    assert matched.names == ["gas", "gas_mask"]
    assert [colour(matched.read(k)[1])[0] for k in range(2)] == [0, 1]


@pytest.mark.parametrize(("names", "flag", "told"), [
    (("x_mask000.png", "x_mask001.png"), "masks", "x_mask000.png and x_mask001.png both stand"),
    (("x.png", "x_mask000.png"), "masks", "x.png and x_mask000.png both stand for x; keep one"),
    (("x.bmp", "x.png"), "pred", "x.bmp and x.png both stand for x; keep one of them"),
    (("a/x.png", "b/x.png"), "refs", "a/x.png and b/x.png both stand for x; keep one of them")])
def test_two_files_for_one_name_are_refused(here, names, flag, told):
    fill(here / "real", "x.png")
    fill(here / flag, *names)
    refused(f"--{flag} {flag}: {told}", "real", **{flag: flag})
    if flag == "pred":
        refused(f"--real pred: {told}", "pred")


# -- mistakes --------------------------------------------------------------------------------------


def test_folders_that_are_missing_or_empty_are_named_with_their_flag(here):
    fill(here / "real", "x.png")
    fill(here / "empty")
    (here / "empty" / "notes.txt").write_text("nothing")
    for folder, words in (("gone", r"cannot be read \(No such file"),
                          ("empty", r"no pictures in it \(\.jpg")):
        refused(f"--real {folder}: {words}", folder)
        for flag in ("pred", "masks", "refs"):
            refused(f"--{flag} {folder}: {words}", "real", **{flag: folder})
        with pytest.raises(UserError, match=f"--pred {folder}: {words}"):
            PictureFolder("--pred", folder)


def test_missing_and_extra_predictions_are_named_and_counted(here):
    fill(here / "real", *(f"{k}.png" for k in range(9)))
    fill(here / "pred", "0.png", "7.png", "8.png")
    refused(r"--pred pred has no file for 1, 2, 3 and 3 more; files are matched by",
            "real", "pred", limit=1)
    fill(here / "pred", *(f"{k}.png" for k in range(9)), "a.png", "b.png")
    refused(r"--real real has no file for a.png, b.png", "real", "pred")


@pytest.mark.parametrize("flag", ["masks", "refs"])
def test_masks_and_references_may_have_more_but_not_less(here, flag):
    fill(here / "real", "x.png")
    fill(here / flag, "x.png", "z.png", "a/z.png")
    assert len(MatchedFolders("real", **{flag: flag})) == 1
    fill(here / "real", "x.png", "y.png")
    refused(f"--{flag} {flag} has no file for y; files", "real", **{flag: flag})


def test_other_sizes_are_refused_and_no_picture_is_resized(here):
    fill(here / "real", "x.png", size=(12, 8))
    fill(here / "turned", "x.png", size=(8, 12))
    sizes = "^turned/x.png is 8 x 12 px, real/x.png is 12 x 8"
    for flag, why in (("pred", "; make them of one size"), ("masks", ": another aspect ratio")):
        matched = MatchedFolders("real", **{flag: "turned"})
        with pytest.raises(UserError, match=sizes + why):
            matched.read(0)
    assert MatchedFolders("real", refs="turned").read(0)[3].shape == (3, 12, 8)


@pytest.mark.parametrize("flag", ["real", "pred", "masks", "refs"])
def test_a_file_that_cannot_be_decoded_ends_the_evaluation(here, flag):
    for folder in ("real", "pred", "masks", "refs"):
        fill(here / folder, *(f"{k}.png" for k in range(5)))
    whole = (here / flag / "3.png").read_bytes()
    for damaged in (b"no picture", whole[:50], b""):
        (here / flag / "3.png").write_bytes(damaged)
        matched = MatchedFolders("real", "pred", "masks", "refs")
        with pytest.raises(UserError, match=f"^{flag}/3.png: cannot be decoded") as error:
            list(matched.batches(2, CPU))
        assert "\n" not in str(error.value)
        if flag == "pred":
            with pytest.raises(UserError, match=r"^pred/3.png: cannot be decoded"):
                list(PictureFolder("--pred", "pred").batches(4, CPU))


def test_warnings_about_masks_are_printed_until_there_are_three(here, capsys):
    names = [f"{k:02}.png" for k in range(9)]
    fill(here / "real", *names)
    for k, name in enumerate(names):
        draw(here / "masks" / name, half_white() // (1 + (k > 3)))         # soft, and all known
    list(MatchedFolders("real", masks="masks").batches(4, CPU))
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24] for line in lines] == [
        "warning: masks/04.png: 4", "warning: masks/04.png: 0", "warning: masks/05.png: 4"]


def test_a_mask_is_fitted_to_its_original_but_a_picture_that_ignored_the_turn_is_named(
        here, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    (here / "real").mkdir()
    Image.new("RGB", (12, 8)).save("real/x.jpg", exif=exif)           # upright it is 8 x 12
    draw(here / "stored" / "x.png", half_white())
    draw(here / "double" / "x.png", np.kron(half_white(12, 8), np.ones((2, 2))))
    fill(here / "pred", "x.png", size=(12, 8))
    for masks, wanted in (("stored", np.rot90(half_white(), -1)), ("double", half_white(12, 8))):
        mask = MatchedFolders("real", masks=masks).read(0)[2]
        assert np.array_equal(mask[0], wanted > 0)
        assert f"warning: {masks}/x.png: " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"real/x.jpg is 8 x 12; turn it by its EXIF tag"):
        MatchedFolders("real", "pred").read(0)


def test_transparency_of_a_pair_is_said(here, capsys):
    fill(here / "real", "x.png")
    (here / "pred").mkdir()
    Image.new("RGBA", (12, 8), (0, 0, 0, 100)).save("pred/x.png")
    MatchedFolders("real", "pred").read(0)
    said = capsys.readouterr().out
    assert said == "warning: pred/x.png: transparency, here on white, is not kept\n"


def test_sizes_are_listed_without_reading_and_what_cannot_be_opened_is_left_to_reading(here):
    fill(here / "real", "a.png", "b.png")
    fill(here / "real", "c.png", size=(5, 9))
    (here / "real" / "b.png").write_bytes(b"no picture")
    assert list(MatchedFolders("real").sizes()) == [("real/a.png", 12, 8), ("real/c.png", 5, 9)]


# -- batches ---------------------------------------------------------------------------------------


def test_batches_are_neighbours_of_one_size(here):
    sizes = [(12, 8)] * 5 + [(8, 12)] * 2 + [(12, 8)]
    for k, size in enumerate(sizes):
        fill(here / "real", f"{k}.png", size=size)
    for folder in (MatchedFolders("real"), PictureFolder("--real", "real")):
        batches = list(folder.batches(3, CPU))
        assert [batch.index for batch in batches] == [[0, 1, 2], [3, 4], [5, 6], [7]]
        assert [batch.names for batch in batches][1:] == [["3", "4"], ["5", "6"], ["7"]]
        assert [tuple(batch.x.shape) for batch in batches] == [
            (3, 3, 8, 12), (2, 3, 8, 12), (2, 3, 12, 8), (1, 3, 8, 12)]


@pytest.mark.parametrize("world", [1, 2, 5, 13])
def test_every_picture_is_of_one_rank_whatever_their_number(here, world, monkeypatch):
    fill(here / "real", *(f"{k:02}.png" for k in range(11)))
    monkeypatch.setattr(image_pairs, "world_size", lambda: world)
    for folder in (MatchedFolders("real"), PictureFolder("--real", "real")):
        shares = []
        for rank in range(world):
            monkeypatch.setattr(image_pairs, "rank", lambda rank=rank: rank)
            shares.append([i for batch in folder.batches(2, CPU) for i in batch.index])
        assert sorted(index for share in shares for index in share) == list(range(11))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_no_more_than_a_batch_is_read_ahead(here, monkeypatch):
    fill(here / "real", *(f"{k}.png" for k in range(9)))
    matched, begun = MatchedFolders("real"), []
    read = matched.read
    monkeypatch.setattr(matched, "read", lambda index: (begun.append(index), read(index))[1])
    batches = matched.batches(2, CPU)
    next(batches)
    assert len(begun) <= 3


def test_what_was_given_comes_in_minus_one_to_one_and_the_rest_is_none(here):
    for flag in ("real", "pred"):
        fill(here / flag, "0.png", "1.png", "2.png")
    fill(here / "refs", "0.png", size=(5, 4))
    fill(here / "refs", "1.png", "2.png", size=(7, 4))
    for k in range(3):
        draw(here / "masks" / f"{k}.png", half_white())
    first, second = MatchedFolders("real", "pred", "masks", "refs").batches(2, CPU)
    assert (first.index, second.index, second.names) == ([0, 1], [2], ["2"])
    assert torch.equal(first.x[1, :, 0, 0], torch.tensor([1, 2, 3]) / 127.5 - 1)
    assert torch.equal(first.pred, first.x)
    assert first.mask.dtype == torch.float32
    assert torch.equal(first.mask[1, 0], torch.tensor(half_white() / 255).float())
    assert [tuple(ref.shape) for ref in first.refs] == [(3, 4, 5), (3, 4, 7)]
    assert all(-1 <= ref.min() <= ref.max() <= 1 for ref in first.refs)
    alone, = MatchedFolders("real").batches(4, CPU)
    assert alone.pred is alone.mask is alone.refs is None
    (black,) = MatchedFolders("real", masks="masks", invert_mask=True).batches(4, CPU)
    assert torch.equal(black.mask[:2], 1 - first.mask)


# -- LaMa's evaluation set -------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """Nine photos in two folders and above them, of several formats and sizes.

    The first is so large that the decoder may shrink it.
    """
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for index, name in enumerate(("a.jpg", "b.png", "cats/a.jpg", "cats/b.jpg", "cats/c.png",
                                  "dogs/a.jpg", "dogs/d.png", "dogs/e.webp", "z.bmp")):
        shape = (30 + 9 * index, 90 - 5 * index, 3) if index else (400, 300, 3)
        pixels = rng.integers(0, 256, shape, np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_pictures_and_masks_are_those_of_eval_py_in_its_order(photos, tmp_path):
    manifest = write_evaluation_set(photos, tmp_path / "out", size=SIZE)
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == manifest
    photos.rename(tmp_path / "train")
    dataset = ImageFiles(tmp_path, "train", SIZE, layout="imagenet")
    (batch,) = held_out_batches(dataset, 100, 100, "cpu")
    assert len(manifest["files"]) == len(batch.index) == 9
    assert manifest["version"] == 2
    assert "(seed, index, attempt = 0, 1, ...)" in manifest["law"]
    images = ((batch.x + 1) * 127.5).round().byte()
    for index, (image, mask, entry) in enumerate(zip(images, batch.mask, manifest["files"])):
        written = Image.open(tmp_path / "out/images" / entry["name"])
        assert np.array_equal(np.array(written), image.permute(1, 2, 0).numpy())
        written = Image.open(tmp_path / "out/masks" / entry["name"])
        assert written.mode == "L"
        assert np.array_equal(np.array(written), 255 * mask[0].numpy())
        assert entry["index"] == index
        assert entry["area"] == mask.float().mean().item()
        assert entry["bucket"] == area_bucket(mask)


def test_the_same_command_gives_the_same_bytes(photos, tmp_path):
    for name in ("one", "two"):
        write_evaluation_set(photos, tmp_path / name, "medium", SIZE)
    assert len(contents(tmp_path / "one")) == 2 * 9 + 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    mask = np.array(Image.open(tmp_path / "one/masks/b.png"))
    assert np.array_equal(mask, 255 * evaluation_mask(SIZE, 4, "medium"))


def test_photos_of_one_stem_get_a_file_each_and_eval_py_finds_their_masks(photos, tmp_path):
    for name in ("cats/a.png", "b.jpg.webp", "b.jpg", "x_mask.png"):
        Image.new("RGB", (50, 50), "red").save(photos / name)
    manifest = write_evaluation_set(photos, tmp_path / "out", size=SIZE)
    names = [entry["name"] for entry in manifest["files"]]
    assert {"a.png", "cats/a.jpg.png", "cats/a.png.png", "b.jpg.png", "b.png.png",
            "b.jpg.webp.png", "x_mask.png"} <= set(names)
    for folder in ("images", "masks"):
        assert set(contents(tmp_path / "out" / folder)) == set(names)
    images, masks = tmp_path / "out/images", tmp_path / "out/masks"
    matched = MatchedFolders(images, pred=images, masks=masks)
    areas = {file: matched.read(i)[2].float().mean().item()
             for i, file in enumerate(matched.real)}
    assert areas == {str(images / entry["name"]): pytest.approx(entry["area"])
                     for entry in manifest["files"]}


def test_a_photo_that_cannot_be_decoded_is_left_out_and_said(photos, tmp_path, capsys):
    whole = write_evaluation_set(photos, tmp_path / "whole", size=SIZE)
    (photos / "cats/b.jpg").write_bytes(b"no picture")
    manifest = write_evaluation_set(photos, tmp_path / "out", size=SIZE)
    assert f"left out: {photos}/cats/b.jpg: cannot be decoded" in capsys.readouterr().out
    assert manifest["files"] == [entry for entry in whole["files"]
                                 if entry["source"] != "cats/b.jpg"]
    for folder in ("images", "masks"):
        assert "cats/b.png" not in contents(tmp_path / "out" / folder)


def test_folders_that_cannot_be_used_are_refused_and_nothing_is_lost(photos, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.jpg").write_bytes(b"no picture")
    for source, out, words in (
            (photos, "full", "full: is not empty"),
            (photos, "full/note.txt", r"-o: .*note\.txt cannot be made a folder"),
            (photos, "full/note.txt/deep", "-o: .*deep cannot be made a folder"),
            (photos, "photos/set", "would mix the set with the photos"),
            (photos, "photos", "would mix the set with the photos"),
            ("none", "out", r"none: cannot be read \(No such file"),
            ("empty", "out", "no pictures in it"),
            ("bad", "out", "none of 1 photos can be used")):
        before = contents(tmp_path)
        with pytest.raises(UserError, match=words):
            write_evaluation_set(tmp_path / source, tmp_path / out, size=SIZE)
        assert contents(tmp_path) == before


def call(monkeypatch, *arguments):
    """The command; its exit status."""
    monkeypatch.setattr(sys, "argv", ["image_pairs.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        exit_on_user_error(image_pairs.main)
    return left.value.code or 0


def test_the_command_says_what_it_does_and_what_it_made(photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert call(monkeypatch, photos, "-o", out, "--size", SIZE, "--kind", "medium") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"writing 32 px squares of {photos} with medium masks to {out}")
    assert "masks 9/9" in said
    assert "made 9 pictures with a mask each, by area: " in said
    assert len(contents(out)) == 19
    assert call(monkeypatch, photos, "-o", tmp_path / "new", "--size", 4) == 2
    assert capsys.readouterr().err == "error: --size 4: give at least 8\n"


def test_defaults_are_the_papers(photos, tmp_path, monkeypatch):
    assert call(monkeypatch, photos, "-o", tmp_path / "out") == 0
    mask = np.array(Image.open(tmp_path / "out/masks/a.png")) // 255
    assert np.array_equal(mask, evaluation_mask(512, 0, "thick"))
