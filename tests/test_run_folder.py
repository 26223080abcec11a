import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import run_folder
from distributed import UserError
from run_folder import (
    Log,
    Progress,
    latest,
    load,
    load_optimizer,
    lock,
    open_run,
    save,
    weights_hash,
    write_text,
)

ROOT = Path(__file__).resolve().parent.parent

# -- the folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "compiled", "expected"), [
    ("cpu", False, True), ("cuda", False, False), ("cuda", True, True), ("mps", False, False)])
def test_channels_lie_side_by_side_where_that_was_measured_to_be_faster(device, compiled, expected):
    run = run_folder.Run({"compile": compiled}, None, torch.device(device), 0, None, None)
    assert run.channels_last is expected


CONFIG = {"lr": 0.1, "sizes": (1, 2), "recipes": {"vqgan": {"steps": 6}}}


def begin(out, config=CONFIG, **options):
    with open_run(out, config, **options):
        (out / "vqgan").mkdir(exist_ok=True)
        (out / "vqgan" / "last.pt").write_text("weights")


def test_the_same_settings_continue_and_every_command_is_noted(tmp_path):
    begin(tmp_path / "run")
    begin(tmp_path / "run")
    assert len((tmp_path / "run" / "command.txt").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["sizes"] == [1, 2]


def test_names_that_are_not_utf_8_are_bytes_in_the_command_and_escapes_in_a_text(tmp_path,
                                                                                monkeypatch):
    name = os.fsdecode(b"M\xfcnchen")
    monkeypatch.setattr(sys, "argv", ["train.py", "--root", name])
    begin(tmp_path / name, CONFIG | {"root": name})
    begin(tmp_path / name, CONFIG | {"root": name})
    command = b"python train.py --root 'M\xfcnchen'\n"
    assert (tmp_path / name / "command.txt").read_bytes() == 2 * command
    write_text(tmp_path / "report.md", f"{name}, ∞")
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == "M\\udcfcnchen, ∞"


def test_other_settings_are_listed_down_to_the_number(tmp_path):
    begin(tmp_path / "run")
    changed = {"lr": 0.2, "sizes": (1, 2), "recipes": {"vqgan": {"steps": 7}}, "new": True}
    with pytest.raises(UserError) as error:
        begin(tmp_path / "run", changed)
    text = str(error.value)
    assert "lr was 0.1, is 0.2" in text
    assert "recipes.vqgan.steps was 6, is 7" in text
    assert "new was None, is True" in text
    assert "sizes" not in text
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == 0.1


def test_what_may_change_is_not_compared_but_noted(tmp_path):
    begin(tmp_path / "run", {"lr": 1, "root": "/old"})
    begin(tmp_path / "run", {"lr": 1, "root": "/new"}, may_change={"root"})
    assert json.loads((tmp_path / "run" / "config.json").read_text())["root"] == "/new"
    with pytest.raises(UserError, match=r"root was /new, is /newer\."):
        begin(tmp_path / "run", {"lr": 1, "root": "/newer"})


def test_other_images_are_refused_by_a_line_that_says_where_the_old_ones_were(tmp_path):
    cats = {"root": "/cats", "data_set": {"train": "names 1"}}
    dogs = {"root": "/dogs", "data_set": {"train": "names 2"}}
    begin(tmp_path / "run", cats)
    with pytest.raises(UserError, match=r"data_set.train was names 1, is names 2; its images were "
                                        r"in --root /cats\. Repeat .* choose another --out$"):
        begin(tmp_path / "run", dogs, may_change={"root"})
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == cats
    with pytest.raises(UserError, match=r"data_set.train was names 1, is None"):
        begin(tmp_path / "run", {"root": "/cats"})


def test_settings_may_change_while_nothing_is_saved(tmp_path):
    with open_run(tmp_path / "run", CONFIG):
        pass
    with open_run(tmp_path / "run", {"lr": 0.2}):
        assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"lr": 0.2}


def test_a_folder_with_other_things_in_it_is_not_written_to(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="choose another"), open_run(tmp_path, CONFIG):
        pass
    assert not (tmp_path / "config.json").exists()


def test_a_file_where_the_run_should_be_is_a_users_mistake(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="--out"), open_run(tmp_path / "run", CONFIG):
        pass


def test_a_log_is_cut_back_to_the_checkpoint_and_goes_on(tmp_path):
    path = tmp_path / "vqgan" / "log.jsonl"
    log = Log(path, -1)
    for step in range(6):
        log.write({"step": step})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 6, "pix')                       # a kill in the middle of a line
    log = Log(path, 3)
    log.write({"step": 4, "again": True}, durable=True)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[4]["again"]
    assert Log(path, -1).file.tell() == 0                   # a stage that begins has an empty log


def test_a_whole_file_or_none_of_it(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"


def test_progress_shows_rate_and_time_left_and_the_last_step(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress("vqgan", 2, 32, 4)
    for step in range(3, 33):
        now[0] += 2
        progress.show(step, {"pixel": 0.5, "other": 1})
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6                                   # ten seconds apart, and the last
    assert lines[0].split() == ["vqgan", "7/32", "pixel", "0.5", "2", "images/s"]
    assert " ".join(lines[3].split()) == "vqgan 22/32 pixel 0.5 2 images/s 20 s left"
    assert "32/32" in lines[-1]


@pytest.mark.parametrize(("seconds", "text"), [
    (42, "42 s"), (450, "7.5 min"), (11_160, "3.1 h"), (12 * 86_400, "12.0 days")])
def test_durations_read_well(seconds, text):
    assert run_folder.duration(seconds) == text


# -- checkpoints -----------------------------------------------------------------------------------

class Killed(BaseException):
    """Stands for SIGKILL: no handler of the program runs."""


def state(step):
    model = {"w": torch.full((300,), float(step)), "half": torch.ones(3).bfloat16()}
    return {"format": 1, "step": step, "model": model, "ema": None,
            "optimizers": {"g": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}},
            "config": {"lr": 1e-4, "sizes": [1, 2]}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back_and_the_one_before_is_kept(tmp_path):
    folder = tmp_path / "run" / "decoder"
    for step in (1, 2, 3):
        save(folder / "last.pt", state(step))
    assert names(folder) == ["last.pt", "previous.pt"]
    assert load(folder / "previous.pt")["step"] == 2
    back = latest(folder)
    assert back["step"] == 3
    assert torch.equal(back["model"]["w"], torch.full((300,), 3.0))
    assert back["config"] == state(3)["config"]


def test_an_empty_folder_has_no_latest(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "missing") is None


def test_a_file_cut_anywhere_is_recognised_and_previous_takes_over(tmp_path, capsys):
    save(tmp_path / "last.pt", state(1))
    save(tmp_path / "last.pt", state(2))
    whole = (tmp_path / "last.pt").read_bytes()
    cuts = [0, 1, 4, len(whole) // 2, len(whole) - 1]
    cuts += [random.Random(0).randrange(len(whole)) for _ in range(40)]
    for cut in cuts:
        (tmp_path / "last.pt").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"last\.pt: truncated"):
            load(tmp_path / "last.pt")
        assert latest(tmp_path)["step"] == 1
        printed = capsys.readouterr().out
        assert "last.pt: truncated" in printed
        assert "previous.pt" in printed


def test_a_flipped_byte_in_a_tensor_is_recognised(tmp_path):
    save(tmp_path / "last.pt", state(7))
    data = bytearray((tmp_path / "last.pt").read_bytes())
    place = data.find(torch.full((300,), 7.0).numpy().tobytes())
    assert place > 0
    data[place + 5] ^= 1
    (tmp_path / "last.pt").write_bytes(data)
    with pytest.raises(UserError, match=r"checksum|CRC"):
        load(tmp_path / "last.pt")


def test_two_unreadable_files_stop_the_run_instead_of_starting_anew(tmp_path):
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"half a checkpoint")
    with pytest.raises(UserError, match=r"last\.pt.*previous\.pt.*--out"):
        latest(tmp_path)
    (tmp_path / "previous.pt").unlink()
    with pytest.raises(UserError, match=r"last\.pt.*--out"):
        latest(tmp_path)


def test_a_last_checkpoint_that_is_a_link_to_nothing_does_not_start_the_run_anew(tmp_path):
    (tmp_path / "last.pt").symlink_to("/unmounted/last.pt")
    with pytest.raises(UserError, match=r"to /unmounted/last\.pt, which is not there.*--out"):
        latest(tmp_path)


def test_a_kill_between_the_two_renames_leaves_previous_to_continue_from(tmp_path):
    save(tmp_path / "last.pt", state(4))
    (tmp_path / "last.pt").rename(tmp_path / "previous.pt")
    assert latest(tmp_path)["step"] == 4


def test_a_damaged_last_never_becomes_previous(tmp_path):
    save(tmp_path / "last.pt", state(1))
    save(tmp_path / "last.pt", state(2))
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-50])
    save(tmp_path / "last.pt", state(2))
    assert load(tmp_path / "last.pt")["step"] == 2
    assert load(tmp_path / "previous.pt")["step"] == 1


def fail_at(monkeypatch, moment, error):
    """Let the `moment`-th of save's calls to the system raise `error`; return the running count."""
    calls = [0]

    def guarded(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == moment:
                raise error
            return function(*args, **kwargs)
        return call

    monkeypatch.setattr(torch, "save", guarded(torch.save))
    for name in ("fsync", "replace", "open", "close"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    return calls


MOMENTS = range(1, 8)


def test_the_moments_below_cover_every_call_of_a_save(tmp_path, monkeypatch):
    save(tmp_path / "last.pt", state(1))
    with monkeypatch.context() as patch:
        calls = fail_at(patch, None, None)
        save(tmp_path / "last.pt", state(2))
    assert calls[0] == MOMENTS.stop - 1


def test_a_full_disk_is_one_line_and_the_old_files_stay_as_they_were(tmp_path, monkeypatch):
    save(tmp_path / "last.pt", state(1))
    save(tmp_path / "last.pt", state(2))
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    def full(value, file):
        file.write(b"the first half")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"cannot save .*last\.pt: No space left") as caught:
        save(tmp_path / "last.pt", state(3))
    assert "\n" not in str(caught.value)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_a_real_limit_of_the_system_in_mid_write_is_the_same_one_line(tmp_path):
    resource = pytest.importorskip("resource")
    save(tmp_path / "last.pt", state(1))
    big = state(2) | {"model": {"w": torch.zeros(1_000_000)}}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot save"):
            save(tmp_path / "last.pt", big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["last.pt"]
    assert latest(tmp_path)["step"] == 1


def test_an_error_of_the_program_is_not_blamed_on_the_disk(tmp_path, monkeypatch):
    def broken(value, file):
        raise RuntimeError("CUDA error")
    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="CUDA error"):
        save(tmp_path / "last.pt", state(1))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_execute_code_is_refused_unexecuted(tmp_path, zipped):
    harm = tmp_path / "harm"
    torch.save({"format": 1, "model": Malicious(harm)}, tmp_path / "last.pt",
               _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="refused" if zipped else "truncated or no checkpoint"):
        load(tmp_path / "last.pt")
    assert not harm.exists()


@pytest.mark.parametrize("value", [{"format": 2}, {"step": 1}, [1, 2], torch.ones(2)])
def test_another_format_is_named(tmp_path, value):
    torch.save(value, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt: not a checkpoint .*expected 1"):
        load(tmp_path / "last.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pt: .*No such file"):
        load(tmp_path / "nowhere.pt")


def test_the_hash_depends_on_names_types_shapes_and_values_only():
    weights = {"b": torch.randn(2, 3, 4, 5), "a": torch.ones(()), "n": torch.zeros(0)}
    reordered = {name: weights[name] for name in ("n", "a", "b")}
    reordered["b"] = weights["b"].to(memory_format=torch.channels_last)
    reference = weights_hash(weights)
    assert len(reference) == 64
    assert weights_hash(reordered) == reference
    changed = weights["b"].clone()
    changed[1, 2, 3, 4] += 1e-6
    for name, tensor in (("b", changed), ("b", weights["b"].reshape(3, 2, 4, 5)),
                         ("a", torch.ones((), dtype=torch.bfloat16)), ("c", torch.ones(()))):
        assert weights_hash(weights | {name: tensor}) != reference


def holder(folder, then):
    """Another process that locks `folder`, says so, and goes on with the statements `then`."""
    program = ("import os, sys, time\nfrom run_folder import lock\n"
               f"with lock({str(folder)!r}):\n    print('locked', flush=True)\n    {then}\n")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"locked\n"
    return process


@pytest.mark.skipif(run_folder.fcntl is None, reason="uses fork and SIGKILL")
def test_a_second_process_is_refused_until_the_first_is_killed_even_if_its_workers_live(tmp_path):
    run = tmp_path / "run"
    worker = "pid = os.fork()\n    print(pid, flush=True) if pid else None\n    time.sleep(60)"
    first = holder(run, worker)
    child = int(first.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"run is in use by process {first.pid} on "), lock(run):
            pass
        first.send_signal(signal.SIGKILL)
        first.wait()
        os.kill(child, 0)                                  # the forked worker is still there
        with lock(run):
            assert (run / ".lock").read_text().startswith(f"{os.getpid()} on ")
    finally:
        os.kill(child, signal.SIGKILL)
        first.stdout.close()


def test_a_lock_is_given_back_at_the_end_of_its_block(tmp_path):
    with lock(tmp_path):
        pass
    second = holder(tmp_path, "pass")
    assert second.wait(timeout=30) == 0
    second.stdout.close()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    complaint = r"--out: .* cannot be made a folder"
    with pytest.raises(UserError, match=complaint), lock(tmp_path / "file/run"):
        pass


# -- optimizers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_state_saved_in_another_memory_layout_takes_the_same_step(fused, tmp_path):
    def conv(layout):
        torch.manual_seed(0)
        module = torch.nn.Conv2d(6, 5, 3).to(memory_format=layout)
        return module, torch.optim.Adam(module.parameters(), lr=0.1, fused=fused)

    def step(module, optimizer, seed):
        torch.manual_seed(seed)
        module(torch.randn(2, 6, 8, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    module, optimizer = conv(torch.channels_last)
    step(module, optimizer, 1)
    torch.save([module.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    step(module, optimizer, 2)
    other, resumed = conv(torch.contiguous_format)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(weights)
    load_optimizer(resumed, state)
    assert resumed.state[other.weight]["exp_avg"].stride() == other.weight.stride()
    step(other, resumed, 2)
    torch.testing.assert_close(other.weight, module.weight, atol=1e-5, rtol=0)
