"""data.py: files good and bad, decoding, crops, and an order that nothing changes."""

import errno
import io
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

import data
from data import ImageFiles, Signs, TrainingItems
from distributed import UserError
from masks import evaluation_mask, training_mask


def picture(value, size=(40, 30)):
    return Image.new("RGB", size, (value % 256, 255 - value % 256, 80))


def fill(folder, names):
    """Pictures under `names`; the k-th has red value k."""
    for value, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(path)
    return folder


def spoil(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x89PNG not really")


def red(image):
    return int(np.asarray(image)[..., 0].mean().round())


# -- decoding --------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "RGBA", "RGB", "I;16"])
def test_every_mode_becomes_rgb_of_the_same_grey(tmp_path, mode):
    level = 255 if mode == "1" else 180
    grey = Image.new("RGB", (20, 20), (level,) * 3)
    image = (Image.fromarray(np.full((20, 20), level * 257, np.uint16)) if mode == "I;16" else
             grey.quantize(4) if mode == "P" else grey.convert(mode))
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    assert Image.open(path).mode == mode
    rgb = data.load_image(path)
    assert rgb.mode == "RGB"
    assert np.abs(np.asarray(rgb).astype(int) - level).max() <= 1


@pytest.mark.parametrize("file", ["x.png", "x.tif", "x.pgm"])
def test_sixteen_bits_are_rounded_to_the_nearest_level(tmp_path, file):
    ramp = np.arange(0, 65536, 3, np.uint16).reshape(6, -1)
    Image.fromarray(ramp).save(tmp_path / file)
    levels = np.asarray(data.load_image(tmp_path / file))[..., 0]
    assert np.array_equal(levels, np.rint(ramp / 257))


@pytest.mark.parametrize(("values", "wanted"), [
    (np.float32([0, 0.25, 0.502, 1]), [0, 64, 128, 255]), (np.float32([0, 0, 0, 0]), [0] * 4),
    (np.int32([0, 3, 128, 255]), [0, 3, 128, 255]), (np.uint16([0, 3, 128, 255]), [0, 3, 128, 255]),
    (np.int32([0, 257, 32896, 65535]), [0, 1, 128, 255]),
    (np.dtype(">u2").type([0, 257, 32896, 65535]), [0, 1, 128, 255])])
def test_wide_pixels_are_scaled_by_their_range(tmp_path, values, wanted):
    Image.fromarray(values[None]).save(tmp_path / "x.tif")
    assert np.asarray(data.load_image(tmp_path / "x.tif"))[0, :, 1].tolist() == wanted


@pytest.mark.parametrize(("values", "said"), [
    (np.float32([0, 1.5]), "mode F, values from 0 to 1.5 outside 0 to 1"),
    (np.float32([-1, 1]), "mode F, values from -1 to 1 "), (np.float32([np.nan, 1]), "mode F"),
    (np.int32([0, 65536]), "mode I, values from 0 to 65536 outside 0 to 65535"),
    (np.int32([-1, 9]), "mode I, values from -1 to 9 ")])
def test_wide_pixels_of_another_range_are_refused_by_name(tmp_path, values, said):
    Image.fromarray(values[None]).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=rf"x\.tif: .*{said}"):
        data.load_image(tmp_path / "x.tif")


@pytest.mark.parametrize("kind", ["profile", "zTXt", "iTXt"])
def test_a_png_with_a_large_chunk_is_read(tmp_path, kind):
    image, text = picture(7), PngImagePlugin.PngInfo()
    if kind == "zTXt":
        text.add_text("workflow", "x" * (3 << 20), zip=True)
    elif kind == "iTXt":
        text.add_itxt("workflow", "x" * (3 << 20), zip=True)
    profile = {"icc_profile": bytes(2 << 20)} if kind == "profile" else {}
    image.save(tmp_path / "x.png", pnginfo=text, **profile)
    assert np.array_equal(data.load_image(tmp_path / "x.png"), image)


# -- colour profiles -------------------------------------------------------------------------------

D50 = np.array([0.9642, 1, 0.8249])
TO_XYZ = {"P3": [[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]],
          "sRGB": [[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]]}


def srgb_curve(linear):
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def icc(space, matrix=None, curve=None):
    """An ICC profile of version 2: RGB by a matrix, GRAY by its curve, or CMYK by a small table."""
    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * v) for v in values))
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"name\0" + b"\0" * 78,
            b"cprt": b"text\0\0\0\0CC0\0", b"wtpt": xyz(D50)}
    if curve is not None:                        # one number is a gamma
        numbers = ([round(256 * curve)] if np.ndim(curve) == 0 else
                   np.rint(65535 * curve).astype(int))
        curve = b"curv\0\0\0\0" + struct.pack(f">I{len(numbers)}H", len(numbers), *numbers)
    if space == b"RGB ":
        tags |= {b"%cXYZ" % name: xyz(column) for name, column in zip(b"rgb", np.transpose(matrix))}
        tags |= {b"%cTRC" % name: curve for name in b"rgb"}
    elif space == b"GRAY":
        tags[b"kTRC"] = curve
    else:                                        # cyan is L* 50, black and mixtures are L* 0
        lightness = {(0, 0, 0, 0): 255, (1, 0, 0, 0): 128}
        table = b"".join(bytes([lightness.get(ink, 0), 128, 128]) for ink in np.ndindex(2, 2, 2, 2))
        unit = struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).flatten())
        tags[b"A2B0"] = (b"mft1\0\0\0\0\4\3\2\0" + unit + bytes(range(256)) * 4 + table
                         + bytes(range(256)) * 3)
    index, body = b"", b""
    for name, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        index += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(value))
        body += value
    pcs, use = (b"Lab ", b"prtr") if space == b"CMYK" else (b"XYZ ", b"mntr")
    head = struct.pack(">I4sI4s4s4s12x4s28x", 132 + len(index + body), b"", 0x02400000, use, space,
                       pcs, b"acsp") + struct.pack(">3i", *(round(65536 * v) for v in D50))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + index + body


P3 = icc(b"RGB ", TO_XYZ["P3"], 2.2)
LINEAR_GREY = icc(b"GRAY", curve=1)


def p3_to_srgb(colours):
    """By the matrices, not by Pillow: (..., 3) levels."""
    linear = (colours / 255.0) ** 2.2 @ np.transpose(np.linalg.inv(TO_XYZ["sRGB"]) @ TO_XYZ["P3"])
    return 255 * srgb_curve(linear.clip(0, 1))


def muted():
    return np.random.default_rng(0).integers(90, 200, (6, 9, 3), np.uint8)


def test_a_photo_becomes_srgb_wherever_it_is_read(tmp_path):
    Image.fromarray(muted()).save(tmp_path / "x.png", icc_profile=P3)
    Image.new("L", (9, 6)).save(tmp_path / "m.png")
    photo = np.asarray(data.load_image(tmp_path / "x.png"))
    assert np.abs(photo - p3_to_srgb(muted())).max() <= 1.5
    assert np.abs(photo - muted().astype(int)).max() > 10
    assert np.array_equal(data.read_pair(tmp_path / "x.png", tmp_path / "m.png")[0], photo)
    Image.fromarray(muted()[:6, :6]).save(tmp_path / "x.png", icc_profile=P3)
    assert np.array_equal(ImageFiles(tmp_path, "train", 6).image(0), photo[:, :6])


@pytest.mark.parametrize(("mode", "file"), [
    ("RGBA", "x.png"), ("P", "x.png"), ("L", "x.png"), ("L", "x.jpg"), ("RGB", "x.tif"),
    ("RGB", "x.jpg"), ("RGB", "x.webp")])
def test_every_mode_and_format_follows_a_profile_of_rgb(tmp_path, mode, file):
    image = Image.new("RGB", (16, 16), (180, 120, 100)).convert(mode)
    if mode == "RGBA":
        image.paste((0, 0, 0, 0), (0, 0, 16, 8))
    lossless = {"lossless": True} if file == "x.webp" else {}
    image.save(tmp_path / file, icc_profile=P3, **lossless)
    with Image.open(tmp_path / file) as stored:
        wanted = p3_to_srgb(np.asarray(stored.convert("RGB")))
    if mode == "RGBA":
        wanted[:8] = 255
    assert np.abs(np.asarray(data.load_image(tmp_path / file)) - wanted).max() <= 2


@pytest.mark.parametrize("file", ["x.jpg", "x.png", "la.png", "wide.png", "float.tif"])
def test_grey_follows_a_profile_of_grey(tmp_path, file):
    image = {"la": Image.new("LA", (8, 8), (128, 255)), "float": Image.new("F", (8, 8), 128 / 255),
             "wide": Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))}.get(
                 file.split(".")[0], Image.new("L", (8, 8), 128))
    image.save(tmp_path / file, icc_profile=LINEAR_GREY)
    photo = np.asarray(data.load_image(tmp_path / file))
    assert np.abs(photo - 255 * srgb_curve(np.array(128 / 255))).max() <= 1          # 188


@pytest.mark.parametrize("file", ["x.jpg", "x.tif"])
def test_cmyk_follows_its_profile(tmp_path, file):
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    cyan.save(tmp_path / file, icc_profile=icc(b"CMYK"))
    assert np.abs(np.asarray(data.load_image(tmp_path / file)) - 119.0).max() <= 2   # L* 50 is 119


@pytest.mark.parametrize("profile", [
    ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    icc(b"RGB ", TO_XYZ["sRGB"], np.interp(
        np.linspace(0, 1, 1024), srgb_curve(np.linspace(0, 1, 9999)), np.linspace(0, 1, 9999))),
    b"no profile", P3[:200], LINEAR_GREY, icc(b"CMYK")],
    ids=["sRGB v4", "sRGB v2", "broken", "cut", "grey", "CMYK"])
def test_srgb_and_what_has_no_profile_that_fits_stay_bit_for_bit(tmp_path, profile):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    image.save(tmp_path / "x.png", icc_profile=profile)
    with Image.open(tmp_path / "x.png") as stored:
        assert stored.info["icc_profile"] == profile
    assert np.array_equal(data.load_image(tmp_path / "x.png"), image)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 0)).convert(mode)
    image.save(tmp_path / "x.png", transparency=image.getpixel((0, 0)) if mode == "P" else None)
    assert np.asarray(data.load_image(tmp_path / "x.png")).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed(tmp_path, orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as stored:
        wanted = np.asarray(ImageOps.exif_transpose(stored))
    assert np.array_equal(np.asarray(data.load_image(tmp_path / "x.png")), wanted)


def test_large_jpegs_are_decoded_small_but_not_below_the_side_asked_for(tmp_path):
    picture(9, (1000, 600)).save(tmp_path / "x.jpg")
    for side, size in ((None, (1000, 600)), (128, (250, 150)), (601, (1000, 600))):
        assert data.load_image(tmp_path / "x.jpg", side).size == size


def test_a_picture_of_100_megapixels_is_read_without_a_word(tmp_path, recwarn):
    Image.new("L", (10_000, 10_000), 77).save(tmp_path / "x.jpg")
    assert red(ImageFiles(tmp_path, "train", 32).image(0)) == 77
    assert not recwarn.list


def test_a_decompression_bomb_counts_as_a_bad_file(tmp_path, monkeypatch):
    fill(tmp_path, ["train/a.png", "train/b.png", "val/c.png"])
    picture(1, (20, 20)).save(tmp_path / "train" / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)          # more than twice that is a bomb
    with pytest.raises(UserError, match=r"cannot be decoded .*decompression bomb"):
        data.load_image(tmp_path / "train" / "a.png")
    assert red(ImageFiles(tmp_path, "train", 16).image(0)) == 1


# -- crops -----------------------------------------------------------------------------------------

def coordinates(width, height):
    """Red is x, green is y."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def test_training_crops_are_squares_of_half_to_all_of_the_short_side_anywhere_and_never_flipped():
    sides, lefts = [], []
    for key in range(200):
        crop = data.square_crop(coordinates(200, 100), 20, np.random.default_rng(key)).astype(float)
        per_pixel = np.diff(crop[10, :, 0])[5:-5].mean(), np.diff(crop[:, 10, 1])[5:-5].mean()
        assert per_pixel[0] == pytest.approx(per_pixel[1], abs=0.15)
        sides.append(20 * per_pixel[0])
        lefts.append(crop[10, 0, 0])
    assert 48 < min(sides) < 56
    assert 94 < max(sides) < 102
    assert min(lefts) < 10
    assert max(lefts) > 120


def test_the_fixed_view_is_the_centre_square():
    wide, tall = coordinates(200, 100), coordinates(100, 200)
    assert np.array_equal(data.square_crop(wide, 100), np.asarray(wide)[:, 50:150])
    assert np.array_equal(data.square_crop(tall, 100), np.asarray(tall)[50:150])


@pytest.mark.parametrize("size", [(7, 5), (1, 1), (64, 3)])
def test_pictures_smaller_than_the_size_are_enlarged(size):
    for rng in (None, np.random.default_rng(0)):
        crop = data.square_crop(picture(100, size), 32, rng)
        assert crop.shape == (32, 32, 3)
        assert red(crop) == 100


def test_shrinking_averages_areas():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    area = noise.reshape(32, 4, 32, 4, 3).mean((1, 3))
    difference = data.square_crop(Image.fromarray(noise), 32).astype(float) - area
    assert np.sqrt((difference ** 2).mean()) < 0.7 * area.std()
    assert abs(difference.mean()) < 1


# -- which files -----------------------------------------------------------------------------------

def test_a_folder_is_read_recursively_and_every_twentieth_file_is_held_out(tmp_path):
    fill(tmp_path, [f"{k % 3}/sub/{k:03}.png" for k in range(45)])
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden").mkdir()
    picture(0).save(tmp_path / ".hidden" / "x.png")
    picture(0).save(tmp_path / "._x.png")
    shown = [[red(each.image(i)) for i in range(len(each))]
             for each in (ImageFiles(tmp_path, split, 16) for split in ("train", "val"))]
    assert shown == [[k for k in range(45) if k % 20], [0, 20, 40]]


@pytest.mark.parametrize(("names", "train", "val"), [
    (["train/a.png", "train/b.png", "val/c.png"], ["train/a.png", "train/b.png"], ["val/c.png"]),
    (["only.png"], ["only.png"], ["only.png"]), (["a.png", "b.png"], ["b.png"], ["a.png"])])
def test_a_folder_is_split_as_it_is_and_one_picture_serves_for_both(tmp_path, names, train, val):
    fill(tmp_path, names)
    for split, wanted in (("train", train), ("val", val)):
        dataset = data.open_dataset("folder", str(tmp_path), split, 16)
        assert [dataset.path(i) for i in range(len(dataset))] == [str(tmp_path / n) for n in wanted]
        assert dataset.image(0).shape == (16, 16, 3)
        assert dataset.describe().startswith("1 photo in " if len(wanted) == 1 else "2 photos in ")


@pytest.mark.parametrize("val", ["val/{name}.JPEG", "val/n{wnid}/{name}.JPEG"])
def test_imagenets_val_has_the_same_order_flat_or_by_class(tmp_path, val):
    fill(tmp_path, ["train/n1/a.JPEG", "train/n2/b.JPEG", "test/c.JPEG"])
    fill(tmp_path, [val.format(name=name, wnid=wnid) for name, wnid in enumerate([3, 1, 2, 0])])
    dataset = data.open_dataset("imagenet", str(tmp_path), "val", 16)
    assert [Path(dataset.path(i)).stem for i in range(4)] == ["0", "1", "2", "3"]
    assert len(data.open_dataset("imagenet", str(tmp_path), "train", 16)) == 2


def stems(name, root, split):
    dataset = data.open_dataset(name, str(root), split, 16)
    return [Path(dataset.path(i)).stem for i in range(len(dataset))]


@pytest.mark.parametrize("val", ["val/images/val_{}.JPEG", "val/n{}/val_{}.JPEG"])
def test_without_test_photos_the_later_half_of_imagenets_val_by_number_is_test(tmp_path, val):
    fill(tmp_path, ["train/n1/a.JPEG", *(val.format(*[k] * val.count("{")) for k in range(13))])
    (tmp_path / "test").mkdir()                                      # without a photo
    first, second = (stems("imagenet", tmp_path, split) for split in ("val", "test"))
    assert first == [f"val_{k}" for k in range(7)]
    assert second == [f"val_{k}" for k in range(7, 13)]
    assert stems("imagenet", tmp_path, "train") == ["a"]
    for split, half in (("val", "val: the first half"), ("test", "test: the second half")):
        told = data.open_dataset("imagenet", tmp_path, split, 16).describe()
        assert told.endswith(f"photos in {tmp_path}/val (imagenet layout, {half} of val/)")


@pytest.mark.parametrize("name", ["imagenet", "folder"])
def test_a_folder_of_test_photos_is_test_and_leaves_val_whole(tmp_path, name):
    fill(tmp_path, ["train/a.png", "val/b.png", "val/c.png", "test/x/e.png", "test/d.png"])
    found = {split: stems(name, tmp_path, split) for split in ("train", "val", "test")}
    assert found == {"train": ["a"], "val": ["b", "c"], "test": ["d", "e"]}
    told = data.open_dataset(name, tmp_path, "test", 16).describe()
    assert told == f"2 photos in {tmp_path}/test ({name} layout, test)"


def test_test_photos_are_never_photos_that_training_or_its_validation_sees(tmp_path):
    flat = fill(tmp_path / "flat", [f"{k}.png" for k in range(30)] + ["test/x.png"])
    halves = fill(tmp_path / "halves", ["train/a.png", "val/b.png", "val/c.png"])
    one = fill(tmp_path / "one", ["train/a.png", "val/b.png"])
    for name, root, wanted in (("folder", flat, "train/, val/ and test/"),
                               ("folder", halves, "train/, val/ and test/"),
                               ("imagenet", one, "train/<class>")):
        with pytest.raises(UserError, match=f"{root}: no photos for test there; .*{wanted}"):
            data.open_dataset(name, root, "test", 16)
        seen = {*stems(name, root, "train"), *stems(name, root, "val")}
        assert len(seen) == len(data.list_images(root))


def test_imagenet_is_looked_for_in_root_then_the_variable_then_data(tmp_path, monkeypatch):
    for place in ("root", "variable", "here/data/imagenet"):
        fill(tmp_path / place, ["train/n/a.png"])
    monkeypatch.chdir(tmp_path / "here")
    assert "data/imagenet" in data.open_dataset("imagenet", None, "train", 16).path(0)
    monkeypatch.setenv("IMAGENET", str(tmp_path / "variable"))
    assert "variable" in data.open_dataset("imagenet", None, "train", 16).path(0)
    assert "root" in data.open_dataset("imagenet", str(tmp_path / "root"), "train", 16).path(0)


def test_a_mistake_is_one_line_that_names_the_flag(tmp_path):
    for name, root, said in (("imagenet", tmp_path, "train/<class>"),
                             ("folder", None, "--root DIR"),
                             ("folder", tmp_path / "none", "none: cannot be read .No such file"),
                             ("folder", tmp_path, "give one with .jpg .jpeg"),
                             ("cats", None, "signs, imagenet, folder")):
        with pytest.raises(UserError, match=said) as error:
            data.open_dataset(name, root, "train", 16)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="--size 16"):
        Signs("train", 16)


def test_names_with_unicode_quotes_and_line_breaks_work(tmp_path):
    names = ["it's \"x\".png", "новый год.png", "写真.PNG", "a\nb.png", "100%{}.png", " .png",
             "é.png"]
    fill(tmp_path / "ordner ü", names)
    assert sorted(data.list_images(tmp_path / "ordner ü")) == sorted(names)
    dataset = ImageFiles(tmp_path / "ordner ü", "train", 16)
    assert [red(dataset.image(i)) for i in range(6)] == [
        names.index(Path(dataset.path(i)).name) for i in range(6)]


def test_links_in_a_circle_end(tmp_path):
    fill(tmp_path, ["a/x.png"])
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert data.list_images(tmp_path) == ["a/x.png"]


@pytest.mark.parametrize("folder", ["@eaDir/a.png", "deep/@EADIR", ".@__thumb", "#recycle",
                                    "@Recently-Snapshot", "__MACOSX/sub", "$RECYCLE.BIN"])
def test_thumbnails_and_deleted_files_of_storage_systems_are_no_photos(folder, tmp_path):
    fill(tmp_path, ["a.png", f"{folder}/SYNOPHOTO_THUMB_M.png", "#sunset/b.png", "@home/c.png"])
    assert data.list_images(tmp_path) == ["a.png", "#sunset/b.png", "@home/c.png"]


def test_runs_inside_the_photos_are_left_out_unless_asked_for(tmp_path):
    fill(tmp_path, ["photos/a.png", "photos/runs/x/curves.png", "photos/runs/x/vqgan/samples/1.png",
                    "photos/other/b.png", "elsewhere/decoder/samples/2.png"])
    run, elsewhere = tmp_path / "photos" / "runs" / "x", tmp_path / "elsewhere"
    for folder in (run, elsewhere):
        (folder / "config.json").write_text("{}")
        (folder / "command.txt").write_text("python train.py")
    (tmp_path / "photos" / "link").symlink_to(elsewhere)
    (tmp_path / "photos" / "other" / "config.json").write_text("{}")        # of another program
    assert data.list_images(tmp_path / "photos") == ["a.png", "other/b.png"]
    assert data.list_images(run) == ["vqgan/samples/1.png", "curves.png"]


def identities(folder):
    return [data.open_dataset("folder", folder, split, 16).identity() for split in ("train", "val")]


def test_an_identity_is_of_names_and_contents_wherever_the_files_are(tmp_path):
    old = fill(tmp_path / "old", [f"{k}/{k}.png" for k in range(25)])
    train, val = known = identities(old)
    assert train != val
    old.rename(tmp_path / "new")
    assert identities(tmp_path / "new") == known
    last = tmp_path / "new" / "24" / "24.png"
    picture(3, (90, 70)).save(last)                                  # another photo of this name
    assert identities(tmp_path / "new")[0] != train
    last.unlink()
    last.symlink_to("nowhere")                                       # a file that is not there
    assert identities(tmp_path / "new")[0] != train
    last.unlink()
    last.with_name("25.png").symlink_to("nowhere")
    assert identities(tmp_path / "new")[0] != train
    assert identities(tmp_path / "new")[1] == val


def test_frames_of_two_films_have_the_same_names_and_sizes_but_are_not_the_same_images(tmp_path):
    names = [f"{k:04}.bmp" for k in range(3)]
    one, two = (fill(tmp_path / film, order) for film, order in (("a", names), ("b", names[::-1])))
    assert (one / names[0]).stat().st_size == (two / names[0]).stat().st_size
    assert identities(one)[0] != identities(two)[0]


def test_names_that_join_to_one_text_are_not_the_same_images(tmp_path):
    (one, _), (two, _) = (identities(fill(tmp_path / str(len(names)), names)) for names in (
        ["train/a.pngb.png", "val/v.png"], ["train/a.png", "train/b.png", "val/v.png"]))
    assert one != two


def test_of_a_large_data_set_few_files_are_opened_for_its_identity(tmp_path, monkeypatch):
    fill(tmp_path, [f"train/{k}.png" for k in range(10)] + ["val/v.png"])
    read = []
    monkeypatch.setattr(data, "PROBED", 4)

    def note(path, mode):
        read.append(Path(path).stem)
        return io.BytesIO(b"photo")

    monkeypatch.setattr(data, "open", note, raising=False)
    data.open_dataset("folder", tmp_path, "train", 16).identity()
    assert read == ["0", "3", "6", "9"]


def test_the_identity_of_signs_stays_as_it_is_in_the_runs_that_exist():
    assert Signs("train", 64).identity() == (
        "50,000 drawn street scenes with signs (train, seed 0), 64 px")


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=r"^.*/x: cannot be read \(Permission denied\)$"):
        data.list_images(tmp_path / "x")


def test_data_sets_describe_themselves_and_can_be_limited(tmp_path):
    fill(tmp_path, [f"train/n/{k}.png" for k in range(9)])
    for name, split, limit, said in (
            ("imagenet", "train", None, "9 photos in "), ("imagenet", "train", 4, "4 photos in "),
            ("signs", "train", None, "50,000 drawn"), ("signs", "val", None, "1,000 drawn"),
            ("signs", "test", None, "1,000 drawn"), ("signs", "val", 3, "3 drawn")):
        dataset = data.open_dataset(name, tmp_path, split, 64, limit=limit)
        assert dataset.describe().startswith(said)
        assert f"{len(dataset):,}" == said.split()[0]


# -- files that cannot be decoded ------------------------------------------------------------------

def test_the_next_readable_file_stands_in_for_a_bad_one_which_is_said_once(tmp_path, capfd):
    fill(tmp_path, [f"train/{k}.png" for k in range(6)])
    fill(tmp_path, ["val/x.png"])
    broken = [tmp_path / "train" / f"{k}.png" for k in (2, 3, 5)]
    spoil(*broken)
    picture(1, (300, 300)).save(broken[0])
    broken[0].write_bytes(broken[0].read_bytes()[:200])          # cut off
    dataset = ImageFiles(tmp_path, "train", 16)
    assert [red(dataset.image(i)) for i in (2, 3, 5, 2)] == [4, 4, 0, 4]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3
    assert all(f"warning: {path}: cannot be decoded" in line for path, line in zip(broken, said))


@pytest.mark.parametrize(("workers", "files"), [(0, 5), (1, 6)])
def test_too_many_bad_files_in_a_row_end_training_in_one_line(tmp_path, monkeypatch, workers,
                                                              files):
    monkeypatch.setattr(data, "BAD_IN_A_ROW", 5)
    spoil(*(tmp_path / "train" / f"{k}.png" for k in range(files)))
    fill(tmp_path, ["val/x.png"])
    items = TrainingItems(ImageFiles(tmp_path, "train", 16), 0, 0, masks=True)
    with pytest.raises(UserError, match=f"5 of its {files} files in a row cannot be used; the "
                       r"first is .*/train/\d\.png: cannot be decoded \(cannot identify") as error:
        next(data.training_batches(items, 0, 1, 2, workers=workers))
    assert "\n" not in str(error.value)


# -- masks and their photos ------------------------------------------------------------------------

def test_white_is_to_be_generated_and_black_with_invert(tmp_path):
    grey = np.repeat(np.array([[0, 127, 128, 255]], np.uint8), 4, 0)
    Image.fromarray(grey).save(tmp_path / "m.png")
    wanted = np.repeat([[False, False, True, True]], 4, 0)
    for invert in (False, True):
        mask, (remark,) = data.read_mask(tmp_path / "m.png", invert)
        assert mask.dtype == bool
        assert np.array_equal(mask, wanted ^ invert)
        assert "8 of 16 pixels are neither black nor white" in remark


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_mask_may_have_any_mode_and_what_is_transparent_is_black(tmp_path, mode):
    hole = np.zeros((8, 8), bool)
    hole[2:5, 3:] = True
    image = alpha = Image.fromarray(np.uint8(255 * hole))
    if mode in ("LA", "RGBA"):
        image = Image.new("RGB", (8, 8), "white")
        image.putalpha(alpha)
    image = Image.fromarray(np.uint16(65535 * hole)) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "m.png")
    mask, remarks = data.read_mask(tmp_path / "m.png")
    assert np.array_equal(mask, hole)
    assert remarks == []


@pytest.mark.parametrize("white", [np.float32(1), np.uint16(65535), np.uint16(255), np.int32(255),
                                   np.int32(65535)], ids=lambda white: f"{white.dtype} {white}")
def test_a_mask_may_have_wide_pixels(tmp_path, white):
    hole = np.arange(64).reshape(8, 8) < 20
    Image.fromarray(hole * white).save(tmp_path / "m.tif")
    mask, remarks = data.read_mask(tmp_path / "m.tif")
    assert np.array_equal(mask, hole)
    assert remarks == []


def test_a_masks_numbers_are_no_colours(tmp_path):
    Image.new("L", (8, 8), 120).save(tmp_path / "m.png", icc_profile=LINEAR_GREY)
    assert not data.read_mask(tmp_path / "m.png")[0].any()       # as a colour it would be 182


@pytest.mark.parametrize(("share", "said"), [(0, "0% of it"), (0.03, None), (0.94, None),
                                             (0.97, "97% of it"), (1, "100% of it")])
def test_a_mask_that_looks_inverted_is_warned_of(tmp_path, share, said):
    white = np.arange(10_000).reshape(100, 100) < 10_000 * share
    Image.fromarray(np.uint8(255 * white)).save(tmp_path / "m.png")
    _, remarks = data.read_mask(tmp_path / "m.png")
    assert len(remarks) == (said is not None)
    assert all(said in remark and "--invert-mask" in remark for remark in remarks)


def test_a_pair_has_the_photos_size_and_warnings_are_printed(tmp_path, capsys):
    picture(7, (40, 30)).save(tmp_path / "p.png")
    hole = np.zeros((15, 20), np.uint8)
    hole[:5, :4] = 255
    Image.fromarray(hole).save(tmp_path / "m.png")
    photo, mask = data.read_pair(tmp_path / "p.png", tmp_path / "m.png")
    assert (photo.shape, red(photo)) == ((30, 40, 3), 7)
    assert np.array_equal(mask, np.kron(hole > 0, np.ones((2, 2), bool)))
    assert "warning: " in capsys.readouterr().out
    black = data.read_pair(tmp_path / "p.png", tmp_path / "m.png", True)[1]
    assert np.array_equal(black, ~mask)


@pytest.mark.parametrize("scale", [(2, 2), (3, 3), (1.5, 1.5), (10, 10), (2.03, 1.97)])
@pytest.mark.parametrize("negative", [False, True])
def test_a_pixel_is_hole_where_any_pixel_of_a_larger_mask_that_overlaps_it_is(tmp_path, scale,
                                                                               negative):
    w, h = round(40 * scale[0]), round(30 * scale[1])
    lines = np.zeros((h, w), bool)
    lines[h // 2 + 1, :] = lines[:, w // 3] = True               # scratches of one pixel
    lines = ~lines if negative else lines
    Image.fromarray(lines).save(tmp_path / "m.png")
    picture(7, (40, 30)).save(tmp_path / "p.png")
    wanted = np.array([[lines[i * h // 30:-(-(i + 1) * h // 30), j * w // 40:-(-(j + 1) * w // 40)]
                        .any() for j in range(40)] for i in range(30)])
    assert np.array_equal(data.read_pair(tmp_path / "p.png", tmp_path / "m.png")[1], wanted)
    inverted = data.read_pair(tmp_path / "p.png", tmp_path / "m.png", True)[1]
    assert (inverted | wanted).all()                             # the hole is what may not be lost


@pytest.mark.parametrize(("size", "fits"), [
    ((80, 60), True), ((20, 15), True), ((13, 10), True), ((61, 45), True), ((400, 299), True),
    ((30, 40), False), ((40, 40), False), ((80, 50), False), ((400, 270), False)])
def test_a_mask_of_another_aspect_ratio_than_rounding_explains_is_refused(tmp_path, size, fits):
    picture(7, (40, 30)).save(tmp_path / "p.png")
    Image.new("L", size, 255).save(tmp_path / "m.png")
    if fits:
        assert data.read_pair(tmp_path / "p.png", tmp_path / "m.png")[1].shape == (30, 40)
        return
    with pytest.raises(UserError, match=f"m.png is {size[0]} x {size[1]} px, .*aspect ratio"):
        data.read_pair(tmp_path / "p.png", tmp_path / "m.png")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("drawn", ["stored", "upright"])
def test_a_mask_of_the_stored_size_gets_the_photos_turn(tmp_path, orientation, drawn, capsys):
    hole, exif = np.zeros((6, 9), bool), Image.Exif()
    hole[1, 2:7] = hole[4, 8] = True
    exif[0x0112] = orientation
    image = Image.fromarray(np.uint8(255 * hole)).convert("RGB")
    image.save(tmp_path / "p.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "p.png"))
    (image if drawn == "stored" else upright).save(tmp_path / "m.png", exif=b"")
    photo, mask = data.read_pair(tmp_path / "p.png", tmp_path / "m.png")
    said = capsys.readouterr().out
    if drawn == "upright" or orientation in (1, 5, 6, 7, 8):
        assert np.array_equal(mask, photo[..., 0] > 0)
    assert ("turned by its EXIF tag too" in said) == (drawn == "stored" and orientation > 4)
    assert ("it would fit both ways" in said) == (orientation in (2, 3, 4))


@pytest.mark.parametrize(("mode", "lost"), [("RGB", None), ("RGBA", None), ("L", None),
                                            ("clear", "transparency, here on white, is not kept"),
                                            ("I;16", "16 bits a colour are not kept")])
def test_what_a_photo_loses_is_said_once_and_an_opaque_channel_is_no_loss(tmp_path, mode, lost,
                                                                          capsys):
    image = (Image.fromarray(np.uint16([[0, 65535] * 80] * 120)) if mode == "I;16" else
             Image.new("RGBA", (160, 120), (1, 2, 3, 99)) if mode == "clear" else
             Image.new(mode, (160, 120), "white"))
    image.save(tmp_path / "p.png")
    Image.fromarray(np.eye(120, 160) > 0).save(tmp_path / "m.png")
    data.read_pair(tmp_path / "p.png", tmp_path / "m.png")
    assert capsys.readouterr().out == (f"warning: {tmp_path / 'p.png'}: {lost}\n" if lost else "")


# -- the order of training -------------------------------------------------------------------------

class Numbers:
    """A data set whose k-th picture is k everywhere, and whose crops are noise from their rng."""

    size = 16

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def image(self, index, rng=None):
        image = np.full((16, 16, 3), index, np.uint8)
        if rng is not None:
            image[0] = rng.integers(0, 256, (16, 3))
        return image


def collect(first, last, batch_size, rank=0, world=1, workers=0, length=10, masks=True):
    items = TrainingItems(Numbers(length), 3, 1, masks)
    return list(data.training_batches(items, first, last, batch_size, rank, world, workers))


def test_an_epoch_shows_every_picture_once_and_the_next_in_another_order():
    shown = [int(image[0, -1, -1]) for batch in collect(0, 5, 4) for image in batch["image"]]
    assert sorted(shown[:10]) == sorted(shown[10:]) == list(range(10))
    assert shown[:10] != shown[10:]
    assert shown[:10] != list(range(10))


def test_no_worker_rank_start_or_batch_size_changes_what_a_position_shows():
    def by_position(*runs):
        shown = {}
        for batch in (batch for run in runs for batch in run):
            for place, image, mask in zip(batch["position"], batch["image"], batch["mask"]):
                assert place not in shown
                shown[place] = image.numpy().tobytes(), mask.numpy().tobytes()
        return shown

    alone = by_position(collect(0, 6, 4))
    assert list(alone) == list(range(24))                        # in order
    assert by_position(collect(0, 6, 4, workers=2)) == alone
    assert by_position(collect(0, 2, 4), collect(2, 6, 4)) == alone
    assert by_position(*(collect(0, 6, 4, rank, world=2) for rank in range(2))) == alone
    assert by_position(collect(0, 12, 2)) == alone


@pytest.mark.parametrize(("p_full", "kind"), [(0.0, "thin"), (0.9, "thick")])
def test_the_share_of_full_masks_and_the_kind_of_the_others_are_as_asked_for(p_full, kind):
    items = TrainingItems(Numbers(10), 3, 1, True, p_full, kind)
    for position in range(20):
        mask = training_mask(16, (3, 1), position, kind, p_full)
        assert np.array_equal(items[position]["mask"][0], mask)


def test_batches_have_the_promised_types():
    (batch,) = collect(0, 1, 10)
    for key, channels in (("image", 3), ("mask", 1)):
        assert batch[key].shape == (10, channels, 16, 16)
        assert batch[key].dtype == torch.uint8
        assert batch[key].is_contiguous()
    assert batch["position"] == list(range(10))
    assert 0 < sum(mask.all() for mask in batch["mask"]) < 10
    (batch,) = collect(0, 1, 10, masks=False)
    assert batch["mask"].all()


def test_the_global_stream_of_random_numbers_is_left_alone():
    before = torch.get_rng_state()
    collect(0, 2, 4, workers=1)
    assert torch.equal(before, torch.get_rng_state())


class WorkerState:
    """Items that tell what their process does on signals and with how many threads."""

    def __getitem__(self, position):
        return {"state": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
                          torch.get_num_threads())}


def test_workers_leave_signals_to_the_main_process_and_use_one_thread():
    (batch,) = data.training_batches(WorkerState(), 0, 1, 1, workers=1)
    assert batch == {"state": [(signal.SIG_IGN, signal.SIG_IGN, 1)]}


def test_a_full_dev_shm_is_one_line_with_the_cure(monkeypatch):
    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "ProcessPoolExecutor", full)
    with pytest.raises(UserError, match=r"/dev/shm is full.*--workers 0.*--shm-size"):
        collect(0, 1, 2, workers=1)


def test_a_worker_ends_when_its_program_is_killed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"""
import os, sys, time
sys.path.insert(0, {str(Path(data.__file__).parent)!r})
from data import Signs, TrainingItems, training_batches
if __name__ == "__main__":
    items = TrainingItems(Signs("train", 32), 0, 0, True)
    next(training_batches(items, 0, 10**6, 4, workers=2))
    os.kill(os.getpid(), 9)
""")
    # run() waits until the workers, which have the pipe too, are gone.
    ended = subprocess.run([sys.executable, program], timeout=60, capture_output=True)
    assert ended.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("end", "status", "said"), [
    ("raise RuntimeError('on purpose')", 1, b"on purpose\n"), ("sys.exit(3)", 3, b"")])
def test_a_program_that_ends_in_the_middle_is_not_held_up_by_its_workers(tmp_path, end, status,
                                                                         said):
    program = tmp_path / "program.py"
    program.write_text(f"""
import sys
sys.path.insert(0, {str(Path(data.__file__).parent)!r})
from data import Signs, TrainingItems, training_batches
if __name__ == "__main__":
    items = TrainingItems(Signs("train", 32), 0, 0, True)
    batches = training_batches(items, 0, 10**6, 4, workers=2)
    next(batches)
    {end}
""")
    ended = subprocess.run([sys.executable, program], timeout=60, capture_output=True)
    assert ended.returncode == status
    assert ended.stderr.endswith(said)


def test_views_are_the_fixed_ones_of_the_indices_asked_for():
    for workers in (0, 1):
        image = next(data.views(Numbers(9), [[4, 7]], workers))
        assert image.shape == (2, 3, 16, 16)
        assert image.flatten(1).unique(dim=1).squeeze().tolist() == [4, 7]


def test_held_out_pictures_are_the_first_ones_with_their_evaluation_masks():
    dataset = Signs("val", 64)
    batches = list(data.held_out_batches(dataset, 7, 3, "cpu"))
    assert [batch.index for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    for batch in batches:
        assert batch.x.dtype == batch.mask.dtype == torch.float32
        for index, x, mask in zip(batch.index, batch.x, batch.mask):
            assert np.array_equal(((x.permute(1, 2, 0) + 1) * 127.5).round(), dataset.image(index))
            assert np.array_equal(mask[0], evaluation_mask(64, index))
    few = list(data.held_out_batches(Signs("val", 64, limit=4), 99, 3, "cpu", masks=False))
    assert sum(len(batch.index) for batch in few) == 4
    assert all(batch.mask is None for batch in few)


def test_processes_share_the_held_out_pictures_without_gap_or_overlap():
    for n in (1, 7, 12):
        shares = [[batch.index for batch in data.held_out_batches(Numbers(12), n, 2, "cpu", r, 3)]
                  for r in range(3)]
        assert shares == [[list(range(i, min(i + 2, n))) for i in range(2 * rank, n, 6)]
                          for rank in range(3)]
