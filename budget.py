"""How much fits and how long it takes: one image through one training step, before the real ones.

The trial moves no weight and draws no random number of the run, so a run with it and a run without are the same.
"""

import copy
import os
import time
from dataclasses import replace

import torch

from distributed import UserError

MARGIN = 0.8            # of the free memory is used
DAY = 24 * 3600


def free_memory(device):
    """Bytes that this process may still take on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") // processes


def trial(trainee, step, batch):
    """(bytes, seconds) that one image takes in `step`, measured with the discriminator on, after one step to warm up.

    batch: a Batch of one image.
    """
    discriminator = copy.deepcopy(trainee.discriminator)      # its running statistics must not see the trial
    scratch = replace(trainee, generator=trainee.model, discriminator=discriminator, critic=discriminator)
    size = _step_bytes(scratch, step, batch)
    _wait(trainee.device)
    start = time.perf_counter()
    step(scratch, batch, gan_on=True)
    _wait(trainee.device)
    seconds = time.perf_counter() - start
    trainee.model.zero_grad(set_to_none=True)
    return size, seconds


def _step_bytes(scratch, step, batch):
    if scratch.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(scratch, batch, gan_on=True)
        return torch.cuda.max_memory_allocated() - before
    # The host's allocator keeps no account: count what autograd saves, and half as much again for what passes through.
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step(scratch, batch, gan_on=True)
    return int(1.5 * sum(saved.values()))


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


def local_batch(batch_size, world):
    """Images a process; raises UserError with the nearest sizes that divide."""
    if batch_size % world:
        below, above = batch_size // world * world, (batch_size // world + 1) * world
        near = " or ".join(str(size) for size in (below, above) if size)
        raise UserError(f"--batch-size {batch_size} does not divide over {world} processes; the nearest that do: {near}")
    return batch_size // world


def micro_batch(local, asked, image_bytes, free):
    """Images a process takes at once: what the user asked for, or the largest divisor of `local` that fits.

    Raises UserError where `asked` does not divide `local`, naming the nearest that do.
    """
    if asked is None:
        fitting = [d for d in divisors(local) if d * image_bytes <= MARGIN * free]
        return max(fitting, default=1)
    if asked < 1 or local % asked:
        near = sorted(divisors(local), key=lambda d: abs(d - asked))[:2]
        raise UserError(f"--micro-batch {asked} does not divide the {local} images of a process; the nearest that do: "
                        + " or ".join(map(str, sorted(near))))
    return asked


def duration(seconds):
    """42 s, 7.5 min, 3.1 h, 12 days."""
    for unit, length in (("days", DAY), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
