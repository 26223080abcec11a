import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import SIZE, TINY, write_decoder, write_first_stage, write_prior

import sample as program
from convert import load_prior
from data import Signs
from diffusion import STRATA
from distributed import UserError
from fid import FeatureStatistics
from sample import Drawing, measure, open_decoder, open_reference

CPU, T = torch.device("cpu"), 6


@pytest.fixture
def run(tmp_path):
    """A run folder with a first stage, a decoder and a prior, all random."""
    _, parent = write_first_stage(tmp_path / "run")
    write_decoder(tmp_path / "run", parent)
    write_prior(tmp_path / "run", parent)
    return tmp_path / "run"


def inception(x):
    """Something like InceptionV3: (features (B,2048), logits)."""
    features = torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1).repeat(1, 11)
    return features[:, :2048], features[:, :1008]


class FakeInception:
    def __init__(self, folder):
        self.folder = folder

    def to(self, device):
        return inception


# -- drawing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["strided", "route"])
def test_a_sample_is_a_function_of_the_seed_and_its_number_alone(run, sampler):
    prior = load_prior(run)
    drawings = [Drawing(3, sampler, 0.9, seed=5, batch_size=size) for size in (2, 5)]
    two, five = (torch.cat([codes for _, codes, _ in drawing.batches(prior, 5)])
                 for drawing in drawings)
    assert torch.equal(two, five)
    assert torch.equal(drawings[0].codes(prior, [3]), five[3:4])
    others = Drawing(3, sampler, 0.9, seed=6).codes(prior, range(5))
    everything = [codes.numpy().tobytes() for codes in (*five, *others)]
    assert len(set(everything)) == 10


def test_steps_sampler_and_temperature_are_the_diffusions_own(run):
    prior, asked = load_prior(run), []

    def spy(model, shape, steps, generators, **options):
        asked.append((model is prior.unet, shape, steps, len(generators), options))
        return torch.zeros(shape, dtype=torch.int64)

    prior.diffusion.sample = spy
    Drawing(4, "route", 0.5).codes(prior, range(3))
    assert asked == [(True, (3, 16, 16), 4, 3, {"sampler": "route", "temperature": 0.5,
                                                "device": CPU})]


def test_what_a_device_does_once_is_not_in_the_seconds(run, monkeypatch):
    prior, clock, calls = load_prior(run), [0.0], []

    def slow_at_first(model, shape, steps, *_, **__):
        clock[0] += 1 if calls else 100
        calls.append(steps)
        return torch.zeros(shape, dtype=torch.int64)

    prior.diffusion.sample = slow_at_first
    monkeypatch.setattr(program.time, "perf_counter", lambda: clock[0])
    seconds = [took for _, _, took in Drawing(3, batch_size=2).batches(prior, 5)]
    assert seconds == [1.0, 1.0, 1.0]
    assert calls == [1, 3, 3, 3]


# -- decoders --------------------------------------------------------------------------------------


def test_samples_are_decoded_by_our_decoder_without_a_mask_where_there_is_one(run, tmp_path):
    prior = load_prior(run)
    z = prior.first_stage.quantize.lookup(torch.randint(TINY.K, (2, 16, 16)))
    ours, vanilla = open_decoder(run, prior), open_decoder(run, prior, "vanilla")
    assert program.decoder_name(ours) == "ours, without a mask"
    assert vanilla is prior.first_stage
    assert not torch.equal(ours.decode(z), vanilla.decode(z))
    assert torch.equal(ours.decode(z), program.load(run).model.decode(z))
    assert type(open_decoder(run / "prior" / "last.pt", prior)) is type(ours)
    _, parent = write_first_stage(tmp_path / "bare")
    write_prior(tmp_path / "bare", parent)
    bare = load_prior(tmp_path / "bare")
    assert open_decoder(tmp_path / "bare", bare) is bare.first_stage
    with pytest.raises(UserError, match=r"--decoder asym: .*bare has no decoder of ours"):
        open_decoder(tmp_path / "bare", bare, "asym")


def test_a_decoder_on_another_first_stage_is_refused(run, tmp_path):
    _, other = write_first_stage(tmp_path / "other", seed=7)
    write_decoder(run, other, vqgan=str(tmp_path / "other"))
    with pytest.raises(UserError, match="stand on different first stages"):
        open_decoder(run, load_prior(run))
    assert open_decoder(run, load_prior(run), "vanilla")


# -- measuring -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "against"), [(5, 3), (2, 5), (4, 4)])
def test_fid_is_of_as_many_samples_as_pictures_whatever_is_shown(run, n, against):
    prior, signs = load_prior(run), Signs("val", SIZE)
    drawing, model = Drawing(2, batch_size=2), prior.first_stage
    reference = open_reference(inception, signs, against, 2, CPU)
    with torch.inference_mode():
        row, shown = measure(prior, model, drawing, n, reference)
        x_hat = model.decode_indices(drawing.codes(prior, range(max(n, against))))
    assert shown.shape == (n, 3, SIZE, SIZE)
    assert torch.allclose(shown, x_hat[:n], atol=1e-4)
    x = torch.tensor(np.stack([signs.image(i) for i in range(against)])).permute(0, 3, 1, 2)
    ours, real = FeatureStatistics(2048), FeatureStatistics(2048)
    ours.update(inception(x_hat[:against].clamp(-1, 1))[0])
    real.update(inception(x / 127.5 - 1)[0])
    assert row["fid"] == pytest.approx(ours.frechet(real), rel=1e-5)


def test_the_bound_is_the_priors_of_the_samples_that_are_shown(run):
    prior, drawing = load_prior(run), Drawing(2, batch_size=2)
    with torch.inference_mode():
        row, _ = measure(prior, prior.first_stage, drawing, 3)
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        codes = drawing.codes(prior, range(3))
        nats = prior.diffusion.vlb(prior.unet, codes, generators, STRATA)["vlb"].mean().item()
    assert row["nats"] == pytest.approx(nats, rel=1e-6)
    assert (row["n"], row["sampler"], row["fid"]) == (2, "strided", None)


def test_the_seconds_are_those_of_one_batch(run, monkeypatch):
    prior, clock = load_prior(run), iter(range(100))
    monkeypatch.setattr(program.time, "perf_counter", lambda: float(next(clock)))
    for n, batch_size, expected in ((3, 2, 2 / 3 * 2), (2, 8, 1.0)):
        row, _ = measure(prior, prior.first_stage, Drawing(1, batch_size=batch_size), n)
        assert row["seconds"] == pytest.approx(expected)


# -- the program -----------------------------------------------------------------------------------


def _call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments), "--device", "cpu"])
    program.main()


def test_the_program_writes_a_grid_and_the_numbers_beside_it(run, tmp_path, monkeypatch, capsys):
    write_prior(run, load_prior(run).parent, finished=False)
    _call(monkeypatch, "--run", run, "-n", 5, "-o", tmp_path / "new" / "s.png", "--steps", 2)
    picture = Image.open(tmp_path / "new" / "s.png")
    assert picture.height < picture.width                # five in rows of three
    saved = json.loads((tmp_path / "new" / "s.json").read_text())
    assert saved["steps"][0].keys() == {"n", "sampler", "seconds", "nats", "fid"}
    assert (saved["n"], saved["seed"], saved["decoder"]) == (5, 0, "ours, without a mask")
    printed = capsys.readouterr().out
    assert "the prior in" in printed
    assert "is not finished (step 2)" in printed
    assert "| steps | sampler | seconds for 5 |" in printed
    assert "FID: not computed: --fid-n N measures it" in printed


def test_a_list_of_steps_gives_a_row_each_for_each_sampler(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "InceptionV3", FakeInception)
    _call(monkeypatch, "--run", run, "-n", 3, "-o", tmp_path / "s.png", "--steps", "1,T,1",
          "--sampler", "both", "--fid-n", 4, "--against", "train", "--batch-size", 4)
    saved = json.loads((tmp_path / "s.json").read_text())
    assert [(row["n"], row["sampler"]) for row in saved["steps"]] == [
        (1, "strided"), (1, "route"), (T, "strided"), (T, "route")]
    assert all(row["fid"] > 0 and row["seconds"] > 0 for row in saved["steps"])
    assert saved["notes"]["fid"].startswith("of 4 samples against the first 4 of 50,000 drawn")
    assert "(train, seed 0)" in saved["notes"]["fid"]
    printed = capsys.readouterr().out
    assert printed.count("| strided |") == printed.count("|   route |") == 2
    picture = Image.open(tmp_path / "s.png")
    assert picture.height > picture.width                # four rows of three


def test_without_the_network_fid_is_na_and_no_more_samples_are_drawn(run, tmp_path, monkeypatch):
    def missing(folder):
        raise UserError("it is not there: get it")

    monkeypatch.setattr(program, "InceptionV3", missing)
    _call(monkeypatch, "--run", run, "-n", 2, "-o", tmp_path / "s.png", "--fid-n", 900)
    saved = json.loads((tmp_path / "s.json").read_text())
    assert saved["steps"][0]["fid"] is None
    assert saved["notes"]["fid"] == "n/a: it is not there: get it"
    assert saved["batch_size"] == 2


@pytest.mark.parametrize(("flags", "reason"), [
    ("-n 0", "-n 0: give a number from 1 on"), ("--steps 0", "from 1 to T = 6"),
    ("--steps 2,7", "from 1 to T = 6"), ("--steps two", "from 1 to T = 6"),
    ("--fid-n 1", "at least 2 samples"), ("--fid-n 1001", "there are 1,000 pictures"),
    ("--temperature 0", "--temperature 0.0: must be positive"), ("--seed -1", "--seed -1"),
    ("-o s.jpg", "a name that ends in .png"),
    ("-o file/s.png", "-o: file cannot be made a folder"),
    ("--decoder asym", "has no decoder of ours")])
def test_a_mistake_names_the_flag(flags, reason, run, monkeypatch, tmp_path):
    (run / "decoder" / "last.pt").unlink()
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(UserError, match=reason):
        _call(monkeypatch, "--run", run, *flags.split())
    assert not (tmp_path / "samples.png").exists()
