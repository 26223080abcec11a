"""codes.py: pictures encoded once."""

import numpy as np
import pytest
import torch
from PIL import Image
from train_process import call

import codes
from codes import CodeItems, code_maps
from data import ImageFiles, Order, Signs, training_batches


def brightness(image):
    """uint8 (b,3,32,32) -> 4 x 4 codes in [0,256): the mean of each 8 x 8 square."""
    return image.float().mean(1).unfold(1, 8, 8).unfold(2, 8, 8).mean((3, 4)).long()


def expected(n, limit=None):
    dataset = Signs("train", 32, limit=limit)
    images = [torch.from_numpy(dataset.image(i)).permute(2, 0, 1) for i in range(n)]
    return brightness(torch.stack(images)).numpy()


def test_row_i_has_the_codes_of_picture_i_whatever_the_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(codes, "BATCH", 4)
    maps = code_maps(brightness, Signs("train", 32), 10, 256, "parent", tmp_path)
    assert isinstance(maps, np.memmap)
    assert (maps.dtype, maps.shape) == (np.uint16, (10, 4, 4))
    np.testing.assert_array_equal(maps, expected(10))


@pytest.mark.parametrize(("K", "dtype"), [(65_536, np.uint16), (65_537, np.int32)])
def test_the_largest_code_fits_into_its_type(K, dtype, tmp_path):
    maps = code_maps(lambda image: torch.full((len(image), 2, 2), K - 1), Signs("train", 32), 3, K,
                     "parent", tmp_path)
    assert maps.dtype == dtype
    assert (maps == K - 1).all()


def test_a_file_serves_again_for_the_same_first_stage_data_and_number_only(tmp_path):
    code_maps(brightness, Signs("train", 32), 5, 256, "parent", tmp_path)

    def refuse(image):
        raise AssertionError("encoded again")

    again = code_maps(refuse, Signs("train", 32), 5, 256, "parent", tmp_path)
    np.testing.assert_array_equal(again, expected(5))
    others = [(Signs("train", 32), 5, "other"), (Signs("val", 32), 5, "parent"),
              (Signs("train", 32), 4, "parent"), (Signs("train", 64), 5, "parent"),
              (Signs("train", 32, seed=1), 5, "parent")]
    for dataset, n, parent in others:
        with pytest.raises(AssertionError, match="encoded again"):
            code_maps(refuse, dataset, n, 256, parent, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1                  # nor is half a file left behind


def test_photos_with_other_names_are_encoded_anew(tmp_path):
    photos, kept = tmp_path / "photos", tmp_path / "codes"
    photos.mkdir()
    for number, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (32, 32), (100 * number, 0, 0)).save(photos / name)
    code_maps(brightness, ImageFiles(photos, "train", 32), 1, 256, "parent", kept)
    (photos / "a.png").rename(photos / "c.png")
    for _ in range(2):
        code_maps(brightness, ImageFiles(photos, "train", 32), 1, 256, "parent", kept)
    assert len(list(kept.iterdir())) == 2


def share(folder):
    from distributed import setup
    setup("cpu")
    codes.BATCH = 4
    maps = code_maps(brightness, Signs("train", 32), 10, 256, "parent", folder)
    np.testing.assert_array_equal(maps, expected(10))


def test_two_processes_share_the_pictures_and_both_see_the_whole_file(tmp_path):
    assert call(share, tmp_path, ranks=2) == [0, 0]
    np.testing.assert_array_equal(
        code_maps(None, Signs("train", 32), 10, 256, "parent", tmp_path), expected(10))


def test_items_are_the_maps_in_the_order_of_pictures_and_leave_the_file_alone():
    maps = np.arange(12, dtype=np.uint16).reshape(3, 2, 2)
    items, order = CodeItems(maps, seed=5, stage_id=3), Order(3, (5, 3))
    batch = next(training_batches(items, 0, 1, 6))
    assert batch["indices"].dtype == torch.int64
    assert batch["position"] == list(range(6))
    for position, indices in enumerate(batch["indices"]):
        np.testing.assert_array_equal(indices, maps[order[position]])
    batch["indices"] += 1
    assert maps.max() == 11
