import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_sample import inception
from tiny_runs import SIZE, write_decoder, write_first_stage, write_prior, write_stage

import eval as evaluation
import run_folder
from data import Signs
from distributed import UserError
from eval import Options, evaluate_samples, open_runs
from fid import FeatureStatistics, inception_score
from generated import Samples
from metrics import Networks, decode_all
from paper_tables import validate
from sample import Drawing

CPU = torch.device("cpu")


@pytest.fixture
def runs(tmp_path):
    """Two decoders on one first stage, and a prior in the second run."""
    _, parent = write_first_stage(tmp_path / "one")
    write_decoder(tmp_path / "one", parent)
    write_decoder(tmp_path / "two", parent, seed=5, blend="concat", vqgan=str(tmp_path / "one"))
    write_prior(tmp_path / "two", parent, vqgan=str(tmp_path / "one"))
    state = run_folder.load(tmp_path / "two" / "prior" / "last.pt")
    state["extra"] |= {"score": 90.0, "uniform_nats": 200.0, "histogram_nats": 150.0}
    run_folder.save(tmp_path / "two" / "prior" / "last.pt", state)
    return [tmp_path / "one", tmp_path / "two"]


def test_every_decoder_reads_the_codes_of_the_same_samples(runs):
    opened = open_runs(runs, CPU)
    samples = Samples(runs, opened, CPU, steps=3, batch_size=2)
    with torch.inference_mode():
        batches = list(samples.pictures(Signs("val", SIZE), 5))
        codes = Drawing(3).codes(samples.prior, range(5))
        z = samples.prior.first_stage.quantize.lookup(codes)
        assert torch.equal(torch.cat([batch.z for batch in batches]), z)
        outputs = decode_all(opened, batches[0])
        expected = opened[1].loaded.model.decode(z[:2])
        assert torch.equal(outputs[str(runs[1]), "asym-nomask"][0], expected)
    assert sorted(outputs, key=str) == sorted(
        [(None, "vanilla"), *((str(run), "asym-nomask") for run in runs)], key=str)
    assert all(batch.mask is None for batch in batches)
    assert samples.drawn == 5


def test_tables_6_and_10_have_fid_and_is_of_samples_against_held_out_pictures(
        runs, monkeypatch, capsys):
    asked = []

    def networks(device, weights, *_, **__):
        asked.append(weights)
        return Networks(inception=inception, notes={})

    monkeypatch.setattr(evaluation, "open_networks", networks)
    state = run_folder.load(runs[1] / "prior" / "last.pt")
    state["config"]["weights"] = "its own"
    state["extra"]["finished"] = False
    run_folder.save(runs[1] / "prior" / "last.pt", state)
    options = Options(steps=2, batch_size=3, table="6")
    report = evaluate_samples(runs, options, n=7)
    out = runs[0] / "compare" / "generated"
    assert json.loads((out / "report.json").read_text()) == report
    validate(report)
    signs, opened = Signs("val", SIZE), open_runs(runs, CPU)
    samples = Samples(runs, opened, CPU, steps=2)
    x = torch.tensor(np.stack([signs.image(i) for i in range(7)])).permute(0, 3, 1, 2)
    real = FeatureStatistics(2048)
    real.update(inception(x / 127.5 - 1)[0])
    with torch.inference_mode():
        z = samples.prior.first_stage.quantize.lookup(Drawing(2).codes(samples.prior, range(7)))
        models = {"vanilla": opened[0].first_stage, "asym-nomask": opened[1].loaded.model}
        for row in report["rows"]:
            if row["decoder"] == "asym-nomask" and row["run"] != str(runs[1]):
                continue
            features, logits = inception(models[row["decoder"]].decode(z).clamp(-1, 1))
            ours = FeatureStatistics(2048)
            ours.update(features)
            assert row["fid"] == pytest.approx(ours.frechet(real), rel=1e-3)
            assert row["is_mean"] == pytest.approx(inception_score(logits, splits=7)[0], rel=1e-4)
            assert row["pre_error"] is row["lpips"] is None
    ours = next(row for row in report["rows"] if row["decoder"] == "asym-nomask")
    assert report["prior"]["vlb_nats"] == 90.0
    assert report["prior"]["steps"][0] | {"seconds": 0} == {
        "n": 2, "sampler": "strided", "seconds": 0, "fid": ours["fid"]}
    printed = capsys.readouterr().out
    assert asked == ["its own"]
    assert report["notes"]["run"] == "the prior is not finished (step 2)"
    assert report["notes"]["run"] in printed
    assert report["notes"]["prior"].startswith("vlb_nats: ")
    assert "samples of our generator, not COCO" in printed
    assert "| paper: large w/o mask" in printed
    assert "LPIPS: not computed: a sample has no original" in printed
    assert Image.open(out / "samples.png").height > 3 * 128         # vanilla and both of ours
    text = (out / "report.md").read_text()
    assert text.startswith("# Pictures")
    assert "![the same samples by each decoder](samples.png)" in text


def test_without_the_network_only_the_picture_is_made(runs, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "open_networks", lambda *_, **__: Networks(
        notes={"fid": "n/a: it is not there"}))
    report = evaluate_samples(runs[1:], Options(table="10", out=str(runs[1] / "new")))
    assert "| paper: large2 w/o mask" in capsys.readouterr().out
    assert report["n"] == evaluation.SHOWN
    assert report["notes"]["fid"] == "n/a: it is not there"
    assert (runs[1] / "new" / "samples.png").exists()


def test_runs_without_a_fitting_prior_are_refused(runs, tmp_path):
    with pytest.raises(UserError, match=r"one has no prior .*--stage prior --vqgan"):
        evaluate_samples(runs[:1], Options(table="6"))
    model, _ = write_first_stage(tmp_path / "one")
    with torch.no_grad():                        # the same latents, another decoder of its own
        model.decoder.conv_out.bias += 1
    write_stage(tmp_path / "three", "vqgan", model.state_dict(),
                run_folder.load(tmp_path / "one" / "vqgan" / "last.pt")["config"])
    opened = open_runs([tmp_path / "three"], CPU)
    with pytest.raises(UserError, match="another first stage than these decoders"):
        Samples([Path(runs[1])], opened, CPU)
    with pytest.raises(UserError, match="from 1 to T = 6"):
        Samples(runs, open_runs(runs, CPU), CPU, steps=7)


def test_the_first_samples_are_kept_for_the_picture(runs):
    samples = Samples(runs, open_runs(runs, CPU), CPU)
    first, second = torch.rand(5, 3, SIZE, SIZE), torch.rand(5, 3, SIZE, SIZE)
    for x_hat in (first, second):
        samples.keep(dataclasses.make_dataclass("Pictures", ["x"])(x_hat),
                     {(None, "vanilla"): (x_hat, 0.0)})
    assert torch.equal(torch.stack(samples.shown[None, "vanilla"]), torch.cat([first, second])[:8])
