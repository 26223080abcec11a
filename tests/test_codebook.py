import dataclasses

import numpy as np
import pytest
import torch
from test_sample import inception
from tiny_runs import SIZE, TINY, settings, write_decoder, write_first_stage, write_stage

import run_folder
from codebook import (
    AFTER,
    BEFORE,
    CodeCounter,
    codebook_row,
    count_splits,
    first_stages_of,
    learnt_usage,
    refit_of,
    remembered,
)
from data import Signs
from eval import open_runs
from fid import FeatureStatistics
from refit import install_codebook

CPU, NEW_K = torch.device("cpu"), 5
WHERE = {"data": "signs", "root": None, "size": SIZE}
FACTS = {"before": {"K": 8, "usage": 0.5, "perplexity": 3.0},
         "after": {"K": 5, "usage": 1.0, "perplexity": 4.5}}


def write_refitted(run):
    """A run whose decoder stands on a refit to five codes, which spread as the pictures do."""
    model, parent = write_first_stage(run)
    z_e = model.moments(_x(Signs("train", SIZE), 2)).permute(0, 2, 3, 1).reshape(-1, TINY.embed_dim)
    install_codebook(model, z_e[:: len(z_e) // NEW_K][:NEW_K])
    fields = {name: list(v) if isinstance(v, tuple) else v
              for name, v in dataclasses.asdict(model.config).items()}
    config = settings() | {"first_stage": fields, "images": {"train": 50_000, "val": 1000}}
    write_stage(run, "refit", model.state_dict(), config, parent, extra={"val": FACTS})
    write_decoder(run, run_folder.weights_hash(model.state_dict()))
    return run


@pytest.fixture
def refitted(tmp_path):
    return write_refitted(tmp_path / "run")


def _x(dataset, n):
    images = np.stack([dataset.image(i) for i in range(n)])
    return torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1


def _run(path):
    return open_runs([path], CPU)[0]


# -- counting --------------------------------------------------------------------------------------


def test_one_pass_counts_the_codes_of_both_codebooks(refitted):
    first_stages, remark = first_stages_of(_run(refitted), CPU)
    assert list(first_stages) == [BEFORE, AFTER]
    assert remark is None
    assert [model.config.K for model in first_stages.values()] == [TINY.K, NEW_K]
    counter, x = CodeCounter(first_stages), _x(Signs("val", SIZE), 5)
    for batch in x.split(2):
        counter.offer(batch)
    for name, statistics in counter.statistics().items():
        K = first_stages[name].config.K
        counts = first_stages[name].indices(x).flatten().bincount(minlength=K).double()
        p = counts / counts.sum()
        assert statistics["K"] == K
        assert statistics["usage"] == (counts > 0).sum() / K
        assert statistics["perplexity"] == pytest.approx(torch.special.entr(p).sum().exp().item())


def test_the_whole_of_table_1_is_counted_on_both_splits(refitted):
    signs = {split: Signs(split, SIZE) for split in ("train", "val")}
    with torch.inference_mode():
        rows, remark = count_splits(_run(refitted), *signs.values(), 4, 3, CPU, inception)
        stages, _ = first_stages_of(_run(refitted), CPU)
        for row, (name, model) in zip(rows, stages.items(), strict=True):
            used = {split: len(model.indices(_x(signs[split], 4)).unique()) / model.config.K
                    for split in signs}
            ours, real, x = FeatureStatistics(2048), FeatureStatistics(2048), _x(signs["val"], 4)
            ours.update(inception(model.decode_indices(model.indices(x)).clamp(-1, 1))[0])
            real.update(inception(x)[0])
            assert (row["name"], row["latent"], row["K"]) == (name, "16x16", model.config.K)
            assert (row["usage_train"], row["usage_val"]) == (used["train"], used["val"])
            assert row["rfid"] == pytest.approx(ours.frechet(real), rel=1e-4)
        assert remark is None
        rows, _ = count_splits(_run(refitted), *signs.values(), 4, 3, CPU)
    assert [row["rfid"] for row in rows] == [None, None]
    assert rows[0]["usage_val"] != rows[1]["usage_val"]


def test_a_run_without_refit_has_one_row(tmp_path):
    write_first_stage(tmp_path)
    signs = [Signs(split, SIZE, limit=3) for split in ("train", "val")]
    rows, remark = count_splits(_run(tmp_path), *signs, None, 2, CPU)
    assert [row["name"] for row in rows] == ["the first stage's"]
    assert remark is None


def test_a_refit_whose_start_is_gone_or_another_has_its_own_row_only(refitted):
    write_first_stage(refitted, seed=9)
    first_stages, remark = first_stages_of(_run(refitted), CPU)
    assert list(first_stages) == [AFTER]
    assert remark.endswith("is not what this ReFiT began with")
    (refitted / "vqgan" / "last.pt").unlink()
    first_stages, remark = first_stages_of(_run(refitted), CPU)
    assert list(first_stages) == [AFTER]
    assert "no such" in remark


# -- what is known already -------------------------------------------------------------------------


def test_what_refit_counted_is_remembered_for_the_same_pictures_only(refitted):
    run = _run(refitted)
    assert remembered(run, WHERE, 1000) == {BEFORE: FACTS["before"], AFTER: FACTS["after"]}
    assert remembered(run, WHERE | {"size": 64}, 1000) is None
    assert remembered(run, WHERE | {"data": "folder", "root": "/there"}, 1000) is None
    assert remembered(run, WHERE, 4) is None                       # with --overfit 4
    row = codebook_row(AFTER, run.first_stage.config, SIZE, FACTS["after"], 0.75)
    assert row == {"name": AFTER, "latent": "16x16", "K": 5, "usage_train": 0.75,
                   "usage_val": 1.0, "perplexity_val": 4.5, "rfid": None}


def test_a_decoders_refit_is_found_in_the_run_that_its_vqgan_names(refitted, tmp_path):
    state = run_folder.load(refitted / "decoder" / "last.pt")
    write_decoder(tmp_path / "two", state["parent"], vqgan=str(refitted))
    for path in (tmp_path / "two", refitted / "decoder" / "last.pt"):
        found, home = refit_of(_run(path))
        assert home == refitted
        assert found["stage"] == "refit"


def test_a_decoders_refit_is_found_by_the_file_that_its_vqgan_names(refitted, tmp_path):
    parent = run_folder.load(refitted / "decoder" / "last.pt")["parent"]
    write_decoder(tmp_path / "two", parent, vqgan=str(refitted / "refit" / "last.pt"))
    assert refit_of(_run(tmp_path / "two"))[1] == refitted


def test_a_refit_of_other_weights_is_not_this_runs(refitted):
    _, parent = write_first_stage(refitted / "other", seed=3)
    run = _run(refitted)
    run.loaded.parent = parent
    assert refit_of(run) is None
    assert remembered(run, WHERE, 1000) is None


def test_the_codes_that_the_prior_has_learnt_are_counted_from_their_file(tmp_path):
    facts = {"K": 8, "grid": [4, 4], "maps": 6}
    assert learnt_usage(tmp_path, facts) is None
    (tmp_path / "codes").mkdir()
    codes = np.random.default_rng(0).integers(0, 6, (6, 4, 4)).astype(np.uint16)
    np.save(tmp_path / "codes" / "train-1.npy", codes)
    np.save(tmp_path / "codes" / "train-2.npy", codes[:5])         # of a shorter run
    assert learnt_usage(tmp_path, facts) == 6 / 8
    np.save(tmp_path / "codes" / "train-3.npy", codes * 0)         # whose?
    assert learnt_usage(tmp_path, facts) is None
    assert learnt_usage(tmp_path, {"K": 8, "grid": [4, 4]}) is None
