"""Keep a run on disk: its settings, its log, and checkpoints that survive a kill at any moment.

    RUN/config.json               the resolved settings, which must be the same to continue the run
    RUN/command.txt               every command that worked on this run
    RUN/STAGE/log.jsonl           one line per step, cut back to the checkpoint when a run continues
    RUN/STAGE/{last,previous}.pt  plain tensors and containers; loading never executes code
"""

import hashlib
import json
import os
import pickle
import platform
import shlex
import sys
import time
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from distributed import UserError, on_rank0, print0, rank, world_size
from weight_files import unreadable

try:
    import fcntl
except ImportError:                                        # Windows has no such locks
    fcntl = None

FORMAT = 1


@dataclass
class Run:
    """Hold what all stages share in one call of train.py."""
    settings:  dict             # the resolved flags, as in config.json
    out:       Path
    device:    torch.device
    workers:   int              # data processes of each training process
    train_set: object           # data.Signs or data.ImageFiles
    val_set:   object

    def __post_init__(self):
        # Whether a pixel's channels lie side by side in memory. On an H100 that is slower.
        self.channels_last = self.device.type == "cpu" or (
            self.device.type == "cuda" and self.settings["compile"])

    def place(self, network):
        """Move a network to the device, before DDP, which copies its memory layout to buckets."""
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        return network.to(self.device, memory_format=layout)

    def autocast(self):
        """Give the autocast context of --precision, for the networks."""
        bf16 = self.settings["precision"] == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)


@contextmanager
def open_run(out, settings, may_change=frozenset()):
    """Make or continue the run folder `out` for `settings`, and lock it while the block runs.

    may_change: the keys that may differ from before. Raises UserError, on every rank, for a folder
    that another process writes to, for other settings, and for a folder that is not a run.
    """
    def enter():
        held.enter_context(lock(out))
        config = out / "config.json"
        # Settings may still change until the first checkpoint exists.
        if config.exists() and any(out.glob("*/*.pt")):
            before, now = (_flat(json.loads(text))
                           for text in (config.read_text(), json.dumps(settings)))
            changed = [f"{key} was {before.get(key)}, is {now.get(key)}"
                       for key in sorted((before.keys() | now.keys()) - may_change)
                       if before.get(key) != now.get(key)]
            if any(text.startswith("data_set.") for text in changed) and before.get("root"):
                changed.append(f"its images were in --root {before['root']}")
            if changed:
                raise UserError(f"{out} was started with other settings: {'; '.join(changed)}. "
                                "Repeat the old ones to continue it, or choose another --out")
        elif not config.exists() and any(path.name not in (".lock", "config.json.part")
                                         for path in out.iterdir()):
            raise UserError(f"--out {out} is not empty and not a run of train.py; choose another")
        write_text(config, json.dumps(settings, indent=2) + "\n")
        launcher = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"
        # Names stay the bytes that they are, so that the command can be given again.
        with open(out / "command.txt", "a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{launcher if world_size() > 1 else 'python'} {shlex.join(sys.argv)}\n")

    with ExitStack() as held:
        on_rank0(enter)
        yield


def _flat(settings, prefix=""):
    """Flatten nested settings: {"a": {"b": 1}} becomes {"a.b": 1}."""
    flat = {}
    for key, value in settings.items():
        flat |= (_flat(value, f"{prefix}{key}.") if isinstance(value, dict)
                 else {prefix + key: value})
    return flat


@contextmanager
def lock(folder):
    """Lock `folder`, made if missing, for this process while the block runs.

    Raises UserError where another process has the lock. The kernel releases it even after SIGKILL,
    and data workers that outlive the run do not keep it.
    """
    with open(make_folder(Path(folder)) / ".lock", "a+") as file:
        try:
            if fcntl:           # not flock, whose lock forked data workers would inherit
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(f"{folder} is in use by process {file.read().strip()}; "
                            "stop it or choose another --out") from None
        except OSError as error:
            print0(f"{folder}: this file system has no locks ({error.strerror}); "
                   "start no second process with this --out")
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


def make_folder(path, flag="--out"):
    """Make the folder `path`, a Path, if it is missing. Raises UserError where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be made a folder ({error.strerror}); choose "
                        f"another {flag}") from None
    return path


def write_text(path, text):
    """Write `text` to `path` so that a kill leaves the old file or the new one, both whole."""
    part = Path(f"{path}.part")
    with open(part, "w", encoding="utf-8", errors="backslashreplace") as file:   # for odd names
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def save(path, state):
    """Write the checkpoint `state` to `path`, and rename the one before it to previous.pt.

    At every moment one of the two is whole. Raises UserError where the disk is full or fails.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if zipfile.is_zipfile(path):             # else it would replace a good previous.pt
            os.replace(path, path.with_name("previous.pt"))
        os.replace(temporary, path)
        if os.name != "nt":                      # make the new names durable
            descriptor = os.open(path.parent, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    except (OSError, RuntimeError) as error:
        # torch's zip writer hides the OSError behind a RuntimeError about file positions.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot save {path}: {reason.strerror or reason}; make room or choose "
                        "another --out, then run the same command again") from error


def load(path):
    """Read the checkpoint `path`, a dictionary with tensors on the CPU.

    Raises UserError for a file that is missing, damaged, of another format or would execute code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise UserError(f"{path}: damaged (wrong checksum in {damaged})")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused, because it has more than tensors and plain containers "
                        "and could execute code; use a checkpoint of train.py") from None
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
        raise unreadable(path, error, remedy="") from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this program (format {found}, "
                        f"expected {FORMAT})")
    return state


def latest(folder):
    """Read a stage's newest whole checkpoint: last.pt, else previous.pt, else None.

    Prints the error of a last.pt that cannot be read. Raises UserError where files are there and
    none can be read, because the run would start again without a word.
    """
    failures = []
    for path in (Path(folder) / "last.pt", Path(folder) / "previous.pt"):
        if os.path.lexists(path):                # also a link to nothing
            try:
                state = load(path)
                if failures:
                    print0(f"{failures[0]}; continuing from {path}")
                return state
            except UserError as error:
                failures.append(str(error))
    if failures:
        raise UserError("; ".join(failures) + "; restore one of them, or choose another --out")
    return None


def load_optimizer(optimizer, state):
    """Load an optimizer's state_dict, in the memory layout of its present parameters.

    torch would keep the layout that the state was saved in. Fused Adam goes through parameter and
    state in the order of memory, so with two layouts its steps would be wrong.
    """
    for group in state["param_groups"]:                  # as the present device needs it
        group["fused"] = optimizer.param_groups[0]["fused"]
    optimizer.load_state_dict(state)
    for parameter, kept in optimizer.state.items():
        for key, value in kept.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                kept[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def weights_hash(state_dict):
    """Hash a state dict's names, types, shapes and bytes: sha256, on any device, in any layout."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Log:
    """Write log.jsonl: one JSON object for each step. Only rank 0 writes."""

    def __init__(self, path, step):
        """Keep the lines up to `step`, -1 for none: the later steps are about to be repeated."""
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A kill may have cut the last line short: it has no newline.
            lines = path.read_text().split("\n")[:-1] if path.exists() else []
            write_text(path, "".join(line + "\n" for line in lines
                                     if json.loads(line)["step"] <= step))
        place = path if rank() == 0 else os.devnull
        self.file = open(place, "a", buffering=1)  # noqa: SIM115  (as long as the run)

    def write(self, record, durable=False):
        """Write a line. durable: force it to disk, as a checkpoint must not be ahead of its log."""
        self.file.write(json.dumps(record, allow_nan=False) + "\n")
        if durable:
            os.fsync(self.file.fileno())

    def close(self):
        self.file.close()


class Progress:
    """Show one updating line with the rate and, from the twentieth step on, the time left.

    Without a terminal, print a new line every ten seconds.
    """

    def __init__(self, name, first, steps, batch_size):
        self.name, self.first, self.steps, self.batch_size = name, first, steps, batch_size
        self.start = self.shown = time.monotonic()
        self.terminal = sys.stdout.isatty()

    def show(self, step, terms):
        """Show the progress after `step` steps, and the main ones of `terms`, {name: number}."""
        now = time.monotonic()
        if rank() or (now - self.shown < (0.2 if self.terminal else 10) and step < self.steps):
            return
        self.shown = now
        rate = (step - self.first) / max(now - self.start, 1e-9)
        words = [f"{self.name} {step}/{self.steps}"]
        words += [f"{name} {terms[name]:.4g}" for name in ("pixel", "perceptual", "gan", "lambda",
                                                           "vlb") if name in terms]
        words.append(f"{rate * self.batch_size:.3g} images/s")
        if step - self.first >= 20:
            words.append(f"{duration((self.steps - step) / rate)} left")
        start, width, end = ("\r", 110, "") if self.terminal else ("", 0, "\n")
        print(f"{start}{'  '.join(words):<{width}}", end=end, flush=True)

    def close(self):
        if self.terminal and rank() == 0:
            print(flush=True)


def duration(seconds):
    """Write seconds as 42 s, 7.5 min, 3.1 h, 12 days."""
    for unit, length in (("days", 24 * 3600), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
