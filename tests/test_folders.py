"""image_pairs.py: which files belong together, what is read of them, and that it streams."""

import math
import re
import time
import warnings
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import image_pairs
from distributed import UserError
from image_pairs import MatchedFolders, PictureFolder, folder_pictures, item_batches

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cache_in_a_folder_of_the_test(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


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


def indices(batches):
    return [index for batch in batches for index, _ in batch]


# -- names -----------------------------------------------------------------------------------------


def test_files_match_by_their_path_without_the_extension(here):
    fill(here / "real", "a/x.png", "b/x.png", "b/y.z.png")
    fill(here / "pred", "a/x.bmp", "b/x.PNG", "b/y.z.tif")
    matched = MatchedFolders("real", "pred")
    assert matched.names == ["a/x", "b/x", "b/y.z"]              # by name first, then by path
    for k in range(3):
        item = matched.read(k)
        assert colour(item.pred) == colour(item.real) == [k, 2 * k, 3 * k]
        assert item.mask is item.ref is item.z is None


def test_a_flat_folder_matches_one_with_classes_by_file_name(here):
    fill(here / "real", "n01/x.png", "n02/y.png")
    fill(here / "pred", "x.png", "y.png")
    matched = MatchedFolders("real", "pred")
    assert [colour(matched.read(k).pred)[0] for k in range(2)] == [0, 1]
    assert matched.names == ["n01/x", "n02/y"]


def test_file_names_alone_do_not_count_where_they_are_not_unique(here):
    fill(here / "real", "a/x.png", "b/x.png")
    fill(here / "pred", "x.png")
    refused("nothing for a/x, b/x of --real real; --real real has nothing for x.png", "real",
            "pred")


def test_a_path_counts_before_a_file_name(here):
    fill(here / "real", "a/x.png", "y.png")
    fill(here / "pred", "x.png", "y.png")
    refused("pred pred: nothing for a/x of", "real", "pred")


def test_the_limit_takes_the_first_names_in_sorted_order(here):
    for folder in ("real", "pred"):
        fill(here / folder, "b/1.png", "a/2.png", "a/3.png", "c/0.png")
    assert MatchedFolders("real", "pred", limit=2).names == ["c/0", "b/1"]
    assert len(MatchedFolders("real", "pred", limit=9)) == 4


def test_the_order_does_not_depend_on_extensions(here):
    fill(here / "real", "a.png", "a-b.png")
    fill(here / "other", "a.bmp", "a-b.tif")
    assert MatchedFolders("real").names == MatchedFolders("other").names == ["a", "a-b"]


def test_the_description_names_what_was_given(here):
    for folder in ("real", "pred", "masks", "refs"):
        fill(here / folder, "x.png")
    matched = MatchedFolders("real", "pred", "masks", "refs", invert_mask=True)
    assert matched.describe() == ("1 picture in pred beside real, masks in masks, references in "
                                  "refs (black = generated)")
    assert matched.name == "pred"
    fill(here / "real", "y.png")
    assert MatchedFolders("real").describe() == "2 pictures in real"


# -- names of masks --------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("x.png", "y.png"), ("x_mask.png", "y_mask.bmp"),
                                   ("x_mask000.png", "y_mask.png"), ("x_mask.png", "y_mask07.png")])
def test_masks_bear_the_pictures_name_or_that_with_mask(here, names):
    fill(here / "real", "x.png", "y.png")
    draw(here / "masks" / names[0], half_white())
    draw(here / "masks" / names[1], 255 - half_white())
    matched = MatchedFolders("real", masks="masks")
    assert matched.read(0).mask[0].tolist() == (half_white() // 255).tolist()
    assert matched.read(1).mask[0].tolist() == (1 - half_white() // 255).tolist()


@pytest.mark.parametrize("predicted", ["crop{}.png", "crop{}_mask000.png"])
def test_lamas_folder_has_photos_and_masks_side_by_side(here, predicted):
    """LaMa calls its predictions after the masks."""
    names = [f"crop{k}" for k in range(3)]
    fill(here / "lama", *(f"{name}.png" for name in names))
    for name in names:
        draw(here / "lama" / f"{name}_mask000.png", half_white())
    fill(here / "pred", *(predicted.format(k) for k in range(3)))
    for masks in ("lama", str(here / "lama") + "/"):
        matched = MatchedFolders("lama", "pred", masks)
        assert matched.names == names
        assert matched.masks["crop1"].endswith("crop1_mask000.png")
        assert colour(matched.read(2).pred) == colour(matched.read(2).real) == [2, 4, 6]


def test_a_photo_in_lamas_folder_is_never_its_own_mask(here):
    fill(here / "lama", "x.png", "y.png")
    refused("--masks lama: nothing for x, y of --real lama", "lama", masks="lama")
    draw(here / "lama" / "x_mask000.png", half_white())
    refused(r"--masks lama: nothing for y of --real lama; .* or NAME_mask.png for NAME.png",
            "lama", masks="lama")
    fill(here / "real", "x.png", "y.png")
    refused("--masks lama: nothing for y", "real", masks="lama")


def test_a_mask_beside_no_photo_is_not_left_out_silently(here):
    fill(here / "lama", "x.png", "x_mask000.png", "y_mask000.png")
    fill(here / "pred", "x.png")
    refused("--pred pred: nothing for y_mask000 of", "lama", "pred", "lama")


def test_a_photo_of_a_gas_mask_is_a_photo(here):
    for folder in ("real", "pred", "masks"):
        fill(here / folder, "gas.png", "gas_mask.png")
    matched = MatchedFolders("real", "pred", "masks")
    assert matched.names == ["gas", "gas_mask"]
    assert [colour(matched.read(k).pred)[0] for k in range(2)] == [0, 1]


def test_several_masks_for_one_picture_are_refused(here):
    fill(here / "real", "x.png")
    fill(here / "masks", "x_mask000.png", "x_mask001.png")
    refused("--masks masks: x_mask000.png and x_mask001.png both stand for x; keep one", "real",
            masks="masks")


# -- mistakes with folders -------------------------------------------------------------------------


def test_a_folder_that_does_not_exist_is_named_with_its_flag(here):
    fill(here / "real", "x.png")
    refused("--real gone: no such folder", "gone")
    for flag in ("pred", "masks", "refs", "latents"):
        refused(f"--{flag} gone: no such folder", "real", **{flag: "gone"})
    with pytest.raises(UserError, match="gone: no such folder"):
        PictureFolder("--pred", "gone")


def test_a_folder_without_pictures_is_named_with_its_flag(here):
    fill(here / "real", "x.png")
    fill(here / "empty")
    (here / "empty" / "notes.txt").write_text("nothing")
    refused(r"--real empty: no file here is one of \.jpg", "empty")
    for flag in ("pred", "masks", "refs"):
        refused(rf"--{flag} empty: no file here is one of \.jpg", "real", **{flag: "empty"})
    refused(r"--latents empty: no file here is one of \.npy \.pt", "real", latents="empty")


def test_missing_and_extra_predictions_are_named_and_counted(here):
    fill(here / "real", *(f"{k}.png" for k in range(9)))
    fill(here / "pred", "0.png", "7.png", "8.png", "a.png", "b.png")
    refused(r"--pred pred: nothing for 1, 2, 3 and 3 more of --real real; --real real has nothing "
            r"for a.png, b.png; .* need the same names", "real", "pred", limit=1)


def test_masks_references_and_latents_may_have_more_but_not_less(here):
    fill(here / "real", "x.png", "y.png")
    for flag in ("masks", "refs"):
        fill(here / flag, "x.png", "z.png", "a/z.png")
    (here / "latents").mkdir()
    np.save(here / "latents" / "x.npy", np.zeros((4, 1, 1), np.float32))
    for flag in ("masks", "refs", "latents"):
        refused(f"--{flag} {flag}: nothing for y of --real real; files", "real", **{flag: flag})
        (here / "real" / "y.png").rename(here / "y.png")
        assert len(MatchedFolders("real", **{flag: flag})) == 1
        (here / "y.png").rename(here / "real" / "y.png")


def test_two_files_for_one_name_are_refused(here):
    fill(here / "real", "x.png")
    fill(here / "twice", "x.bmp", "x.png")
    fill(here / "deep", "a/x.png", "b/x.png")
    refused("--real twice: x.bmp and x.png both stand for x; keep one of them", "twice")
    refused("--pred twice: x.bmp and x.png both stand for x", "real", "twice")
    refused("--refs deep: a/x.png and b/x.png both stand for x", "real", refs="deep")


# -- mistakes with files ---------------------------------------------------------------------------


def test_other_sizes_are_refused_and_nothing_is_resized(here):
    fill(here / "real", "x.png", size=(12, 8))
    fill(here / "turned", "x.png", size=(8, 12))
    for flag in ("pred", "masks"):
        matched = MatchedFolders("real", **{flag: "turned"})
        with pytest.raises(UserError, match=r"^turned/x.png is 8 x 12 px, real/x.png is 12 x 8; "
                           "resize to the same size: nothing is resized here"):
            matched.read(0)
    assert MatchedFolders("real", refs="turned").read(0).ref.shape == (3, 12, 8)


@pytest.mark.parametrize("flag", ["real", "pred", "masks", "refs"])
def test_a_file_that_cannot_be_decoded_ends_the_evaluation(here, flag):
    for folder in ("real", "pred", "masks", "refs"):
        fill(here / folder, *(f"{k}.png" for k in range(5)))
    whole = (here / flag / "3.png").read_bytes()
    for damaged in (b"no picture", whole[:50], b""):
        (here / flag / "3.png").write_bytes(damaged)
        batches = item_batches(MatchedFolders("real", "pred", "masks", "refs"), 2)
        with pytest.raises(UserError, match=f"^{flag}/3.png: cannot be decoded") as error:
            list(batches)
        assert "\n" not in str(error.value)
    (here / flag / "3.png").unlink()


def test_a_picture_among_unpaired_ones_that_cannot_be_decoded_is_an_error_too(here):
    fill(here / "set", "0.png", "1.png")
    (here / "set" / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"^set/1.png: cannot be decoded"):
        list(PictureFolder("--pred", "set").pictures(4, CPU))


# -- pictures --------------------------------------------------------------------------------------


def test_pictures_are_read_as_they_stand_upright_and_on_white(here):
    values = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    (here / "real").mkdir()
    Image.fromarray(values).save(here / "real" / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                             # to be turned by 90 degrees
    Image.fromarray(values).save(here / "real" / "b.png", exif=exif)
    clear = np.dstack([values, np.full((8, 12), 0, np.uint8)])
    Image.fromarray(clear).save(here / "real" / "c.png")
    grey = (np.arange(96, dtype=np.uint16) * 514).reshape(8, 12)
    Image.fromarray(grey).save(here / "real" / "d.png")
    matched = MatchedFolders("real")
    a, b, c, d = (matched.read(k).real for k in range(4))
    assert a.dtype == torch.uint8
    assert a.permute(1, 2, 0).tolist() == values.tolist()
    assert b.permute(1, 2, 0).tolist() == np.rot90(values, -1).tolist()
    assert (c == 255).all()
    assert d[0].tolist() == (grey // 257).tolist()


# -- masks -----------------------------------------------------------------------------------------


def _mask_of(here, image, invert=False, **options):
    fill(here / "real", "x.png")
    (here / "masks").mkdir(exist_ok=True)
    image.save(here / "masks" / "x.png", **options)
    return MatchedFolders("real", masks="masks", invert_mask=invert).read(0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_white_is_to_be_generated_in_every_mode(here, mode):
    if mode == "I;16":
        image = Image.fromarray(half_white().astype(np.uint16) * 257)
    elif mode == "P":                                            # the palette's order is no matter
        image = Image.fromarray(1 - half_white() // 255, mode="P")
        image.putpalette([255, 255, 255, 0, 0, 0])
    else:
        image = Image.fromarray(half_white()).convert(mode)
    item = _mask_of(here, image)
    assert item.mask.dtype == torch.uint8
    assert item.mask.shape == (1, 8, 12)
    assert item.mask[0].tolist() == (half_white() // 255).tolist()
    assert item.remarks == {}
    inverted = _mask_of(here, image, invert=True)
    assert torch.equal(inverted.mask, 1 - item.mask)


def test_white_begins_at_128(here):
    values = np.full((8, 12), 127, np.uint8)
    values[0] = 128
    item = _mask_of(here, Image.fromarray(values))
    assert item.mask[0, 0].tolist() == [1] * 12
    assert item.mask.sum() == 12
    assert "96 of 96 pixels are neither black nor white" in item.remarks["soft"]
    sixteen = np.full((8, 12), 128 * 257 - 1, np.uint16)
    sixteen[0], sixteen[1] = 128 * 257, 0x40FF                   # a low byte must not count
    assert _mask_of(here, Image.fromarray(sixteen)).mask.sum() == 12


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparent_parts_of_masks_count_as_black_and_it_is_said(here, mode):
    if mode == "P":
        image = Image.fromarray(half_white() // 255, mode="P")
        image.putpalette([255, 255, 255, 255, 255, 255])
        item = _mask_of(here, image, transparency=0)
    else:
        image = Image.new("RGBA", (12, 8), "white")              # white strokes on a clear layer
        image.putalpha(Image.fromarray(half_white()))
        item = _mask_of(here, image.convert(mode))
    assert item.mask[0].tolist() == (half_white() // 255).tolist()
    assert "has transparent parts" in item.remarks["alpha"]


def test_masks_are_turned_upright_like_their_photos(here):
    exif = Image.Exif()
    exif[0x0112] = 6
    item = _mask_of(here, Image.fromarray(half_white(12, 8)), exif=exif)
    assert item.mask[0].tolist() == np.rot90(half_white(12, 8) // 255, -1).tolist()


@pytest.mark.parametrize(("white", "words"), [
    (0, "nothing in it is to be generated"), (91, None), (92, "96% of it is to be generated"),
    (96, "100% of it is to be generated"), (1, None)])
def test_masks_with_nothing_or_nearly_all_to_be_generated_are_doubted(here, white, words):
    values = np.zeros(96, np.uint8)
    values[:white] = 255
    for invert in (False, True):
        image = Image.fromarray((values ^ (255 * invert)).reshape(8, 12).astype(np.uint8))
        remark = _mask_of(here, image, invert).remarks.get("polarity")
        if words is None:
            assert remark is None
        else:
            assert words in remark
            assert "white means to be generated" in remark
            assert "--invert-mask" in remark
            assert "\n" not in remark


def test_a_mask_of_zeros_and_ones_is_doubted_with_its_values(here):
    remark = _mask_of(here, Image.fromarray(half_white() // 255)).remarks["polarity"]
    assert "its values are 0 to 1 of 255" in remark


def test_each_remark_is_made_once_about_the_first_mask_it_fits(here, capsys):
    names = [f"{k:02}.png" for k in range(20)]
    fill(here / "real", *names)
    for k, name in enumerate(names):
        soft = np.where(half_white() > 0, 200, 0) if k >= 7 else half_white()
        draw(here / "masks" / name, soft if k != 13 else 0 * soft)
    for _ in item_batches(MatchedFolders("real", masks="masks"), 4):
        pass
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("masks/07.png: 48 of 96 pixels are neither black nor white")
    assert lines[1].startswith("masks/13.png: nothing in it is to be generated")


# -- latents ---------------------------------------------------------------------------------------


def test_latents_come_from_numpy_or_torch_files_and_are_divided_by_their_factor(here):
    fill(here / "real", "a.png", "b.png")
    (here / "latents").mkdir()
    z = torch.randn(4, 2, 3)
    np.save(here / "latents" / "a.npy", z.numpy().astype(np.float64))
    torch.save(z[None].bfloat16(), here / "latents" / "b.pt")
    matched = MatchedFolders("real", latents="latents", scaling_factor=0.18215)
    a, b = (matched.read(k).z for k in range(2))
    assert a.dtype == b.dtype == torch.float32
    assert torch.allclose(a, z / 0.18215)
    assert torch.allclose(b, z.bfloat16().float() / 0.18215)


def test_files_that_hold_no_latent_are_refused_by_name(here):
    fill(here / "real", "a.png")
    (here / "latents").mkdir()
    for content, words in (({"z": torch.zeros(4, 2, 2)}, "holds a dict"),
                           (torch.zeros(2, 4, 2, 2), r"of shape \(2, 4, 2, 2\)"),
                           (torch.zeros(4, 2, 2, dtype=torch.int64), "holds torch.int64"),
                           (torch.full((4, 2, 2), torch.nan), "not finite"),
                           (torch.nn.Linear(1, 1), "cannot be decoded")):
        torch.save(content, here / "latents" / "a.pt")
        with pytest.raises(UserError, match=f"^latents/a.pt: .*{words}") as error:
            MatchedFolders("real", latents="latents").read(0)
        assert "\n" not in str(error.value)
    for factor in (0, math.inf):
        refused(f"--scaling-factor {factor}: give", "real", latents="latents",
                scaling_factor=factor)


# -- batches ---------------------------------------------------------------------------------------


def test_batches_are_neighbours_of_one_size(here):
    sizes = [(12, 8)] * 5 + [(8, 12)] * 2 + [(12, 8)]
    for k, size in enumerate(sizes):
        fill(here / "real", f"{k}.png", size=size)
    batches = list(item_batches(MatchedFolders("real"), 3))
    assert [[index for index, _ in batch] for batch in batches] == [[0, 1, 2], [3, 4], [5, 6], [7]]
    pictures = list(PictureFolder("--real", "real").pictures(3, CPU))
    assert [batch.index for batch in pictures] == [[0, 1, 2], [3, 4], [5, 6], [7]]
    assert [tuple(batch.x.shape) for batch in pictures] == [
        (3, 3, 8, 12), (2, 3, 8, 12), (2, 3, 12, 8), (1, 3, 8, 12)]


def test_latents_of_one_batch_are_of_one_size(here):
    fill(here / "real", "0.png", "1.png", "2.png")
    (here / "latents").mkdir()
    for k, side in enumerate((2, 2, 4)):
        np.save(here / "latents" / f"{k}.npy", np.zeros((4, side, side), np.float32))
    batches = item_batches(MatchedFolders("real", latents="latents"), 3)
    assert [len(batch) for batch in batches] == [2, 1]


@pytest.mark.parametrize("world", range(1, 6))
def test_every_picture_is_of_one_rank_whatever_their_number(here, world, monkeypatch):
    fill(here / "real", *(f"{k}.png" for k in range(11)))
    matched = MatchedFolders("real")
    shares = [indices(item_batches(matched, 2, rank, world)) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(11))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for rank in range(world):
        monkeypatch.setattr(image_pairs, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(image_pairs, "world_size", lambda: world)
        pictures = PictureFolder("--pred", "real").pictures(2, CPU)
        assert [index for batch in pictures for index in batch.index] == shares[rank]


def test_more_ranks_than_pictures_leave_some_with_nothing(here):
    fill(here / "real", "0.png")
    assert [indices(item_batches(MatchedFolders("real"), 2, rank, 3)) for rank in range(3)] == [
        [0], [], []]


def test_only_a_few_items_are_in_memory_at_once(here, monkeypatch):
    fill(here / "real", *(f"{k:03}.png" for k in range(80)))
    monkeypatch.setattr(image_pairs, "THREADS", 2)
    matched, made, alive = MatchedFolders("real"), [], []
    read = matched.read

    def counted(index):
        item = read(index)
        made.append(weakref.ref(item))
        alive.append(sum(other() is not None for other in made))
        return item

    monkeypatch.setattr(matched, "read", counted)
    for _ in item_batches(matched, 4):
        time.sleep(0.002)                                        # the threads could run far ahead
    assert len(made) == 80
    assert max(alive) <= 3 * 4 + 2                               # in use, gathered, decoded ahead


def test_the_next_pictures_are_decoded_while_these_are_in_use(here, monkeypatch):
    fill(here / "real", *(f"{k}.png" for k in range(8)))
    matched, begun = MatchedFolders("real"), set()
    read = matched.read
    monkeypatch.setattr(image_pairs, "THREADS", 2)
    monkeypatch.setattr(matched, "read", lambda index: (begun.add(index), read(index))[1])
    batches = item_batches(matched, 2)
    next(batches)
    deadline = time.monotonic() + 10
    while 2 not in begun and time.monotonic() < deadline:
        time.sleep(0.001)
    assert 2 in begun
    assert 7 not in begun
    batches.close()


def test_items_come_in_order_though_threads_finish_in_another(here, monkeypatch):
    fill(here / "real", *(f"{k:02}.png" for k in range(12)))
    monkeypatch.setattr(image_pairs, "THREADS", 4)
    matched = MatchedFolders("real")
    read = matched.read

    def slow_at_first(index):
        time.sleep(0.01 * (index % 4 == 0))
        return read(index)

    monkeypatch.setattr(matched, "read", slow_at_first)
    batches = list(item_batches(matched, 5))
    assert indices(batches) == list(range(12))
    assert [colour(item.real)[0] for batch in batches for _, item in batch] == list(range(12))


def test_warnings_are_heard_as_before_after_threads_have_hidden_them(here, monkeypatch):
    fill(here / "real", *(f"{k}.png" for k in range(4)))
    matched = MatchedFolders("real")
    before = list(warnings.filters)

    def leaves_them_hidden(index):                               # as two that decode at once may
        warnings.simplefilter("ignore")
        return image_pairs.Item(str(index), torch.zeros(3, 1, 1, dtype=torch.uint8))

    monkeypatch.setattr(matched, "read", leaves_them_hidden)
    assert len(indices(item_batches(matched, 2))) == 4
    assert list(warnings.filters) == before


# -- for the tally ---------------------------------------------------------------------------------


def test_the_tally_gets_batches_in_minus_one_to_one(here):
    for flag in ("real", "pred"):
        fill(here / flag, "0.png", "1.png", "2.png")
    fill(here / "refs", "0.png", size=(5, 4))
    fill(here / "refs", "1.png", "2.png", size=(7, 4))
    (here / "latents").mkdir()
    for k in range(3):
        draw(here / "masks" / f"{k}.png", half_white())
        np.save(here / "latents" / f"{k}.npy", np.full((4, 4, 6), k, np.float32))
    matched = MatchedFolders("real", "pred", "masks", "refs", "latents")
    first, second = folder_pictures(matched, 2, CPU)
    assert (first.index, second.index) == ([0, 1], [2])
    expected = torch.tensor([1, 2, 3]) / 127.5 - 1
    assert torch.equal(first.x[1, :, 0, 0], expected)
    assert torch.equal(first.pred, first.x)
    assert first.mask.dtype == torch.float32
    assert first.mask.shape == (2, 1, 8, 12)
    assert first.buckets() == ["50-60", "50-60"]
    assert [tuple(ref.shape) for ref in first.refs] == [(3, 4, 5), (3, 4, 7)]
    assert all(-1 <= ref.min() <= ref.max() <= 1 for ref in first.refs)
    assert first.z[:, 0, 0, 0].tolist() == [0, 1]


def test_what_was_not_given_is_none_for_the_tally(here):
    fill(here / "real", "0.png")
    pictures, = folder_pictures(MatchedFolders("real"), 2, CPU)
    assert pictures.pred is pictures.mask is pictures.refs is pictures.z is None


def test_this_process_gets_its_share(here, monkeypatch):
    fill(here / "real", *(f"{k}.png" for k in range(5)))
    monkeypatch.setattr(image_pairs, "rank", lambda: 1)
    monkeypatch.setattr(image_pairs, "world_size", lambda: 2)
    shares = [pictures.index for pictures in folder_pictures(MatchedFolders("real"), 4, CPU)]
    assert shares == [[1, 3]]


def test_messages_name_paths_that_can_be_opened(here):
    fill(here / "real", "deep/er/x.png")
    (here / "real" / "deep" / "er" / "x.png").write_bytes(b"no picture")
    with pytest.raises(UserError) as error:
        MatchedFolders("real").read(0)
    assert (here / re.match(r"(.*?): ", str(error.value))[1]).exists()
