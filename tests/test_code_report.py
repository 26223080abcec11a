from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from test_codebook import write_refitted
from tiny_runs import (
    SIZE,
    TINY,
    settings,
    write_decoder,
    write_first_stage,
    write_prior,
    write_stage,
)

import code_report as program
import run_folder
from code_report import CodeReport
from data import Signs
from distributed import UserError
from eval import open_runs
from metrics import Pictures
from paper_tables import CODEBOOK_KEYS
from vqgan import VQGAN

CPU = torch.device("cpu")
WHERE = {"data": "signs", "root": None, "size": SIZE}
ROWS = [{"decoder": "asym", "bucket": "all", "fid": 3.0},
        {"decoder": "vanilla", "bucket": "10-20", "fid": 1.0},
        {"decoder": "vanilla", "bucket": "all", "fid": 12.5}]


def _report(run, where=WHERE):
    return CodeReport(open_runs([run], CPU), [run], where, Signs("val", where["size"]))


@pytest.fixture
def plain(tmp_path):
    """A run without ReFiT and without a prior."""
    _, parent = write_first_stage(tmp_path)
    write_decoder(tmp_path, parent)
    return tmp_path


@pytest.fixture
def refitted(tmp_path):
    return write_refitted(tmp_path / "run")


def _with_prior(run, **facts):
    parent = run_folder.load(run / "decoder" / "last.pt")["parent"]
    write_prior(run, parent)
    state = run_folder.load(run / "prior" / "last.pt")
    state["extra"] |= facts
    run_folder.save(run / "prior" / "last.pt", state)


def test_without_refit_the_codes_of_the_pictures_at_hand_are_counted(plain, tmp_path):
    report = _report(plain)
    x = torch.rand(3, 3, SIZE, SIZE) * 2 - 1
    with torch.inference_mode():
        for batch in x.split(2):
            report.offer(Pictures([0], batch))
        report.finish(3, ROWS, tmp_path, CPU)
        used = report.first_stage.indices(x).unique()
    codebook = report.codebook()
    assert codebook.keys() == CODEBOOK_KEYS
    assert codebook["usage_val"] == len(used) / TINY.K
    assert (codebook["K"], codebook["usage_train"], codebook["rfid"]) == (TINY.K, None, 12.5)
    assert report.notes["codebook"] == (
        "held out: 3 pictures; train: not counted, --table ddm1 does")
    assert report.prior is None
    assert "prior" not in report.notes
    assert report.pictures == {}
    assert "the first stage's" in report.text()
    assert "ReFiT, P = 20k" in report.text(as_printed=True)


def test_what_refit_counted_stands_before_and_after(refitted, tmp_path):
    report = _report(refitted)
    assert report.counter is None                # nothing is counted twice
    report.finish(4, [], tmp_path, CPU)
    codebook = report.codebook()
    assert [codebook["usage_val"], codebook["perplexity_val"], codebook["rfid"]] == [1.0, 4.5, None]
    assert "all 1,000 pictures, as ReFiT counted them" in report.text()
    lines = [line.split("|") for line in report.text().split("\n") if line.startswith("| ")][-2:]
    assert [cells[1].strip() for cells in lines] == ["before ReFiT", "after ReFiT"]
    assert [cells[3].strip() for cells in lines] == ["8", "5"]
    assert [cells[5].strip() for cells in lines] == ["50.0 %", "100.0 %"]


def test_a_finished_prior_has_its_bound_and_its_pictures(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "SAMPLES", 3)
    _with_prior(plain, score=60.0, uniform_nats=532.3, histogram_nats=120.0, maps=7)
    report = _report(plain)
    with torch.inference_mode():
        report.offer(Pictures([0], torch.zeros(1, 3, SIZE, SIZE)))
        report.finish(1, ROWS, tmp_path / "out", CPU, steps=2)
    assert report.prior.keys() == {"vlb_nats", "uniform_nats", "histogram_nats", "steps"}
    (step,) = report.prior["steps"]
    assert step.keys() == {"n", "sampler", "seconds", "fid"}
    assert (step["n"], step["sampler"], step["fid"]) == (2, "strided", None)
    assert list(report.pictures) == ["samples.png", "completions.png", "inpainting.png"]
    assert report.pictures["inpainting.png"] == "full inpainting (2 steps, strided, resample 5)"
    assert all((tmp_path / "out" / name).stat().st_size for name in report.pictures)
    text = report.text()
    assert "| VQ-DDM, an upper bound             |       60.0 |" in text
    assert "50.0 % |" in text
    assert "| 2     | strided |" in text


def test_codes_that_a_prior_has_learnt_of_another_first_stage_are_not_this_ones(plain, tmp_path):
    for parent, expected in ((None, 6 / 8), ("0" * 64, None)):
        _with_prior(plain, maps=6)
        (plain / "codes").mkdir(exist_ok=True)
        np.save(plain / "codes" / "train-1.npy", np.arange(6 * 256).reshape(6, 16, 16) % 6)
        if parent:
            state = run_folder.load(plain / "prior" / "last.pt")
            run_folder.save(plain / "prior" / "last.pt", state | {"parent": parent})
        report = _report(plain)
        with torch.inference_mode():
            report.offer(Pictures([0], torch.zeros(1, 3, SIZE, SIZE)))
            report.finish(1, ROWS, tmp_path / "out", CPU, steps=1)
        assert report.codebooks[-1]["usage_train"] == expected


def test_a_prior_without_our_decoder_shows_no_inpainting(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "SAMPLES", 2)
    _with_prior(plain)
    (plain / "decoder" / "last.pt").unlink()
    report = _report(plain)
    with torch.inference_mode():
        report.offer(Pictures([0], torch.zeros(1, 3, SIZE, SIZE)))
        report.finish(1, ROWS, tmp_path, CPU, steps=1)
    assert list(report.pictures) == ["samples.png", "completions.png"]
    assert report.prior["vlb_nats"] is None
    assert "What a held-out map" not in report.text()


@pytest.mark.parametrize(("change", "reason"), [
    ("unfinished", "training is not finished (step 2)"),
    ("other size", "it makes pictures of 32 px, not of 64"),
    ("other weights", "n/a: the prior in"), ("too many steps", "from 1 to T = 6")])
def test_a_prior_that_cannot_be_shown_is_told_and_the_rest_stands(change, reason, plain, tmp_path):
    _with_prior(plain)
    where, run = WHERE, plain
    if change == "unfinished":
        write_prior(plain, run_folder.load(plain / "decoder" / "last.pt")["parent"], finished=False)
    if change == "other size":
        where = WHERE | {"size": 64}
    if change == "other weights":
        write_prior(plain, "0" * 64)
    report = _report(run, where)
    with torch.inference_mode():
        report.offer(Pictures([0], torch.zeros(1, 3, SIZE, SIZE)))
        report.finish(1, ROWS, tmp_path, CPU, steps=7 if change == "too many steps" else None)
    assert report.prior is None
    assert reason in report.notes["prior"]
    assert reason in report.text()
    assert report.codebook() is not None
    assert not (tmp_path / "samples.png").exists()


def test_a_kl_latent_has_no_codes_and_cannot_be_counted(tmp_path):
    model = VQGAN(replace(TINY, latent="kl"))
    config = settings() | {"first_stage": asdict(model.config)}
    write_stage(tmp_path, "vqgan", model.state_dict(), config)
    report = _report(tmp_path)
    with pytest.raises(UserError, match="--table ddm1: a KL latent has no codes"):
        report.count(3, 2, CPU, None)
    report.offer(Pictures([0], torch.zeros(1, 3, SIZE, SIZE)))
    report.finish(1, ROWS, tmp_path, CPU)
    assert report.codebook() is None
    assert report.text() == ""
    assert report.notes["codebook"] == "not computed: a KL latent has no codes"


def test_counting_both_splits_takes_the_place_of_what_is_remembered(
        refitted, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "WORKERS", 0)
    report = _report(refitted)
    with torch.inference_mode():
        report.count(3, 2, CPU, None)
        rows = [dict(row) for row in report.codebooks]
        report.offer(Pictures([0], torch.zeros(1, 3, SIZE, SIZE)))
        report.finish(4, ROWS, tmp_path, CPU)
    assert report.codebooks == rows
    assert report.codebook()["usage_train"] == rows[-1]["usage_train"] > 0
    assert report.notes["codebook"] == "held out: 3 pictures; train: 3"
    uncounted = _report(plain)
    with torch.inference_mode():
        uncounted.count(3, 2, CPU, None)
    assert uncounted.counter is None             # the pictures at hand are not counted, too
