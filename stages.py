"""What one training step of each stage is, and the papers' numbers. AVQ Sec. 3.2, 4; DDM Sec. 4.1.

    vqgan     x --VQGAN--> x_hat                              AVQ Eq. 2 (or 11) + lambda Eq. 7
    refit     x --frozen encoder, codes; decoder--> x_hat     the same; the codes are new
    decoder   x, mask --frozen VQGAN, AsymDecoder--> x_hat    AVQ Eq. 6 + lambda Eq. 7
    prior     z_0, t --noise--> z_t --UNet--> logits          DDM Eq. 7

In the first everything trains, in the others what is named last. A stage is built as a `Trainee`,
which makes its gradients for one (micro-)batch at a time, moves, and turns into a state dict. The
loop around that is in train.py, what a stage starts from in begin.py, its validation in
validation.py; losses are in losses.py and diffusion.py. RECIPES holds every number of the papers'
training, so notebooks and `train.py --help` read the same table.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from asym_decoder import AsymDecoder, AsymVQGAN
from data import pixels
from diffusion import MultinomialDiffusion, Timesteps
from distributed import mean_over_ranks, wrap
from ema import EMA
from losses import (
    LPIPS,
    PatchDiscriminator,
    discriminator_loss,
    generator_gradient,
)
from seeding import image_generators
from vqgan import VQGAN


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
    disc_factor:   float = 1.0         # on its learning rate
    latent_weight: float = 1.0         # of Eq. 2's latent terms (VQ) or of Eq. 10 (KL)
    p_full:        float = 0.5         # share of full masks among the decoder's
    mask_kind:     str   = "thick"     # of the others, masks.MASK_KINDS
    max_maps:      int   = 0           # the prior sees the codes of so many images; 0: of all
    code_start:    bool  = False       # its embedding and last layer start from the codebook


# AVQ Sec. 4's "Implementation details", the authors' configuration where the paper is silent, and
# the first stages' own; what none of them states is in OURS.
# [AVQ Sec. 4] [DDM Sec. 4.1]  deviations D10 D21 D46
RECIPES = {
    "vqgan": {
        "vq": Recipe(batch_size=96, lr=4.5e-6 * 96, steps=500_000, lambda_rule="taming",
                     disc_start=250_001),
        "kl": Recipe(batch_size=96, lr=4.5e-6 * 96, steps=250_000, lambda_rule="taming",
                     disc_start=50_001, latent_weight=1e-6),
        "tiny": Recipe(batch_size=8, lr=2e-3, steps=1300, warmup=50, min_lr=1e-4,
                       lambda_rule="taming", disc_start=0.8, ndf=32, disc_layers=2),
    },
    "refit": {
        "vq": Recipe(batch_size=8, lr=1e-6, steps=50_000, lambda_rule="taming", disc_start=0,
                     disc_factor=2.0),
        "tiny": Recipe(batch_size=8, lr=5e-5, steps=150, lambda_rule="taming", disc_start=0,
                       disc_factor=2.0, ndf=32, disc_layers=2),
    },
    "decoder": {
        "base": Recipe(batch_size=80, lr=3.6e-4, epochs=12, warmup=5_000, min_lr=1e-6,
                       start_trunk=True, trunk_factor=0.1),
        "large": Recipe(batch_size=320, lr=7.2e-4, epochs=12, warmup=5_000, min_lr=1e-6),
        "large2": Recipe(batch_size=320, lr=7.2e-4, epochs=12, warmup=5_000, min_lr=1e-6),
        "tiny": Recipe(batch_size=8, lr=6e-3, steps=1600, warmup=50, min_lr=1e-5,
                       start_trunk=True, trunk_factor=0.3, disc_start=0.8, ndf=32, disc_layers=2),
    },
    "prior": {
        **dict.fromkeys(("paper117", "ddpm117"), Recipe(
            batch_size=180, lr=1e-4, betas=(0.9, 0.999), steps=1_000_000, min_lr=1e-8)),
        "tiny": Recipe(batch_size=16, lr=4e-3, betas=(0.9, 0.99), steps=2000, warmup=50,
                       min_lr=1e-5, max_maps=12_000, code_start=True),
    },
}
# Our own numbers: single fields, or all that a recipe states.
OURS = {("vqgan", "vq"): {"steps"}, ("vqgan", "kl"): {"steps"}, ("vqgan", "tiny"): "all",
        ("refit", "vq"): {"steps"}, ("refit", "tiny"): "all",
        ("decoder", "large2"): "all", ("decoder", "tiny"): "all", ("prior", "tiny"): "all"}


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


@dataclass
class Batch:
    """One micro-batch on the device."""

    x:          torch.Tensor             # (B,3,H,W) in [-1,1]
    mask:       torch.Tensor             # (B,1,H,W) in {0,1}
    rows:       torch.Tensor | None      # (n,) int64, the samples whose mask is not full; None: all
    generators: list | None              # one for each sample, for the KL latent's noise

    def first(self, n):
        """The first n samples of a batch whose masks are all partial, for pictures."""
        return replace(self, x=self.x[:n], mask=self.mask[:n])

    def heaviest(self):
        """The same images half masked, so that the decoder's branch has work with each of them."""
        mask = torch.zeros_like(self.mask)
        mask[..., :mask.shape[3] // 2] = 1
        return replace(self, mask=mask, rows=torch.arange(len(mask), device=mask.device))


@dataclass
class CodeBatch:
    """One micro-batch of the prior, on the device."""

    indices:    torch.Tensor             # (B,h,w) int64, z_0
    generators: list | None              # one for each sample, for t and its noise
    x:          torch.Tensor | None      # (B,3,H,W), the pictures; only of held-out maps

    def first(self, n):
        """The first n samples, for pictures."""
        return replace(self, indices=self.indices[:n], x=self.x[:n])

    def heaviest(self):
        """The same: every map is the same work."""
        return self


def training_batch(items, seed, stage, device, channels_last=False):
    """A training loader's dict -> Batch."""
    x, mask = pixels(items["image"], device, channels_last), _mask(items, device)
    rows = [i for i, full in enumerate(items["full"]) if not full]
    return Batch(x, mask, torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True),
                 image_generators(seed, stage, items["position"]))


def validation_batch(items, device, channels_last=False):
    """A validation loader's dict -> Batch, for the modes of the latents and all masks partial."""
    x, mask = pixels(items["image"], device, channels_last), _mask(items, device)
    return Batch(x, mask, rows=None, generators=None)


def _mask(items, device):
    return items["mask"].to(device, non_blocking=True).float()


def code_batch(items, seed, device):
    """A training loader's dict of codes.CodeItems -> CodeBatch."""
    return CodeBatch(items["indices"].to(device, non_blocking=True),
                     image_generators(seed, "prior", items["position"]), x=None)


@dataclass
class Trainee:
    """The networks and optimisers of one stage, and what its checkpoint says of its start."""

    stage:                  str
    recipe:                 Recipe
    device:                 torch.device
    model:                  nn.Module                    # VQGAN, AsymVQGAN or UNet
    optimizers:             dict                         # "generator", of model; "discriminator"
    precision:              str = "fp32"
    parallel_model:         nn.Module = None             # `model`, in DDP where processes are many
    discriminator:          nn.Module | None = None      # None for a prior, as the next two are
    parallel_discriminator: nn.Module | None = None      # `discriminator`, likewise
    perceptual:             LPIPS | None = None
    first_stage:            VQGAN | None = None          # of a prior: what made its codes, frozen
    diffusion:              MultinomialDiffusion | None = None   # of a prior
    timesteps:              Timesteps | None = None      # of a prior
    ema:                    EMA | None = None            # of a prior
    parent:                 str | None = None            # hash of the first stage it started from
    config:                 dict = field(default_factory=dict)   # its file's, beside the settings
    facts:                  dict = field(default_factory=dict)   # found at the start, for the file

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def parallel_networks(self):
        """What DDP may be around: a list."""
        networks = self.parallel_model, self.parallel_discriminator
        return [network for network in networks if network is not None]

    def denoise(self, z_t, t):
        """The prior's logits (B,K,h,w) of maps z_t at times t, in training."""
        with self.autocast():
            return self.parallel_model(z_t, t)


def build_vqgan(config, recipe, device, perceptual=None, precision="fp32", channels_last=False):
    """A first stage to train, from a VQGANConfig. [AVQ Sec. 3.1]"""
    model = VQGAN(config).to(device)
    groups = [{"params": list(model.parameters()), "factor": 1.0}]
    return _players("vqgan", model, groups, recipe, device, perceptual, precision, channels_last)


def build_refit(model, recipe, device, perceptual=None, precision="fp32", channels_last=False):
    """A VQGAN whose decoder is to follow its new codes (refit.install_codebook). [DDM Sec. 4.1]"""
    trained = [p for p in model.to(device).parameters() if p.requires_grad]
    groups = [{"params": trained, "factor": 1.0}]
    return _players("refit", model, groups, recipe, device, perceptual, precision, channels_last)


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
    return _players("decoder", model, groups, recipe, device, perceptual, precision, channels_last)


def build_prior(unet, diffusion, decay, first_stage, recipe, device, precision="fp32",
                channels_last=False):
    """A denoiser of a frozen first stage's codes to train, with its average. [DDM Sec. 4.1]

    unet, diffusion: as prior.denoiser gives them; decay: EMA's.
    """
    unet.to(device).train()
    first_stage.to(device).eval().requires_grad_(False)
    if channels_last:
        unet.to(memory_format=torch.channels_last)
        first_stage.to(memory_format=torch.channels_last)
    groups = [{"params": list(unet.parameters()), "factor": 1.0}]
    return Trainee("prior", recipe, device, unet, {"generator": _adam(groups, recipe, device)},
                   precision, wrap(unet, device), first_stage=first_stage, diffusion=diffusion,
                   timesteps=Timesteps(diffusion.T), ema=EMA(unet, decay))


def _players(stage, model, groups, recipe, device, perceptual, precision, channels_last):
    """The Trainee of a stage with a discriminator."""
    discriminator = PatchDiscriminator(ndf=recipe.ndf, n_layers=recipe.disc_layers).to(device)
    if device.type == "cuda":                    # there is none for CPU  deviation D19
        discriminator = nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
    if channels_last:                            # before DDP, whose buckets take the layout of now
        model.to(memory_format=torch.channels_last)
        discriminator.to(memory_format=torch.channels_last)
    its_own = [{"params": list(discriminator.parameters()), "factor": recipe.disc_factor}]
    optimizers = {"generator": _adam(groups, recipe, device),
                  "discriminator": _adam(its_own, recipe, device)}
    model.train()
    return Trainee(stage, recipe, device, model, optimizers, precision, wrap(model, device),
                   discriminator, wrap(discriminator, device), perceptual)


def _adam(groups, recipe, device):
    return torch.optim.Adam(groups, lr=recipe.lr, betas=recipe.betas, fused=device.type != "mps")


def set_learning_rates(trainee, step, steps, disc_start):
    """Set all rates for `step`; the generator's. The discriminator's schedule starts with it."""
    r = trainee.recipe
    schedule = r.lr, r.warmup, r.min_lr
    rates = {"generator": learning_rate(step, steps, *schedule),
             "discriminator": learning_rate(max(0, step - disc_start), max(1, steps - disc_start),
                                            *schedule)}
    for name, optimizer in trainee.optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = max(rates[name] * group["factor"], min(r.min_lr, rates[name]))
    return rates["generator"]


def vqgan_step(trainee, batch, gan_on, scale=1.0):
    """Add one micro-batch's gradients of the first stage to .grad. [AVQ Eq. 2] [AVQ Eq. 8]

    No optimiser moves. gan_on: whether the discriminator has started; before, it costs nothing.
    scale: this micro-batch's share of the step. Returns the losses' terms, detached, by name.
    """
    with trainee.autocast():
        x_hat, extra = trainee.parallel_model(batch.x, generator=batch.generators)
    return _backward(trainee, batch.x, x_hat, extra, gan_on, scale)


def refit_step(trainee, batch, gan_on, scale=1.0):
    """Add one micro-batch's gradients of a refitted decoder to .grad. [DDM Sec. 3.2]

    As vqgan_step, of which the frozen encoder and codes make the latent's loss a constant.
    """
    return vqgan_step(trainee, batch, gan_on, scale)


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
        terms["latent"] = extra["latent_loss"].detach()
        if extra["latent_loss"].requires_grad:                   # not that of a frozen encoder
            outputs.append(extra["latent_loss"])
            gradients.append(torch.full_like(extra["latent_loss"], r.latent_weight * scale))
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


def prior_step(trainee, batch, gan_on, scale=1.0):
    """Add one micro-batch's gradients of the prior to .grad. [DDM Sec. 4.1]

    One t for each map, by importance, and one draw of the bound; gan_on means nothing here.
    Returns {"vlb": the bound in nats a map, as this draw estimates it}, detached.
    """
    t, p = trainee.timesteps.draw(batch.generators)                         # (B), (B)
    loss, terms = trainee.diffusion.loss(trainee.denoise, batch.indices, t, p, batch.generators)
    (loss * scale).backward()
    trainee.timesteps.observe(t, terms)
    return {"vlb": loss.detach() * batch.indices[0].numel()}


def optimizer_step(trainee, gan_on):
    """Move the weights by the gradients in .grad, then clear these; a prior's average follows.

    Every process must call this.
    """
    for name, optimizer in trainee.optimizers.items():
        if name == "generator" or gan_on:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if trainee.ema is not None:
        trainee.timesteps.update()
        trainee.ema.update(trainee.model)


def gradient_norm(trainee, gan_on):
    """The norm of all gradients, a 0-d tensor: the cheapest way to see one that is not finite."""
    groups = [group for name, optimizer in trainee.optimizers.items()
              if name == "generator" or gan_on for group in optimizer.param_groups]
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


def stage_weights(trainee):
    """A checkpoint's state dict: taming's keys for vqgan and refit, the authors' for decoder."""
    return {name: value for name, value in trainee.model.state_dict().items()
            if not _is_frozen(name)}


def load_stage_weights(trainee, weights):
    """The inverse of stage_weights; strict."""
    frozen = {name: value for name, value in trainee.model.state_dict().items() if _is_frozen(name)}
    trainee.model.load_state_dict(frozen | weights)


def _is_frozen(name):
    return name.startswith("first_stage.")
