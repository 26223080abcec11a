import json
import os
import signal

import pytest

import run_folder
from distributed import UserError
from run_folder import Log, Progress, open_run, stop_signals, write_text

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


def test_settings_may_change_while_nothing_is_saved(tmp_path):
    with open_run(tmp_path / "run", CONFIG):
        pass
    with open_run(tmp_path / "run", {"lr": 0.2}):
        assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"lr": 0.2}


def test_restart_sets_runs_aside_one_after_the_other(tmp_path, capsys):
    out = tmp_path / "run"
    for lr in (1, 2, 3):
        begin(out, {"lr": lr}, restart=True)
    found = [json.loads((tmp_path / name / "config.json").read_text())["lr"]
             for name in ("run.old1", "run.old2", "run")]
    assert found == [1, 2, 3]
    assert "run.old2" in capsys.readouterr().out


def test_a_folder_with_other_things_in_it_is_not_written_to(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="choose another --out"), open_run(tmp_path, CONFIG):
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
    log.write({"step": 4, "again": True})
    log.sync()
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
    progress = Progress("vqgan", 2, 12, 4)
    for step in range(3, 13):
        now[0] += 2
        progress.show(step, {"pixel": 0.5, "other": 1})
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2                                   # ten seconds apart, and the last
    assert lines[0].split() == ["vqgan", "7/12", "pixel", "0.5", "2", "images/s", "10", "s", "left"]
    assert "12/12" in lines[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_noted_and_the_handlers_come_back(number, capfd):
    before = signal.getsignal(number)
    with stop_signals() as received:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert received == [number, number]
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err.count("then saving") == 1  # said once


def test_ctrl_c_again_after_some_seconds_leaves_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with stop_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += run_folder.PATIENCE - 0.1
        os.kill(os.getpid(), signal.SIGINT)                  # a launcher's repetition
        now[0] += 0.2
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(received) == 3
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
