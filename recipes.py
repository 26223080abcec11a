"""State the numbers of training, one row per recipe, and compute the learning rate.

A comment above each row names its sources; "ours": no source has it. Elsewhere are the image
size, LPIPS network, P, K, T and EMA's decay (train.resolve), the networks' sizes (VQGAN_PRESETS,
ASYM_PRESETS, UNET_PRESETS), beta (VQGANConfig), crops (data.square_crop) and masks (masks.py).
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Recipe:
    """Hold the numbers of one stage. lr changes in proportion to the batch size.  deviation D25"""
    batch_size:    int   = 80          # images per step, over all processes
    lr:            float = 3.6e-4      # Adam's peak learning rate at this batch size
    betas:         tuple = (0.5, 0.9)  # Adam
    steps:         int   = 0           # length of the run; 0: by epochs
    epochs:        float = 0           # passes over the data
    warmup:        int   = 0           # steps of linear warm-up from 1 % (at most a tenth of all)
    min_lr:        float = 0.0         # the cosine's end; 0: constant after the warm-up
    trunk_factor:  float = 1.0         # learning-rate factor of a trunk that start_trunk copied
    start_trunk:   bool  = False       # start the trunk from the first stage's decoder
    start:         str   = "plain"     # the decoder's, or "pinned";  deviation D56
    known_factor:  float = 20.0        # learning-rate factor of feature 0 in a pinned start
    pixel:         str   = "l1"        # pixel loss, or "l2", Eq. 2's squared error;  deviation D4
    gan:           str   = "hinge"     # or "log", Eq. 7
    lambda_rule:   str   = "paper"     # of the adaptive weight: Eq. 9, "taming" or "ldm"
    disc_start:    float = 0.29        # first step of the GAN; below 1 a fraction;  deviation D11
    ndf:           int   = 64          # the discriminator's width
    disc_layers:   int   = 3           # its strided layers
    disc_factor:   float = 1.0         # its learning-rate factor
    latent_weight: float = 1.0         # of Eq. 2's latent terms; of Eq. 10 beside summed L1
    p_full:        float = 0.5         # share of full masks in the decoder's training
    mask_kind:     str   = "thick"     # of the other masks: a name in masks.MASK_KINDS
    max_maps:      int   = 0           # the prior trains on the codes of so many images; 0: of all
    code_start:    bool  = False       # the prior's first and last layer start from the codebook


# [AVQ Sec. 4] [DDM Sec. 4.1] [DDM App.]  deviations D10 D21 D46
RECIPES = {
    "vqgan": {
        # taming-transformers' and latent-diffusion's configurations; the number of steps is ours
        "vq": Recipe(batch_size=96, lr=4.5e-6 * 96, steps=500_000, lambda_rule="taming",
                     disc_start=250_001),
        "kl": Recipe(batch_size=96, lr=4.5e-6 * 96, steps=250_000, lambda_rule="ldm",
                     disc_start=50_001, latent_weight=1e-6),
        # ours
        "tiny": Recipe(batch_size=8, lr=2e-3, steps=1300, warmup=50, min_lr=1e-4,
                       lambda_rule="taming", disc_start=0.8, ndf=32, disc_layers=2),
    },
    "refit": {
        # DDM Sec. 4.1; the number of steps is ours
        "vq": Recipe(batch_size=8, lr=1e-6, steps=50_000, lambda_rule="taming", disc_start=0,
                     disc_factor=2.0),
        # ours
        "tiny": Recipe(batch_size=8, lr=5e-5, steps=150, lambda_rule="taming", disc_start=0,
                       disc_factor=2.0, ndf=32, disc_layers=2),
    },
    "decoder": {
        # AVQ Sec. 4; start and discriminator as in the authors' code, whose GAN starts at step
        # 50,001 of 172,824, or 0.29 of 12 epochs of 1,152,196 images. ImageNet has 1,281,167.
        "base": Recipe(batch_size=80, lr=3.6e-4, epochs=12, warmup=5_000, min_lr=1e-6,
                       start_trunk=True, trunk_factor=0.1),
        "large": Recipe(batch_size=320, lr=7.2e-4, epochs=12, warmup=5_000, min_lr=1e-6),
        # ours: the paper gives none for this size
        "large2": Recipe(batch_size=320, lr=7.2e-4, epochs=12, warmup=5_000, min_lr=1e-6),
        "tiny": Recipe(batch_size=8, lr=6e-3, steps=1600, warmup=50, min_lr=1e-5, disc_layers=2,
                       start_trunk=True, trunk_factor=0.3, start="pinned", disc_start=0.8, ndf=32),
        "tiny2": Recipe(batch_size=8, lr=6e-3, steps=2400, warmup=50, min_lr=1e-5, disc_layers=2,
                        start_trunk=True, trunk_factor=0.3, start="pinned", disc_start=0.8, ndf=32),
    },
    "prior": {
        # DDM Sec. 4.1 and its appendix
        "paper117": Recipe(batch_size=180, lr=1e-4, betas=(0.9, 0.999), steps=1_000_000,
                           min_lr=1e-8),
        # ours
        "tiny": Recipe(batch_size=16, lr=4e-3, betas=(0.9, 0.99), steps=2000, warmup=50,
                       min_lr=1e-5, max_maps=12_000, code_start=True),
    },
}


def run_length(recipe, images):
    """Count the steps of a stage on a data set of `images` images."""
    return recipe.steps or math.ceil(recipe.epochs * images / recipe.batch_size)


def first_gan_step(recipe, steps):
    """Give the 0-based step at which the discriminator starts."""
    start = recipe.disc_start
    return math.floor(start * steps) if start < 1 else int(start)


def learning_rate(step, steps, peak, warmup, min_lr):
    """Compute the learning rate of `step` (0-based): linear from 1 %, then cosine. [AVQ Sec. 4]

    With min_lr 0 it stays at the peak after the warm-up, as for the first stages. [DDM App.]
    deviation D27
    """
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return peak * (0.01 + 0.99 * step / warmup)
    if min_lr == 0:
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    low = min(min_lr, peak)
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * done))


def adam(groups, recipe, device):
    """Make Adam for groups: [(parameters, factor on the learning rate)]."""
    return torch.optim.Adam([{"params": list(parameters), "factor": factor}
                             for parameters, factor in groups],
                            lr=recipe.lr, betas=recipe.betas, fused=device.type != "mps")


def set_learning_rates(optimizers, recipe, step, steps, disc_start):
    """Set every learning rate for `step`; return the generator's at factor 1.

    Each group has a schedule of its own, from lr times its factor down to the same min_lr, as in
    the authors' code. The discriminator's begins when it does.
    """
    when = {"generator": (step, steps),
            "discriminator": (max(0, step - disc_start), max(1, steps - disc_start))}
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(*when[name], recipe.lr * group["factor"], recipe.warmup,
                                        recipe.min_lr)
    return learning_rate(step, steps, recipe.lr, recipe.warmup, recipe.min_lr)
