"""How much fits and how long it takes: one image through one training step, before the real ones.

The trial moves no weight and draws no random number of the run, so a run with it and a run without
are the same.
"""

import copy
import math
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import torch

from distributed import UserError, wait_for

MARGIN = 0.8            # of the free memory is used
DAY = 24 * 3600


def free_memory(trainee):
    """Bytes that this process may still take for images, on the device where `trainee` is.

    Room is left for the gradients, and for Adam's two averages where they do not exist yet.
    """
    optimizers = trainee.optimizers.values()
    weights = sum(p.numel() * p.element_size() for optimizer in optimizers
                  for group in optimizer.param_groups for p in group["params"])
    begun = any(optimizer.state for optimizer in optimizers)
    return _free(trainee.device) - (1 if begun else 3) * weights


def _free(device):
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _free_on_host() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _free_on_host(root="/"):
    """Linux: what programs may still take, or the container's limit allows; else a careful half."""
    root = Path(root)
    try:
        memory = (root / "proc/meminfo").read_text()
        available = 1024 * int(re.search(r"^MemAvailable: +(\d+) kB", memory, re.M)[1])
        return min(available, *_free_in_cgroups(root))
    except FileNotFoundError:
        if not hasattr(os, "sysconf"):
            return 4 * 2**30                   # Windows tells it in another way
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _free_in_cgroups(root):
    """What each limited group (cgroup v2) around this process has left, then infinity.

    Cached files that are not in use count as free, as they do in MemAvailable.
    """
    own = re.search(r"^0::/(.*)$", (root / "proc/self/cgroup").read_text(), re.M)
    mount = root / "sys/fs/cgroup"
    inside = mount / own[1] if own else mount
    for group in (inside, *inside.parents):
        limit = group / "memory.max"
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.M)
            yield int(most) - int((group / "memory.current").read_text()) + int(cached[1])
    yield math.inf


def trial(trainee, step, batch):
    """(bytes, seconds) that one image takes in `step`, measured with the discriminator on.

    batch: a Batch or CodeBatch of one image. The first of two steps warms up and leaves the
    gradients where they are, so that the second one's memory is the image's own.
    """
    batch = batch.heaviest()
    discriminator = copy.deepcopy(trainee.discriminator)       # keeps its running statistics
    timesteps = copy.deepcopy(trainee.timesteps)               # and its history
    scratch = replace(trainee, parallel_model=trainee.model, discriminator=discriminator,
                      parallel_discriminator=discriminator, timesteps=timesteps)
    size = _saved_bytes(scratch, step, batch)
    wait_for(trainee.device)
    if trainee.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step(scratch, batch, gan_on=True)
    wait_for(trainee.device)
    seconds = time.perf_counter() - start
    if trainee.device.type == "cuda":
        size = torch.cuda.max_memory_allocated() - before
    trainee.model.zero_grad(set_to_none=True)
    return size, seconds


def _saved_bytes(scratch, step, batch):
    """One step's bytes where no allocator counts them: what autograd saves, and half as much."""
    networks = (scratch.model, scratch.discriminator, scratch.perceptual)
    weights = {p.untyped_storage().data_ptr() for net in networks if net for p in net.parameters()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step(scratch, batch, gan_on=True)
    return int(1.5 * sum(saved.values()))


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


def local_batch(batch_size, world, micro_batch=None):
    """Images a process takes in a step.

    micro_batch: as asked for. Raises UserError where `world` does not divide `batch_size` or
    `micro_batch` not the share, naming the nearest that do.
    """
    if batch_size % world:
        below, above = batch_size // world * world, (batch_size // world + 1) * world
        near = " or ".join(str(size) for size in (below, above) if size)
        raise UserError(f"--batch-size {batch_size} does not divide over {world} processes; "
                        f"the nearest that do: {near}")
    local = batch_size // world
    if micro_batch and local % micro_batch:
        near = sorted(divisors(local), key=lambda d: abs(d - micro_batch))[:2]
        raise UserError(f"--micro-batch {micro_batch} does not divide the {local} images of a "
                        f"process; the nearest that do: {' or '.join(map(str, sorted(near)))}")
    return local


def fitting_micro_batch(local, image_bytes, free):
    """The largest divisor of a process's `local` images that fits into `free` bytes, at least 1."""
    fitting = [d for d in divisors(local) if d * image_bytes <= MARGIN * free]
    return max(fitting, default=1)
