"""What one training step of each stage is, and the papers' numbers. AVQ Sec. 3.2, 4, Appendix A.

    vqgan     x --VQGAN--> x_hat                              Eq. 2 (or 11) + lambda Eq. 7
    decoder   x, mask --frozen VQGAN, AsymDecoder--> x_hat    Eq. 6 + lambda Eq. 7

In the first stage everything trains, in the second only the decoder. A stage is four functions:
build a `Trainee`, make its gradients for one (micro-)batch, validate it, and turn it into a state
dict. The loop around them is in train.py; the losses are in losses.py. RECIPES holds every number
of the papers' training, so notebooks and `train.py --help` read the same table.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from asym_decoder import AsymDecoder, AsymVQGAN
from distributed import mean_over_ranks, wrap
from losses import (
    LPIPS,
    PatchDiscriminator,
    discriminator_loss,
    generator_gradient,
    pixel_loss,
)
from metrics import pre_error
from vqgan import VQGAN

STAGE_IDS = {"vqgan": 0, "refit": 1, "decoder": 2, "prior": 3}   # part of every random seed


@dataclass(frozen=True)
class Recipe:
    """How a stage is trained. lr holds at `batch_size` and scales linearly with another one.

    deviation D11 (disc_start), deviation D25 (lr)
    """

    batch_size:    int   = 80          # global, over all processes
    lr:            float = 3.6e-4      # Adam's peak learning rate at this batch size
    betas:         tuple = (0.5, 0.9)  # Adam
    steps:         int   = 0           # length of the run; 0: by epochs
    epochs:        float = 0           # passes over the data at hand
    warmup:        int   = 0           # steps of linear warm-up from 1 % (at most a tenth of all)
    min_lr:        float = 0.0         # the cosine's end; 0: constant after the warm-up
    trunk_factor:  float = 1.0         # on the rate of a trunk that starts from the first stage's
    start_trunk:   bool  = False       # start the trunk from the first stage's decoder
    gan:           str   = "hinge"     # or "log", Eq. 7
    lambda_rule:   str   = "paper"     # of the adaptive weight: Eq. 9, or "taming"
    disc_start:    float = 0.29        # below 1 a fraction of the steps, from 1 on a step
    ndf:           int   = 64          # the discriminator's width
    disc_layers:   int   = 3           # and its strided layers
    latent_weight: float = 1.0         # of Eq. 2's latent terms (VQ) or of Eq. 10 (KL)
    p_full:        float = 0.5         # share of full masks among the decoder's
    mask_kind:     str   = "thick"     # of the others, masks.MASK_KINDS


# AVQ Sec. 4's "Implementation details", the authors' configuration where the paper is silent, and
# the first stages' own; what none of them states is in OURS.
# [AVQ Sec. 4]  deviation D10, deviation D21
RECIPES = {
    "vqgan": {
        "vq": Recipe(batch_size=96, lr=4.5e-6 * 96, steps=500_000, lambda_rule="taming",
                     disc_start=250_001),
        "kl": Recipe(batch_size=96, lr=4.5e-6 * 96, steps=250_000, lambda_rule="taming",
                     disc_start=50_001, latent_weight=1e-6),
        "tiny": Recipe(batch_size=8, lr=2e-3, steps=1800, warmup=50, min_lr=1e-4,
                       lambda_rule="taming", disc_start=0.8, ndf=32, disc_layers=2),
    },
    "decoder": {
        "base": Recipe(batch_size=80, lr=3.6e-4, epochs=12, warmup=5_000, min_lr=1e-6,
                       start_trunk=True, trunk_factor=0.1),
        "large": Recipe(batch_size=320, lr=7.2e-4, epochs=12, warmup=5_000, min_lr=1e-6),
        "large2": Recipe(batch_size=320, lr=7.2e-4, epochs=12, warmup=5_000, min_lr=1e-6),
        "tiny": Recipe(batch_size=8, lr=6e-3, steps=2000, warmup=50, min_lr=1e-5,
                       start_trunk=True, trunk_factor=0.3, disc_start=0.8, ndf=32, disc_layers=2),
    },
}
# Our own numbers: single fields, or all that a recipe states.
OURS = {("vqgan", "vq"): {"steps"}, ("vqgan", "kl"): {"steps"}, ("vqgan", "tiny"): "all",
        ("decoder", "large2"): "all", ("decoder", "tiny"): "all"}


def run_length(recipe, images):
    """Steps of a stage on a data set of so many images."""
    return recipe.steps or math.ceil(recipe.epochs * images / recipe.batch_size)


def first_gan_step(recipe, steps):
    """The 0-based step at which the discriminator starts."""
    start = recipe.disc_start
    return math.floor(start * steps) if start < 1 else int(start)


def learning_rate(step, steps, peak, warmup, min_lr):
    """The learning rate of `step` (0-based): linear from 1 %, then cosine to min_lr. [AVQ Sec. 4]

    deviation D27
    steps: of the run. min_lr = 0 keeps the peak after the warm-up, as the first stages do.
    """
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return peak * (0.01 + 0.99 * step / warmup)
    if min_lr == 0:
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    low = min(min_lr, peak)
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * done))


def image_generators(seed, stage, positions):
    """One CPU generator for each image, a function of (seed, stage, position in the run) alone."""
    keys = [np.random.SeedSequence((seed, STAGE_IDS[stage], p)) for p in positions]
    return [torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0])) for key in keys]


@dataclass
class Batch:
    """One micro-batch on the device."""

    x:          torch.Tensor             # (B,3,H,W) in [-1,1]
    mask:       torch.Tensor             # (B,1,H,W) in {0,1}
    rows:       torch.Tensor | None      # (n,) int64, the samples whose mask is not full; None: all
    generators: list | None              # one for each sample, for the KL latent's noise


def training_batch(items, seed, stage, device, channels_last=False):
    """A training loader's dict -> Batch."""
    x, mask = _pixels(items, device, channels_last)
    rows = [i for i, full in enumerate(items["full"]) if not full]
    return Batch(x, mask, torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True),
                 image_generators(seed, stage, items["position"]))


def validation_batch(items, device, channels_last=False):
    """A validation loader's dict -> Batch, for the modes of the latents and all masks partial."""
    x, mask = _pixels(items, device, channels_last)
    return Batch(x, mask, rows=None, generators=None)


def _pixels(items, device, channels_last):
    """Images and masks cross to the device as uint8; floats are made there."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = items["image"].to(device, non_blocking=True).to(memory_format=layout)
    return x.float() / 127.5 - 1, items["mask"].to(device, non_blocking=True).float()


@dataclass
class Trainee:
    """The networks and optimisers of one stage."""

    stage:                  str
    recipe:                 Recipe
    device:                 torch.device
    model:                  nn.Module            # VQGAN or AsymVQGAN
    discriminator:          nn.Module
    perceptual:             LPIPS | None
    precision:              str = "fp32"
    optimizers:             dict = field(default_factory=dict)
    parallel_model:         nn.Module = None     # `model`, in DDP where processes are several
    parallel_discriminator: nn.Module = None     # `discriminator`, likewise
    parent:                 str | None = None    # hash of the frozen first stage

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def build_vqgan(config, recipe, device, perceptual=None, precision="fp32", channels_last=False):
    """A first stage to train, from a VQGANConfig. [AVQ Sec. 3.1]"""
    model = VQGAN(config).to(device)
    groups = [{"params": list(model.parameters()), "factor": 1.0}]
    return _trainee("vqgan", model, groups, recipe, device, perceptual, precision, channels_last)


def build_decoder(first_stage, preset, blend, recipe, device, perceptual=None, precision="fp32",
                  channels_last=False):
    """An asymmetric decoder to train on a frozen first stage. [AVQ Sec. 3.2]

    Where the recipe says so and the sizes agree, the trunk starts from the first stage's decoder
    and learns at `trunk_factor` times the rate; the branch always starts anew.  deviation D10
    """
    decoder = AsymDecoder.from_preset(first_stage.config, preset, blend)
    started = recipe.start_trunk and decoder.trunk_fits(first_stage.decoder)
    if started:
        decoder.load_trunk(first_stage.decoder)
    model = AsymVQGAN(first_stage, decoder).to(device)
    trunk_factor = recipe.trunk_factor if started else 1.0
    groups = [{"params": decoder.trunk_parameters(), "factor": trunk_factor},
              {"params": decoder.branch_parameters(), "factor": 1.0}]
    return _trainee("decoder", model, groups, recipe, device, perceptual, precision, channels_last)


def _trainee(stage, model, groups, recipe, device, perceptual, precision, channels_last):
    discriminator = PatchDiscriminator(ndf=recipe.ndf, n_layers=recipe.disc_layers).to(device)
    if device.type == "cuda":                    # there is none for CPU  deviation D19
        discriminator = nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
    if channels_last:                            # before DDP, whose buckets take the layout of now
        model.to(memory_format=torch.channels_last)
        discriminator.to(memory_format=torch.channels_last)
    fused = device.type == "cuda"
    optimizers = {
        "generator": torch.optim.Adam(groups, lr=recipe.lr, betas=recipe.betas, fused=fused),
        "discriminator": torch.optim.Adam(
            [{"params": list(discriminator.parameters()), "factor": 1.0}],
            lr=recipe.lr, betas=recipe.betas, fused=fused),
    }
    model.train()
    return Trainee(stage, recipe, device, model, discriminator, perceptual, precision, optimizers,
                   wrap(model, device), wrap(discriminator, device))


def set_learning_rates(trainee, step, steps, disc_start):
    """Both optimisers' rates for `step`. The discriminator's schedule starts when it does."""
    r = trainee.recipe
    schedule = r.lr, r.warmup, r.min_lr
    rates = {"generator": learning_rate(step, steps, *schedule),
             "discriminator": learning_rate(max(0, step - disc_start), max(1, steps - disc_start),
                                            *schedule)}
    for name, rate in rates.items():
        for group in trainee.optimizers[name].param_groups:
            group["lr"] = max(rate * group["factor"], min(r.min_lr, rate))
    return rates["generator"]


def vqgan_step(trainee, batch, gan_on, scale=1.0):
    """Add one micro-batch's gradients of the first stage to .grad. [AVQ Eq. 2] [AVQ Eq. 8]

    No optimiser moves. gan_on: whether the discriminator has started; before, it costs nothing.
    scale: this micro-batch's share of the step. Returns the losses' terms, detached, by name.
    """
    with trainee.autocast():
        x_hat, extra = trainee.parallel_model(batch.x, generator=batch.generators)
    return _backward(trainee, batch.x, x_hat, extra, gan_on, scale)


def decoder_step(trainee, batch, gan_on, scale=1.0):
    """Add one micro-batch's gradients of the decoder to .grad. [AVQ Sec. 3.2] [AVQ Eq. 8]

    The full image is encoded; only the branch sees the masked one. Else as vqgan_step.
    """
    with trainee.autocast():
        x_hat, extra = trainee.parallel_model(batch.x, batch.mask, batch.rows, batch.generators)
    return _backward(trainee, batch.x, x_hat, extra, gan_on, scale)


def _backward(trainee, x, x_hat, extra, gan_on, scale):
    """Back-propagate the combined image gradient once, with the latent's own loss; then D's loss.

    Both players see the one x_hat: the model runs once a step, before either of them moves.
    deviation D12
    """
    r = trainee.recipe
    gradient, terms = generator_gradient(
        x_hat, x, extra["last_features"], trainee.model.decoder.conv_out.weight.shape,
        trainee.perceptual, trainee.discriminator if gan_on else None, r.gan, r.lambda_rule)
    outputs, gradients = [x_hat], [gradient * scale]
    if "latent_loss" in extra:
        outputs.append(extra["latent_loss"])
        gradients.append(torch.full_like(extra["latent_loss"], r.latent_weight * scale))
        terms["latent"] = extra["latent_loss"].detach()
    torch.autograd.backward(outputs, gradients)
    if gan_on:
        terms |= discriminator_backward(trainee, x, x_hat.detach(), scale)
    return terms


def discriminator_backward(trainee, x, x_hat, scale=1.0):
    """Add the discriminator's gradients to .grad. [AVQ Eq. 7]

    Real and generated images pass separately, because of BatchNorm. x_hat: detached, the very
    images that the generator's step judged.
    """
    real, fake = trainee.parallel_discriminator(x), trainee.parallel_discriminator(x_hat)
    loss = discriminator_loss(real, fake, trainee.recipe.gan)
    (loss * scale).backward()
    return {"disc": loss.detach(), "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean()}


def optimizer_step(trainee, gan_on):
    """Move the weights by the gradients in .grad, then clear these."""
    for name, optimizer in trainee.optimizers.items():
        if name == "generator" or gan_on:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def gradient_norm(trainee, gan_on):
    """The norm of all gradients, a 0-d tensor: the cheapest way to see one that is not finite."""
    names = ["generator", "discriminator"] if gan_on else ["generator"]
    groups = [group for name in names for group in trainee.optimizers[name].param_groups]
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads)


def global_terms(terms):
    """The terms of one step as floats, means over micro-batches and ranks.

    A term that is not finite on any rank is not finite in the mean. terms: one dict of 0-d tensors
    for each micro-batch.
    """
    names = sorted(terms[0])
    values = torch.stack([torch.stack([t[name].float() for t in terms]).mean() for name in names])
    return dict(zip(names, mean_over_ranks(values).tolist()))


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


def stage_weights(trainee):
    """The state dict of a checkpoint: taming's keys for vqgan, the authors' `decoder.*` else."""
    return {name: value for name, value in trainee.model.state_dict().items()
            if not _is_frozen(name)}


def load_stage_weights(trainee, weights):
    """The inverse of stage_weights; strict."""
    frozen = {name: value for name, value in trainee.model.state_dict().items() if _is_frozen(name)}
    trainee.model.load_state_dict(frozen | weights)


def _is_frozen(name):
    return name.startswith("first_stage.")
