"""Checkpoints that survive a kill at any moment, a full disk and a curious download.

A run's stage folder holds last.pt, previous.pt (the one before) and best.pt. What they hold is
train.py's affair; here they are one dictionary of plain tensors and containers with `format` 1.

    save:    last.pt.tmp written, fsync -> last.pt linked as previous.pt -> .tmp renamed to last.pt
    latest:  last.pt, or previous.pt with a message, or None where nothing was ever saved
    lock:    one writing process per run folder, released by the kernel even after SIGKILL

Loading never executes code (`weights_only=True`). Not here: public checkpoints (convert.py), when
to save and what to compare on resume (train.py).
"""

import hashlib
import os
import pickle
import platform
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from distributed import UserError, print0

try:
    import fcntl
except ImportError:                                        # Windows
    fcntl = None
    import msvcrt

FORMAT = 1


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
