import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ports import free_port
from tiny_reports import assert_alike
from tiny_runs import (
    SIZE,
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
from data import SIGNS_LENGTH, Signs
from distributed import UserError
from eval import Options
from fid import FeatureStatistics, inception_score
from masks import evaluation_mask
from paper_tables import DECODERS, table, validate

ROOT = Path(__file__).resolve().parent.parent
QUICK = Options(fid=False)               # no network but the runs' own


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


def _rows(report, bucket="all"):
    return {row["decoder"]: row for row in report["rows"] if row["bucket"] == bucket}


# -- figures ---------------------------------------------------------------------------------------


def test_a_perfect_decoder_has_no_error_no_seam_and_infinite_psnr(run, monkeypatch):
    monkeypatch.setattr(program.open_runs.__globals__["AsymVQGAN"], "decode",
                        lambda model, z, image=None, mask=None:
                        torch.zeros(len(z), 3, SIZE, SIZE) if image is None else image.clone())
    report = program.evaluate_runs([run], QUICK, n=4)
    row = _rows(report)["asym"]
    assert row["pre_error"] == 0
    assert row["seam"] == 0
    assert row["psnr_known"] is None
    assert "∞" in table(report).split("\n")[3]


def test_the_figures_are_those_of_a_slow_loop_over_the_pictures(run):
    rows = _rows(program.evaluate_runs([run], Options(batch_size=2, fid=False), n=5))
    model, signs, errors, psnrs = program.open_runs([run], QUICK.device)[0].loaded.model, Signs(
        "val", SIZE), [], []
    for index in range(5):
        picture = signs.image(index)
        x = torch.tensor(picture).permute(2, 0, 1)[None] / 127.5 - 1
        mask = evaluation_mask(SIZE, index)
        m = torch.tensor(mask)[None, None].float()
        with torch.no_grad():
            x_hat = model.decode(model.encode(x), image=x, mask=m)
        unit = (x_hat[0].permute(1, 2, 0).numpy().astype(float).clip(-1, 1) + 1) / 2
        known = mask == 0
        errors.append(((unit - picture / 255) ** 2)[known].mean())
        psnrs.append(-10 * math.log10(errors[-1]))
    assert rows["asym"]["pre_error"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert rows["asym"]["psnr_known"] == pytest.approx(np.mean(psnrs), rel=1e-5)
    assert rows["asym"]["n"] == 5


def test_pasting_keeps_the_known_pixels_exactly_but_leaves_a_seam(run):
    row = _rows(program.evaluate_runs([run], QUICK, n=8))["paste"]
    assert row["pre_error"] == 0
    assert row["seam"] > 0


def test_means_do_not_depend_on_the_batch_size(run):
    one, three = (program.evaluate_runs([run], Options(batch_size=size, fid=False), n=7)
                  for size in (1, 3))
    for a, b in zip(one["rows"], three["rows"], strict=True):
        assert (a["decoder"], a["bucket"], a["n"]) == (b["decoder"], b["bucket"], b["n"])
        assert a["pre_error"] == pytest.approx(b["pre_error"], rel=1e-5, abs=1e-12)
        assert a["seam"] == pytest.approx(b["seam"], rel=1e-4, abs=1e-6)


def test_the_pictures_are_those_of_seed_0_whatever_the_training_seed(tmp_path):
    for seed in (0, 3):
        _, parent = write_first_stage(tmp_path / str(seed))
        write_decoder(tmp_path / str(seed), parent, seed=1)
    state = run_folder.load(tmp_path / "3" / "decoder" / "last.pt")
    state["config"]["seed"] = 3
    run_folder.save(tmp_path / "3" / "decoder" / "last.pt", state)
    reports = [program.evaluate_runs([tmp_path / str(seed)], QUICK, n=3) for seed in (0, 3)]
    assert [report["seed"] for report in reports] == [0, 3]
    first, second = ([row | {"run": "", "images_per_s": 0} for row in report["rows"]]
                     for report in reports)
    assert first == second


def test_nothing_is_measured_in_tf32_or_with_gradients(run, monkeypatch):
    backends, seen = (torch.backends.cudnn.conv, torch.backends.cuda.matmul), []
    original = program.tally_batches

    def note(*args):
        seen.extend(backend.fp32_precision for backend in backends)
        seen.append(torch.is_grad_enabled())
        return original(*args)

    monkeypatch.setattr(program, "tally_batches", note)
    program.evaluate_runs([run], QUICK, n=1)
    assert seen == ["ieee", "ieee", False]


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
    assert one["codebook"] == two["codebook"]
    assert one["codebook"]["usage_val"] > 0
    for name in ("report.png", "report_crops.png", "samples.png", "completions.png",
                 "inpainting.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# -- the report ------------------------------------------------------------------------------------


def test_the_files_keep_to_the_schema_and_the_table_says_shared_rows_once(two_runs, capsys):
    returned = program.evaluate_runs(two_runs, QUICK, n=6)
    out = two_runs[0] / "compare"

    def refuse(word):
        raise ValueError(word)

    report = json.loads((out / "report.json").read_text(), parse_constant=refuse)
    assert report == returned
    validate(report)
    every = [(row["run"], row["decoder"]) for row in report["rows"] if row["bucket"] == "all"]
    assert every == [(str(name), decoder) for name in two_runs for decoder in DECODERS[:4]]
    first, second = (list(filter(lambda row, run=run: row["run"] == str(run)
                                 and row["decoder"] == "vanilla", report["rows"]))
                     for run in two_runs)
    assert [row | {"run": ""} for row in first] == [row | {"run": ""} for row in second]
    assert {row["blend"] for row in report["rows"]} == {None, "add", "concat"}
    assert all(row["lpips"] is None and row["fid"] is None for row in report["rows"])
    assert report["notes"]["lpips"].startswith("not computed: the run has --perceptual none")
    printed = capsys.readouterr().out
    assert table(report) in printed
    assert table(report) in (out / "report.md").read_text()
    assert table(report).count("(vanilla)") == table(report).count("(paste)") == 1
    assert len(table(report).split("\n")) == 2 + 6
    for name in ("report.png", "report_crops.png"):
        assert Image.open(out / name).width > 7 * 256


def test_a_run_with_a_first_stage_only_has_its_two_rows(tmp_path):
    write_first_stage(tmp_path)
    report = program.evaluate_runs([tmp_path], QUICK, n=3)
    assert list(_rows(report)) == ["vanilla", "paste"]
    assert (tmp_path / "report.json").exists()


def test_an_unfinished_run_is_said_to_be_one(tmp_path, capsys):
    model, _ = write_first_stage(tmp_path)
    write_stage(tmp_path, "vqgan", model.state_dict(), settings(), finished=False)
    report = program.evaluate_runs([tmp_path], QUICK, n=2)
    assert report["notes"]["run"] == f"training is not finished: {tmp_path} (step 2)"
    assert report["notes"]["run"] in capsys.readouterr().out


def test_a_prior_comes_with_its_pictures_and_figures(run, capsys):
    _, parent = write_first_stage(run)
    write_prior(run, parent)
    report = program.evaluate_runs([run], QUICK, n=3)
    assert json.loads((run / "report.json").read_text()) == report
    assert report["prior"]["steps"][0]["n"] == 6                 # all of them, as they are few
    assert report["codebook"]["K"] == 8
    text, printed = (run / "report.md").read_text(), capsys.readouterr().out
    for name in ("samples.png", "completions.png", "inpainting.png"):
        assert f"]({name})" in text
        assert str(run / name) in printed.split("\n")[-2]
    for shown in (text, printed):
        assert "Codes in use (held out: 3 pictures" in shown
        assert "| steps | sampler | seconds for 16 |" in shown


def test_table_1_of_the_other_paper_looks_at_all_pictures_unless_told_otherwise(run, monkeypatch):
    asked = []
    monkeypatch.setitem(SIGNS_LENGTH, "val", 4)
    monkeypatch.setattr("code_report.CodeReport.count", lambda self, n, *_: asked.append(n))
    for n in (None, 3):
        program.evaluate_runs([run], Options(fid=False, table="ddm1"), n=n)
    assert asked == [None, 3]


def test_table_1_of_the_other_paper_is_counted_and_printed(run, monkeypatch, capsys):
    monkeypatch.setattr("code_report.WORKERS", 0)
    _call(monkeypatch, run, "--table", "ddm1", "-n", "3", "--no-fid")
    report = _saved(run)
    assert report["codebook"]["usage_train"] > 0
    assert report["notes"]["codebook"] == "held out: 3 pictures; train: 3"
    assert "| ReFiT, P = 100k |" in capsys.readouterr().out


def test_photos_that_cannot_be_decoded_are_replaced(run, tmp_path, capsys):
    photos = tmp_path / "photos" / "val"
    for index in range(4):
        (photos.parent / "train").mkdir(parents=True, exist_ok=True)
        photos.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (60 * index, 90, 20)).save(photos / f"{index}.png")
        Image.new("RGB", (40, 40)).save(photos.parent / "train" / f"{index}.png")
    (photos / "2.png").write_bytes(b"no picture")
    _, parent = write_first_stage(run)
    write_decoder(run, parent, data="folder", root=str(photos.parent))
    report = program.evaluate_runs([run], QUICK)
    assert report["n"] == 4
    assert "2.png: cannot be decoded" in capsys.readouterr().err


# -- mistakes --------------------------------------------------------------------------------------


def test_the_program_ends_with_0_or_with_2_and_one_line(run, tmp_path):
    def call(*arguments):
        command = [sys.executable, str(ROOT / "eval.py"), "--device", "cpu", "--no-fid", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    good = call("run", "-n", "2", "--out", "there")
    assert good.returncode == 0, good.stderr
    assert (tmp_path / "there" / "report.json").exists()
    assert "report_crops.png" in good.stdout.split("\n")[-2]
    bad = call("gone")
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: gone: no such")
    assert bad.stderr.count("\n") == 1


def test_numbers_below_one_are_a_mistake_that_names_the_flag(monkeypatch):
    for flag in ("-n", "--batch-size", "--steps"):
        monkeypatch.setattr(sys, "argv", ["eval.py", "run", flag, "0"])
        with pytest.raises(UserError, match=flag):
            program.main()


def test_flags_that_lack_or_contradict_others_are_mistakes_that_say_what_to_give(monkeypatch):
    for flags, reason in (
            ("", "give either runs"), ("run --pred p --real r", "give either runs"),
            ("--pred p", "--pred needs --real DIR"), ("run --masks m", "--masks needs --real"),
            ("--pred p --real r --latents z", "--latents needs a decoder"),
            ("run --real r --latents z", "--latents needs --scaling-factor: 0.18215"),
            ("run --unpaired", "--unpaired is for FID and inception score of two sets"),
            ("--pred p --real r --masks m --unpaired", "--unpaired is for FID"),
            ("run --table 1", "--table 1 is about pictures that a generator made"),
            ("--pred p --real r --table 2", "--table 2 needs --masks"),
            ("--pred p --real r --masks m --table 4", "--table 4 has a CLIP score"),
            ("--pred p --real r --table 6", "--table 6 is about a run and its own data set"),
            ("run --real r --table ddm1", "--table ddm1 is about a run"),
            ("--pred p --real r --nearest", "--nearest is about a run"),
            ("run other --nearest", "--nearest is about one run"),
            ("--pred p --real r --refs f", "--refs needs --masks DIR"),
            ("--pred p --real r --unpaired --no-fid", "--unpaired is for FID"),
            ("run --nearest --table 2", "--nearest is about one run, and no table"),
            ("run --nearest --size 64", "--size: --nearest has pictures of the prior's own size"),
            ("run --table 6 --size 64", "--size: --table 6 has pictures of the prior's own size"),
            ("run --nearest --data signs", "--data: --nearest is about the run's own pictures")):
        monkeypatch.setattr(sys, "argv", ["eval.py", *flags.split()])
        with pytest.raises(UserError, match=reason):
            program.main()


# -- pictures and latents made elsewhere -----------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
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
    return tmp_path


def _call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments), "--device", "cpu"])
    program.main()


def _saved(folder):
    return json.loads((folder / "report.json").read_text())


def test_pictures_made_by_anything_are_measured_as_they_are(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    _call(monkeypatch, "--pred", "pred", "--real", "real", "--masks", "masks", "--no-fid",
          "--lpips", "none", "--table", "2")
    report, errors = _saved(folders / "pred-report"), []
    for index in range(5):
        photo, made, mask = (np.asarray(Image.open(folders / name / f"{index}.png"), float) / 255
                             for name in ("real", "pred", "masks"))
        errors.append(((photo - made) ** 2)[mask == 0].mean())
    row = _rows(report)["files"]
    assert row["pre_error"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert (row["run"], row["n"], row["images_per_s"]) == ("pred", 5, None)
    assert report["masks"] == {"kind": "files", "size": None, "seed": None}
    assert sum(row["n"] for row in report["rows"] if row["bucket"] != "all") == 5
    assert "| paper: StableDiffusion |" in capsys.readouterr().out


def test_every_column_has_a_value_where_its_network_is_there(folders, monkeypatch):
    def network(images):
        features = torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1).repeat(1, 11)
        return features[:, :2048], features[:, :1008]

    class Fake:
        size, mean = 32, torch.zeros(1)

        def __init__(self, *_):
            pass

        def to(self, *_, **__):
            return self

        def __call__(self, a, b=None):
            return network(a) if b is None else (a - b).abs().mean((1, 2, 3))

    class FakeClip(Fake):
        def __call__(self, a, b=None):
            return a.flatten(1)[:, ::1000]

    for name, fake in (("LPIPS", Fake), ("InceptionV3", Fake), ("CLIPImageEncoder", FakeClip)):
        monkeypatch.setattr(f"metrics.{name}", fake)
    monkeypatch.chdir(folders)
    _call(monkeypatch, "--pred", "pred", "--real", "real", "--masks", "masks", "--refs", "refs",
          "--clip", "clip", "--table", "4", "--batch-size", "2")
    row = _rows(_saved(folders / "pred-report"))["files"]
    assert all(row[name] is not None for name in row if name not in (
        "blend", "size", "images_per_s"))
    assert row["lpips_net"] == "vgg"


def test_a_folder_that_cannot_be_made_is_a_mistake_found_before_anything_is_measured(
        run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(program, "tally_batches", None)
    for out in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match=r"--out: .*file.* cannot be made a folder"):
            program.evaluate_runs([run], Options(out=str(out)), n=1)


def test_sets_that_are_no_pairs_have_a_fid_and_an_inception_score(folders, monkeypatch):
    def network(images):
        features = torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1).repeat(1, 11)
        return features[:, :2048], features[:, :1008] * 9

    networks = metrics.Networks(inception=network, notes={})
    monkeypatch.setattr(program, "open_networks", lambda *_, **__: networks)
    for index in range(3):
        (folders / "real" / f"{index}.png").rename(folders / "real" / f"other{index}.png")
    monkeypatch.chdir(folders)
    _call(monkeypatch, "--pred", "pred", "--real", "real", "--unpaired", "-n", "4",
          "--batch-size", "3")
    row = _rows(_saved(folders / "pred-report"))["files"]
    sets = [[network(torch.tensor(np.array(Image.open(path))).permute(2, 0, 1)[None] / 127.5 - 1)
             for path in sorted((folders / name).iterdir())[:most]]
            for name, most in (("pred", 4), ("real", 5))]
    ours, real = (FeatureStatistics(2048) for _ in sets)
    for statistics, outputs in zip((ours, real), sets):
        statistics.update(torch.cat([features for features, _ in outputs]))
    assert row["fid"] == pytest.approx(ours.frechet(real), rel=1e-5)
    mean, _ = inception_score(torch.cat([logits for _, logits in sets[0]]), splits=4)
    assert row["is_mean"] == pytest.approx(mean, rel=1e-5)
    assert row["n"] == 4
    assert row["pre_error"] is row["lpips"] is None
    assert _saved(folders / "pred-report")["notes"]["lpips"] == "not computed: no pairs"


def test_runs_decode_given_latents_of_given_photos_and_masks(folders, run, monkeypatch):
    def offline(address, *args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    model = program.open_runs([run], "cpu")[0].loaded.model
    (folders / "latents").mkdir()
    for index in range(5):
        photo = np.asarray(Image.open(folders / "real" / f"{index}.png"))
        x = torch.tensor(photo).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            np.save(folders / "latents" / f"{index}.npy", model.encode(x).numpy() * 0.5)
    given = ("--real", folders / "real", "--masks", folders / "masks", "--no-fid")
    _call(monkeypatch, run, *given, "--out", folders / "encoded")
    _call(monkeypatch, run, *given, "--out", folders / "decoded", "--table", "5", "--latents",
          folders / "latents", "--scaling-factor", "0.5", "--refs", folders / "refs")
    encoded, decoded = _saved(folders / "encoded"), _saved(folders / "decoded")
    for a, b in zip(encoded["rows"], decoded["rows"], strict=True):
        assert a["pre_error"] == pytest.approx(b["pre_error"], rel=1e-4, abs=1e-12)
    assert _rows(decoded)["asym"]["pre_error"] > 0
    assert (folders / "decoded" / "report.png").exists()
