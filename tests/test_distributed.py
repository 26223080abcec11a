import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from test_train_autoencoder import SMALL_RECIPE, assert_close, batch, decoder, float64, part
from train_process import call

import distributed
import train as program
from distributed import UserError


def run_main(error, capsys):
    def main():
        if isinstance(error, BaseException):
            raise error
        return error
    with pytest.raises(SystemExit) as left:
        distributed.exit_on_user_error(main)
    return left.value.code, capsys.readouterr().err


# -- one process -----------------------------------------------------------------------------------

def test_one_process_is_its_own_group():
    module, tensor = torch.nn.Linear(2, 2), torch.tensor([1.0, 2.0])
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.wrap(module, torch.device("cpu")) is module
    assert distributed.mean_over_ranks(tensor) is tensor
    assert distributed.gather(tensor) is tensor
    assert distributed.on_rank0(lambda: 5) == 5
    assert distributed.gather_objects("a") == ["a"]


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "mps" if not
                                  torch.backends.mps.is_available() else "nonsense"])
def test_a_device_that_is_not_there_is_named_with_the_mend(name):
    with pytest.raises(UserError, match=f"--device {name}.*--device cpu"):
        distributed.setup(name)


def test_auto_takes_what_is_there():
    expected = "cuda" if torch.cuda.is_available() else (
        "mps" if torch.backends.mps.is_available() else "cpu")
    assert distributed.setup("auto").type == expected


def test_a_users_mistake_is_one_line_and_status_2(capsys):
    assert run_main(UserError("--size 7: no"), capsys) == (2, "error: --size 7: no\n")


def test_a_full_disk_is_one_line_and_status_2(capsys):
    status, text = run_main(OSError(errno.ENOSPC, "No space left on device", "log.jsonl"), capsys)
    assert status == 2
    assert "log.jsonl" in text
    assert "make room" in text
    assert text.count("\n") == 1


def test_anything_else_keeps_its_traceback_and_ctrl_c_has_none(capsys):
    status, text = run_main(ZeroDivisionError("on purpose"), capsys)
    assert status == 1
    assert "Traceback" in text
    assert run_main(KeyboardInterrupt(), capsys) == (130, "")
    assert run_main(0, capsys)[0] == 0


PRINTING = """
import sys
import distributed
def main():
    for _ in range(3):
        distributed.print0("∞" * 40_000)
        print("done", file=sys.stderr)
    return 0
distributed.exit_on_user_error(main)
"""


def test_a_reader_that_goes_ends_no_program_and_brings_no_traceback():
    """As with `| head`: its end is closed before the first line. The text does not fit cp1252."""
    with subprocess.Popen([sys.executable, "-c", PRINTING], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "cp1252"}) as process:
        process.stdout.close()
        assert process.stderr.read() == "done\n" * 3
    assert process.returncode == 0


@pytest.mark.parametrize("name", ["train", "eval", "sample", "inpaint", "convert", "image_pairs"])
def test_every_program_prints_and_ends_by_exit_on_user_error(name):
    assert (ROOT / f"{name}.py").read_text().endswith("exit_on_user_error(main)\n")


# -- signals ---------------------------------------------------------------------------------------

@pytest.fixture
def _terminal():
    """A terminal that does not ignore its signals, as the background of a shell does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    for number, handler in ((signal.SIGINT, signal.default_int_handler),
                            (signal.SIGHUP, signal.SIG_DFL)):
        signal.signal(number, handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_terminal")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_signals_are_noted_said_once_and_heeded_and_the_handlers_come_back(name, capfd):
    number, seen = getattr(signal, name), []
    before = signal.getsignal(number)

    def work():
        with distributed.stop_signals():
            for i in distributed.heed(range(9)):
                seen.append(i)
                if i == 3:
                    os.kill(os.getpid(), number)
                    os.kill(os.getpid(), number)

    with pytest.raises(distributed.Leaving) as leaving:
        work()
    assert seen == [0, 1, 2, 3]
    assert leaving.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert not distributed.asked()
    assert capfd.readouterr().err.count(f"{name}: finishing this step, then saving") == 1


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with distributed.stop_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not distributed.asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_end_of_max_hours_is_status_0_and_one_line(capsys):
    def main():
        with distributed.stop_signals(hours=1e-9):
            list(distributed.heed(range(3)))

    with pytest.raises(SystemExit) as left:
        distributed.exit_on_user_error(main)
    assert left.value.code == 0
    assert capsys.readouterr().out == ("stopped before the next step; the same command continues "
                                       "from here\n")


@pytest.mark.usefixtures("_terminal")
def test_ctrl_c_again_after_some_seconds_leaves_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def press():
        with distributed.stop_signals():
            os.kill(os.getpid(), signal.SIGINT)
            now[0] += distributed.PATIENCE - 0.1
            os.kill(os.getpid(), signal.SIGINT)              # a launcher's repetition
            now[0] += 0.2
            os.kill(os.getpid(), signal.SIGTERM)
            assert len(distributed.STOP.signals) == 3
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        press()


MALLINFO = """
import ctypes, sys, distributed
class Info(ctypes.Structure):                            # glibc's struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks",
                "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype = Info, ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "keep":
    distributed.keep_freed_memory()
before = libc.mallinfo2()
buffers = [libc.malloc(16 << 20) for _ in range(4)]
held = libc.mallinfo2()
for buffer in buffers:
    libc.free(buffer)
print(held.hblks - before.hblks, round((libc.mallinfo2().arena - before.arena) / (16 << 20)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(("keep", "expected"), [("keep", "0 4"), ("", "4 0")])
def test_freed_memory_is_kept_for_the_next_step(keep, expected):
    """Of four buffers of 16 MiB: so many mapped singly, so many kept after they are freed.

    In a process of its own, which no other test has told how to allocate.
    """
    out = subprocess.run([sys.executable, "-c", MALLINFO, keep], cwd=ROOT, check=True,
                         capture_output=True, text=True).stdout
    assert out.split() == expected.split()


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8"])
def test_printing_never_fails_for_a_character(encoding, tmp_path, monkeypatch):
    """A file or pipe on Windows is cp1252; a name that is not UTF-8 has lone surrogates."""
    stream = open(tmp_path / "out", "w", encoding=encoding)  # noqa: SIM115  (replaced, not closed)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "__stdout__", stream)
    with pytest.raises(SystemExit) as left:
        distributed.exit_on_user_error(lambda: distributed.print0("∞ dB, x̂, M\udcfcnchen"))
    assert not left.value.code
    shown = (tmp_path / "out").read_text(encoding)
    assert shown.strip() == ("∞ dB, x̂, M\\udcfcnchen" if encoding == "utf-8" else
                             "\\u221e dB, x\\u0302, M\\udcfcnchen")


def test_a_rank_that_is_left_over_in_the_environment_is_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match=r"RANK is set: .*WORLD_SIZE.*torchrun, or unset RANK"):
        distributed.setup("cpu")
    monkeypatch.setenv("RANK", "")
    assert distributed.setup("cpu").type == "cpu"
    assert distributed.rank() == 0


# -- two processes ---------------------------------------------------------------------------------

def gradients_of_a_share(folder, full, sgd):
    """What each process of the test below does: steps on its share of a batch of 4."""
    with float64():
        distributed.setup("cpu")
        stage = decoder(recipe=replace(SMALL_RECIPE, lambda_rule="paper"))
        stage.discriminator.eval()
        rank, world = distributed.rank(), distributed.world_size()
        share = 4 // world
        if sgd:
            stage.optimizers = {
                name: torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.05)
                for name, optimizer in stage.optimizers.items()}
        data = part(batch(full=full), rank * share, (rank + 1) * share)
        stage.batch = lambda items: data
        for _ in range(10 if sgd else 1):
            terms = program.gradients(stage, {"position": data.index}, True, share)
            terms, _ = program.agree(terms, False)
            if sgd:
                stage.update(gan_on=True)
        networks = {"": stage.model.decoder, "D.": stage.discriminator}
        kept = {prefix + name: (p if sgd else p.grad).detach().clone()
                for prefix, network in networks.items() for name, p in network.named_parameters()}
        if rank == 0:
            torch.save({"tensors": kept, "terms": terms}, f"{folder}/{world}.pt")
        distributed.close()


@pytest.mark.parametrize("sgd", [False, True], ids=["gradients", "ten-sgd-steps"])
def test_two_processes_with_half_the_batch_each_are_one_process(sgd, tmp_path):
    full = (False, False, True, True)                     # the second has no partial mask at all
    assert call(gradients_of_a_share, str(tmp_path), full, sgd) == [0]
    assert call(gradients_of_a_share, str(tmp_path), full, sgd, ranks=2) == [0, 0]
    one, two = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "2.pt")
    assert_close(two["tensors"], one["tensors"], 1e-6)
    for name, value in one["terms"].items():
        assert two["terms"][name] == pytest.approx(value, rel=1e-5), name


def talk(folder):
    distributed.setup("cpu")
    rank = distributed.rank()
    assert distributed.mean_over_ranks(torch.tensor(float(rank))).item() == 0.5
    assert distributed.gather(torch.full((1, 2), rank)).tolist() == [[0, 0], [1, 1]]
    assert distributed.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert distributed.on_rank0(lambda: f"from {rank}") == "from 0"

    def fail():
        raise UserError("only rank 0 ran this")

    with pytest.raises(UserError, match="only rank 0 ran this"):
        distributed.on_rank0(fail)
    nan = distributed.mean_over_ranks(torch.tensor([float("nan") if rank else 1.0, 1.0]))
    assert nan.isfinite().tolist() == [False, True]
    distributed.close()
    assert distributed.rank() == rank                     # torchrun's word, for what is printed


def test_two_processes_agree_on_flags_values_and_mistakes(tmp_path):
    assert call(talk, str(tmp_path), ranks=2) == [0, 0]


def one_fails(folder):
    def main():
        distributed.setup("cpu")
        if distributed.rank() == 1:
            raise ValueError("rank 1 is broken")
        dist.barrier()
        return 0
    distributed.exit_on_user_error(main)


def test_a_process_that_fails_takes_the_others_with_it(tmp_path):
    start = time.monotonic()
    assert call(one_fails, str(tmp_path), ranks=2) == [1, 1]
    assert time.monotonic() - start < 30
