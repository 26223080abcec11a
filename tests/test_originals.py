import numpy as np
import pytest
import torch
from PIL import Image

import originals as program
from data import ImageFiles, Signs
from distributed import UserError
from originals import originals, shares

CPU = torch.device("cpu")


def test_the_pictures_are_the_data_sets_own_in_order():
    signs = Signs("val", 32)
    batches = list(originals(signs, 5, 2, CPU))
    assert [batch.index for batch in batches] == [[0, 1], [2, 3], [4]]
    x = torch.cat([batch.x for batch in batches])
    expected = np.stack([signs.read(i)[0] for i in range(5)])
    assert torch.equal(x, torch.tensor(expected).permute(0, 3, 1, 2) / 127.5 - 1)
    assert all(batch.mask is None and batch.buckets() == ["all"] * len(batch.x)
               for batch in batches)


@pytest.mark.parametrize("n", [1, 7, 12])
def test_processes_share_the_pictures_without_gap_or_overlap(n, monkeypatch):
    monkeypatch.setattr(program, "world_size", lambda: 3)
    seen = []
    for rank in range(3):
        monkeypatch.setattr(program, "rank", lambda rank=rank: rank)
        parts = shares(n, 2)
        assert parts == [range(i, min(i + 2, n)) for i in range(2 * rank, n, 6)]
        assert [batch.index for batch in originals(Signs("val", 32), n, 2, CPU)] == [
            list(part) for part in parts]
        seen += [i for part in parts for i in part]
    assert sorted(seen) == list(range(n))


def test_a_picture_that_cannot_be_decoded_is_told_and_too_many_end_it(tmp_path, capsys):
    for i in range(40):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "05.png").write_bytes(b"no picture")
    (pictures,) = originals(ImageFiles(tmp_path, "train", 32), 10, 10, CPU, "reading")
    assert len(pictures.x) == 10
    printed = capsys.readouterr().out
    assert "05.png" in printed
    assert "reading 1/1" in printed
    for i in range(6, 30, 2):
        (tmp_path / f"{i:02}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be decoded"):
        list(originals(ImageFiles(tmp_path, "train", 32), 30, 10, CPU))
