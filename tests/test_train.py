import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image
from ports import free_port
from train_process import (
    ARGS,
    KILLED,
    Started,
    assert_same_run,
    call,
    die_inside,
    log_lines,
    note_curves,
    rank_env,
    train,
)

import run_folder
import train as program
from convert import load, load_prior
from options import parse, resolve
from pictures import curves

STAGES = ["vqgan", "refit", "decoder", "prior"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed, all stages and report: (folder, what it printed, seconds)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    call(print)                                        # the server is there before the clock runs
    start = time.monotonic()
    status, text = train(out, prepare=note_curves)
    assert status == 0, text
    return out, text, time.monotonic() - start


def before(stage, whole, out):
    """`out` as it was when the undisturbed run began `stage`."""
    later = STAGES[STAGES.index(stage):]
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("report*", "codes", *later))


def finish(out, *more):
    status, text = train(out, *more)
    assert status == 0, text
    return text


# -- one run ---------------------------------------------------------------------------------------

def test_a_run_leaves_the_files_that_the_readme_names(whole, tmp_path):
    out, text, _ = whole
    for stage in STAGES:
        names = {path.name for path in (out / stage).iterdir()}
        assert names == {"last.pt", "previous.pt", "best.pt", "log.jsonl", "curves.png", "samples"}
        assert len(list((out / stage / "samples").iterdir())) == 4            # steps 0, 2, 4, 6
        assert (out / stage / "curves.png").read_text() == "cccc"             # at the same steps
        curves(out / stage / "log.jsonl", tmp_path / f"{stage}.png")
        assert (tmp_path / f"{stage}.png").exists()
        assert [line["step"] for line in log_lines(out / stage)] == list(range(7))
    config = json.loads((out / "config.json").read_text())
    assert config["recipes"]["decoder"]["steps"] == 6
    assert config["images"] == {"train": 50_000, "val": 100}
    assert "--steps 6" in (out / "command.txt").read_text()
    assert {"report.md", "report.json", "report.png"} <= {path.name for path in out.iterdir()}
    assert f"writing to {out}" in text
    assert "a short run, not the reported one" in text


def test_a_checkpoint_holds_what_the_design_says(whole):
    state = run_folder.load(whole[0] / "decoder" / "last.pt")
    assert set(state) == {"format", "stage", "config", "model", "ema", "optimizers", "images",
                          "step", "parent", "extra"}
    assert (state["stage"], state["step"], state["images"]) == ("decoder", 6, 24)
    assert all(name.startswith("decoder.") for name in state["model"])
    first = run_folder.load(whole[0] / "refit" / "last.pt")
    assert state["parent"] == run_folder.weights_hash(first["model"])
    assert "encoder.conv_in.weight" in first["model"]
    assert first["config"]["first_stage"]["K"] == first["extra"]["K"] == 12
    vqgan = run_folder.load(whole[0] / "vqgan" / "last.pt")
    assert first["parent"] == run_folder.weights_hash(vqgan["model"])
    prior = run_folder.load(whole[0] / "prior" / "last.pt")
    assert prior["parent"] == state["parent"]
    assert prior["ema"]["updates"] == 6
    assert prior["model"].keys() == prior["ema"]["weights"].keys()
    assert prior["extra"]["timesteps"]["counts"].sum() == 24          # each image has its t
    assert (prior["extra"]["grid"], prior["extra"]["K"]) == ([16, 16], 12)


def test_the_discriminator_starts_at_its_step_and_not_before(whole):
    lines = log_lines(whole[0] / "decoder")
    assert ["gan" in line for line in lines] == [False] * 4 + [True] * 3      # from the 4th step on
    assert all(line["lambda"] > 0 for line in lines[4:])


def test_a_finished_run_says_so_and_leaves_everything_alone(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    report = (out / "report.json").stat().st_mtime_ns
    text = finish(out)
    assert "vqgan: finished before, 6 steps" in text
    assert "the report is there already" in text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")} == times
    assert (out / "report.json").stat().st_mtime_ns == report
    (out / "report.json").unlink()
    assert "report.json" in finish(out)
    assert (out / "report.json").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trained_again_makes_the_report_old(stage, tmp_path, monkeypatch):
    reported = []
    monkeypatch.setattr(program, "evaluate_runs", lambda runs, *args, **more: reported.append(runs))
    for name in (*STAGES, "report"):
        file = tmp_path / name / "last.pt" if name in STAGES else tmp_path / "report.json"
        file.parent.mkdir(exist_ok=True)
        file.touch()
    run = SimpleNamespace(out=tmp_path, device="cpu", settings={"weights": None, "root": None})
    program.report_unless_there(run)
    assert not reported
    written = (tmp_path / "report.json").stat().st_mtime
    os.utime(tmp_path / stage / "last.pt", (written + 1, written + 1))
    program.report_unless_there(run)
    assert reported == [[tmp_path]]


# -- kills -----------------------------------------------------------------------------------------

def kill_and_continue(stage, folder, out, kills, longest, *more):
    """Kill `kills` times within `longest` seconds, finish, and compare; how many kills hit."""
    before(stage, folder, out)
    moments, hits = random.Random(f"{stage} {kills}"), 0
    for _ in range(kills):
        started = Started(out, "--stage", stage, *more)
        time.sleep(moments.uniform(0, longest))
        started.process.kill()
        status, text = started.end()
        assert status in (KILLED, 0), text
        hits += status == KILLED
    finish(out, "--stage", stage, *more)
    assert_same_run(folder, out, stage)
    return hits


@pytest.mark.parametrize("stage", STAGES)
def test_three_kills_at_random_moments_change_no_bit(stage, whole, tmp_path):
    # A stage takes about a fifth of the whole run.
    assert kill_and_continue(stage, whole[0], tmp_path / "run", 3, 0.2 * whole[2]) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_twenty_kills_at_random_moments_change_no_bit(stage, tmp_path):
    start = time.monotonic()
    finish(tmp_path / "long", "--steps", "200")
    seconds = time.monotonic() - start
    hits = kill_and_continue(stage, tmp_path / "long", tmp_path / "run", 20, 0.02 * seconds,
                             "--steps", "200")
    assert hits == 20


@pytest.mark.slow
def test_kills_change_no_bit_of_a_concat_decoder(whole, tmp_path):
    concat = tmp_path / "concat" / "run"
    concat.parent.mkdir()
    more = ("--vqgan", str(whole[0]), "--blend", "concat")
    finish(concat, *more)
    assert kill_and_continue("decoder", concat, tmp_path / "run", 5, 0.3 * whole[2], *more) >= 1


@pytest.mark.parametrize(("stage", "call", "count"), [
    ("decoder", "save", 1), ("decoder", "save", 4), ("decoder", "save", 5),
    ("decoder", "replace", 5), ("decoder", "link", 2), ("refit", "save", 1),
    ("refit", "replace", 4),
    ("prior", "replace", 2),                             # that of the codes
    ("prior", "save", 5)])
def test_a_kill_inside_a_save_changes_no_bit(stage, call, count, whole, tmp_path):
    out = tmp_path / "run"
    before(stage, whole[0], out)
    status, text = train(out, "--stage", stage, prepare=partial(die_inside, call, count))
    assert status == KILLED, text
    finish(out, "--stage", stage)
    assert_same_run(whole[0], out, stage)


@pytest.mark.parametrize("stage", ["decoder", "prior"])
def test_a_truncated_last_falls_back_to_previous_and_ends_the_same(stage, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    last = out / stage / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    text = finish(out)
    assert "continuing from" in text
    assert "from step 4" in text
    assert_same_run(whole[0], out, stage)


def test_a_refit_that_goes_on_builds_no_codes_anew_and_keeps_encoder_and_codes(whole, tmp_path):
    out = tmp_path / "run"
    before("refit", whole[0], out)
    finish(out, "--stage", "refit", "--max-hours", "1e-9")
    text = finish(out, "--stage", "refit")
    assert "sampling" not in text
    assert "from step 1" in text
    vqgan, refit, ours = (run_folder.load(folder / "last.pt")["model"] for folder in (
        whole[0] / "vqgan", whole[0] / "refit", out / "refit"))
    for name in refit:
        assert torch.equal(ours[name], refit[name]), name
        frozen = name.startswith(("encoder.", "quant_conv."))
        if not name.startswith("quantize."):
            assert torch.equal(refit[name], vqgan[name]) == frozen, name
    start = run_folder.load(whole[0] / "refit" / "previous.pt")["model"]
    assert torch.equal(start["quantize.embedding.weight"], refit["quantize.embedding.weight"])
    assert len(refit["quantize.embedding.weight"]) == 12


def test_the_codes_are_made_once_and_again_where_they_are_lost(whole, tmp_path):
    out = tmp_path / "run"
    before("prior", whole[0], out)
    finish(out, "--stage", "prior", "--max-hours", "1e-9")
    (codes,) = (out / "codes").iterdir()
    made = codes.stat().st_mtime_ns
    finish(out, "--stage", "prior", "--max-hours", "1e-9")
    assert codes.stat().st_mtime_ns == made
    codes.unlink()
    finish(out, "--stage", "prior")
    assert codes.exists()
    (original,) = (whole[0] / "codes").iterdir()
    assert codes.read_bytes() == original.read_bytes()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_leave_and_the_same_command_continues(number, status, whole, tmp_path):
    out = tmp_path / "run"
    before("vqgan", whole[0], out)
    started = Started(out, "--stage", "vqgan", "--save-every", "100")
    log = out / "vqgan" / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        time.sleep(0.01)
    os.kill(started.process.pid, number)
    found, text = started.end()
    assert found == status, text
    step = run_folder.load(out / "vqgan" / "last.pt")["step"]
    assert step >= 2
    assert f"saved at step {step}" in text
    if step < 6:
        finish(out, "--stage", "vqgan")
        weights = [run_folder.load(run / "vqgan" / "last.pt")["model"] for run in (whole[0], out)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# -- what is refused -------------------------------------------------------------------------------

def test_other_settings_are_refused_with_a_list_and_restart_keeps_the_old_run(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    status, text = train(out, "--lr", "0.5", "--blend", "concat")
    assert status == 2
    assert "Traceback" not in text
    assert "recipes.decoder.lr was" in text
    assert "decoder.blend was add, is concat" in text
    assert "--restart" in text
    assert run_folder.load(out / "decoder" / "last.pt")["step"] == 6
    text = finish(out, "--lr", "0.01", "--stage", "vqgan", "--restart")
    assert f"kept as {out}.old1" in text
    assert run_folder.load(tmp_path / "run.old1" / "decoder" / "last.pt")["step"] == 6
    assert not (out / "decoder").exists()


def test_a_mistake_before_the_first_checkpoint_does_not_fix_the_settings(tmp_path):
    out = tmp_path / "run"
    status, text = train(out, "--perceptual", "alex", "--weights", str(tmp_path),
                         prepare=no_network)
    assert status == 2, text
    assert "alexnet" in text
    finish(out, "--stage", "vqgan", "--steps", "1")


def no_network():
    import losses

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    losses.torch.hub.download_url_to_file = refuse


def test_a_second_process_on_the_same_run_is_refused(tmp_path):
    out = tmp_path / "run"
    first = Started(out, "--stage", "vqgan", "--steps", "1000")
    while not (out / "vqgan" / "last.pt").exists():
        time.sleep(0.02)
    status, text = train(out, "--stage", "vqgan", "--steps", "1000")
    first.process.kill()
    assert status == 2
    assert "is in use by process" in text


def test_a_later_stages_mistake_shows_before_the_first_stage_is_trained(tmp_path):
    photos = write_photos(tmp_path / "photos", 4)
    args = ["--data", "folder", "--root", str(photos), "--size", "128", "--micro-batch", "8"]
    status, text = train(tmp_path / "run", args=args)    # vqgan takes 96 images, prior 180
    assert status == 2
    assert "--micro-batch 8 does not divide the 180 images" in text
    assert not (tmp_path / "run").exists()


def write_photos(folder, count):
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (40, 40), (60 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


def test_photos_may_move_but_not_change_in_number(tmp_path):
    old, new = write_photos(tmp_path / "old", 3), tmp_path / "new"
    more = ("--data", "folder", "--perceptual", "none", "--first-stage", "tiny", "--stage", "vqgan",
            "--steps", "1")
    finish(tmp_path / "run", *more, "--root", str(old))
    old.rename(new)
    assert "finished before" in finish(tmp_path / "run", *more, "--root", str(new))
    (new / "2.png").unlink()
    status, text = train(tmp_path / "run", *more, "--root", str(new))
    assert status == 2
    assert "images.train was 2, is 1" in text


def test_a_decoder_on_an_unfinished_first_stage_is_warned_of(whole, tmp_path):
    out = tmp_path / "run"
    before("vqgan", whole[0], out)
    finish(out, "--stage", "vqgan", "--max-hours", "1e-9")
    text = finish(out, "--stage", "decoder", "--max-hours", "1e-9")
    assert f"warning: the first stage in {out} is not finished (step 1)" in text
    assert "finish it first" in text


@pytest.mark.parametrize(("below", "stage"), [
    ("vqgan", "refit"), ("refit", "decoder"), ("refit", "prior")])
def test_another_first_stage_under_a_stage_is_refused(below, stage, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    state = run_folder.load(out / below / "last.pt")
    state["model"]["encoder.conv_in.weight"] += 1
    run_folder.save(out / below / "last.pt", state)
    status, text = train(out, "--stage", stage)
    assert status == 2
    assert "another first stage" in text
    assert f"--stage {stage} --vqgan {out} --out NEW_RUN" in text


def test_a_decoder_without_a_first_stage_is_refused_by_name(tmp_path):
    status, text = train(tmp_path / "run", "--stage", "decoder")
    assert status == 2
    assert "vqgan/last.pt" in text
    assert "Traceback" not in text


# -- what goes wrong -------------------------------------------------------------------------------

def test_a_loss_that_is_not_finite_stops_with_term_and_step_and_keeps_the_checkpoint(tmp_path):
    status, text = train(tmp_path / "run", "--stage", "vqgan", "--lr", "1e30")
    assert status == 2
    assert "Traceback" not in text
    error = text[text.index("error: "):]
    assert "vqgan step 2: " in error
    assert "pixel" in error.split("not finite")[0]
    state = run_folder.load(tmp_path / "run" / "vqgan" / "last.pt")
    assert all(value.isfinite().all() for value in state["model"].values())
    assert state["step"] == 0


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path):
    out = tmp_path / "run"
    status, text = train(out, "--stage", "vqgan", prepare=partial(fill_the_disk, 3))
    assert status == 2, text
    assert "Traceback" not in text
    assert "make room" in text
    assert run_folder.load(out / "vqgan" / "last.pt")["step"] == 0
    finish(out, "--stage", "vqgan")


def fill_the_disk(count):
    original, left = torch.save, [count]

    def full(*args, **kwargs):
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    torch.save = full


def test_max_hours_saves_and_leaves_in_good_order(whole, tmp_path):
    out = tmp_path / "run"
    before("vqgan", whole[0], out)
    status, text = train(out, "--max-hours", "1e-9")
    assert status == 0
    assert "saved at step 1" in text
    assert not (out / "report.json").exists()
    finish(out, "--stage", "vqgan")
    weights = [run_folder.load(run / "vqgan" / "last.pt")["model"] for run in (whole[0], out)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# -- variants --------------------------------------------------------------------------------------

def test_overfit_gives_a_verdict_and_a_first_stage_may_come_from_a_run(whole, tmp_path):
    more = ("--vqgan", str(whole[0]), "--overfit", "2", "--lr", "0.01", "--steps", "40",
            "--disc-start", "50", "--save-every", "100")
    text = finish(tmp_path / "run", *more)
    assert "is not finished" not in text
    assert "held-out = train L1 on 2 images" in text
    assert "held-out = train bound, nats a map, on 2 images" in text
    lines = log_lines(tmp_path / "run" / "decoder")
    assert lines[40]["val_pixel_masked"] < lines[0]["val_pixel_masked"]
    assert "no GAN loss in this run" in text
    assert not (tmp_path / "run" / "vqgan").exists()
    assert not (tmp_path / "run" / "refit").exists()               # the given one is a refit
    assert not (tmp_path / "run" / "report.json").exists()


def test_on_a_given_first_stage_the_runs_own_refit_is_what_the_others_stand_on(whole, tmp_path):
    out = tmp_path / "run"
    text = finish(out, "--vqgan", str(whole[0] / "vqgan" / "last.pt"))
    assert "refit, decoder, prior at 32 px" in text
    refit = run_folder.load(out / "refit" / "last.pt")
    parent = run_folder.weights_hash(refit["model"])
    assert load(out).parent == load_prior(out).parent == parent
    assert refit["parent"] == run_folder.load(whole[0] / "refit" / "last.pt")["parent"]
    assert "finished before" in finish(out, "--vqgan", str(whole[0] / "vqgan" / "last.pt"))


@pytest.mark.parametrize("stage", ["vqgan", "prior"])
def test_without_the_trial_step_the_weights_are_the_same(stage, whole, tmp_path):
    before(stage, whole[0], tmp_path / "run")
    status, text = train(tmp_path / "run", "--stage", stage, prepare=no_trial)
    assert status == 0, text
    assert_same_run(whole[0], tmp_path / "run", stage)


def no_trial():
    program.trial = lambda *args: (1, 1.0)


@pytest.mark.parametrize("stage", ["vqgan", "refit"])
def test_workers_change_no_bit(stage, whole, tmp_path):
    before(stage, whole[0], tmp_path / "run")
    status, text = train(tmp_path / "run", "--stage", stage, "--workers", "2")
    assert status == 0, text
    assert_same_run(whole[0], tmp_path / "run", stage)


def test_micro_batches_give_the_same_weights_but_for_rounding(whole, tmp_path):
    more = ("--stage", "vqgan", "--disc-start", "50")
    finish(tmp_path / "one", *more)
    finish(tmp_path / "two", *more, "--micro-batch", "2")
    one, two = (run_folder.load(tmp_path / name / "vqgan" / "last.pt") for name in ("one", "two"))
    assert two["extra"]["micro_batch"] == 2
    assert_nearly(one["model"], two["model"])


def assert_nearly(one, two):
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_a_priors_micro_batches_and_processes_see_the_same_noise(whole, tmp_path):
    for name in ("micro", "ranks"):
        before("prior", whole[0], tmp_path / name)
    finish(tmp_path / "micro", "--stage", "prior", "--micro-batch", "2")
    results = ranks(tmp_path / "ranks", "--stage", "prior")
    assert [status for status, _ in results] == [0, 0], results
    one, *others = (run_folder.load(run / "prior" / "last.pt")
                    for run in (whole[0], tmp_path / "micro", tmp_path / "ranks"))
    for other in others:
        assert_nearly(one["model"], other["model"])
        assert_nearly(one["ema"]["weights"], other["ema"]["weights"])
        history, theirs = one["extra"]["timesteps"], other["extra"]["timesteps"]
        assert torch.equal(theirs["counts"], history["counts"])
        torch.testing.assert_close(theirs["losses"], history["losses"], rtol=1e-3, atol=1e-4)
    codes = [next((run / "codes").iterdir()).read_bytes() for run in (whole[0], tmp_path / "ranks")]
    assert codes[0] == codes[1]


def test_days_are_announced_with_a_command_that_works(tmp_path):
    status, text = train(tmp_path / "run", "--stage", "vqgan", "--steps", "100000000",
                         "--max-hours", "1e-9")
    assert status == 0
    assert "days on this device" in text
    command = next(line for line in text.splitlines() if line.startswith("  python train.py"))
    words = command.split()[2:]
    assert words.count("--steps") == 1
    settings, _ = resolve(parse(words))
    assert 0 < settings["recipes"]["vqgan"]["steps"] < 100_000_000


# -- several processes -----------------------------------------------------------------------------

def ranks(out, *more, world=2, **options):
    """[(status, text)] of train.py as torchrun would start it."""
    port = free_port()
    started = [Started(out, *more, env=rank_env(rank, world, port), **options)
               for rank in range(world)]
    return [one.end() for one in started]


def test_two_processes_write_one_run_and_one_process_continues_it(whole, tmp_path):
    out = tmp_path / "run"
    results = ranks(out, "--max-hours", "1e-9")
    assert [status for status, _ in results] == [0, 0], results
    assert "2 x cpu" in results[0][1]
    assert "statistics are per process" in results[0][1]
    assert results[1][1] == ""                                         # only rank 0 speaks
    assert run_folder.load(out / "vqgan" / "last.pt")["step"] == 1
    finish(out)
    assert [line["step"] for line in log_lines(out / "vqgan")] == list(range(7))
    ours = log_lines(out / "vqgan")
    for a, b in zip(log_lines(whole[0] / "vqgan")[:4], ours):
        assert a["images"] == b["images"]
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-3), key
    text = (out / "command.txt").read_text().splitlines()
    assert text[0].startswith("torchrun --nproc_per_node=2 train.py")


def test_two_processes_rebuild_the_codebook_of_one_and_one_continues_them(whole, tmp_path):
    out = tmp_path / "run"
    before("refit", whole[0], out)
    results = ranks(out, "--stage", "refit", "--max-hours", "1e-9")
    assert [status for status, _ in results] == [0, 0], results
    one, two = (run_folder.load(run / "refit" / "last.pt") for run in (whole[0], out))
    name = "quantize.embedding.weight"
    assert torch.equal(two["model"][name], one["model"][name])
    assert two["extra"]["val"] == one["extra"]["val"]
    finish(out, "--stage", "refit")
    for a, b in zip(log_lines(whole[0] / "refit")[:4], log_lines(out / "refit")):
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-3), key


@pytest.mark.parametrize("stage", ["refit", "prior"])
def test_two_processes_of_which_one_is_killed_go_on_to_the_same_bits(stage, whole, tmp_path):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "run"
    for each in (undisturbed, out):
        before(stage, whole[0], each)
    results = ranks(out, "--stage", stage, prepare=partial(die_inside, "save", 5))
    assert results[0][0] == KILLED
    assert results[1][0] not in (0, KILLED)              # nor does the other wait, or go on alone
    for each in (undisturbed, out):
        assert [status for status, _ in ranks(each, "--stage", stage)] == [0, 0]
    assert_same_run(undisturbed, out, stage)


def test_a_failure_on_one_rank_shows_its_traceback_and_ends_all(tmp_path):
    start = time.monotonic()
    results = ranks(tmp_path / "run", "--steps", "1000", prepare=fail_on_rank1)
    assert time.monotonic() - start < 30
    assert all(status not in (0, None) for status, _ in results)
    assert "ZeroDivisionError: on purpose" in results[1][1]


def fail_on_rank1():
    original = program.optimizer_step

    def step(*args):
        if program.rank() == 1:
            raise ZeroDivisionError("on purpose")
        return original(*args)

    program.optimizer_step = step


@pytest.mark.slow
def test_torchrun_starts_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               str(ROOT / "train.py"), *ARGS, "--out", str(tmp_path / "run")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "run" / "report.json").exists()
