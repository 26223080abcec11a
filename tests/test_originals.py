import numpy as np
import pytest
import torch

import originals as program
from data import Signs
from originals import originals, shares

CPU = torch.device("cpu")


def test_the_pictures_are_the_data_sets_own_in_order():
    signs = Signs("val", 32)
    batches = list(originals(signs, 5, 2, CPU))
    assert [batch.index for batch in batches] == [[0, 1], [2, 3], [4]]
    x = torch.cat([batch.x for batch in batches])
    expected = np.stack([signs.image(i) for i in range(5)])
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
