import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import SIZE, settings, write_decoder, write_first_stage, write_run, write_stage

import checkpoint
import eval as program
from data import Signs
from distributed import UserError
from masks import area_bucket, evaluation_mask
from report import BUCKETS, DECODERS, table, validate

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


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


def _evaluate(runs, n=8, batch_size=4, lpips=None):
    tally, _ = program.evaluate(runs, Signs("val", SIZE), n, batch_size, CPU, lpips)
    return program.make_report(runs, tally, n, CPU)


# -- figures ---------------------------------------------------------------------------------------


def test_a_perfect_decoder_has_no_error_no_seam_and_infinite_psnr(run, monkeypatch):
    runs = program.open_runs([run], CPU)
    monkeypatch.setattr(runs[0].loaded.model, "decode", lambda z, image=None, mask=None:
                        torch.zeros(len(z), 3, SIZE, SIZE) if image is None else image.clone())
    row = _rows(_evaluate(runs))["asym"]
    assert row["pre_error"] == 0
    assert row["seam"] == 0
    assert row["psnr_known"] is None
    assert "∞" in table(_evaluate(runs)).split("\n")[3]


def test_the_figures_are_those_of_a_slow_loop_over_the_pictures(run):
    runs = program.open_runs([run], CPU)
    rows, errors, psnrs = _rows(_evaluate(runs, n=5, batch_size=2)), [], []
    model, signs = runs[0].loaded.model, Signs("val", SIZE)
    for index in range(5):
        picture, _ = signs.read(index)
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


def test_every_decoder_gets_the_latents_of_the_full_image(two_runs):
    runs = program.open_runs(two_runs, CPU)
    x, mask = torch.rand(2, 3, SIZE, SIZE) * 2 - 1, torch.zeros(2, 1, SIZE, SIZE)
    mask[:, :, 10:] = 1
    with torch.no_grad():
        outputs = {key: x_hat for key, (x_hat, _) in program.decode_all(runs, x, mask).items()}
        model = runs[1].loaded.model
        z = model.encode(x)
        assert torch.equal(outputs[None, "vanilla"], model.first_stage.decode(z))
        assert torch.equal(outputs[runs[1].name, "asym"], model.decode(z, image=x, mask=mask))
        assert torch.equal(outputs[runs[1].name, "asym-nomask"], model.decode(z))
    assert torch.equal(outputs[None, "paste"][:, :, :10], x[:, :, :10])
    assert torch.equal(outputs[None, "paste"][:, :, 10:], outputs[None, "vanilla"][:, :, 10:])


def test_pasting_keeps_the_known_pixels_exactly_but_leaves_a_seam(run):
    row = _rows(_evaluate(program.open_runs([run], CPU)))["paste"]
    assert row["pre_error"] == 0
    assert row["seam"] > 0


def test_means_do_not_depend_on_the_batch_size(run):
    runs = program.open_runs([run], CPU)
    one, three = _evaluate(runs, 7, 1), _evaluate(runs, 7, 3)
    for a, b in zip(one["rows"], three["rows"], strict=True):
        assert (a["decoder"], a["bucket"], a["n"]) == (b["decoder"], b["bucket"], b["n"])
        assert a["pre_error"] == pytest.approx(b["pre_error"], rel=1e-5, abs=1e-12)
        assert a["seam"] == pytest.approx(b["seam"], rel=1e-4, abs=1e-6)


def test_bins_hold_the_images_of_their_area_and_add_up_to_all(run):
    report = _evaluate(program.open_runs([run], CPU), n=12)
    bins = {bucket: _rows(report, bucket)["vanilla"] for bucket in BUCKETS
            if _rows(report, bucket)}
    areas = [area_bucket(evaluation_mask(SIZE, index)) for index in range(12)]
    assert {bucket: row["n"] for bucket, row in bins.items() if bucket != "all"} == {
        bucket: areas.count(bucket) for bucket in set(areas)}
    assert len(bins) > 2
    every = bins.pop("all")
    mean = sum(row["n"] * row["pre_error"] for row in bins.values()) / 12
    assert every["pre_error"] == pytest.approx(mean, rel=1e-9)


def test_the_pictures_are_those_of_seed_0_whatever_the_training_seed(tmp_path):
    for seed in (0, 3):
        _, parent = write_first_stage(tmp_path / str(seed))
        write_decoder(tmp_path / str(seed), parent, seed=1)
    state = checkpoint.load(tmp_path / "3" / "decoder" / "last.pt")
    state["config"]["seed"] = 3
    checkpoint.save(tmp_path / "3" / "decoder" / "last.pt", state)
    reports = [program.evaluate_runs([tmp_path / str(seed)], n=3) for seed in (0, 3)]
    assert [report["seed"] for report in reports] == [0, 3]
    first, second = ([row | {"run": "", "images_per_s": 0} for row in report["rows"]]
                     for report in reports)
    assert first == second


def test_nothing_is_measured_in_tf32(run, monkeypatch):
    backends, seen = (torch.backends.cudnn.conv, torch.backends.cuda.matmul), []
    before = [backend.fp32_precision for backend in backends]
    original = program.evaluate

    def note(*args):
        seen.extend(backend.fp32_precision for backend in backends)
        return original(*args)

    monkeypatch.setattr(program, "evaluate", note)
    program.evaluate_runs([run], n=1)
    assert seen == ["ieee", "ieee"]
    assert [backend.fp32_precision for backend in backends] == before


def test_lpips_sees_whole_pictures_clamped(run):
    def distance(a, b):
        assert a.abs().max() <= 1
        return (a - b).abs().mean((1, 2, 3))

    row = _rows(_evaluate(program.open_runs([run], CPU), lpips=distance))["paste"]
    assert row["lpips"] > 0                                  # the hole counts, too


def test_outputs_that_are_not_finite_end_the_evaluation(run, monkeypatch):
    runs = program.open_runs([run], CPU)
    monkeypatch.setattr(runs[0].loaded.model, "decode", lambda z, image=None, mask=None:
                        torch.full((len(z), 3, SIZE, SIZE), math.nan))
    with pytest.raises(UserError, match=r"asym of .*run gives values that are not finite"):
        _evaluate(runs)


# -- the report ------------------------------------------------------------------------------------


def test_the_files_keep_to_the_schema_and_the_table_says_shared_rows_once(two_runs, capsys):
    returned = program.evaluate_runs(two_runs, n=6)
    out = two_runs[0] / "compare"

    def refuse(word):
        raise ValueError(word)

    report = json.loads((out / "report.json").read_text(), parse_constant=refuse)
    assert report == returned
    validate(report)
    every = [(row["run"], row["decoder"]) for row in report["rows"] if row["bucket"] == "all"]
    assert every == [(str(name), decoder) for name in two_runs for decoder in DECODERS]
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
    assert printed.count("(vanilla)") == printed.count("(paste)") == 1
    assert len(table(report).split("\n")) == 2 + 6
    for name in ("report.png", "report_crops.png"):
        assert Image.open(out / name).width > 7 * 256


def test_a_run_with_a_first_stage_only_has_its_two_rows(tmp_path):
    write_first_stage(tmp_path)
    report = program.evaluate_runs([tmp_path], n=3)
    assert list(_rows(report)) == ["vanilla", "paste"]
    assert (tmp_path / "report.json").exists()


def test_the_table_gives_both_ranges_and_how_much_better_than_vanilla(run):
    report = _evaluate(program.open_runs([run], CPU))
    rows = _rows(report)
    rows["vanilla"]["pre_error"], rows["asym"]["pre_error"] = 1082.8e-5, 5.7e-5
    lines = table(report).split("\n")
    assert [cell.strip() for cell in lines[2].split("|")[2:5]] == ["1,083", "4,331", "1.000x"]
    assert [cell.strip() for cell in lines[3].split("|")[2:5]] == ["5.700", "22.80", "190.0x"]
    assert len({len(line) for line in lines}) == 1


def test_an_unfinished_run_is_said_to_be_one(tmp_path, capsys):
    model, _ = write_first_stage(tmp_path)
    write_stage(tmp_path, "vqgan", model.state_dict(), settings(), finished=False)
    report = program.evaluate_runs([tmp_path], n=2)
    assert report["notes"]["run"] == f"training is not finished: {tmp_path} (step 2)"
    assert report["notes"]["run"] in capsys.readouterr().out


def test_a_broken_report_is_not_written(run):
    report = _evaluate(program.open_runs([run], CPU))
    row = report["rows"][0]
    broken = [{"rows": [*report["rows"], row]}, {"rows": [{**row, "speed": 1}]},
              {"rows": [{**row, "seam": math.nan}]}, {"rows": [{**row, "bucket": "5-15"}]}]
    for change in broken:
        with pytest.raises(ValueError, match=r"report.json|JSON"):
            validate(report | change)


def test_photos_that_cannot_be_decoded_are_replaced_and_counted(run, tmp_path):
    photos = tmp_path / "photos" / "val"
    for index in range(4):
        (photos.parent / "train").mkdir(parents=True, exist_ok=True)
        photos.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (60 * index, 90, 20)).save(photos / f"{index}.png")
        Image.new("RGB", (40, 40)).save(photos.parent / "train" / f"{index}.png")
    (photos / "2.png").write_bytes(b"no picture")
    _, parent = write_first_stage(run)
    write_decoder(run, parent, data="folder", root=str(photos.parent))
    report = program.evaluate_runs([run])
    assert report["n"] == 4
    assert report["notes"]["n"].startswith("1 files could not be decoded")


# -- which pictures --------------------------------------------------------------------------------


def test_words_that_are_half_known_are_found_wherever_they_are():
    x, mask = torch.zeros(3, 3, 64, 64), torch.zeros(3, 1, 64, 64)
    x[:, :, 40:48, 8:24] = torch.randint(0, 2, (8, 16)) * 2.0 - 1     # a word
    mask[0, :, :, 16:] = 1                                            # half of it is hidden
    mask[1, :, :, 40:] = 1                                            # none
    mask[2, :, 32:] = 1                                               # all
    scores, crops = program.half_known(x, mask)
    assert scores[0] > 100 * scores[1:].max()
    top, left, side = crops[0]
    assert side == 32
    assert top <= 40
    assert top + side >= 48
    assert left <= 12
    assert left + side >= 20


def test_examples_keep_the_best_in_the_order_of_the_data_set_and_ignore_the_outputs():
    def chosen(batches, noise):
        examples = program.Examples(3)
        for x, mask in batches:
            examples.offer(x, mask, {(None, "vanilla"): (torch.randn_like(x) * noise, 0.0)})
        return examples.columns(cut=False)["", "original"]

    x, mask = torch.rand(9, 3, 32, 32), torch.zeros(9, 1, 32, 32)
    mask[..., 16:] = 1
    x *= torch.tensor([1, 5, 2, 9, 3, 8, 1, 1, 4.0])[:, None, None, None] / 10
    for size, noise in ((9, 1), (2, 5), (1, 0)):
        kept = chosen(zip(x.split(size), mask.split(size)), noise)
        assert all(torch.equal(a, b) for a, b in zip(kept, x[[1, 3, 5]], strict=True))


def test_cut_examples_are_the_window_of_the_whole_ones():
    examples = program.Examples(1)
    x, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[..., 20:] = 1
    examples.offer(x, mask, {})
    top, left, side = program.half_known(x, mask)[1][0]
    cut = examples.columns(cut=True)
    assert torch.equal(cut["", "original"][0], x[0, :, top:top + side, left:left + side])
    assert (cut["", "masked"][0][..., 20 - left:] == 0).all()


# -- mistakes --------------------------------------------------------------------------------------


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
            program.open_runs([run, other], CPU)


def test_lpips_that_is_not_to_be_had_is_a_reason_or_an_error_if_asked_for(monkeypatch):
    def missing(net, weights):
        raise UserError(f"{weights}: {net} is missing")

    monkeypatch.setattr(program, "LPIPS", missing)
    config = {"perceptual": "vgg", "weights": "here"}
    assert program.open_lpips(config, None, None, CPU) == (
        None, None, "not computed: here: vgg is missing")
    assert program.open_lpips(config, "none", None, CPU)[2] == "not computed: --lpips none"
    with pytest.raises(UserError, match="there: alex is missing"):
        program.open_lpips(config, "alex", "there", CPU)


def test_the_program_ends_with_0_or_with_2_and_one_line(run, tmp_path):
    def call(*arguments):
        command = [sys.executable, str(ROOT / "eval.py"), "--device", "cpu", *arguments]
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
    for flag in ("-n", "--batch-size"):
        monkeypatch.setattr(sys, "argv", ["eval.py", "run", flag, "0"])
        with pytest.raises(UserError, match=flag):
            program.main()
