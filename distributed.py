"""Run the same code on one process or many; end programs early, or with one-line errors.

`python train.py` is one process, where every function here does nothing or next to nothing;
`torchrun --nproc_per_node=8 train.py` is eight with DistributedDataParallel. NCCL moves tensors
between GPUs, gloo between CPUs.
"""

import ctypes
import errno
import inspect
import io
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES)  # full or read-only
GROUP_TIMEOUT = timedelta(hours=1)   # a process that keeps the others waiting for longer hangs
JOINING = timedelta(minutes=10)       # until all processes are there
ROLL_CALL = 4           # seconds that the processes have to tell that they are alive
PATIENCE = 3            # seconds after which a second Ctrl-C is taken for a new one
STOP = SimpleNamespace(signals=[], deadline=math.inf)      # of stop_signals
ASK_TO_STOP = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
               if hasattr(signal, name)]


class UserError(Exception):
    """Tell of a user's mistake in one line: the file or flag, and what to do. Exit status 2."""


class Leaving(SystemExit):
    """Leave early, as a signal or --max-hours asks, and say where."""

    def __init__(self, where="stopped before the next step"):
        super().__init__(where)
        self.code = 128 + STOP.signals[0] if STOP.signals else 0


def setup(device="auto"):
    """Join the group that torchrun made, if any, and return this process's `torch.device`.

    device: "auto" (CUDA, then MPS, then CPU) or anything that `torch.device` takes. Under torchrun
    each process uses the CUDA device of its local rank. Raises UserError for a missing device.
    """
    name = device if device != "auto" else (
        "cuda" if torch.cuda.is_available() else
        "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here ({str(error).splitlines()[0]}); "
                        "use --device cpu, or fewer processes than GPUs") from None
    if device.type == "mps" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--device mps works in one process only; start it without torchrun, "
                        "or with --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        keep_freed_memory()
    if os.environ.get("RANK") and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            store, number, world = next(dist.rendezvous("env://", timeout=JOINING))
        except ValueError as error:
            raise UserError(f"RANK is set: {error}; start torchrun, or unset RANK") from None
        # After a restart torchrun's store still has the addresses of the dead, and gloo may wait
        # for them. Several machines may count restarts differently, so there they stay.
        alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
        STOP.store = dist.PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group(backend, store=STOP.store, rank=number, world_size=world,
                                timeout=GROUP_TIMEOUT)
    return device


def keep_freed_memory():
    """Make glibc keep freed buffers of up to 32 MiB: otherwise a CPU step is a fifth slower.

    Memory that is given back to Linux returns page by page, with a page fault for each.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)               # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)          # M_TRIM_THRESHOLD


def close():
    """Leave the process group. Does nothing on one process."""
    if dist.is_initialized():
        # Destroying a gloo group joins its threads while it holds the interpreter's lock. A thread
        # that frees a tensor waits for that lock (pytorch/pytorch#56297), so let them finish first.
        time.sleep(0.2)
        dist.destroy_process_group()


def rank():
    """Give this process's number, from torchrun's RANK before `setup` and after `close`."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK") or 0)


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args, **kwargs):
    """Print on rank 0 only, flushed at once."""
    if rank() == 0:
        print(*args, **kwargs, flush=True)


def mean_over_ranks(tensor):
    """Average `tensor` over all processes, without gradient; on one, return it as it is."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def gather(tensor):
    """Join all processes' tensors of one shape (B,...) in the order of ranks: (world·B,...)."""
    if world_size() == 1:
        return tensor
    joined = tensor.new_empty(world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(joined, tensor)
    return joined


def on_rank0(function):
    """Run function() on rank 0; every rank gets its small result, or its error or Leaving."""
    if world_size() == 1:
        return function()
    answer = [None, None]
    if rank() == 0:
        try:
            answer[0] = function()
        except (UserError, OSError, Leaving) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, device=torch.device("cpu"))
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def gather_objects(value):
    """Give every rank the list of all ranks' values, small ones, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for(device):
    """Wait until the device has finished all kernels, so that a clock measures their time."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def wrap(module, device):
    """Wrap `module` in DistributedDataParallel; on one process, return it as it is."""
    if world_size() == 1:
        return module
    # Two different strides describe the same layout of a 1x1 kernel, and DDP warns of the two.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    DDP = nn.parallel.DistributedDataParallel
    known = inspect.signature(DDP).parameters            # the flag's name changed in PyTorch 2.13
    # Without copying buffers: they are D's running statistics, which training never reads.
    flag = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    ids = [device.index] if device.type == "cuda" else None
    return DDP(module, device_ids=ids, gradient_as_bucket_view=True, **{flag: False})


@contextmanager
def stop_signals(hours=None):
    """Note signals that ask to stop, and the end of --max-hours, while the block runs: `asked`.

    They are SIGTERM, SIGINT, SIGHUP of a lost terminal and SIGUSR1 of Slurm, unless ignored. A
    second Ctrl-C is a KeyboardInterrupt if it comes PATIENCE seconds after the first signal.
    Launchers repeat a signal within milliseconds, which must not count.
    """
    def note(number, frame):
        if not STOP.signals:
            STOP.first = time.monotonic()
            text = (f"\n{signal.Signals(number).name}: finishing this step, then saving; Ctrl-C "
                    f"after {PATIENCE} s stops at once\n")
            with suppress(OSError):                              # print is not safe in a handler
                os.write(2, text.encode() if rank() == 0 else b"")
        elif number == signal.SIGINT and time.monotonic() - STOP.first > PATIENCE:
            raise KeyboardInterrupt
        STOP.signals.append(number)

    STOP.signals, STOP.deadline = [], time.monotonic() + 3600 * hours if hours else math.inf
    before = {number: signal.signal(number, note) for number in ASK_TO_STOP
              if signal.getsignal(number) != signal.SIG_IGN}     # as nohup has it
    try:
        yield
        next(heed(), None)
    except RuntimeError as error:
        if is_from_group(error):
            next(heed(), None)       # another process left a moment before
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        STOP.signals, STOP.deadline = [], math.inf


def asked():
    """Tell whether this process was asked to stop."""
    return bool(STOP.signals) or time.monotonic() > STOP.deadline


def heed(items=(None,)):
    """Yield the items, and raise Leaving before one if this process was asked to stop."""
    for item in items:
        if asked():
            raise Leaving
        yield item


def is_from_group(error):
    """Tell whether an exception is of a collective call: gloo's, NCCL's or the store's."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def absent_ranks():
    """Call the roll after a collective call has failed: list the ranks that do not answer."""
    present = []

    def call():
        with suppress(RuntimeError):             # rank 0 may keep the store, and be gone
            STOP.store.set(f"rank {rank()}", "is here")
            time.sleep(ROLL_CALL if rank() else ROLL_CALL + 2)       # and it must not go first
            present.extend(r for r in range(world_size()) if STOP.store.check([f"rank {r}"]))

    signal.signal(signal.SIGTERM, signal.SIG_IGN)        # torchrun sends it at once
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(3 * ROLL_CALL)                   # a store that hangs has no time limit
    return sorted(set(range(world_size())) - set(present)) if present else [0]


class _Unbreakable(io.FileIO):
    """Write to a terminal, pipe or file, and go on when it is gone or full."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def end_at_once():
    """Let SIGINT and SIGTERM end a program that saves nothing, also within a call of torch.

    Python's own handlers would wait for the end of the call, which can take minutes.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:           # as in the background of a shell
            signal.signal(number, signal.SIG_DFL)


def exit_on_user_error(main):
    """Run a program's `main()` and exit with its status.

    A UserError, a full disk or too little device memory prints one line on stderr and gives status
    2. SIGINT gives 130 and SIGTERM 143. Another process that is gone gives one line and 1. Any
    other exception prints its traceback and gives 1. Printing never fails: its reader may go.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):         # not a notebook's
            stream.flush()
            raw = _Unbreakable(stream.fileno(), "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(
                io.BufferedWriter(raw), stream.encoding, "backslashreplace", line_buffering=True))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    status, complaint = 2, None
    try:
        status = main()
        close()
    except UserError as error:
        complaint = error
    except torch.OutOfMemoryError as error:
        complaint = f"{str(error).split('. ')[0]}; use fewer images at a time, or smaller ones"
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except SystemExit as error:
        status = error.code
        if isinstance(error, Leaving):
            print0(f"{error}; the same command continues from here")
    except Exception as error:
        status = 2 if getattr(error, "errno", None) in DISK else 1
        if status == 2:
            complaint = f"{error}; make room or choose another place, then run it again"
        elif is_from_group(error) and (absent := absent_ranks()):
            if rank() == min(set(range(world_size())) - set(absent)):
                complaint = (f"rank {', '.join(map(str, absent))} of {world_size()} has died or "
                             "hangs; its own output may say why. Run the same command again")
        else:
            traceback.print_exc()
    if complaint:
        # If all ranks have the same error, only rank 0 prints it: torchrun ends the others first.
        if rank():
            time.sleep(3)
        who = f"rank {rank()}: " if rank() else ""
        print(f"{who}error: {complaint}", file=sys.stderr, flush=True)
    if world_size() > 1 or (status and threading.active_count() > 1):
        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        os._exit(status)            # an orderly exit would wait for the other processes
    sys.exit(status)
