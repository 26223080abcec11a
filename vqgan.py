"""The first stage: convolutional encoder, quantiser (or KL latent), decoder. AVQ Sec. 3.1 and Appendix B.

    x (B,3,H,W) --Encoder--> (B,z,h,w) --quant_conv--> z_e (B,d,h,w) --VectorQuantizer--> z_q --post_quant_conv-->
    --Decoder--> x_hat (B,3,H,W)                                          h = H/f, f = 2^(levels - 1)

Attribute names are those of taming-transformers and latent-diffusion, so that their checkpoints load with no renaming;
that is why an up block is `up[i]` with i = 0 at the highest resolution. The asymmetric decoder, which is what the paper
adds, is asym_decoder.py; the losses and the discriminator are in losses.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from quantize import DiagonalGaussian, VectorQuantizer


@dataclass(frozen=True)
class VQGANConfig:
    """Every width and level of a first stage."""

    latent:         str   = "vq"              # "vq" (codebook) or "kl" (diagonal Gaussian)
    ch:             int   = 128               # width of the highest level
    ch_mult:        tuple = (1, 1, 2, 2, 4)   # width of level i is ch * ch_mult[i]; one level halves the resolution once
    num_res_blocks: int   = 2                 # ResBlocks a level in the encoder; the decoder has one more
    attn_levels:    tuple = (4,)              # levels with an AttnBlock after each ResBlock
    z_channels:     int   = 256               # width of the encoder's output
    embed_dim:      int   = 256               # d, the width of a code
    K:              int   = 1024              # codebook size (latent="vq")
    beta:           float = 0.25              # commitment weight (latent="vq")
    legacy_beta:    bool  = False             # taming's order of beta (latent="vq")
    norm_groups:    int   = 32                # GroupNorm groups, fewer for narrow networks

    @property
    def f(self):
        """Downsampling factor H/h."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def widths(self):
        """Channels of each level, highest resolution first."""
        return [self.ch * multiplier for multiplier in self.ch_mult]


VQGAN_PRESETS = {
    "tiny":   VQGANConfig(ch=32, ch_mult=(1, 2, 2, 4), num_res_blocks=1, attn_levels=(),          # our own, for 64 px
                          z_channels=32, embed_dim=32, K=256, norm_groups=8),
    "vq-f16": VQGANConfig(),                                                                      # taming, ImageNet
    "vq-f8":  VQGANConfig(ch_mult=(1, 2, 2, 4), attn_levels=(3,), z_channels=4, embed_dim=4, K=16384),
    "kl-f8":  VQGANConfig(latent="kl", ch_mult=(1, 2, 4, 4), attn_levels=(), z_channels=4, embed_dim=4),
}   # the last two are latent-diffusion's; kl-f8 is Stable Diffusion's first stage


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1 shortcut where the width changes."""

    def __init__(self, in_channels, out_channels, norm_groups=32):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                                               # (B,out,H,W)
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """x + proj(softmax(q k^T / sqrt(C)) v) over all positions, one head.

    q, k, v are 1x1 convolutions by name and weight shape. Here they are one linear map on (B,HW,C): one transposition
    of the map instead of one for each of the three.
    """

    def __init__(self, channels, norm_groups=32):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)                                    # (B,HW,C)
        weight = torch.cat([self.q.weight, self.k.weight, self.v.weight]).flatten(1)        # (3C,C)
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])                           # (3C)
        q, k, v = F.linear(tokens, weight, bias)[:, None].chunk(3, dim=-1)                  # (B,1,HW,C) each
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]                                   # (B,HW,C)
        h = F.linear(h, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + h.transpose(1, 2).reshape(x.shape)                                       # (B,C,H,W)


class Downsample(nn.Module):
    """Halve the resolution: a strided 3x3 convolution, padded right and below only, as in taming."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))                                            # (B,C,H/2,W/2)


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))                  # (B,C,2H,2W)


def _level(in_channels, out_channels, num_blocks, attention, norm_groups):
    """`block` and `attn` lists of one resolution; `attn` is empty where the level has none."""
    level = nn.Module()
    widths = [in_channels] + [out_channels] * num_blocks
    level.block = nn.ModuleList(ResBlock(a, b, norm_groups) for a, b in zip(widths[:-1], widths[1:]))
    level.attn = nn.ModuleList(AttnBlock(out_channels, norm_groups) for _ in range(num_blocks * attention))
    return level


def _middle(channels, norm_groups):
    mid = nn.Module()
    mid.block_1 = ResBlock(channels, channels, norm_groups)
    mid.attn_1 = AttnBlock(channels, norm_groups)
    mid.block_2 = ResBlock(channels, channels, norm_groups)
    return mid


def _run_blocks(level, h):
    for j, block in enumerate(level.block):
        h = block(h)
        if len(level.attn):
            h = level.attn[j](h)
    return h


class Encoder(nn.Module):
    """x (B,3,H,W) in [-1,1] -> (B,z,H/f,W/f); twice as many channels for a KL latent's mean and logvar."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        inputs = [config.ch] + widths[:-1]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (a, b) in enumerate(zip(inputs, widths)):
            level = _level(a, b, config.num_res_blocks, i in config.attn_levels, groups)
            if i < len(widths) - 1:
                level.downsample = Downsample(b)
            self.down.append(level)
        self.mid = _middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels * (2 if config.latent == "kl" else 1), 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)                                                                 # (B,ch,H,W)
        for level in self.down:
            h = _run_blocks(level, h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)                                                     # (B,C,h/2,w/2)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))                                      # (B,z or 2z,H/f,W/f)


class Decoder(nn.Module):
    """(B,z,h,w) -> x_hat (B,3,H,W). The vanilla decoder, and the trunk of the asymmetric one.

    `ch` and `num_res_blocks` are arguments, because the asymmetric decoder changes just these two.
    """

    def __init__(self, config, ch=None, num_res_blocks=None):
        super().__init__()
        ch, num_res_blocks = ch or config.ch, num_res_blocks or config.num_res_blocks
        widths, groups = [ch * m for m in config.ch_mult], config.norm_groups
        if any(width % groups for width in widths):
            raise ValueError(f"decoder widths {widths} are not all multiples of norm_groups={groups}")
        self.in_widths = widths[1:] + widths[-1:]           # of level i: what the level below it hands up
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for i, (a, b) in enumerate(zip(self.in_widths, widths)):
            level = _level(a, b, num_res_blocks + 1, i in config.attn_levels, groups)
            if i > 0:
                level.upsample = Upsample(b)
            self.up.append(level)
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        self.checkpointing = False                          # recompute a level's activations in the backward pass

    def bottom(self, z):
        h = self.conv_in(z)                                                                 # (B,C,h,w)
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))

    def run_level(self, i, h):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._level_forward, i, h, use_reentrant=False)
        return self._level_forward(i, h)

    def _level_forward(self, i, h):
        h = _run_blocks(self.up[i], h)                                                      # (B,C,h,w)
        return self.up[i].upsample(h) if i > 0 else h                                       # (B,C,2h,2w)

    def last_features(self, z):
        """What enters the last layer G_L of [AVQ Eq. 9]: (B,ch,H,W)."""
        h = self.bottom(z)
        for i in reversed(range(len(self.up))):
            h = self.run_level(i, h)
        return F.silu(self.norm_out(h))                                                     # (B,ch,H,W)

    def forward(self, z):
        return self.conv_out(self.last_features(z))                                         # (B,3,H,W)


class VQGAN(nn.Module):
    """Encoder, latent and decoder, with the names of the public checkpoints. [AVQ Sec. 3.1] [AVQ Eq. 11]"""

    def __init__(self, config):
        super().__init__()
        if config.latent not in ("vq", "kl"):
            raise ValueError(f'latent must be "vq" or "kl", not {config.latent!r}')
        self.config = config
        twice = 2 if config.latent == "kl" else 1
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.latent == "vq":
            self.quantize = VectorQuantizer(config.K, config.embed_dim, config.beta, config.legacy_beta)
        self.quant_conv = nn.Conv2d(twice * config.z_channels, twice * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def moments(self, x):
        """The latent before quantisation or sampling: z_e (B,d,h,w), or a DiagonalGaussian.

        x: (B,3,H,W) in [-1,1]. Raises ValueError where f does not divide H and W.
        """
        check_image(x, self.config.f)
        z_e = self.quant_conv(self.encoder(x)).float()                                      # (B,d or 2d,h,w)
        return DiagonalGaussian(z_e) if self.config.latent == "kl" else z_e

    def encode(self, x, sample=False, generator=None):
        """x (B,3,H,W) in [-1,1] -> z (B,d,h,w): z_q; or the Gaussian's mode, or a sample of it."""
        latent = self.moments(x)
        if self.config.latent == "vq":
            return self.quantize(latent)[0]
        return latent.sample(generator) if sample else latent.mode()

    def indices(self, x):
        """x (B,3,H,W) -> code indices (B,h,w). Raises ValueError for a KL latent, which has none."""
        self._needs_codebook()
        return self.quantize(self.moments(x))[1]

    def decode(self, z):
        """z (B,d,h,w) -> x_hat (B,3,H,W), about [-1,1], not clamped."""
        return self.decoder(self.post_quant_conv(z)).float()

    def decode_indices(self, indices):
        """Code indices (B,h,w) in [0,K) -> x_hat (B,3,H,W). Raises ValueError for a KL latent."""
        self._needs_codebook()
        return self.decode(self.quantize.lookup(indices))

    def forward(self, x, generator=None):
        """x -> x_hat (B,3,H,W) and what the losses need, in a dict:

        latent_loss: scalar; VQ: Eq. 2's last two terms; KL: the mean over images of Eq. 10.
        last_features: (B,ch,H,W), detached, the input of the decoder's last layer.
        indices: (B,h,w), VQ only.
        """
        latent, extra = self.moments(x), {}
        if self.config.latent == "vq":
            z, extra["indices"], extra["latent_loss"] = self.quantize(latent)               # (B,d,h,w)
        else:
            z, extra["latent_loss"] = latent.sample(generator), latent.kl().mean()
        h = self.decoder.last_features(self.post_quant_conv(z))                             # (B,ch,H,W)
        extra["last_features"] = h.detach()
        return self.decoder.conv_out(h).float(), extra                                      # (B,3,H,W)

    def _needs_codebook(self):
        if self.config.latent != "vq":
            raise ValueError("a KL latent has no codebook; use encode and decode")


def check_image(x, f):
    """Raise ValueError unless x is (B,3,H,W) with H and W multiples of f."""
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"an image batch is (B,3,H,W), not {tuple(x.shape)}")
    if x.shape[2] % f or x.shape[3] % f:
        raise ValueError(f"image size {x.shape[2]}x{x.shape[3]} is not a multiple of f={f}; "
                         "pad or resize the image")
