import errno
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import run_folder
from distributed import UserError
from run_folder import latest, load, lock, save, weights_hash

ROOT = Path(__file__).resolve().parent.parent


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


def test_best_is_replaced_without_touching_previous(tmp_path):
    save(tmp_path / "last.pt", state(1))
    save(tmp_path / "last.pt", state(2))
    for step in (1, 2):
        save(tmp_path / "best.pt", state(step), keep_previous=False)
    assert load(tmp_path / "best.pt")["step"] == 2
    assert load(tmp_path / "previous.pt")["step"] == 1


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
    with pytest.raises(UserError, match=r"last\.pt.*previous\.pt.*--restart"):
        latest(tmp_path)
    (tmp_path / "previous.pt").unlink()
    with pytest.raises(UserError, match=r"last\.pt.*--restart"):
        latest(tmp_path)


def test_a_missing_last_beside_a_good_previous_continues_with_a_message(tmp_path, capsys):
    save(tmp_path / "previous.pt", state(4), keep_previous=False)
    assert latest(tmp_path)["step"] == 4
    assert "last.pt: no such checkpoint" in capsys.readouterr().out


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
    for name in ("fsync", "link", "replace", "unlink", "open", "close"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    return calls


MOMENTS = range(1, 11)


def test_the_moments_below_cover_every_call_of_a_save(tmp_path, monkeypatch):
    save(tmp_path / "last.pt", state(1))
    with monkeypatch.context() as patch:
        calls = fail_at(patch, None, None)
        save(tmp_path / "last.pt", state(2))
    assert calls[0] == MOMENTS.stop - 1


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_before_any_call_of_a_save_leaves_a_complete_file(tmp_path, monkeypatch, moment):
    save(tmp_path / "last.pt", state(1))
    save(tmp_path / "last.pt", state(2))
    with monkeypatch.context() as patch:
        fail_at(patch, moment, Killed())
        with pytest.raises(Killed):
            save(tmp_path / "last.pt", state(3))
    assert latest(tmp_path)["step"] in (2, 3)
    for step in (4, 5):                                    # and the next run's saves are as ever
        save(tmp_path / "last.pt", state(step))
    assert names(tmp_path) == ["last.pt", "previous.pt"]
    assert load(tmp_path / "previous.pt")["step"] == 4


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_disk_that_refuses_any_call_of_a_save_loses_nothing(tmp_path, monkeypatch, moment):
    save(tmp_path / "last.pt", state(1))
    save(tmp_path / "last.pt", state(2))
    with monkeypatch.context() as patch:
        fail_at(patch, moment, OSError(errno.EIO, "Input/output error"))
        with suppress(UserError):                          # some calls have a second way
            save(tmp_path / "last.pt", state(3))
    assert latest(tmp_path)["step"] in (2, 3)
    assert "last.pt.tmp" not in names(tmp_path)


def test_without_hard_links_the_one_before_is_kept_by_renaming(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(os, "link", no_links)
    for step in (1, 2, 3):
        save(tmp_path / "last.pt", state(step))
    assert load(tmp_path / "last.pt")["step"] == 3
    assert load(tmp_path / "previous.pt")["step"] == 2


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
    with pytest.raises(UserError, match=r"nowhere\.pt: no such checkpoint"):
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
    with pytest.raises(UserError, match=r"cannot write there .*--out"), lock(tmp_path / "file/run"):
        pass
