import csv
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ports import free_port
from tiny_reports import assert_alike
from tiny_runs import (
    SIZE,
    TINY,
    settings,
    write_decoder,
    write_first_stage,
    write_prior,
    write_run,
    write_stage,
)

import eval as program
import metrics
import run_folder
from convert import load_model
from data import Signs
from distributed import UserError
from fid import frechet_distance, inception_score, moments
from masks import box_mask, evaluation_mask
from metrics import DECODERS, Networks
from paper_tables import table
from refit import install_codebook
from vqgan import VQGAN

ROOT = Path(__file__).resolve().parent.parent
NEW_K, WIDTH = 5, 16
FACTS = {"before": {"K": 8, "usage": 0.5, "perplexity": 3.0},
         "after": {"K": 5, "usage": 1.0, "perplexity": 4.5}}


def evaluate(*runs, **options):
    """The report, with no network but the runs' own."""
    return program.evaluate(runs, **{"fid": False} | options)


def images(split, n):
    """(n,3,H,W) in [-1,1]: street scenes."""
    scenes = torch.tensor(np.stack([Signs(split, SIZE).image(i) for i in range(n)]))
    return scenes.permute(0, 3, 1, 2) / 127.5 - 1


def inception(x):
    """(features, logits) that depend on the images, without the network's weight file."""
    features = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)         # (B, 48)
    return features[:, :WIDTH], features[:, :32] * 9


def fid(x_hat, x):
    return frechet_distance(*moments(inception(x_hat)[0]), *moments(inception(x)[0]))


@pytest.fixture
def fake_networks(monkeypatch):
    monkeypatch.setattr("metrics.open_networks", lambda *_, **__: Networks(inception=inception))
    monkeypatch.setattr("metrics.FEWEST_FOR_FID", 3)             # else n/a


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def two_runs(run, tmp_path):
    """An add and a concat decoder on one first stage, as for Table 3."""
    _, parent = write_first_stage(run)
    write_decoder(tmp_path / "concat", parent, blend="concat", vqgan=str(run))
    return [run, tmp_path / "concat"]


def _rows(report, protocol="full"):
    return {row["decoder"]: row for row in report["rows"]
            if (row["bucket"], row["protocol"]) == ("all", protocol)}


def test_the_figures_are_those_of_a_slow_loop_and_pasting_is_exact_but_for_a_seam(run):
    rows, model = _rows(evaluate(run, batch_size=2, n=5)), load_model(run)
    x, masks = images("val", 5), np.stack([evaluation_mask(SIZE, index) for index in range(5)])
    with torch.no_grad():
        m = torch.tensor(masks)[:, None].float()
        errors = _errors(model.decode(model.encode(x), image=x, mask=m), x, masks == 1)
    psnrs = [-10 * math.log10(error) for error in errors]
    assert rows["asym"]["pre_error"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert rows["asym"]["psnr_known"] == pytest.approx(np.mean(psnrs), rel=1e-5)
    assert rows["asym"]["n"] == 5
    assert rows["paste"]["pre_error"] == 0
    assert rows["paste"]["seam"] > 0


def test_the_colours_of_a_hole_change_by_its_index_alone_and_known_pixels_stay():
    x = 2 * torch.rand(40, 3, 8, 8) - 1
    mask = (torch.rand(40, 1, 8, 8) < 0.5).float()
    shifted, hole = program.shift_hole(x, mask, range(100, 140)), mask.expand(x.shape) == 1
    assert torch.equal(shifted[~hole], x[~hole])
    for i in (0, 39):
        (gain, *_), (offset, *_) = drawn = np.random.default_rng((404, 100 + i)).uniform(
            -0.1, 0.1, (2, 3))
        wanted = (x[i, 0] * (1 + gain) + offset).clamp(-1, 1)
        torch.testing.assert_close(shifted[i, 0][hole[i, 0]], wanted[hole[i, 0]])
        assert len({*drawn.flat}) == 6                           # one for each channel
    assert torch.equal(program.shift_hole(x[5:6], mask[5:6], [105]), shifted[5:6])
    assert shifted.abs().max() <= 1
    assert 0.02 < (shifted - x)[hole].std() < (shifted - x)[hole].abs().max() <= 0.2


def test_shifted_latents_are_of_another_hole_but_known_pixels_and_truth_are_the_images(run):
    rows, model = _rows(evaluate(run, batch_size=2, n=3), "shifted"), load_model(run)
    assert list(rows) == ["vanilla", "asym", "paste"]
    x, masks = images("val", 3), [evaluation_mask(SIZE, index) for index in range(3)]
    m = torch.tensor(np.stack(masks))[:, None].float()
    with torch.no_grad():
        z = model.encode(program.shift_hole(x, m, range(3)))
        vanilla = model.first_stage.decode(z)
        made = {"vanilla": vanilla, "asym": model.decode(z, image=x, mask=m),
                "paste": torch.where(m == 1, vanilla, x)}
    for decoder, x_hat in made.items():
        assert rows[decoder]["pre_error"] == pytest.approx(
            np.mean(_errors(x_hat, x, m[:, 0] == 1)), rel=1e-5)
        seam = metrics.seam(x_hat, x, m).mean().item()
        assert rows[decoder]["seam"] == pytest.approx(seam, rel=1e-5)


def test_the_test_split_is_measured_where_it_is_asked_for_and_reported_apart(run, capsys):
    of_val, of_test = evaluate(run, n=3), evaluate(run, n=3, split="test")
    for split, report, place in (("val", of_val, run), ("test", of_test, run / "test")):
        assert json.loads((place / "report.json").read_text()) == report
        assert {row["split"] for row in report["rows"]} == {split}
        assert f"street scenes with signs ({split}, seed 0)" in (place / "report.md").read_text()
    model, x = load_model(run), images("test", 3)
    with torch.no_grad():
        z = model.encode(x)
        m = torch.tensor(np.stack([evaluation_mask(SIZE, index) for index in range(3)]))
        x_hat = model.decode(z, image=x, mask=m[:, None].float())
    expected = np.mean(_errors(x_hat, x, m == 1))
    assert _rows(of_test)["asym"]["pre_error"] == pytest.approx(expected, rel=1e-5)
    assert _rows(of_val)["asym"]["pre_error"] != pytest.approx(expected, rel=1e-3)


def test_means_do_not_depend_on_the_batch_size(run):
    one, three = (evaluate(run, batch_size=size, n=7) for size in (1, 3))
    for a, b in zip(one["rows"], three["rows"], strict=True):
        assert_alike(a, b, 1e-4)


def test_the_pictures_are_those_of_seed_0_whatever_the_training_seed(run):
    reports = [evaluate(run, n=3)]
    path = run / "decoder" / "last.pt"
    state = run_folder.load(path)
    state["config"]["seed"] = 3
    run_folder.save(path, state)
    reports.append(evaluate(run, n=3))
    assert [report["seed"] for report in reports] == [0, 3]
    for a, b in zip(*(report["rows"] for report in reports), strict=True):
        assert_alike(a, b, 1e-9)


def test_lpips_is_by_the_runs_network_unless_another_is_asked_for(run, monkeypatch):
    asked = []
    monkeypatch.setattr("metrics.open_networks",
                        lambda device, weights, net, *_: asked.append(net) or Networks())
    evaluate(run, n=1)
    evaluate(run, n=1, lpips="alex")
    assert asked == ["none", "alex"]                 # the run has --perceptual none


def test_nothing_is_measured_in_tf32_or_with_gradients(run, monkeypatch):
    backends, seen = (torch.backends.cudnn.conv, torch.backends.cuda.matmul), []
    original = metrics.decode_all

    def note(*args, **options):
        seen.append((*(backend.fp32_precision for backend in backends), torch.is_grad_enabled()))
        return original(*args, **options)

    monkeypatch.setattr("metrics.decode_all", note)
    evaluate(run, n=1)
    assert set(seen) == {("ieee", "ieee", False)}


def test_two_processes_find_what_one_does(run, tmp_path):
    _, parent = write_first_stage(run)
    write_prior(run, parent)

    def call(out, **environment):
        command = [sys.executable, str(ROOT / "eval.py"), str(run), "--device", "cpu", "--no-fid",
                   "-n", "7", "--batch-size", "2", "--out", str(tmp_path / out)]
        return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)

    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [call("two", RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(2)]
    for process in (call("one"), *both):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    one, two = (json.loads((tmp_path / out / "report.json").read_text()) for out in ("one", "two"))
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert_alike(a, b, 1e-9)
    for a, b in zip(one["differences"], two["differences"], strict=True):
        assert_alike(a, b, 1e-9)
    assert one["codebook"] == two["codebook"]
    assert one["codebook"]["usage_val"] > 0
    for name in ("report.png", "samples.png", "completions.png", "inpainting.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_files_keep_to_the_schema_and_the_table_says_shared_rows_once(two_runs, capsys):
    returned = evaluate(*two_runs, n=6)
    out = two_runs[0] / "compare"

    def refuse(word):
        raise ValueError(word)

    report = json.loads((out / "report.json").read_text(), parse_constant=refuse)
    assert report == returned
    every = [(row["run"], row["decoder"], row["protocol"]) for row in report["rows"]
             if row["bucket"] == "all"]
    assert every == [(str(name), decoder, protocol) for name in two_runs
                     for decoder in DECODERS[:4] for protocol in ("full", "shifted")
                     if (decoder, protocol) != ("asym-nomask", "shifted")]
    assert {row["blend"] for row in report["rows"]} == {None, "add", "concat"}
    assert all(row["lpips"] is None and row["fid"] is None for row in report["rows"])
    assert report["notes"]["lpips"].startswith("not computed: the run has --perceptual none")
    printed = capsys.readouterr().out
    for protocol in ("full", "shifted"):
        assert table(report, protocol=protocol) in printed
        assert table(report, protocol=protocol) in (out / "report.md").read_text()
    assert Image.open(out / "report.png").width > 11 * 256


def test_a_run_with_a_first_stage_only_has_two_rows_and_unfinished_it_says_so(tmp_path, capsys):
    write_first_stage(tmp_path, finished=False)
    report = evaluate(tmp_path, n=2)
    assert list(_rows(report)) == ["vanilla", "paste"]
    assert report["notes"]["run"] == f"training is not finished: {tmp_path} (step 2)"
    assert report["notes"]["run"] in capsys.readouterr().out


def test_the_pictures_are_the_first_six_by_each_decoder(run, monkeypatch):
    drawn = {}
    monkeypatch.setattr(program, "image_grid", lambda columns, path: drawn.update(columns))
    evaluate(run, n=8, batch_size=5)
    assert list(drawn) == [
        "original", "masked", "vanilla", "vanilla, pasted", "ours w/ mask", "ours w/o mask",
        "hole shifted: vanilla, pasted", "hole shifted: ours w/ mask"]
    assert torch.equal(torch.stack(drawn["original"]), images("val", 6))
    assert all(len(column) == 6 for column in drawn.values())


def test_the_table_of_images_has_all_from_which_the_means_and_their_errors_come(
        two_runs, tmp_path, monkeypatch):
    monkeypatch.setattr("data.evaluation_mask", lambda size, index, *_, **__:      # of two images
                        box_mask(size, 0, 0, size, 5 + 3 * (index // 2)))
    report = evaluate(*two_runs, n=8, batch_size=3, per_image=tmp_path / "images.csv")
    with (tmp_path / "images.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len({row["group"] for row in table}) == 4
    count = 0
    for row in report["rows"]:
        run = "" if row["decoder"] in metrics.SHARED else row["run"]
        own = [each for each in table if row["bucket"] in ("all", each["bucket"])
               and all(each[key] == row[key] for key in ("decoder", "protocol"))
               and each["run"] == run]
        assert row["n"] == len(own)
        for name in ("pre_error", "seam"):
            values = np.array([float(each[name]) for each in own])
            e, masks = values - values.mean(), np.array([each["group"] for each in own])
            sums = np.array([e[masks == mask].sum() for mask in set(masks)])
            assert row[name] == pytest.approx(values.mean(), rel=1e-9)
            if len(sums) > 1:
                error = math.sqrt((sums ** 2).sum() * len(sums) / (len(sums) - 1)) / len(e)
                assert row[f"{name}_se"] == pytest.approx(error, rel=1e-9, abs=1e-12)
                count += 1
            else:
                assert row[f"{name}_se"] is None
        assert row["pre_error_median"] == pytest.approx(
            np.median([float(each["pre_error"]) for each in own]))
        if row["bucket"] == "all":
            seconds = sum(float(each["seconds"]) for each in own)
            assert row["images_per_s"] == pytest.approx(8 / seconds)
    assert count >= 16
    assert all(int(10 * float(row["area"])) * 10 == int(row["bucket"].split("-")[0])
               for row in table)
    pairs = {row["protocol"]: row for row in report["differences"] if row["other_run"]}
    for protocol in ("full", "shifted"):
        by = {(row["run"], row["index"]): float(row["seam"]) for row in table
              if (row["decoder"], row["protocol"]) == ("asym", protocol)}
        seams = [by[str(two_runs[1]), str(i)] - by[str(two_runs[0]), str(i)] for i in range(8)]
        assert pairs[protocol]["seam"] == pytest.approx(np.mean(seams), rel=1e-9)


def test_photos_that_cannot_be_decoded_are_replaced_and_told(run, tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for index in range(4):
            photo = Image.new("RGB", (40, 40), (60 * index, 90, 20))
            photo.save(tmp_path / "photos" / split / f"{index}.png")
    (tmp_path / "photos" / "val" / "2.png").write_bytes(b"no picture")
    _, parent = write_first_stage(run)
    write_decoder(run, parent, data="folder", root=str(tmp_path / "photos"))
    report = evaluate(run)
    assert report["n"] == 4
    assert "2.png" in capsys.readouterr().err


def change(run, stage, **extra):
    """Note more in a stage's file."""
    path = run / stage / "last.pt"
    state = run_folder.load(path)
    state["extra"] |= extra
    run_folder.save(path, state)


@pytest.fixture
def with_prior(run):
    _, parent = write_first_stage(run)
    write_prior(run, parent)
    return run


@pytest.fixture
def refitted(tmp_path):
    """A run whose decoder stands on a refit to five codes, which spread as the pictures do."""
    run = tmp_path / "refitted"
    model, parent = write_first_stage(run)
    z_e = model.moments(images("train", 2)).permute(0, 2, 3, 1).reshape(-1, TINY.embed_dim)
    install_codebook(model, z_e[:: len(z_e) // NEW_K][:NEW_K])
    fields = {name: list(v) if isinstance(v, tuple) else v
              for name, v in asdict(model.config).items()}
    write_stage(run, "refit", model.state_dict(), settings() | {"first_stage": fields}, parent,
                extra={"val": FACTS})
    write_decoder(run, run_folder.weights_hash(model.state_dict()))
    return run


def test_the_codes_of_the_evaluated_pictures_are_counted(run):
    report = evaluate(run, n=3, batch_size=2)
    used = load_model(run).first_stage.indices(images("val", 3)).unique()
    assert report["codebook"]["usage_val"] == len(used) / TINY.K
    assert (report["codebook"]["K"], report["codebook"]["usage_train"]) == (TINY.K, None)
    assert report["notes"]["codebook"] == (
        "held out: 3 images; train: not counted, --table ddm1 does")
    assert report["prior"] is None


def test_what_refit_counted_stands_before_and_after(refitted, capsys):
    evaluate(refitted, n=2)
    lines = [[cell.strip() for cell in line.split("|")] for line in
             capsys.readouterr().out.split("\n") if line.startswith(("| before", "| after"))]
    assert [line[1:4] + line[5:6] for line in lines] == [
        ["before ReFiT", "16x16", "8", "50.0%"], ["after ReFiT", "16x16", "5", "100.0%"]]


def test_table_1_of_the_other_paper_counts_both_splits_before_and_after(
        refitted, fake_networks, monkeypatch, capsys):
    monkeypatch.setattr(program, "WORKERS", 0)
    report = evaluate(refitted, table="ddm1", n=4, batch_size=3)
    printed, x = capsys.readouterr().out, images("val", 4)
    for name, word in (("vqgan", "before ReFiT"), ("refit", "after ReFiT")):
        model = load_model(refitted / name / "last.pt")
        K = model.config.K
        train, val = (len(model.indices(seen).unique()) / K for seen in (images("train", 4), x))
        rfid = fid(model.decode(model.encode(x)).clamp(-1, 1), x)
        (line,) = [line for line in printed.split("\n") if line.startswith(f"| {word}")]
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[3:6] == [str(K), f"{train:.1%}", f"{val:.1%}"]
        assert float(cells[7]) == pytest.approx(rfid, abs=0.02)
    assert report["codebook"]["usage_train"] == train
    assert report["codebook"]["rfid"] == pytest.approx(rfid, rel=1e-4)
    assert report["notes"]["codebook"] == "held out: 4 images; train: 4 images"
    assert "| ours (P = 100k) |" in printed


def test_a_kl_latent_has_no_codes_and_cannot_be_counted(tmp_path):
    model = VQGAN(replace(TINY, latent="kl"))
    config = settings() | {"first_stage": asdict(model.config)}
    write_stage(tmp_path, "vqgan", model.state_dict(), config)
    with pytest.raises(UserError, match="--table ddm1: a KL latent has no codes"):
        evaluate(tmp_path, table="ddm1")
    report = evaluate(tmp_path, n=2)
    assert report["codebook"] is None
    assert report["notes"]["codebook"] == "not computed: a KL latent has no codes"


def test_a_finished_prior_has_its_bound_and_its_pictures(with_prior, capsys):
    (with_prior / "codes").mkdir()
    np.save(with_prior / "codes" / "train-0.npy", np.zeros((3, 16, 16), np.uint16))
    change(with_prior, "prior", codes="train-0.npy")
    report = evaluate(with_prior, n=3)
    assert json.loads((with_prior / "report.json").read_text()) == report
    assert report["prior"].keys() == {"maps", "uniform_nats", "steps"} | {
        f"{name}_{what}" for name in ("vlb", "train_vlb", "unigram", "histogram")
        for what in ("nats", "se")}
    assert report["prior"]["steps"][0]["n"] == 6                 # all of them, as they are few
    text, printed = (with_prior / "report.md").read_text(), capsys.readouterr().out
    for name in ("report.png", "samples.png", "completions.png", "inpainting.png"):
        assert f"]({name})" in text
        assert (with_prior / name).stat().st_size
        assert str(with_prior / name) in printed.split("\n")[-2]
    for shown in (text, printed):
        assert re.search(r"\| VQ-DDM, an upper bound +\| +[0-9,.]+ ± [0-9.]+ \|", shown)
        assert "| the same, of training's maps" in shown
        assert "Codes in use (held out: 3 images" in shown
        assert "seconds for 16 |" in shown


def test_a_prior_without_our_decoder_shows_no_inpainting(with_prior):
    (with_prior / "decoder" / "last.pt").unlink()
    report = evaluate(with_prior, n=1)
    assert not (with_prior / "inpainting.png").exists()
    assert (with_prior / "completions.png").exists()
    assert report["prior"]["vlb_nats"] > 0
    assert "train_vlb_nats" not in report["prior"]               # its codes are not there
    assert report["notes"]["prior"].endswith("are left out, as "
                                             f"{with_prior}/codes/maps is not there")


@pytest.mark.parametrize(("what", "reason"), [
    ("unfinished", "training is not finished (step 2)"), ("other weights", "n/a: the prior in"),
    ("other size", "it draws images of 32 px, not of 64")])
def test_a_prior_that_cannot_be_shown_is_told_and_the_rest_stands(what, reason, with_prior, capsys):
    if what == "unfinished":
        change(with_prior, "prior", finished=False)
    if what == "other weights":
        write_prior(with_prior, "0" * 64)
    report = evaluate(with_prior, n=1, size=64 if what == "other size" else None)
    assert report["prior"] is None
    assert reason in report["notes"]["prior"]
    assert reason in capsys.readouterr().out
    assert report["codebook"] is not None
    assert not (with_prior / "samples.png").exists()


def test_a_mistake_ends_the_program_with_2_and_one_line(tmp_path):
    bad = subprocess.run([sys.executable, str(ROOT / "eval.py"), "--device", "cpu", "gone"],
                         cwd=tmp_path, capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: gone: no such")
    assert bad.stderr.count("\n") == 1


@pytest.mark.parametrize(("flags", "reason"), [
    ("run -n 0", "-n, .* at least 1"), ("run --batch-size 0", "--batch-size .* at least 1"),
    ("run --size 0", "--size are at least 1"),
    ("", "give either runs"), ("run --pred p --real r", "give either runs"),
    ("--pred p", "--pred needs --real DIR"), ("run --masks m", "--masks needs --real"),
    ("run --unpaired --real r", "--unpaired compares --pred DIR with"),
    ("--pred p --unpaired", "give --real DIR or --data"),
    ("--pred p --unpaired --real r --data signs", "give --real DIR or --data"),
    ("--pred p --real r --masks m --unpaired", "--unpaired gives only FID"),
    ("--pred p --real r --unpaired --no-fid", "--unpaired gives only FID"),
    ("--pred p --real r --unpaired --table 2", "--table 2 is about pairs"),
    ("--pred p --real r --size 64", "--size are about a data set"),
    ("run --real r --split test", "--split, .* are about a data set"),
    ("run --table 1", "--table 1 is about pictures that a generator made"),
    ("--pred p --real r --table 2", "--table 2 needs --masks"),
    ("--pred p --real r --masks m --table 4", "--table 4 has a CLIP score"),
    ("run --table 6", "--table 6 is about samples: write them with sample.py"),
    ("run --real r --table ddm1", "--table ddm1 is about a run alone"),
    ("--pred p --real r --refs f", "--refs needs --masks DIR")])
def test_flags_out_of_range_missing_or_contradictory_say_what_to_give(flags, reason, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", *flags.split()])
    with pytest.raises(UserError, match=reason):
        program.main()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Five photos, what another program made of them, masks of 20-50 %, and references."""
    rng = np.random.default_rng(0)
    for index in range(5):
        photo = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        made = (photo * 0.9 + 3 * index).clip(0, 255).astype(np.uint8)
        mask = 255 * evaluation_mask(SIZE, index)
        reference = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        for name, array in (("real", photo), ("pred", made), ("masks", mask), ("refs", reference)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / name / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _call(monkeypatch, flags, out="pred-report"):
    """Run the program; the report that it wrote."""
    monkeypatch.setattr(sys, "argv", ["eval.py", "--device", "cpu", *flags.split()])
    program.main()
    return json.loads((Path(out) / "report.json").read_text())


def _read(folder):
    """(N,3,H,W) in [-1,1], or (N,H,W) of masks."""
    arrays = np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).iterdir())])
    return torch.tensor(arrays).movedim(-1, 1) / 127.5 - 1 if arrays.ndim == 4 else arrays > 127


def _errors(pred, real, mask):
    return [(((a.clamp(-1, 1) - b) / 2) ** 2)[:, ~m].mean().item()
            for a, b, m in zip(pred, real, mask)]


def test_pictures_made_by_anything_are_measured_as_they_are(folders, monkeypatch, capsys):
    report = _call(monkeypatch, "--pred pred --real real --masks masks --no-fid --lpips none "
                                "--table 2")
    row, errors = _rows(report)["files"], _errors(_read("pred"), _read("real"), _read("masks"))
    assert row["pre_error"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert (row["run"], row["n"], row["images_per_s"], row["split"]) == ("pred", 5, None, None)
    assert {row["protocol"] for row in report["rows"]} == {"full"}
    assert report["masks"] == {"kind": "files", "size": None, "seed": None}
    assert sum(row["n"] for row in report["rows"] if row["bucket"] != "all") == 5
    assert "| paper: StableDiffusion " in capsys.readouterr().out


def test_every_column_has_a_value_where_its_network_is_there(folders, monkeypatch):
    class Fake:
        mean, size, least_side = torch.zeros(1), 24, 0

        def __init__(self, *_):
            pass

        def to(self, *_, **__):
            return self

        def __call__(self, a, b=None):
            return inception(a) if b is None else (a - b).abs().mean((1, 2, 3))

    class FakeClip(Fake):
        def __call__(self, a, b=None):
            return a.flatten(1)[:, ::1000]

    monkeypatch.setattr("metrics.FEWEST_FOR_FID", 5)
    for name, fake in (("LPIPS", Fake), ("InceptionV3", Fake), ("CLIPImageEncoder", FakeClip)):
        monkeypatch.setattr(f"metrics.{name}", fake)
    row = _rows(_call(monkeypatch, "--pred pred --real real --masks masks --refs refs --clip tower "
                                   "--table 4 --batch-size 2"))["files"]
    empty = {"blend", "size", "images_per_s", "split"}
    assert all(row[name] is not None for name in row.keys() - empty)
    assert row["lpips_net"] == "vgg"


def test_a_folder_that_cannot_be_made_is_a_mistake_found_before_anything_is_measured(
        run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("metrics.decode_all", None)
    for out in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match=r"--out: .*file.* cannot be made a folder"):
            evaluate(run, out=str(out), n=1)


def test_sets_that_are_no_pairs_have_a_fid_and_an_inception_score(
        folders, fake_networks, monkeypatch):
    for index in range(3):
        (folders / "real" / f"{index}.png").rename(folders / "real" / f"other{index}.png")
    report = _call(monkeypatch, "--pred pred --real real --unpaired -n 4 --batch-size 3")
    row, pred, real = _rows(report)["files"], _read("pred")[:4], _read("real")
    assert row["fid"] == pytest.approx(fid(pred, real), rel=1e-5)
    mean, _ = inception_score(inception(pred)[1], splits=4)
    assert row["is_mean"] == pytest.approx(mean, rel=1e-5)
    assert row["n"] == 4
    assert row["pre_error"] is row["lpips"] is None
    assert report["notes"]["lpips"] == "not computed: no pairs"


def test_fid_of_few_pictures_says_why_it_is_left_out(folders, fake_networks, monkeypatch, capsys):
    monkeypatch.setattr("metrics.FEWEST_FOR_FID", 2048)
    report = _call(monkeypatch, "--pred pred --real real --unpaired")
    assert report["rows"][0]["fid"] is None
    assert report["rows"][0]["is_mean"] > 0
    assert report["notes"]["fid"] == "n/a: below 2,048 images it is mostly bias"
    assert "FID: n/a: below 2,048 images it is mostly bias" in capsys.readouterr().out
    report = _call(monkeypatch, "--pred pred --real real --masks masks --table 1")
    assert {row["fid"] for row in report["rows"]} == {None}
    assert report["notes"]["fid"] in capsys.readouterr().out


def test_samples_are_compared_with_a_data_sets_own_pictures(
        folders, fake_networks, monkeypatch, capsys):
    row = _rows(_call(monkeypatch, "--pred pred --data signs --unpaired --table 6"))["files"]
    assert row["fid"] == pytest.approx(fid(_read("pred"), images("val", 5)), rel=1e-5)
    printed = capsys.readouterr().out
    assert "5 pictures in pred against 5 of 1,000 drawn street scenes" in printed
    assert "| paper: Ours (large) w/o mask" in printed
    (line,) = [line for line in printed.split("\n") if line.startswith("| pred")][1:]
    assert f"{row['fid']:.2f}" in line
    _call(monkeypatch, "--pred pred --data signs --unpaired --table ddm2")
    assert "| ours (K = 1024 w/ ReFiT) " in capsys.readouterr().out


def test_runs_decode_photos_and_masks_of_ones_own(folders, run, monkeypatch):
    flags = f"{run} --real real --masks masks --no-fid --out out"
    report, model = _call(monkeypatch, flags, "out"), load_model(run)
    x, mask = _read("real"), _read("masks")
    with torch.no_grad():
        x_hat = model.decode(model.encode(x), image=x, mask=torch.tensor(mask)[:, None].float())
    expected = np.mean(_errors(x_hat, x, mask))
    assert _rows(report)["asym"]["pre_error"] == pytest.approx(expected, rel=1e-4)
    assert _rows(report, "shifted")["asym"]["pre_error"] != _rows(report)["asym"]["pre_error"]
    assert report["codebook"] is None
    unmasked = _call(monkeypatch, f"{run} --real real --no-fid --out out", "out")
    assert {(row["decoder"], row["protocol"]) for row in unmasked["rows"]} == {
        ("vanilla", "full"), ("asym-nomask", "full")}
    assert Path("out", "report.png").exists()
    for path in (*Path("real").iterdir(), *Path("masks").iterdir()):
        Image.open(path).crop((0, 0, 31, 30)).save(path)
    with pytest.raises(UserError, match=r"^real/0.png: 31 x 30 px; sides must be multiples of 2"):
        _call(monkeypatch, flags)


def test_a_photo_that_is_too_large_to_be_decoded_whole_is_refused_before_any_work(
        folders, run, monkeypatch):
    monkeypatch.setattr(program, "tabulate", None)
    Image.new("RGB", (1024, 514)).save("real/3.png")             # f = 2: 512 x 257 cells
    with pytest.raises(UserError, match=r"^real/3.png: 1024 x 514 px; .* at most 262,144 px for"):
        _call(monkeypatch, f"{run} --real real --no-fid --lpips none --out out")


def test_lpips_leaves_out_what_is_too_small_for_its_pools_and_says_so(folders, monkeypatch, capsys):
    class Fake(torch.nn.Module):
        least_side = 20

        def forward(self, a, b):
            assert min(a.shape[2:]) >= 20
            return (a - b).abs().mean((1, 2, 3))

    monkeypatch.setattr("metrics.LPIPS", lambda *_: Fake())
    flags = "--pred pred --real real --no-fid --lpips alex"
    whole = _rows(_call(monkeypatch, flags))["files"]["lpips"]
    assert whole is not None
    assert "smaller and left out" not in capsys.readouterr().out
    for folder in ("real", "pred"):
        for name in ("1.png", "3.png"):
            Image.open(f"{folder}/{name}").crop((0, 0, 32, 19)).save(f"{folder}/{name}")
    report = _call(monkeypatch, f"{flags} --per-image rows.csv")
    said = capsys.readouterr().out
    why = "alex needs 20 px: 2 images are smaller and left out, the first is real/1.png"
    assert said.index(why) < said.index("evaluation ")           # before the work
    assert said.count(why) == 2                                  # and in the report
    with open("rows.csv", newline="") as file:
        values = [row["lpips"] for row in csv.DictReader(file)]
    assert [value == "" for value in values] == [False, True, False, True, False]
    mean = np.mean([float(value) for value in values if value])
    assert _rows(report)["files"]["lpips"] == pytest.approx(mean)


def test_progress_counts_images_so_that_mixed_sizes_have_one_line_at_the_end(
        folders, monkeypatch, capsys):
    for folder in ("real", "pred"):
        for k in range(5):
            Image.open(f"{folder}/{k}.png").crop((0, 0, 32, 20 + k)).save(f"{folder}/{k}.png")
    _call(monkeypatch, "--pred pred --real real --no-fid --lpips none")
    lines = re.findall("^evaluation .*", capsys.readouterr().out, re.MULTILINE)
    assert [line[:16] for line in lines] == ["evaluation 5/5  "]


@pytest.mark.parametrize("name", [".", "./", "../pred", "below/.."])
def test_the_report_stands_beside_the_pictures_however_their_folder_is_named(
        folders, name, monkeypatch):
    (folders / "pred" / "below").mkdir()
    monkeypatch.chdir("pred")
    _call(monkeypatch, f"--pred {name} --real ../real --no-fid --lpips none", "../pred-report")
    assert [path.name for path in folders.rglob("*report")] == ["pred-report"]


def test_a_terminal_that_fails_costs_no_report(folders, monkeypatch):
    """The report is of hours of work, and is written before the first line of it is printed."""
    def broken(text, **_):
        if "psnr_known" in text or "dB" in text:
            raise BrokenPipeError

    monkeypatch.setattr(program, "print0", broken)
    flags = "--pred pred --real real --masks masks --no-fid --lpips none --per-image rows.csv"
    with pytest.raises(BrokenPipeError):
        _call(monkeypatch, flags)
    for name in ("pred-report/report.md", "pred-report/report.json", "rows.csv"):
        assert Path(name).stat().st_size > 100


def test_a_program_works_in_a_hostile_environment_on_names_that_are_not_utf_8(folders):
    """The C locale, warnings as errors, no home, a notebook's backend, stdout in Latin-1."""
    name = os.fsdecode(b"M\xfcnchen")
    Path(name).mkdir()
    Path("real").rename(Path(name, "real"))
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                   "PYTHONWARNINGS": "error", "PYTHONIOENCODING": "latin-1", "HOME": "/dev/null",
                   "MPLCONFIGDIR": "/dev/null", "MPLBACKEND": "nonsense"}
    real = os.path.join(name, "real")
    flags = ["--masks", "masks", "--no-fid", "--lpips", "none", "--per-image", "rows.csv"]
    run = subprocess.run([sys.executable, ROOT / "eval.py", "--pred", real, "--real", real, *flags],
                         env=os.environ | environment, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr               # matplotlib says that it has no home
    assert b"evaluating M\\udcfcnchen/real: 5 of 5" in run.stdout
    text = Path(f"{real}-report", "report.md").read_text(encoding="utf-8")
    assert "M\\udcfcnchen" in text
    assert "M\\udcfcnchen" in Path("rows.csv").read_text(encoding="utf-8")


def test_runs_that_cannot_share_a_table_are_refused(two_runs, tmp_path):
    _, parent = write_first_stage(tmp_path / "other", seed=5)
    write_decoder(tmp_path / "other", parent)
    _, parent = write_first_stage(two_runs[0])
    write_decoder(tmp_path / "large", parent, vqgan=str(two_runs[0]), size=64)
    run = two_runs[0]
    for other, reason in ((tmp_path / "other", "different first-stage weights"),
                          (tmp_path / "large", "--size of .*large is 64"), (run, "given twice"),
                          (tmp_path / "gone", "no such run folder")):
        with pytest.raises(UserError, match=reason):
            program.open_runs([run, other], "cpu")
