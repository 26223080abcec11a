"""sample.py: sample i is a function of (seed, i); what fewer steps cost; a grid or a folder."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import SIZE, TINY, write_decoder, write_first_stage, write_prior

import sample as program
from convert import load_prior
from data import Signs, held_out_batches
from diffusion import frequency_nats
from distributed import UserError
from sample import draw_samples, measure_steps, open_decoder, sample_codes


@pytest.fixture
def run(tmp_path):
    """A run folder with a first stage, a decoder and a prior, all random."""
    _, parent = write_first_stage(tmp_path / "run")
    write_decoder(tmp_path / "run", parent)
    write_prior(tmp_path / "run", parent)
    return tmp_path / "run"


# -- drawing ---------------------------------------------------------------------------------------


def test_a_sample_is_a_function_of_the_seed_and_its_number_alone(run):
    prior = load_prior(run)
    two, five = (torch.cat([codes for _, codes, _, _ in draw_samples(
        prior, prior.first_stage, 3, 5, seed=5, batch_size=size)]) for size in (2, 5))
    assert torch.equal(two, five)
    assert torch.equal(sample_codes(prior, [3], 3, seed=5), five[3:4])
    others = sample_codes(prior, range(5), 3, seed=6)
    assert len({codes.numpy().tobytes() for codes in (*five, *others)}) == 10


def test_what_a_device_does_once_is_not_in_the_seconds(run, monkeypatch):
    prior, clock, calls = load_prior(run), [0.0], []

    def slow_at_first(model, shape, steps, *_, **__):
        clock[0] += 1 if calls else 100
        calls.append(steps)
        return torch.zeros(shape, dtype=torch.int64)

    prior.diffusion.sample = slow_at_first
    monkeypatch.setattr(program.time, "perf_counter", lambda: clock[0])
    seconds = [took for *_, took in draw_samples(prior, prior.first_stage, 3, 5, batch_size=2)]
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
    assert type(open_decoder(run / "prior" / "last.pt", prior, "asym")) is type(ours)
    _, parent = write_first_stage(tmp_path / "bare")
    write_prior(tmp_path / "bare", parent)
    bare = load_prior(tmp_path / "bare")
    assert open_decoder(tmp_path / "bare", bare) is bare.first_stage
    with pytest.raises(UserError, match=r"--decoder asym: .*bare has none; train one"):
        open_decoder(tmp_path / "bare", bare, "asym")


def test_a_decoder_on_another_first_stage_is_refused(run, tmp_path):
    _, other = write_first_stage(tmp_path / "other", seed=7)
    write_decoder(run, other, vqgan=str(tmp_path / "other"))
    with pytest.raises(UserError, match="have different first stages"):
        open_decoder(run, load_prior(run))
    assert open_decoder(run, load_prior(run), "vanilla")


# -- what fewer steps cost -------------------------------------------------------------------------


def test_the_bound_is_the_priors_of_the_samples_and_the_seconds_those_of_a_batch(run, monkeypatch):
    prior, clock = load_prior(run), iter(range(100))
    monkeypatch.setattr(program.time, "perf_counter", lambda: float(next(clock)))
    with torch.inference_mode():
        (row,), (images,) = measure_steps(prior, prior.first_stage, [2], 3, batch_size=2)
        codes = sample_codes(prior, range(3), 2)
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        nats = prior.diffusion.vlb(prior.unet, codes, generators)["vlb"]
        assert torch.allclose(images, prior.first_stage.decode_indices(codes), atol=1e-4)
    assert (row["n"], row["maps"]) == (2, 3)
    assert row["nats"] == pytest.approx(nats.mean().item(), rel=1e-6)
    assert row["nats_se"] == pytest.approx(nats.numpy().std(ddof=1) / 3 ** 0.5, rel=1e-4)
    assert row["seconds"] == pytest.approx(2 / 3 * 2)
    (row,), _ = measure_steps(prior, prior.first_stage, [1], 2, batch_size=8)
    assert row["seconds"] == 1.0


def test_numbers_of_steps_are_compared_sample_by_sample(run):
    prior = load_prior(run)
    with torch.inference_mode():
        rows, images = measure_steps(prior, prior.first_stage, [1, 6, 2], 4, batch_size=3)
        nats = [prior.diffusion.vlb(prior.unet, sample_codes(prior, range(4), steps), [
            torch.Generator().manual_seed(i) for i in range(4)])["vlb"] for steps in (1, 6, 2)]
    for row, one in zip(rows, nats, strict=True):
        assert row["more"] == pytest.approx((one - nats[1]).mean().item(), rel=1e-4, abs=1e-4)
        assert row["more_se"] == pytest.approx((one - nats[1]).std().item() / 2, rel=1e-4, abs=1e-4)
    assert (rows[1]["more"], rows[1]["more_se"]) == (0, 0)
    assert rows[0]["more_se"] > 0
    assert [len(x) for x in images] == [4, 4, 4]


# -- the bound -------------------------------------------------------------------------------------


def test_held_out_and_training_maps_have_one_estimator_and_are_spread_over_their_sets(
        run):
    prior, dataset = load_prior(run), Signs("val", SIZE, limit=7)
    codes = np.random.default_rng(0).integers(0, TINY.K, (10, 16, 16)).astype(np.uint16)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    with torch.inference_mode():
        found = program.measure_bound(prior, codes, dataset, 3, batch_size=2)
        x = torch.cat([batch.x for batch in held_out_batches(dataset, 7, 7, torch.device("cpu"))])
        held_out = prior.first_stage.indices(x[[0, 2, 4]])
        vlb = prior.diffusion.vlb(prior.unet, held_out, generators)["vlb"]
        generators = [torch.Generator().manual_seed(i) for i in range(3, 6)]
        train = prior.diffusion.vlb(prior.unet, torch.from_numpy(codes[[0, 3, 6]].astype(np.int64)),
                                    generators)["vlb"]
    nats = {"vlb": vlb, "train_vlb": train} | frequency_nats(codes, held_out.numpy(), TINY.K)
    assert found.keys() == {"maps", "uniform_nats", *(
        f"{name}_{what}" for name in nats for what in ("nats", "se"))}
    assert (found["maps"], found["uniform_nats"]) == (3, pytest.approx(256 * np.log(TINY.K)))
    for name, each in nats.items():
        assert found[f"{name}_nats"] == pytest.approx(each.mean().item(), rel=1e-5)
        assert found[f"{name}_se"] == pytest.approx(each.std().item() / 3 ** 0.5, rel=1e-4)
    assert program.measure_bound(prior, None, dataset).keys() == {
        "maps", "uniform_nats", "vlb_nats", "vlb_se"}


# -- the program -----------------------------------------------------------------------------------


def _call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments), "--device", "cpu"])
    program.main()


def test_the_program_writes_a_grid_and_says_what_it_did(run, tmp_path, monkeypatch, capsys):
    write_prior(run, load_prior(run).parent, finished=False)
    _call(monkeypatch, "--run", run, "-n", 5, "-o", tmp_path / "new" / "s.png", "--steps", 2)
    picture = Image.open(tmp_path / "new" / "s.png")
    assert picture.height < picture.width                # five in rows of three
    printed = capsys.readouterr().out
    assert f"warning: training of the prior in {run} is not finished (step 2)" in printed
    assert "5 samples of" in printed
    assert "decoded by ours, without a mask, in 2 of 6 steps, on cpu" in printed
    assert printed.endswith(f"wrote {tmp_path}/new/s.png\n")


def test_a_list_of_steps_gives_a_row_each(run, tmp_path, monkeypatch, capsys):
    _call(monkeypatch, "--run", run, "-n", 3, "-o", tmp_path / "s.png", "--steps", "1,6, 1")
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()
             if line.startswith("|")]
    assert [cell.strip() for cell in lines[0]] == ["steps", "samples", "seconds for 3", "hours for "
                                                   "50,000", "nats per map", "more than in 6"]
    assert [line[0].strip() for line in lines[2:]] == ["1", "6"]
    picture = Image.open(tmp_path / "s.png")
    assert picture.height < picture.width                # two rows of three


@pytest.mark.parametrize(("decoder", "folder"), [("asym", "new/"), ("vanilla", "plain"),
                                                 ("vanilla", "there.is")])
def test_a_folder_gets_one_rounded_png_a_sample(run, tmp_path, monkeypatch, decoder, folder):
    monkeypatch.chdir(tmp_path)
    os.mkdir("there.is")
    _call(monkeypatch, "--run", run, "-n", 5, "-o", folder, "--steps", 2, "--decoder", decoder,
          "--batch-size", 2, "--seed", 4)
    assert sorted(os.listdir(folder)) == [f"{i:05}.png" for i in range(5)]
    prior = load_prior(run)
    with torch.inference_mode():
        codes = sample_codes(prior, [3], 2, seed=4)
        x_hat = open_decoder(run, prior, decoder).decode(prior.first_stage.quantize.lookup(codes))
    written = np.array(Image.open(Path(folder) / "00003.png"))
    assert written.shape == (SIZE, SIZE, 3)
    exact = ((x_hat[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(written - exact).max() < 0.5 + 1e-2    # rounded, not cut off
    with pytest.raises(UserError, match="give an empty folder"):
        _call(monkeypatch, "--run", run, "-o", folder)


@pytest.mark.parametrize(("flags", "reason"), [
    ("-n 0", "-n and --batch-size are at least 1"), ("--seed -1", "--seed at least 0"),
    ("--steps 0", "from 1 to T = 6"), ("--steps 2,7", "from 1 to T = 6"),
    ("--steps two", "from 1 to T = 6"), ("--steps 1,2 -o new/", "an empty folder and one --steps"),
    ("-o s.jpg", "-o s.jpg: give a .png, or a folder"),
    ("-o file/s.png", "-o: file cannot be made a folder"), ("--decoder asym", "run has none")])
def test_a_mistake_names_the_flag(flags, reason, run, monkeypatch, tmp_path):
    (run / "decoder" / "last.pt").unlink()
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(UserError, match=reason):
        _call(monkeypatch, "--run", run, *flags.split())
    assert sorted(os.listdir()) == ["file", "run"]
