"""How much fits and how long it takes: one image through one training step, before the real ones.

The trial moves no weight and draws no random number of the run, so a run with it and a run without
are the same.
"""

import copy
import os
import time
from dataclasses import replace

import torch

from distributed import UserError

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
    if not hasattr(os, "sysconf"):
        return 4 * 2**30                       # Windows tells it in another way: a careful guess
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") // processes


def trial(trainee, step, batch):
    """(bytes, seconds) that one image takes in `step`, measured with the discriminator on.

    batch: a Batch of one image. The first of two steps warms up and leaves the gradients where they
    are, so that the second one's memory is the image's own.
    """
    discriminator = copy.deepcopy(trainee.discriminator)       # keeps its running statistics
    scratch = replace(trainee, generator=trainee.model, discriminator=discriminator,
                      critic=discriminator)
    size = _saved_bytes(scratch, step, batch)
    _wait(trainee.device)
    if trainee.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step(scratch, batch, gan_on=True)
    _wait(trainee.device)
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


def _wait(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


def local_batch(batch_size, world):
    """Images a process takes in a step; raises UserError with the nearest sizes that divide."""
    if batch_size % world:
        below, above = batch_size // world * world, (batch_size // world + 1) * world
        near = " or ".join(str(size) for size in (below, above) if size)
        raise UserError(f"--batch-size {batch_size} does not divide over {world} processes; "
                        f"the nearest that do: {near}")
    return batch_size // world


def micro_batch(local, asked, image_bytes, free):
    """Images a process takes at once: what the user asked for, or the largest divisor that fits.

    local: images of a process in a step. Raises UserError where `asked` does not divide it, naming
    the nearest that do.
    """
    if asked is None:
        fitting = [d for d in divisors(local) if d * image_bytes <= MARGIN * free]
        return max(fitting, default=1)
    if asked < 1 or local % asked:
        near = sorted(divisors(local), key=lambda d: abs(d - asked))[:2]
        raise UserError(f"--micro-batch {asked} does not divide the {local} images of a process; "
                        f"the nearest that do: {' or '.join(map(str, sorted(near)))}")
    return asked


def duration(seconds):
    """42 s, 7.5 min, 3.1 h, 12 days."""
    for unit, length in (("days", DAY), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
