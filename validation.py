"""What a stage is judged by while it trains: numbers on held-out images, and pictures of a few.

    held-out batches, Trainee --validate_*--> {"val_...": mean over images}        log.jsonl
    one batch, Trainee --*_columns--> {caption: (B,3,H,W)}                          samples/

Models are in eval mode meanwhile, KL latents are modes, and a prior has the average of its weights.
A refit is judged as the vqgan that it is. Not here: the comparison of decoders that results are
reported by (eval.py).
"""

from contextlib import contextmanager

import torch

from diffusion import held_out_bound
from losses import pixel_loss
from metrics import pre_error

SAMPLE_STEPS = 25       # of the pictures


@torch.no_grad()
def validate_vqgan(trainee, batches):
    """{"val_pixel", "val_perceptual"} over held-out batches."""
    trainee.model.eval()
    totals = _Means()
    for batch in batches:
        with trainee.autocast():
            x_hat = trainee.model.decode(trainee.model.encode(batch.x))
        totals.add("val_pixel", pixel_loss(x_hat, batch.x), len(batch.x))
        _perceptual(trainee, totals, x_hat, batch.x)
    trainee.model.train()
    return totals.means()


@torch.no_grad()
def validate_decoder(trainee, batches):
    """{"val_pixel" (no mask), "val_pixel_masked", "val_pre_error", ...} over held-out batches."""
    model = trainee.model
    model.eval()
    totals = _Means()
    for batch in batches:
        with trainee.autocast():
            z = model.encode(batch.x)
            plain, masked = model.decode(z), model.decode(z, image=batch.x, mask=batch.mask)
        totals.add("val_pixel", pixel_loss(plain, batch.x), len(batch.x))
        totals.add("val_pixel_masked", pixel_loss(masked, batch.x), len(batch.x))
        totals.add("val_pre_error", pre_error(masked, batch.x, batch.mask).mean(), len(batch.x))
        _perceptual(trainee, totals, plain, batch.x)
    model.train()
    return totals.means()


@torch.no_grad()
def validate_prior(trainee, batches):
    """{"val_vlb"}: the bound in nats a map over held-out CodeBatches, the noise always the same."""
    totals, done = _Means(), 0
    with _averaged(trainee) as model:
        for batch in batches:
            nats = held_out_bound(trainee.diffusion, model, batch.indices, done)    # (B)
            totals.add("val_vlb", nats.mean(), len(nats))
            done += len(nats)
    return totals.means()


@contextmanager
def _averaged(trainee):
    """The prior's model with its averaged weights, not compiled, while the block runs."""
    model = trainee.model
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(trainee.ema.weights)
    model.eval()
    try:
        yield model.forward          # a compiled model would be compiled anew for these shapes
    finally:
        model.load_state_dict(weights)
        model.train()


def _generators(first, count):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def _perceptual(trainee, totals, x_hat, x):
    if trainee.perceptual is not None:
        totals.add("val_perceptual", trainee.perceptual(x_hat, x).mean(), len(x))


class _Means:
    """Means over images of values that come a batch at a time."""

    def __init__(self):
        self.sums, self.counts = {}, {}

    def add(self, name, value, count):
        self.sums[name] = self.sums.get(name, 0.0) + value.item() * count
        self.counts[name] = self.counts.get(name, 0) + count

    def means(self):
        return {name: total / self.counts[name] for name, total in self.sums.items()}


@torch.no_grad()
def vqgan_columns(trainee, batch):
    """Columns of a picture people can judge a first stage by: {caption: (B,3,H,W)}."""
    model = trainee.model
    model.eval()
    with trainee.autocast():
        columns = {"original": batch.x, "reconstruction": model.decode(model.encode(batch.x))}
    model.train()
    return columns


@torch.no_grad()
def decoder_columns(trainee, batch):
    """Columns of a picture people can judge a decoder by: {caption: (B,3,H,W)}."""
    model = trainee.model
    model.eval()
    with trainee.autocast():
        z = model.encode(batch.x)
        columns = {"original": batch.x, "masked": batch.x * (1 - batch.mask),
                   "vanilla": model.first_stage.decode(z),
                   "ours, with mask": model.decode(z, image=batch.x, mask=batch.mask),
                   "ours, without": model.decode(z)}
    model.train()
    return columns


@torch.no_grad()
def prior_columns(trainee, batch):
    """Columns of a picture people can judge a prior by: {caption: (B,3,H,W)}."""
    decode, diffusion = trainee.first_stage.decode_indices, trainee.diffusion
    steps = min(SAMPLE_STEPS, diffusion.T)
    with _averaged(trainee) as model:
        drawn = diffusion.sample(model, batch.indices.shape, steps,
                                 _generators(0, len(batch.indices)), device=trainee.device)
    return {"held out": batch.x, "its codes, decoded": decode(batch.indices),
            f"new codes, {steps} steps": decode(drawn)}
