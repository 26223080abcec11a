"""The evaluation set: eval.py's pictures and masks, the same bytes each time, nothing lost."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

import image_pairs
from data import ImageFiles, held_out
from distributed import UserError, exit_on_user_error
from image_pairs import MatchedFolders, output_names, summary, write_evaluation_set
from masks import area_bucket, random_mask

SIZE = 32


@pytest.fixture(autouse=True)
def _no_list_is_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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


def run(monkeypatch, *arguments):
    """The command; its exit status."""
    monkeypatch.setattr(sys, "argv", ["image_pairs.py", *(str(value) for value in arguments)])
    with pytest.raises(SystemExit) as left:
        exit_on_user_error(image_pairs.main)
    return left.value.code


def test_pictures_and_masks_are_those_of_eval_py_in_its_order(photos, tmp_path):
    manifest = write_evaluation_set(photos, tmp_path / "out", size=SIZE)
    photos.rename(tmp_path / "val")
    dataset = ImageFiles(tmp_path, "val", SIZE, layout="imagenet")
    (batch,) = held_out(dataset, 100, 100, "cpu")
    assert len(manifest["files"]) == len(batch.index) == 9
    images = ((batch.x + 1) * 127.5).round().byte()
    for image, mask, entry in zip(images, batch.mask, manifest["files"]):
        written = Image.open(tmp_path / "out/images" / entry["name"])
        assert np.array_equal(np.array(written), image.permute(1, 2, 0).numpy())
        written = Image.open(tmp_path / "out/masks" / entry["name"])
        assert written.mode == "L"
        assert np.array_equal(np.array(written), 255 * mask[0].numpy())


@pytest.mark.parametrize(("kind", "seed"), [("thick", 0), ("medium", 5)])
def test_the_manifest_says_how_each_mask_came_about(kind, seed, photos, tmp_path):
    write_evaluation_set(photos, tmp_path / "out", kind, SIZE, seed=seed)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["settings"] == {"photos": str(photos.resolve()), "kind": kind, "size": SIZE,
                                    "n": None, "seed": seed}
    for index, entry in enumerate(manifest["files"]):
        mask = np.array(Image.open(tmp_path / "out/masks" / entry["name"])) // 255
        assert entry["index"] == index
        assert np.array_equal(mask, random_mask(kind, SIZE, seed, entry["draw"]))
        assert entry["area"] == mask.mean()
        assert entry["bucket"] == area_bucket(mask)
        assert 0 < entry["area"] <= 0.5
        for draw in entry["dropped"]:
            assert not 0 < random_mask(kind, SIZE, seed, draw).mean() <= 0.5
        assert [*entry["dropped"], entry["draw"]] == list(range(index, entry["draw"] + 1))
    dropped = sum(len(entry["dropped"]) for entry in manifest["files"])
    assert (dropped > 0) == (kind == "thick")
    assert f"{dropped} draws dropped" in summary(manifest)


def test_a_second_run_gives_the_same_bytes(photos, tmp_path):
    out = tmp_path / "out"
    write_evaluation_set(photos, out, size=SIZE)
    before = contents(out)
    assert len(before) == 2 * 9 + 1
    write_evaluation_set(photos, out, size=SIZE)
    assert contents(out) == before
    write_evaluation_set(photos, tmp_path / "another", size=SIZE)
    assert contents(tmp_path / "another") == before


def test_an_interrupted_set_is_made_again_with_the_same_bytes(photos, tmp_path, monkeypatch):
    write_evaluation_set(photos, tmp_path / "whole", size=SIZE)
    progress = image_pairs.Progress

    class Interrupted(progress):
        def show(self, step, terms):
            if step == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(image_pairs, "Progress", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_evaluation_set(photos, tmp_path / "out", size=SIZE)
    monkeypatch.setattr(image_pairs, "Progress", progress)
    write_evaluation_set(photos, tmp_path / "out", size=SIZE)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_first_n_have_the_masks_that_they_have_among_all(photos, tmp_path):
    write_evaluation_set(photos, tmp_path / "all", size=SIZE)
    manifest = write_evaluation_set(photos, tmp_path / "some", size=SIZE, n=4)
    assert len(manifest["files"]) == 4
    some, whole = contents(tmp_path / "some"), contents(tmp_path / "all")
    assert len(some) == 9
    assert all(whole[name] == data for name, data in some.items() if name != "manifest.json")


def test_names_keep_folders_and_the_extension_where_they_would_collide():
    assert output_names(["a.jpg", "cats/a.jpg", "cats/B.JPG"]) == ["a.png", "cats/a.png",
                                                                   "cats/B.png"]
    assert output_names(["a.jpg", "a.png", "A.bmp", "b.x.jpg"]) == [
        "a.jpg.png", "a.png.png", "A.bmp.png", "b.x.png"]
    names = output_names(["a.jpg", "a.png", "a.jpg.webp", "a.png.gif"])
    assert len(set(names)) == 4


def test_pictures_of_one_stem_get_a_file_each(photos, tmp_path):
    Image.new("RGB", (50, 50), "red").save(photos / "cats/a.png")
    manifest = write_evaluation_set(photos, tmp_path / "out", size=SIZE)
    names = [entry["name"] for entry in manifest["files"]]
    assert {"a.png", "cats/a.jpg.png", "cats/a.png.png", "dogs/a.png"} <= set(names)
    assert len(set(names)) == 10
    for folder in ("images", "masks"):
        assert set(contents(tmp_path / "out" / folder)) == set(names)


def test_eval_py_finds_the_mask_of_each_picture(photos, tmp_path):
    Image.new("RGB", (50, 50), "red").save(photos / "cats/a.png")
    Image.new("RGB", (50, 50), "blue").save(photos / "x_mask.png")
    manifest = write_evaluation_set(photos, tmp_path / "out", size=SIZE)
    images, masks = tmp_path / "out/images", tmp_path / "out/masks"
    folders = MatchedFolders(images, pred=images, masks=masks)
    areas = {folders.real[name]: folders.read(index).mask.float().mean().item()
             for index, name in enumerate(folders.names)}
    assert areas == {str(images / entry["name"]): pytest.approx(entry["area"])
                     for entry in manifest["files"]}


def test_an_undecodable_picture_is_left_out_said_and_listed(photos, tmp_path):
    whole = write_evaluation_set(photos, tmp_path / "whole", size=SIZE)
    (photos / "cats/b.jpg").write_bytes(b"no picture")
    manifest = write_evaluation_set(photos, tmp_path / "out", size=SIZE)
    (bad,) = (entry for entry in manifest["files"] if "error" in entry)
    assert bad["source"] == "cats/b.jpg"
    assert set(bad) == {"source", "index", "error"}
    assert "left out, cannot be decoded: 'cats/b.jpg' (UnidentifiedImageError" in summary(manifest)
    assert "8 pictures" in summary(manifest)
    assert [entry for entry in manifest["files"] if entry is not bad] == [
        entry for entry in whole["files"] if entry["source"] != "cats/b.jpg"]
    assert "cats/b.png" not in contents(tmp_path / "out/images")
    assert "cats/b.png" not in contents(tmp_path / "out/masks")


def test_a_folder_without_any_readable_picture_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"none of 1 pictures can be decoded, for example 'a\.jpg'"):
        write_evaluation_set(tmp_path / "photos", tmp_path / "out", size=SIZE)


@pytest.mark.parametrize(("change", "told"), [
    ({"seed": 1}, "seed was 0, is 1"), ({"size": 64}, "size was 32, is 64"),
    ({"kind": "thin"}, "kind was thick, is thin"), ({"n": 3}, "n was None, is 3")])
def test_a_set_with_other_settings_is_not_overwritten(change, told, photos, tmp_path):
    write_evaluation_set(photos, tmp_path / "out", size=SIZE)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=f"--out {tmp_path}/out: .*{told}; choose another --out"):
        write_evaluation_set(photos, tmp_path / "out", **{"size": SIZE} | change)
    assert contents(tmp_path / "out") == before


def test_a_set_of_other_pictures_is_not_overwritten(photos, tmp_path):
    write_evaluation_set(photos, tmp_path / "out", size=SIZE)
    before = contents(tmp_path / "out")
    (photos / "b.png").rename(photos / "new.png")
    with pytest.raises(UserError, match="the pictures are not the same ones"):
        write_evaluation_set(photos, tmp_path / "out", size=SIZE)
    photos.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"photos was {photos}, is {tmp_path}/elsewhere"):
        write_evaluation_set(tmp_path / "elsewhere", tmp_path / "out", size=SIZE)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("text", ["no json", "[1]", '{"settings": 3, "files": []}',
                                  '{"files": []}'])
def test_a_manifest_of_something_else_is_refused(text, photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest of masks"):
        write_evaluation_set(photos, tmp_path / "out", size=SIZE)
    assert (tmp_path / "out/manifest.json").read_text() == text


def test_a_folder_of_anything_else_and_the_photos_own_are_refused(photos, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--out .*/full: is there and holds no set of masks"):
        write_evaluation_set(photos, tmp_path / "full")
    with pytest.raises(UserError, match=r"--out .*/note\.txt: is there and holds no set of masks"):
        write_evaluation_set(photos, tmp_path / "full/note.txt")
    with pytest.raises(UserError, match=r"--out .*: cannot be written \(Not a directory\)"):
        write_evaluation_set(photos, tmp_path / "full/note.txt/deep")
    before = contents(photos)
    for out in (photos, photos / "set"):
        with pytest.raises(UserError, match="would mix the set with the pictures"):
            write_evaluation_set(photos, out)
    (tmp_path / "set").mkdir()
    for inside in ("images", "masks", "masks/deep"):
        photos = photos.rename(tmp_path / "set" / inside)
        with pytest.raises(UserError, match="would mix the set with the pictures"):
            write_evaluation_set(photos, tmp_path / "set")
        assert contents(photos) == before
        photos = photos.rename(tmp_path / "photos")
        (tmp_path / "set/masks").mkdir(exist_ok=True)


def test_a_missing_and_an_empty_folder_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/none: no such folder"):
        write_evaluation_set(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no pictures here \(\.jpg"):
        write_evaluation_set(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_does_and_what_it_made(photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert not run(monkeypatch, photos, "-o", out, "--size", SIZE, "--kind", "medium", "-n", 5)
    said = capsys.readouterr().out
    assert said.startswith(f"writing 32 x 32 px pictures of {photos} with medium masks, seed 0, to")
    assert "masks 5/5" in said
    assert "5 pictures with a mask each; by area: " in said
    assert said.endswith(f"made {out}/images, {out}/masks and {out}/manifest.json\n")
    assert len(contents(out)) == 11


def test_defaults_are_the_papers_and_help_shows_them(photos, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("default: thick", "default: 512", "default: 0", "default: all",
                  "python eval.py --pred DIR --real OUT/images --masks OUT/masks", "40-50 %, the"):
        assert words in said
    assert not run(monkeypatch, photos, "-o", tmp_path / "out", "-n", 1)
    (entry,) = json.loads((tmp_path / "out/manifest.json").read_text())["files"]
    mask = np.array(Image.open(tmp_path / "out/masks" / entry["name"])) // 255
    assert np.array_equal(mask, random_mask("thick", 512, 0, entry["draw"]))


@pytest.mark.parametrize(("arguments", "line"), [
    (("--size", 4), "--size 4: the least is 8"), (("-n", 0), "-n 0: the least is 1"),
    (("--seed", -1), "--seed -1: the least is 0")])
def test_a_mistake_is_one_line_and_status_2(arguments, line, photos, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, photos, "-o", tmp_path / "out", *arguments) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert not (tmp_path / "out").exists()
