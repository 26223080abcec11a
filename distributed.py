"""Run the same lines on one process or many: DistributedDataParallel that vanishes on one.

`python train.py` is one process, `torchrun --nproc_per_node=8 train.py` is eight. Tensors on the
device travel by NCCL, host numbers by gloo, so a decision about stopping never waits for the
device. A program ends here as well: after a user's mistake, a signal, a failure.
"""

import ctypes
import errno
import inspect
import os
import signal
import sys
import time
import traceback
import warnings
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES)    # full, or refuses


class UserError(Exception):
    """A user's mistake, in one line that names file or flag and what to do; exit status 2."""


def setup(device="auto"):
    """Join the group that torchrun made, if any, and return this process's `torch.device`.

    device: "auto" (CUDA, then MPS, then CPU) or anything `torch.device` takes. Under torchrun each
    process takes the CUDA device of its own number. Raises UserError for a device that is not here.
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
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # A process that died is noticed within this time even where the launcher died with it.
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    return device


def keep_freed_memory():
    """Ask glibc to keep freed buffers of up to 32 MiB; without, a CPU step is a fifth slower.

    What a step frees and allocates again would return page by page, each by a fault. Linux only.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)               # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)          # M_TRIM_THRESHOLD


def close():
    """Leave the group; harmless on one process."""
    if dist.is_initialized():
        # Dropping a gloo group joins its threads while holding the interpreter's lock, for which a
        # thread with a tensor to drop waits (pytorch/pytorch#56297): they finish in this time.
        time.sleep(0.2)
        dist.destroy_process_group()


def rank():
    """Give this process's number; torchrun's word for it before `setup` and after `close`."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args, **kwargs):
    """Print on rank 0 only, flushed at once."""
    if rank() == 0:
        print(*args, **kwargs, flush=True)


def mean_over_ranks(tensor):
    """Average `tensor` over all processes; the tensor itself on one. No gradient passes."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def any_rank(flag):
    """Tell whether any rank has set the flag; agreed over gloo, so nothing waits for a GPU."""
    vote = torch.tensor(float(bool(flag)))
    if world_size() > 1:
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote)


def on_rank0(function):
    """Run function() on rank 0; every rank has its result, a small host value, or its UserError."""
    if world_size() == 1:
        return function()
    answer = [None, None]
    if rank() == 0:
        try:
            answer[0] = function()
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, device=torch.device("cpu"))
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def gather_objects(value):
    """List every rank's value, rank 0's first, on every rank; for small host values."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for(device):
    """Wait until the device has done all that was asked of it; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def wrap(module, device):
    """Put `module` in DistributedDataParallel; on one process return it as it is."""
    if world_size() == 1:
        return module
    # The strides of a 1x1 kernel have two spellings for one layout; DDP warns where they differ.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    DDP = nn.parallel.DistributedDataParallel
    known = inspect.signature(DDP).parameters            # the flag's name changed in PyTorch 2.13
    # The only buffers are the discriminator's running statistics, which training never reads.
    flag = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    ids = [device.index] if device.type == "cuda" else None
    return DDP(module, device_ids=ids, **{flag: False})


def no_sync(module, last):
    """Keep gradients on their rank in all but the last of a step's micro-batches."""
    return module.no_sync() if world_size() > 1 and not last else nullcontext()


def exit_on_user_error(main):
    """Run a program's `main()` and leave with its exit status.

    A UserError, a full disk or too little device memory is one line on stderr and status 2; SIGINT
    is 130 and SIGTERM 143; anything else keeps its traceback and is status 1.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        status, complaint = main(), None
        close()
    except UserError as error:
        status, complaint = 2, error
    except torch.OutOfMemoryError as error:
        status = 2
        complaint = f"{str(error).split('. ')[0]}; give fewer images at once, or smaller ones"
    except KeyboardInterrupt:
        status, complaint = 128 + signal.SIGINT, None
    except Exception as error:
        status, complaint = 1, None
        if getattr(error, "errno", None) in DISK:
            status, complaint = 2, f"{error}; make room or choose another place, then run it again"
        else:
            traceback.print_exc()
    if complaint:
        # Where all make the same mistake, rank 0 says so, and the launcher ends the others in time.
        if rank():
            time.sleep(3)
        who = f"rank {rank()}: " if rank() else ""
        print(f"{who}error: {complaint}", file=sys.stderr, flush=True)
    if status and world_size() > 1:
        sys.stdout.flush()
        os._exit(status)            # to leave the group in good order is to wait for the others
    sys.exit(status)
