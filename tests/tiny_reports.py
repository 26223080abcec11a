"""Small reports with figures that are known, made without a network."""

import pytest
import torch

from metrics import Networks, Pictures, Tally, measure
from paper_tables import make_report, rows_of

CPU, SIZE = torch.device("cpu"), 16
RUNS = [("add", {"preset": "base", "blend": "add"}),
        ("concat", {"preset": "base", "blend": "concat"})]
KEYS = [(None, "vanilla"), (None, "paste"), *((run, decoder) for run, _ in RUNS
                                              for decoder in ("asym", "asym-nomask"))]


def example_tally(keys):
    """Four pictures, two of which have a mask of 25 % and two one of 44 %."""
    x = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) - 0.5
    mask = torch.zeros(4, 1, SIZE, SIZE)
    mask[:2, :, :, :4] = mask[2:, :, :, :7] = 1
    pictures, tally = Pictures([0, 1, 2, 3], x, mask), Tally(4)
    for place, key in enumerate(keys):
        shift = 0 if key[1] == "paste" else 0.02 * (place + 1)
        x_hat = torch.where(mask == 1, x * 0.5, x + shift)
        tally.add(key, pictures, measure(x_hat, pictures, Networks(notes={})), seconds=0.1)
    return tally


def example_report(notes=None, **changes):
    """Two runs on one first stage; changes: {measure: value} of every row."""
    missing = "n/a: x.pth is not in y"
    notes = {"fid": missing, "is_mean": missing, "lpips": "not computed: --lpips none",
             "clip_score": "not computed: no --refs"} | (notes or {})
    rows = [row | changes for row in rows_of(RUNS, example_tally(KEYS))]
    return make_report(rows, 4, CPU, {"kind": "thick", "size": SIZE, "seed": 0}, 0, notes)


def assert_alike(a, b, rel, but=("images_per_s",)):
    """Two rows are equal: their numbers to `rel`, all else exactly; `but`: keys to be left out."""
    assert a.keys() == b.keys()
    for name in a.keys() - set(but):
        exact = b[name] is None or isinstance(b[name], str)
        assert a[name] == (b[name] if exact else pytest.approx(b[name], rel=rel, abs=1e-9)), name
