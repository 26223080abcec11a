"""Keep a run on disk: its settings, its log, and checkpoints that survive a kill at any moment.

    RUN/config.json               the resolved settings: the same ones continue the run
    RUN/command.txt               every command that worked on this run
    RUN/STAGE/log.jsonl           one line a step, each step once, cut back on resume
    RUN/STAGE/{last,previous}.pt  plain tensors and containers; loading never executes code

The progress line and the signals that end a run early are here, too.
"""

import hashlib
import json
import math
import os
import pickle
import platform
import shlex
import signal
import sys
import time
import zipfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from distributed import UserError, on_rank0, print0, rank, world_size

try:
    import fcntl
except ImportError:                                        # Windows
    fcntl = None
    import msvcrt

FORMAT = 1
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
        with lock(out):
            print0(f"the earlier run is kept as {set_aside(out)}")
    held.enter_context(lock(out))
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


def duration(seconds):
    """Write seconds as 42 s, 7.5 min, 3.1 h, 12 days."""
    for unit, length in (("days", 24 * 3600), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


# -- checkpoints -----------------------------------------------------------------------------------


def save(path, state, keep_previous=True):
    """Write `state` to `path` so that at every moment at least one complete file exists.

    keep_previous: the file that stood at `path` becomes previous.pt beside it.
    Raises UserError when the disk refuses (full, read-only, ...): the files of before are as they
    were, and the unfinished one is removed.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous:
            _keep_previous(path)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch's zip writer hides the OSError behind a RuntimeError about file positions.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        _remove(temporary)
        raise UserError(f"cannot save {path}: {reason.strerror or reason}; make room or choose "
                        "another --out, then run the same command again") from error


def _keep_previous(path):
    """Give the complete file at `path` the second name previous.pt; a damaged one is not kept."""
    if not zipfile.is_zipfile(path):
        return
    previous = path.with_name("previous.pt")
    spare = path.with_name("previous.pt.tmp")
    _remove(spare)
    try:
        os.link(path, spare)
    except OSError:                                        # a file system without hard links
        os.replace(path, previous)
    else:
        os.replace(spare, previous)
        _remove(spare)          # rename leaves both names where both were one file already


def _remove(path):
    try:
        os.unlink(path)
    except OSError:
        return                  # nothing there, or the disk refuses that, too: no further harm


def _sync_folder(folder):
    """Make the new names durable; Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path):
    """The dictionary that `save` wrote at `path`, its tensors on the CPU.

    Raises UserError, one line, for a file that is missing, truncated, damaged (checksums), of
    another format, or that would execute code.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused, it holds more than tensors and plain containers and "
                        "could execute code; use a checkpoint that train.py wrote") from None
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: truncated or no checkpoint ({reason})") from None
    if damaged:
        raise UserError(f"{path}: damaged (wrong checksum in {damaged})")
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this program (format {found}, "
                        f"expected {FORMAT})")
    return state


def latest(folder):
    """The newest readable state in a stage's `folder`: last.pt, else previous.pt, else None.

    None means that neither file exists. Falling back prints a line that names the bad file. Raises
    UserError when files exist but none can be read: a run never starts anew in silence.
    """
    candidates = [Path(folder) / name for name in ("last.pt", "previous.pt")]
    if not any(path.exists() for path in candidates):
        return None
    failures = []
    for path in candidates:
        try:
            state = load(path)
        except UserError as error:
            failures.append(str(error))
            continue
        if failures:
            print0(f"{failures[0]}; continuing from {path}")
        return state
    raise UserError("; ".join(failures) + "; restore one of them or begin anew with --restart")


def weights_hash(state_dict):
    """sha256 (hex) over the sorted names, types, shapes and bytes of a state dict's tensors.

    The same on every device and for every memory layout.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def lock(folder):
    """Hold the run `folder` (made if missing) for this process while the block runs.

    Raises UserError when another process holds it, or when it cannot be written. The lock is the
    process's own: data workers that outlive a killed run do not hold it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115  (closed by the with below)
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror}); "
                        "choose another --out") from None
    with file:
        try:
            _lock_file(file)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(f"{folder} is in use by process {file.read().strip()}; "
                            "stop it or choose another --out") from None
        except OSError as error:
            print0(f"{folder}: this file system has no locks ({error.strerror}); "
                   "take care that no second process writes there")
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _lock_file(file):
    if fcntl is not None:
        # lockf, not flock: flock's lock would pass to forked data workers and outlive this process
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    file.seek(1024)             # beyond the text, which others must be able to read
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
