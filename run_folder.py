"""What a run leaves on disk besides weights: its settings, its log, its progress line. See checkpoint.py for weights.

    RUN/config.json    the resolved settings; the same command again continues, another one is refused
    RUN/command.txt    every command that worked on this run
    RUN/STAGE/log.jsonl    one line a step, each step once, cut back to the checkpoint on resume
"""

import json
import os
import shlex
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import checkpoint
from budget import duration
from distributed import UserError, on_rank0, print0, rank


@contextmanager
def open_run(out, config, restart=False):
    """Hold the run folder `out`, made or continued for `config` (plain values only), while the block runs.

    restart: an existing run is set aside under the next free name, never deleted.
    Raises UserError, on every rank, where another process writes there, where the folder holds a run with other
    settings (listing them), or where it holds something that is no run.
    """
    with ExitStack() as held:
        on_rank0(lambda: _open(Path(out), config, restart, held))
        yield


def _open(out, config, restart, held):
    if restart and out.exists():
        with checkpoint.lock(out):
            print0(f"the earlier run is kept as {set_aside(out)}")
    held.enter_context(checkpoint.lock(out))
    settings = out / "config.json"
    if settings.exists():
        _compare(out, json.loads(settings.read_text()), json.loads(json.dumps(config)))
    elif any(path.name not in (".lock", "config.json.part") for path in out.iterdir()):
        raise UserError(f"--out {out}: the folder is not empty and holds no run of ours; choose another --out")
    write_text(settings, json.dumps(config, indent=2) + "\n")
    with open(out / "command.txt", "a") as file:
        file.write("python " + shlex.join(sys.argv) + "\n")


def set_aside(out):
    """Rename the folder to OUT.old1, OUT.old2, ...; the new path."""
    number = 1
    while (old := out.with_name(f"{out.name}.old{number}")).exists():
        number += 1
    return out.rename(old)


def _compare(out, before, now):
    changed = _differences(before, now)
    if changed:
        raise UserError(f"{out} was begun with other settings: {'; '.join(changed)}. Give the same ones to continue it, "
                        "another --out for a new run, or --restart to begin anew (the old run is kept aside)")


def _differences(before, now, prefix=""):
    found = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} was {a}, is {b}")
    return found


def write_text(path, text):
    """Write a whole file or none of it."""
    part = Path(f"{path}.part")
    part.write_text(text)
    os.replace(part, path)


class Log:
    """log.jsonl: one JSON object for each step. Only rank 0 writes."""

    def __init__(self, path, step):
        """Keep the lines of the first `step` steps, drop the later ones: they are about to be made again."""
        self.file = None
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= step]
            write_text(path, "".join(line + "\n" for line in kept))
            self.file = open(path, "a", buffering=1)  # noqa: SIM115  (open for the length of the run)

    def write(self, record):
        if self.file:
            self.file.write(json.dumps(record) + "\n")

    def close(self):
        if self.file:
            self.file.close()


def _complete_lines(path):
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [line for line in lines[:-1] if line]        # what follows the last newline was cut off by a kill


class Progress:
    """One updating line with rate and time left; plain lines, ten seconds apart, where there is no terminal."""

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
        values = "  ".join(f"{name} {terms[name]:.4g}" for name in ("pixel", "perceptual", "gan", "lambda") if name in terms)
        line = (f"{self.name} {step}/{self.steps}  {values}  {rate * self.batch_size:.3g} images/s  "
                f"{duration((self.steps - step) / rate)} left")
        print(f"\r{line:<110}" if self.terminal else line, end="" if self.terminal else "\n", flush=True)

    def close(self):
        if self.terminal and rank() == 0:
            print(flush=True)


@contextmanager
def stop_signals():
    """Yields a list that SIGTERM and SIGINT append themselves to: the loop saves and leaves at the end of its step."""
    received = []

    def note(number, frame):
        if not received:
            print0(f"\n{signal.Signals(number).name}: finishing this step, then saving", file=sys.stderr)
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
