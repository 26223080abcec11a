"""train.py: whole runs, kills, what is refused, several processes; and the flags."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from conftest import ROOT
from PIL import Image
from ports import free_port
from tiny_runs import write_first_stage
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
from distributed import UserError
from pictures import curves
from recipes import RECIPES
from train import chosen_stages, micro_batch_size, parse, resolve

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


def finish(out, *more, **options):
    status, text = train(out, *more, **options)
    assert status == 0, text
    return text


def one_step():
    """For `prepare`: --max-hours end in the first step of training."""
    original = program.gradients

    def last(*args):
        program.distributed.STOP.deadline = 0
        return original(*args)

    program.gradients = last


# -- one run ---------------------------------------------------------------------------------------

def test_a_run_leaves_the_files_that_the_readme_names(whole, tmp_path):
    out, text, _ = whole
    for stage in STAGES:
        names = {path.name for path in (out / stage).iterdir()}
        assert names == {"last.pt", "previous.pt", "log.jsonl", "curves.png", "samples"}
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
    assert "a short run; the recipe's is 1300 steps of 8 images" in text


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
    monkeypatch.setattr(program, "evaluate", lambda runs, *_, **more: reported.append(runs))
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
    # A stage takes a tenth to a fifth of the whole run.
    assert kill_and_continue(stage, whole[0], tmp_path / "run", 3, 0.1 * whole[2]) >= 1


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
    ("decoder", "save", 1), ("decoder", "save", 3), ("decoder", "replace", 5),
    ("decoder", "replace", 6), ("refit", "save", 1), ("refit", "replace", 4),
    ("prior", "replace", 2),                             # that of the codes
    ("prior", "save", 3)])
def test_a_kill_inside_a_save_changes_no_bit(stage, call, count, whole, tmp_path):
    out = tmp_path / "run"
    before(stage, whole[0], out)
    status, text = train(out, "--stage", stage, prepare=partial(die_inside, call, count))
    assert status == KILLED, text
    finish(out, "--stage", stage)
    assert_same_run(whole[0], out, stage)


def pause(seconds):
    """For `prepare`: validation after each step, checkpoints so many seconds apart."""
    program.RHYTHM = 1, seconds
    note_curves()


def test_checkpoints_are_ten_minutes_apart_unless_save_every_is_given(whole, tmp_path):
    more = ["--stage", "decoder", "--preset", "tiny2", "--vqgan", str(whole[0]), "--steps", "14"]
    rare = {"args": [word for word in ARGS if word not in ("--save-every", "2")],
            "prepare": partial(pause, 600)}
    assert program.RHYTHM[1] == 600
    finish(tmp_path / "often", *more, "--save-every", "1")
    finish(tmp_path / "rare", *more, **rare)
    assert_same_run(tmp_path / "often", tmp_path / "rare", "decoder")
    folder = tmp_path / "rare" / "decoder"
    assert all("val_pixel" in line for line in log_lines(folder))
    assert run_folder.load(folder / "previous.pt")["step"] == 0
    assert run_folder.load(tmp_path / "often" / "decoder" / "previous.pt")["step"] == 13
    # After steps 0 to 11 the log has grown by a tenth, after 12 it has not.
    assert len((folder / "curves.png").read_text()) == 14


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
    finish(out, "--stage", "refit", prepare=one_step)
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
    finish(out, "--stage", "prior", prepare=one_step)
    (codes,) = (out / "codes").iterdir()
    made = codes.stat().st_mtime_ns
    finish(out, "--stage", "prior", prepare=one_step)
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
    found, text = train(out, "--stage", "vqgan", "--save-every", "100",
                        prepare=partial(signal_in, "step", 3, number, "vqgan"))
    assert found == status, text
    assert run_folder.load(out / "vqgan" / "last.pt")["step"] == 3
    assert "saved at step 3" in text
    finish(out, "--stage", "vqgan")
    weights = [run_folder.load(run / "vqgan" / "last.pt")["model"] for run in (whole[0], out)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def signal_in(method, count, number, stage):
    """For `prepare`: send this process `number` at the end of the count-th call of a method."""
    cls, left = program.STAGES[stage], [count]
    original = getattr(cls, method)

    def call(*args):
        found = original(*args)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return found

    setattr(cls, method, call)


@pytest.mark.parametrize(("stage", "count", "number"), [
    ("decoder", 1, signal.SIGUSR1), ("decoder", 2, signal.SIGTERM), ("prior", 4, signal.SIGTERM)])
def test_a_signal_in_a_validation_saves_and_the_next_start_makes_up_for_it(stage, count, number,
                                                                           whole, tmp_path):
    out = tmp_path / "run"
    before(stage, whole[0], out)
    hook = {"decoder": "measures", "prior": "batch"}[stage]       # a batch of 8, or before a step
    count = {"decoder": count, "prior": 6}[stage]
    status, text = train(out, "--stage", stage, prepare=partial(signal_in, hook, count, number,
                                                                stage))
    assert status == 128 + number, text
    step = run_folder.load(out / stage / "last.pt")["step"]
    assert f"{stage}: saved at step {step}; the same command continues from here" in text
    assert "steps done" not in text
    finish(out, "--stage", stage)
    assert_same_run(whole[0], out, stage)


def stop_in_kmeans():
    import train_autoencoder
    original = train_autoencoder.rebuild_codebook

    def rebuild(*args, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **more)

    train_autoencoder.rebuild_codebook = rebuild


def test_a_signal_in_kmeans_leaves_at_once_on_all_processes(whole, tmp_path):
    out = tmp_path / "run"
    before("refit", whole[0], out)
    results = ranks(out, "--stage", "refit", prepare=stop_in_kmeans)
    assert [status for status, _ in results] == [143, 0], results
    assert "stopped before the next step; the same command continues" in results[0][1]
    assert "error" not in results[0][1] + results[1][1]
    assert not (out / "refit" / "last.pt").exists()


# -- workers ---------------------------------------------------------------------------------------

def signal_a_worker(number):
    """For `prepare`: in step 3, `number` goes to a data worker; patience is short."""
    import data
    data.SILENCE = 2
    original, steps = program.gradients, []

    def gradients(*args):
        steps.append(1)
        if len(steps) == 3:
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid, number)
        return original(*args)

    program.gradients = gradients


@pytest.mark.parametrize(("number", "said"), [(signal.SIGKILL, "a worker was killed"),
                                              (signal.SIGSTOP, "no image for 2 s")])
def test_a_worker_that_dies_or_hangs_ends_the_run_saved_and_in_one_line(number, said, whole,
                                                                        tmp_path):
    out = tmp_path / "run"
    before("vqgan", whole[0], out)
    status, text = Started(out, "--stage", "vqgan", "--workers", "1", "--steps", "60",
                           prepare=partial(signal_a_worker, number)).end(120)
    assert (status, text.count("error: ")) == (2, 1), text
    error = text[text.index("error: "):]
    step = run_folder.load(out / "vqgan" / "last.pt")["step"]
    assert said in error
    assert "give --workers 0, or the container more memory and a larger /dev/shm" in error
    assert f"vqgan is saved at step {step}" in error
    assert step >= 3
    assert "Traceback" not in text


def hang_in_step_3():
    program.distributed.GROUP_TIMEOUT = timedelta(seconds=4)
    original, steps = program.gradients, []

    def gradients(*args):
        steps.append(1)
        if len(steps) == 3 and program.rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(*args)

    program.gradients = gradients


def test_a_process_that_hangs_is_named_when_the_group_has_waited_its_time(tmp_path):
    port, out = free_port(), tmp_path / "run"
    started = [Started(out, "--stage", "vqgan", env=rank_env(rank, 2, port), prepare=hang_in_step_3)
               for rank in range(2)]
    status, text = started[0].end(60)
    started[1].process.kill()
    assert status == 1, text
    assert text.count("error: ") == 1
    assert "error: rank 1 of 2 has died or hangs" in text
    assert "Traceback" not in text


# -- what is refused -------------------------------------------------------------------------------

def test_other_settings_are_refused_with_a_list(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    status, text = train(out, "--lr", "0.5", "--blend", "concat")
    assert status == 2
    assert "Traceback" not in text
    assert "recipes.decoder.lr was" in text
    assert "decoder.blend was add, is concat" in text
    assert run_folder.load(out / "decoder" / "last.pt")["step"] == 6


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


def test_photos_may_move_but_not_change_in_number_or_name(tmp_path):
    old, new = write_photos(tmp_path / "old", 3), tmp_path / "new"
    more = ("--data", "folder", "--perceptual", "none", "--first-stage", "tiny", "--stage", "vqgan",
            "--steps", "1")
    finish(tmp_path / "run", *more, "--root", str(old))
    old.rename(new)
    assert "finished before" in finish(tmp_path / "run", *more, "--root", str(new))
    (new / "2.png").rename(new / "3.png")
    status, text = train(tmp_path / "run", *more, "--root", str(new))
    assert status == 2
    assert f"its images were in --root {new}" in text
    (new / "3.png").unlink()
    status, text = train(tmp_path / "run", *more, "--root", str(new))
    assert status == 2
    assert "images.train was 2, is 1" in text


def test_a_decoder_on_an_unfinished_first_stage_is_warned_of(whole, tmp_path):
    out = tmp_path / "run"
    before("vqgan", whole[0], out)
    finish(out, "--stage", "vqgan", prepare=one_step)
    text = finish(out, "--stage", "decoder", prepare=one_step)
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
    status, text = train(out, "--stage", "vqgan", prepare=partial(fill_the_disk, 2))
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


def run_out_of_memory(name):
    """Fail at the end of step 4's first micro-batch, when gradients are there already."""
    stage = program.STAGES[name]
    original, calls = stage.step, []

    def step(self, *args, **kwargs):
        terms = original(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More words.")
        return terms

    stage.step = step


@pytest.mark.parametrize(("micro_batch", "mend"), [("4", "--micro-batch 2"),
                                                   ("1", "a smaller --size")])
def test_images_that_do_not_fit_into_memory_are_one_line_that_says_what_does(
        micro_batch, mend, tmp_path):
    status, text = train(tmp_path / "run", "--stage", "vqgan", "--micro-batch", micro_batch,
                         prepare=partial(run_out_of_memory, "vqgan"))
    assert status == 2
    assert f"error: vqgan: CUDA out of memory; give {mend}, or --checkpointing" in text


def add_a_decoder_size():
    program.ASYM_PRESETS["wider"] = (1.5, 1)


def test_a_row_of_asym_presets_is_all_that_a_new_decoder_size_needs(whole, tmp_path):
    status, text = train(tmp_path / "run", "--stage", "decoder", "--vqgan", str(whole[0]),
                         "--preset", "wider", "--steps", "1", prepare=add_a_decoder_size)
    assert status == 0, text
    state = run_folder.load(tmp_path / "run" / "decoder" / "last.pt")
    assert (state["step"], state["config"]["recipe_names"]["decoder"]) == (1, "tiny")
    assert state["model"]["decoder.conv_out.weight"].shape == (3, 12, 3, 3)   # of 8 channels
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    assert "wider" in {row["size"] for row in rows}


def test_several_processes_end_in_one_line_that_names_the_flag(tmp_path):
    results = ranks(tmp_path / "run", "--stage", "vqgan",
                    prepare=partial(run_out_of_memory, "vqgan"))
    assert all(status == 2 for status, _ in results), results
    assert "give --micro-batch 1" in results[0][1]
    assert "Traceback" not in results[0][1] + results[1][1]


def test_max_hours_saves_and_leaves_in_good_order(whole, tmp_path):
    out = tmp_path / "run"
    before("vqgan", whole[0], out)
    status, text = train(out, prepare=one_step)
    assert status == 0
    assert "saved at step 1" in text
    assert not (out / "report.json").exists()
    finish(out, "--stage", "vqgan")
    weights = [run_folder.load(run / "vqgan" / "last.pt")["model"] for run in (whole[0], out)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# -- variants --------------------------------------------------------------------------------------

def test_a_first_stage_may_come_from_a_run(whole, tmp_path):
    more = ("--vqgan", str(whole[0]), "--overfit", "2", "--lr", "0.01", "--steps", "40",
            "--disc-start", "50", "--save-every", "100")
    text = finish(tmp_path / "run", *more)
    assert "is not finished" not in text
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


# -- several processes -----------------------------------------------------------------------------

def ranks(out, *more, world=2, **options):
    """[(status, text)] of train.py as torchrun would start it."""
    port = free_port()
    started = [Started(out, *more, env=rank_env(rank, world, port), **options)
               for rank in range(world)]
    return [one.end() for one in started]


def test_two_processes_write_one_run_and_one_process_continues_it(whole, tmp_path):
    out = tmp_path / "run"
    results = ranks(out, prepare=one_step)
    assert [status for status, _ in results] == [0, 0], results
    assert "2 x cpu" in results[0][1]
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
    results = ranks(out, "--stage", "refit", prepare=one_step)
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
    results = ranks(out, "--stage", stage, prepare=partial(die_inside, "save", 3))
    assert results[0][0] == KILLED
    assert results[1][0] == 1, results                   # nor does the other wait, or go on alone
    assert "error: rank 0 of 2 has died or hangs" in results[1][1]
    assert "Traceback" not in results[1][1]
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
    def update(self, gan_on):
        if program.rank() == 1:
            raise ZeroDivisionError("on purpose")

    program.FirstStage.update = update


@pytest.mark.slow
def test_torchrun_starts_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               str(ROOT / "train.py"), *ARGS, "--out", str(tmp_path / "run")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "run" / "report.json").exists()


# -- flags and settings ----------------------------------------------------------------------------


def settings(*words):
    return resolve(parse(list(words)))[0]


def test_no_flags_mean_the_embedded_data_and_tiny_models():
    args = parse([])
    found, first_stage = resolve(args)
    assert first_stage is None
    assert (found["data"], found["size"], found["decoder"]["preset"], found["perceptual"]) == (
        "signs", 64, "tiny", "none")
    assert found["recipes"]["vqgan"]["steps"] == RECIPES["vqgan"]["tiny"].steps
    assert str(args.out) == "runs/signs-tiny"
    json.dumps(found, allow_nan=False)


def test_imagenet_means_the_papers_plan():
    found = settings("--data", "imagenet")
    assert (found["size"], found["first_stage_name"], found["decoder"]["preset"],
            found["perceptual"]) == (256, "vq-f16", "base", "vgg")
    assert found["recipes"]["decoder"]["lr"] == 3.6e-4
    assert found["recipes"]["vqgan"]["disc_start"] == 250_001
    assert settings("--data", "imagenet", "--first-stage", "kl-f8")["recipes"]["vqgan"][
        "latent_weight"] == 1e-6
    assert settings("--data", "folder", "--preset", "large")["decoder"]["ch"] == 192


def test_the_recipes_lr_scales_with_the_batch_and_a_given_one_is_absolute():
    base = ("--data", "imagenet", "--batch-size", "40")
    assert settings(*base)["recipes"]["decoder"]["lr"] == pytest.approx(1.8e-4)
    assert settings(*base)["recipes"]["vqgan"]["lr"] == pytest.approx(4.5e-6 * 40)
    assert settings(*base, "--lr", "0.5")["recipes"]["decoder"]["lr"] == 0.5


def test_tiny2_trains_by_the_recipe_of_tiny_for_half_as_many_steps_again():
    found = settings("--preset", "tiny2")
    assert found["recipes"]["decoder"] == asdict(RECIPES["decoder"]["tiny"]) | {"steps": 2400}
    assert (found["decoder"]["ch"], found["decoder"]["num_res_blocks"]) == (32, 1)


def test_a_decoder_size_without_a_recipe_trains_by_that_of_base(monkeypatch):
    monkeypatch.setitem(program.ASYM_PRESETS, "wide", (3.0, 4))
    found = settings("--data", "imagenet", "--preset", "wide", "--batch-size", "40")
    base = asdict(RECIPES["decoder"]["base"])
    assert found["recipes"]["decoder"] == base | {"batch_size": 40, "lr": base["lr"] / 2}
    assert (found["decoder"]["preset"], found["decoder"]["ch"]) == ("wide", 3 * 128)


def test_flags_replace_the_recipes_numbers():
    found = settings("--gan", "log", "--lambda", "taming", "--disc-start", "0.5", "--epochs", "2")
    for recipe in found["recipes"].values():
        assert (recipe["gan"], recipe["lambda_rule"]) == ("log", "taming")
        assert (recipe["disc_start"], recipe["steps"], recipe["epochs"]) == (0.5, 0, 2)


def test_how_a_run_is_run_is_not_among_its_settings():
    assert settings() == settings("--device", "cpu", "--workers", "3", "--save-every", "7",
                                  "--max-hours", "1", "--micro-batch", "2", "--stage", "vqgan",
                                  "--out", "elsewhere")
    steps = str(RECIPES["vqgan"]["tiny"].steps)
    assert settings("--stage", "vqgan", "--steps", steps)["recipes"]["vqgan"] == \
        settings()["recipes"]["vqgan"]


@pytest.mark.parametrize(("words", "message"), [
    ("--data imagenet --size 16", "--size 16 is too small"),
    ("--stage vqgan --preset odd", "--preset odd does not fit --first-stage tiny"),
    ("--steps 5 --epochs 1", "give one"),
    ("--refit-samples 100", "--refit-samples 100 cannot make 128 codes"),
    ("--vqgan nowhere", "nowhere: no such run folder"),
])
def test_a_mistake_names_the_flag_and_the_mend(words, message, monkeypatch):
    monkeypatch.setitem(program.ASYM_PRESETS, "odd", (1.1, 1))       # no multiple of norm_groups
    with pytest.raises(UserError, match=message):
        settings(*words.split())


@pytest.mark.parametrize(("words", "message"), [
    ("--steps 0", "--steps: 0: must be above 0"), ("--lr nan", "--lr: nan: must be above 0"),
    ("--lr inf", "--lr: inf: must be above 0"),
    ("--seed -1", "--seed: -1: must be at least 0"),
    ("--disc-start -0.5", "--disc-start: -0.5: must be at least 0"),
    ("--timesteps 1", "--timesteps: 1: must be at least 2"),
    ("--codes 1", "--codes: 1: must be at least 2"), ("--steps x", "invalid int value: 'x'"),
    ("--ema 1", "--ema: 1: must be at least 0 and less than 1")])
def test_a_number_out_of_range_names_its_flag(words, message, capsys):
    with pytest.raises(SystemExit) as left:
        parse(words.split())
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def stages_of(*words):
    args = parse(list(words))
    return chosen_stages(args, *resolve(args))


def test_the_stages_are_all_or_the_one_asked_for_in_order():
    assert stages_of() == ["vqgan", "refit", "decoder", "prior"]
    for name in ("vqgan", "refit", "decoder", "prior"):
        assert stages_of("--stage", name) == [name]


def test_a_kl_latent_has_no_codes_to_rebuild_or_to_learn(capsys):
    assert stages_of("--data", "imagenet", "--first-stage", "kl-f8") == ["vqgan", "decoder"]
    assert "kl-f8 has a KL latent" in capsys.readouterr().out
    assert settings("--first-stage", "kl-f8", "--data", "imagenet")["prior"] is None
    assert stages_of("--first-stage", "kl-f8", "--stage", "decoder") == ["decoder"]
    for name in ("refit", "prior"):
        with pytest.raises(UserError, match=f"--stage {name}: kl-f8 has a KL latent"):
            stages_of("--first-stage", "kl-f8", "--stage", name)


def test_a_given_first_stage_is_not_trained_again_nor_a_finished_refit_rebuilt(tmp_path):
    where = ("--vqgan", str(tmp_path / "run"), "--size", "32")
    write_first_stage(tmp_path / "run")
    assert stages_of(*where, "--unet", "tiny") == ["refit", "decoder", "prior"]
    write_first_stage(tmp_path / "run", stage="refit")
    assert stages_of(*where, "--unet", "tiny") == ["decoder", "prior"]
    assert stages_of(*where, "--unet", "tiny", "--stage", "refit") == ["refit"]


def test_a_grid_that_the_unet_cannot_halve_is_refused_where_the_prior_is_to_be_trained():
    with pytest.raises(UserError, match=r"--size 72 .* of 16 .*--unet tiny\); the next one is 80"):
        stages_of("--size", "72")
    with pytest.raises(UserError, match=r"--size 60 .* multiple of 8 .* the next one is 64"):
        stages_of("--size", "60", "--first-stage", "vq-f8", "--stage", "vqgan")
    assert stages_of("--size", "72", "--stage", "vqgan") == ["vqgan"]


def test_the_prior_and_its_codes_have_the_papers_sizes_unless_told_otherwise():
    tiny, paper = settings(), settings("--data", "imagenet")
    assert (paper["refit"], tiny["refit"]["K"]) == ({"K": 1024, "samples": 20_000}, 128)
    assert (paper["prior"]["unet"], paper["prior"]["T"], paper["prior"]["ema"]) == (
        "paper117", 4000, 0.9999)
    assert paper["prior"]["residual"] == "onehot"
    assert (tiny["prior"]["unet"], tiny["prior"]["T"], tiny["prior"]["residual"]) == (
        "tiny", 100, "none")
    own = settings("--codes", "64", "--refit-samples", "900", "--unet", "paper117", "--timesteps",
                   "50", "--ema", "0")
    assert own["refit"] == {"K": 64, "samples": 900}
    assert (own["prior"]["unet"], own["prior"]["T"], own["prior"]["ema"]) == ("paper117", 50, 0)
    assert (own["prior"]["residual"], own["recipes"]["prior"]["batch_size"]) == ("onehot", 180)


def test_a_large_codebook_is_rebuilt_from_at_least_16_features_a_code():
    assert settings("--data", "imagenet", "--codes", "16384")["refit"]["samples"] == 16 * 16384


def test_a_first_stage_whose_codes_were_rebuilt_is_still_of_its_plan(tmp_path, monkeypatch):
    monkeypatch.setitem(program.VQGAN_PRESETS, "tiny", replace(tiny_runs.TINY, K=77))
    write_first_stage(tmp_path / "run")
    found = settings("--vqgan", str(tmp_path / "run"), "--size", "32")
    assert (found["first_stage_name"], found["first_stage"]["K"]) == ("tiny", 8)
    assert (found["prior"]["unet"], found["refit"]["K"]) == ("tiny", 8)


def test_flags_are_not_guessed_from_their_beginnings(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--batch", "4"])
    assert left.value.code == 2
    assert "--batch" in capsys.readouterr().err


def test_a_given_first_stage_brings_its_plan(tmp_path):
    write_first_stage(tmp_path / "run")
    found, first_stage = resolve(parse(["--vqgan", str(tmp_path / "run"), "--size", "32"]))
    assert found["first_stage_name"] == "own"
    assert found["first_stage"]["ch"] == first_stage.model.config.ch == 8
    assert found["vqgan"] == str((tmp_path / "run").resolve())
    for flag, value in (("--first-stage", "vq-f8"), ("--stage", "vqgan")):
        with pytest.raises(UserError, match=flag):
            settings("--vqgan", str(tmp_path / "run"), flag, value)


def test_help_tells_every_flag_and_recipe_in_60_lines_of_100_columns(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 60
    assert max(map(len, text.splitlines())) <= 100
    for stage, recipes in RECIPES.items():
        for name in recipes:
            assert f"{stage} {name}" in text
    for number in ("0.00036", "0.00072", "250001", "50001", "12 epochs", "1000000 steps"):
        assert number in text, number
    for flag in vars(parse([])):
        assert f"--{'lambda' if flag == 'lambda_rule' else flag.replace('_', '-')}" in text


def test_the_micro_batch_is_what_was_asked_for_else_what_was_kept_else_what_a_cpu_holds():
    found, cpu, cuda = settings(), torch.device("cpu"), torch.device("cuda")
    found["recipes"]["decoder"]["batch_size"] = 80
    found["size"] = 128
    assert micro_batch_size(5, 10, found, "decoder", cpu) == 5
    assert micro_batch_size(None, 10, found, "decoder", cpu) == 10
    assert micro_batch_size(None, 7, found, "decoder", cpu) == 8          # 7 does not divide 80
    assert micro_batch_size(None, None, found, "decoder", cpu) == 8
    assert micro_batch_size(None, None, found | {"size": 64}, "decoder", cpu) == 20
    assert micro_batch_size(None, None, found | {"size": 512}, "decoder", cpu) == 1
    assert micro_batch_size(None, None, found, "decoder", cuda) == 80
    assert micro_batch_size(None, None, found, "prior", cpu) == 16
    with pytest.raises(UserError, match=r"--micro-batch 3 does not divide the 80 images .* 2 does"):
        micro_batch_size(3, None, found, "decoder", cpu)


def test_a_health_check_takes_500_steps_unless_told_otherwise():
    found = settings("--overfit", "8", "--data", "imagenet")
    assert [recipe["steps"] for recipe in found["recipes"].values()] == [500] * 4
    assert settings("--overfit", "8", "--epochs", "3")["recipes"]["decoder"]["epochs"] == 3


@pytest.mark.parametrize(("words", "folder"), [
    ("--blend concat", "runs/signs-tiny-concat"), ("--overfit 8", "runs/signs-tiny-overfit8"),
    ("--blend concat --overfit 8", "runs/signs-tiny-concat-overfit8")])
def test_what_must_not_share_a_folder_has_its_own(words, folder):
    args = parse(words.split())
    resolve(args)
    assert str(args.out) == folder


def test_paths_are_absolute_whatever_named_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = settings("--data", "folder", "--root", "photos", "--weights", "nets")
    assert (found["root"], found["weights"]) == (str(tmp_path / "photos"), str(tmp_path / "nets"))
    monkeypatch.delenv("IMAGENET", raising=False)
    assert settings("--data", "imagenet")["root"] == str(tmp_path / "data" / "imagenet")
    monkeypatch.setenv("IMAGENET", "elsewhere")
    assert settings("--data", "imagenet")["root"] == str(tmp_path / "elsewhere")
    assert settings()["root"] is None


def test_every_flag_is_a_setting_or_a_way_of_running():
    elsewhere = {"steps", "epochs", "batch_size", "lr", "start", "pixel", "gan", "lambda_rule",
                 "disc_start", "preset", "blend", "codes", "refit_samples", "unet", "timesteps",
                 "ema"}
    assert set(vars(parse([]))) - program.MAY_CHANGE - elsewhere <= settings().keys()
