"""Build the first stage: convolutional encoder, quantiser (or KL latent), decoder.

AVQ Sec. 3.1 and Appendix B, with h = H/f, f = 2^(levels - 1):

    x (B,3,H,W) --Encoder--> (B,z,h,w) --quant_conv--> z_e (B,d,h,w) --VectorQuantizer--> z_q
    z_q (B,d,h,w) --post_quant_conv--> (B,z,h,w) --Decoder--> x_hat (B,3,H,W)

Names are those of taming's and latent-diffusion's checkpoints. `up[0]` is the highest resolution.
"""

from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from quantize import DiagonalGaussian, VectorQuantizer


@dataclass(frozen=True)
class VQGANConfig:
    """Hold every width and level of a first stage."""
    latent:         str   = "vq"              # "vq" (codebook) or "kl" (diagonal Gaussian)
    ch:             int   = 128               # width of the highest level
    ch_mult:        tuple = (1, 1, 2, 2, 4)   # level i has ch * ch_mult[i] channels, 1/2^i of H, W
    num_res_blocks: int   = 2                 # ResBlocks per level; the decoder has one more
    attn_levels:    tuple = (4,)              # levels with an AttnBlock after each ResBlock
    z_channels:     int   = 256               # width of the encoder's output
    embed_dim:      int   = 256               # d, the width of a code
    K:              int   = 1024              # codebook size (latent="vq")
    beta:           float = 0.25              # commitment weight (latent="vq")
    legacy_beta:    bool  = False             # beta on the codebook's term (latent="vq")
    code_range:     float | None = None       # codes start in ±this; None: 1/K (latent="vq")
    norm_groups:    int   = 32                # GroupNorm groups, fewer for narrow networks

    @property
    def f(self):
        """Give the downsampling factor H/h."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def widths(self):
        """List the channels of each level, highest resolution first."""
        return [self.ch * multiplier for multiplier in self.ch_mult]


# By row: ours, for 64 px; taming's [DDM Tab. 3]; latent-diffusion's; Stable Diffusion's.
VQGAN_PRESETS = {
    "tiny":   VQGANConfig(ch=16, ch_mult=(1, 2, 4), num_res_blocks=1, attn_levels=(), z_channels=32,
                          embed_dim=8, K=256, code_range=0.3, norm_groups=4),
    "vq-f16": VQGANConfig(),
    "vq-f8":  VQGANConfig(ch_mult=(1, 2, 2, 4), attn_levels=(3,), z_channels=4, embed_dim=4,
                          K=16384),
    "kl-f8":  VQGANConfig(latent="kl", ch_mult=(1, 2, 4, 4), attn_levels=(), z_channels=4,
                          embed_dim=4),
}


class GroupNorm(nn.GroupNorm):
    """Normalise groups of channels, in bf16 under CUDA's autocast if x is bf16.

    By itself autocast would convert x to float32 and the result back, which moves more bytes than
    bf16 saves. The kernel's statistics are float32 in both cases.
    """

    def forward(self, x):
        if x.device.type != "cuda":                      # where no autocast converts x
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class ResBlock(nn.Module):
    """Compute x + conv(silu(norm(conv(silu(norm(x)))))), x by a 1x1 shortcut if widths differ."""

    def __init__(self, in_channels, out_channels, norm_groups=32):
        super().__init__()
        self.norm1 = GroupNorm(norm_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(norm_groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                               # (B, out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Compute x + proj(softmax(q k^T / sqrt(C)) v) over all positions, with one head."""

    def __init__(self, channels, norm_groups=32):
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2)[:, None]              # (B, 1, HW, C)
                   for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]                   # (B, HW, C)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))        # (B, C, H, W)


class Downsample(nn.Module):
    """Halve the resolution by a strided 3x3 convolution, padded right and below as in taming."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))                            # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Double the resolution by nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # (B, C, 2H, 2W)


class Level(nn.Module):
    """Apply all blocks of one resolution, then change the resolution if there is another."""

    def __init__(self, in_channels, out_channels, num_blocks, attention, norm_groups):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResBlock(a, b, norm_groups) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(out_channels, norm_groups)
                                  for _ in range(num_blocks if attention else 0))
        self.downsample = self.upsample = None       # Encoder and Decoder set one of them, or none

    def forward(self, h):
        for j, block in enumerate(self.block):
            h = block(h)                                                    # (B, out, H, W)
            if len(self.attn):
                h = self.attn[j](h)
        if self.downsample is not None:
            h = self.downsample(h)                                          # (B, out, H/2, W/2)
        return h if self.upsample is None else self.upsample(h)             # (B, out, 2H, 2W)


def middle(channels, norm_groups):
    """Build the blocks of the lowest resolution: ResBlock, AttnBlock, ResBlock."""
    return nn.Sequential(OrderedDict(block_1=ResBlock(channels, channels, norm_groups),
                                     attn_1=AttnBlock(channels, norm_groups),
                                     block_2=ResBlock(channels, channels, norm_groups)))


class Encoder(nn.Module):
    """Encode x (B,3,H,W) in [-1,1]: (B,z,h,w), or (B,2z,h,w), mean and logvar, for a KL latent."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        outputs = config.z_channels * (2 if config.latent == "kl" else 1)
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (a, b) in enumerate(zip([config.ch, *widths], widths)):
            level = Level(a, b, config.num_res_blocks, i in config.attn_levels, groups)
            if i < len(widths) - 1:
                level.downsample = Downsample(b)
            self.down.append(level)
        self.mid = middle(widths[-1], groups)
        self.norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)                                                 # (B, ch, H, W)
        for level in self.down:
            h = level(h)                                                    # (B, C, H/2^i, W/2^i)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))            # (B, z|2z, h, w)


class Decoder(nn.Module):
    """Decode (B,z,h,w) into x_hat (B,3,H,W): the vanilla decoder, and the asymmetric one's trunk.

    ch, num_res_blocks: default to the config's; the asymmetric decoder changes only these two.
    checkpointing: an attribute, False at first; recompute each level's activations in backward.
    """

    def __init__(self, config, ch=None, num_res_blocks=None):
        super().__init__()
        ch, num_res_blocks = ch or config.ch, num_res_blocks or config.num_res_blocks
        widths, groups = [ch * m for m in config.ch_mult], config.norm_groups
        if any(width % groups for width in widths):
            raise ValueError(f"decoder widths {widths}: not all multiples of norm_groups={groups}")
        self.checkpointing = False
        self.in_widths = [*widths[1:], widths[-1]]     # input width of level i
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for i, (a, b) in enumerate(zip(self.in_widths, widths)):
            level = Level(a, b, num_res_blocks + 1, i in config.attn_levels, groups)
            if i > 0:
                level.upsample = Upsample(b)
            self.up.append(level)
        self.norm_out = GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def run_level(self, i, h):
        """Apply level i and its upsampling: (B,C,h,w) -> (B,C',2h,2w), at level 0 (B,C',h,w)."""
        if self.checkpointing:
            return checkpoint(self.up[i], h, use_reentrant=False)
        return self.up[i](h)

    def last_features(self, z):
        """Compute what enters the last layer G_L of [AVQ Eq. 9]: (B,ch,H,W)."""
        h = self.mid(self.conv_in(z))                                       # (B, C, h, w)
        for i in reversed(range(len(self.up))):
            h = self.run_level(i, h)                                        # (B, C', 2h, 2w)
        return F.silu(self.norm_out(h))                                     # (B, ch, H, W)

    def forward(self, z):
        return self.conv_out(self.last_features(z))                         # (B, 3, H, W)


class VQGAN(nn.Module):
    """Join encoder, latent and decoder of a VQGANConfig. [AVQ Sec. 3.1] [DDM Sec. 2.2] [DDM Eq. 13]

    own_decoder: False leaves `decoder` None, for a first stage from an asymmetric model's file.
    """

    def __init__(self, config, own_decoder=True):
        super().__init__()
        self.config = config
        d, z = config.embed_dim, config.z_channels
        twice = 2 if config.latent == "kl" else 1        # a KL latent has mean and logvar
        self.encoder = Encoder(config)
        self.decoder = Decoder(config) if own_decoder else None
        if config.latent == "vq":
            self.quantize = VectorQuantizer(config.K, d, config.beta, config.legacy_beta,
                                            config.code_range)
        self.quant_conv = nn.Conv2d(twice * z, twice * d, 1)
        self.post_quant_conv = nn.Conv2d(d, z, 1)

    @property
    def first_stage(self):
        """Give the model itself, so that a VQGAN and an AsymVQGAN share this name."""
        return self

    def moments(self, x):
        """Encode x (B,3,H,W) in [-1,1]: z_e (B,d,h,w) to be quantised, or a DiagonalGaussian."""
        f = self.config.f
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"an image batch is (B,3,H,W) with H and W multiples of f={f}, not "
                             f"{tuple(x.shape)}; pad or resize the images")
        z_e = self.quant_conv(self.encoder(x)).float()                      # (B, d|2d, h, w)
        return DiagonalGaussian(z_e) if self.config.latent == "kl" else z_e

    def encode(self, x, sample=False, generator=None):
        """Encode x (B,3,H,W) in [-1,1]: z (B,d,h,w) is z_q, the Gaussian's mode or its sample."""
        latent = self.moments(x)
        if self.config.latent == "vq":
            return self.quantize(latent)[0]                                 # (B, d, h, w)
        return latent.sample(generator) if sample else latent.mode()

    def indices(self, x):
        """Encode x (B,3,H,W) in [-1,1] by a VQ latent: indices (B,h,w)."""
        return self.quantize(self.moments(x))[1]                            # (B, h, w)

    def decode(self, z):
        """Decode z (B,d,h,w): x_hat (B,3,H,W), about [-1,1], not clamped."""
        if self.decoder is None:
            raise ValueError("this first stage came without a decoder of its own; decode with "
                             "AsymVQGAN.decode, or load the first stage's own file")
        return self.decoder(self.post_quant_conv(z)).float()                # (B, 3, H, W)

    def decode_indices(self, indices):
        """Decode indices (B,h,w) in [0,K) of a VQ latent: x_hat (B,3,H,W)."""
        return self.decode(self.quantize.lookup(indices))

    def forward(self, x, generator=None):
        """Pass training images x (B,3,H,W) up to the last layer: h (B,ch,H,W), latent loss.

        decoder.conv_out(h) is x_hat. The latent loss is the last two terms of Eq. 2. A KL latent is
        sampled instead, and its loss is Eq. 10's mean over images.
        """
        # ReFiT's frozen encoder is in float32 under autocast too: rounding would exchange codes.
        trains = self.quant_conv.weight.requires_grad
        with nullcontext() if trains else torch.autocast(x.device.type, enabled=False):
            latent = self.moments(x)
        if self.config.latent == "vq":
            z, _, latent_loss = self.quantize(latent)                       # (B, d, h, w)
        else:
            z, latent_loss = latent.sample(generator), latent.kl().mean()
        return self.decoder.last_features(self.post_quant_conv(z)), latent_loss
