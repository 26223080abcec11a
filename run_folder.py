"""What a run leaves on disk besides weights and pictures: its settings and its log.

    RUN/config.json        the resolved settings: the same ones continue the run, others are refused
    RUN/command.txt        every command that worked on this run
    RUN/STAGE/log.jsonl    one line a step, each step once, cut back to the checkpoint on resume

The progress line and the signals that end a run early are here, too. Weights are in checkpoint.py,
pictures in pictures.py.
"""

import json
import math
import os
import shlex
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import checkpoint
from budget import duration
from distributed import UserError, on_rank0, print0, rank, world_size

PATIENCE = 3            # seconds from one signal to the next that is meant as another


@contextmanager
def open_run(out, config, restart=False, may_change=frozenset()):
    """Hold the run folder `out`, made or continued for `config`, while the block runs.

    config: plain values only. restart: an existing run is set aside under the next free name, never
    deleted. may_change: keys of `config` that need not be as they were. Raises UserError, on every
    rank, where another process writes there, where the folder holds a run with other settings
    (listing them), or where it holds something that is no run.
    """
    with ExitStack() as held:
        on_rank0(lambda: _open(Path(out), config, restart, may_change, held))
        yield


def _open(out, config, restart, may_change, held):
    if restart and out.exists():
        with checkpoint.lock(out):
            print0(f"the earlier run is kept as {set_aside(out)}")
    held.enter_context(checkpoint.lock(out))
    settings = out / "config.json"
    if settings.exists():
        # Before anything is saved, a mistake in the settings must not have to be kept.
        if any(out.glob("*/*.pt")):
            before, now = json.loads(settings.read_text()), json.loads(json.dumps(config))
            _compare(out, *({key: value for key, value in known.items() if key not in may_change}
                            for known in (before, now)))
    elif any(path.name not in (".lock", "config.json.part") for path in out.iterdir()):
        raise UserError(f"--out {out}: the folder is not empty and holds no run of ours; "
                        "choose another --out")
    write_text(settings, json.dumps(config, indent=2) + "\n")
    with open(out / "command.txt", "a") as file:
        file.write(shlex.join([*_launcher(), *sys.argv]) + "\n")


def _launcher():
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return ["torchrun", f"--nproc_per_node={processes}"] if world_size() > 1 else ["python"]


def set_aside(out):
    """Rename the folder to OUT.old1, OUT.old2, ...; the new path."""
    number = 1
    while (old := out.with_name(f"{out.name}.old{number}")).exists():
        number += 1
    return out.rename(old)


def _compare(out, before, now):
    changed = _differences(before, now)
    if changed:
        raise UserError(f"{out} was begun with other settings: {'; '.join(changed)}. Give the same "
                        "ones to continue it, another --out for a new run, or --restart to begin "
                        "anew (the old run is kept aside)")


def _differences(before, now, prefix=""):
    found = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} was {a}, is {b}")
    return found


def make_folder(path, flag="--out"):
    """`path`, a Path, as a folder: made where it is not there. UserError: it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be made a folder ({error.strerror}); choose "
                        f"another {flag}") from None
    return path


def write_text(path, text):
    """Write a whole file or none of it."""
    part = Path(f"{path}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class Log:
    """log.jsonl: one JSON object for each step. Only rank 0 writes."""

    def __init__(self, path, step):
        """Keep the lines up to `step` steps; the later ones are about to be made again."""
        self.file = None
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = (line for line in _complete_lines(path) if json.loads(line)["step"] <= step)
            write_text(path, "".join(line + "\n" for line in lines))
            self.file = open(path, "a", buffering=1)  # noqa: SIM115  (as long as the run)

    def write(self, record):
        if self.file:
            self.file.write(json.dumps(record, allow_nan=False) + "\n")

    def sync(self):
        """Before a checkpoint: its log must not be behind it, even after a power cut."""
        if self.file:
            os.fsync(self.file.fileno())

    def close(self):
        if self.file:
            self.file.close()


def _complete_lines(path):
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return lines[:-1]                       # what follows the last newline was cut off by a kill


class Progress:
    """One updating line with rate and time left; off a terminal, a plain line every ten seconds."""

    def __init__(self, name, first, steps, batch_size):
        self.name, self.first, self.steps, self.batch_size = name, first, steps, batch_size
        self.start = self.shown = time.monotonic()
        self.terminal = sys.stdout.isatty()

    def show(self, step, terms):
        """After `step` steps."""
        now = time.monotonic()
        if rank() or (now - self.shown < (0.2 if self.terminal else 10) and step < self.steps):
            return
        self.shown = now
        rate = (step - self.first) / max(now - self.start, 1e-9)
        shown = [name for name in ("pixel", "perceptual", "gan", "lambda", "vlb")
                 if name in terms]
        line = "  ".join([f"{self.name} {step}/{self.steps}",
                          *(f"{name} {terms[name]:.4g}" for name in shown),
                          f"{rate * self.batch_size:.3g} images/s",
                          f"{duration((self.steps - step) / rate)} left"])
        if self.terminal:
            print(f"\r{line:<110}", end="", flush=True)
        else:
            print(line, flush=True)

    def close(self):
        if self.terminal and rank() == 0:
            print(flush=True)


@contextmanager
def stop_signals():
    """Yields a list that SIGTERM and SIGINT join; the loop looks at it at the end of a step.

    A later Ctrl-C is a KeyboardInterrupt. Launchers repeat a signal within milliseconds: those
    repetitions are not meant so.
    """
    received, first = [], math.inf

    def note(number, frame):
        nonlocal first
        if not received:
            first = time.monotonic()
            text = (f"\n{signal.Signals(number).name}: finishing this step, then saving; Ctrl-C "
                    f"after {PATIENCE} s leaves at once\n")
            os.write(2, text.encode() if rank() == 0 else b"")   # print may be busy just now
        elif number == signal.SIGINT and time.monotonic() - first > PATIENCE:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
