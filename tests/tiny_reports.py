"""Small reports with figures that are known, made without a network."""

import pytest
import torch

from data import Batch
from metrics import Networks, differences, measure, report_rows
from paper_tables import make_report

CPU, SIZE = torch.device("cpu"), 16
RUNS = {"add": {"preset": "base", "blend": "add"}, "concat": {"preset": "base", "blend": "concat"}}
KEYS = [(None, "vanilla"), (None, "paste"), *((run, decoder) for run in RUNS
                                              for decoder in ("asym", "asym-nomask"))]
EMPTY = {"fid": "n/a: x.pth is not in y", "is_mean": "n/a: x.pth is not in y",
         "lpips": "not computed: --lpips none", "clip_score": "not computed: no --refs"}


def example_table(keys, seconds=0.1):
    """Six images, three with masks of 25 %, three of 44 %, as `measure` has them.

    The first two masks of each are equal.
    """
    x = torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) - 0.5
    mask = torch.zeros(6, 1, SIZE, SIZE)
    mask[:2, :, :, :4] = mask[2, :, :, -4:] = mask[3:5, :, :, :7] = mask[5, :, :, -7:] = 1
    batch, rows = Batch(list(range(6)), x, mask), []
    for place, (run, decoder) in enumerate(keys):
        shift = 0 if decoder == "paste" else 0.02 * (place + 1 + x[:, :, :1, :1])
        x_hat = torch.where(mask == 1, x * 0.5, x + shift)
        rows += measure(x_hat, batch, Networks(), run, decoder, seconds)
    return rows


def example_report(**changes):
    """Two runs on one first stage; changes: {measure: value} of every row."""
    table = example_table(KEYS)
    rows = [row | changes for row in report_rows(table, RUNS)]
    return make_report(CPU, {}, n=6, seed=0, masks={"kind": "thick", "size": SIZE, "seed": 0},
                       rows=rows, differences=differences(table), codebook=None, prior=None)


def assert_alike(a, b, rel, but=("images_per_s",)):
    """Two rows are equal: their numbers to `rel`, all else exactly; `but`: keys to be left out."""
    assert a.keys() == b.keys()
    for name in a.keys() - set(but):
        exact = b[name] is None or isinstance(b[name], str)
        assert a[name] == (b[name] if exact else pytest.approx(b[name], rel=rel, abs=1e-9)), name
