"""DistributedDataParallel that vanishes on one process.

`python train.py` is one process and pays nothing; `torchrun --nproc_per_node=8 train.py` is eight, and the same lines
of train.py run. Tensors on the device travel by NCCL, host numbers by gloo, so a decision about stopping never waits
for the device. Nothing here knows about models or stages.
"""

import os
import sys
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn


class UserError(Exception):
    """A user's mistake: one line that names the file or flag and the mend; programs leave with exit status 2."""


def setup(device="auto"):
    """Join the group that torchrun made, if any, and return this process's `torch.device`.

    device: "auto" (CUDA, then MPS, then CPU) or anything `torch.device` takes.
    Raises UserError for a device this machine does not have.
    """
    device = _choose_device(device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # A rank that died is noticed by the others within this time even where the launcher is gone, too.
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    return device


def _choose_device(name):
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here ({str(error).splitlines()[0]}); "
                        "use --device cpu or auto") from None
    return device


def close():
    """Leave the group; harmless on one process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args, **kwargs):
    """print, on rank 0 only, flushed at once."""
    if rank() == 0:
        print(*args, **kwargs, flush=True)


def mean_over_ranks(tensor):
    """The mean of `tensor` over all processes; the tensor itself on one process. No gradient passes."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def any_rank(*flags):
    """For each flag, whether it is set on any rank; agreed over gloo, so that nothing waits for the device."""
    if world_size() == 1:
        return flags
    votes = torch.tensor([float(flag) for flag in flags])
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes)


def on_rank0(function):
    """function() on rank 0, its result on every rank; a UserError there is one everywhere, so all leave alike."""
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
    """[value of rank 0, value of rank 1, ...] on every rank, for small host values."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def wrap(module, device):
    """`module` in DistributedDataParallel; itself on one process.

    Buffers are not broadcast: the only ones are the discriminator's running statistics, which training never reads.
    """
    if world_size() == 1:
        return module
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)


def no_sync(module, last):
    """Gradients cross the ranks only in the last of a step's micro-batches."""
    return module.no_sync() if world_size() > 1 and not last else nullcontext()


def exit_on_user_error(main):
    """Run a program's `main()`: a UserError is one line on stderr and exit status 2, anything else keeps its traceback."""
    try:
        sys.exit(main())
    except UserError as error:
        if rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        close()
