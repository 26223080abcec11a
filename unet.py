"""VQ-DDM's denoiser: a map of codes and a time in, K logits for each cell of the map out.

    indices (B,h,w) --embedding--> (B,C,h,w) --trunk--> (B,C',h,w) --1x1 conv--> logits (B,K,h,w)
                                                 ^
    t (B,) --sinusoids--> (B,C) --MLP--> time (B,time_width), to every block

There are two trunks. Both are U-Nets of cells (residual blocks, then attention):

    MultinomialTrunk    one skip a level, none at full resolution: what the paper's figures fit
    DDPMTrunk           one skip a block, up to full resolution: what the paper's words say

The last layer starts at zero, so x̂0 starts uniform. Not here: what the logits mean, and the
residual of Eq. 23 (both are the diffusion's); the average of the weights (train_prior.py).
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from vqgan import Upsample

TIME_SCALE = 4000       # the embedding sees t · 4000/T: one setting for every T  deviation D39


@dataclass(frozen=True)
class UNetConfig:
    """Every width and level of a denoiser; level i has 1/2^i of h and w."""

    layout:      str   = "multinomial"   # "multinomial" or "ddpm": trunk, blocks and activation
    width:       int   = 128             # of the embedded codes
    mults:       tuple = (1, 2, 4, 8)    # level i has width * mults[i] channels
    num_blocks:  int   = 2               # residual blocks a level; ddpm's way up has one more
    attention:   str   = "linear"        # "linear" or "full"; the middle always has one
    attn_levels: tuple = (0, 1, 2, 3)    # levels with attention
    heads:       int   = 4               # of each attention
    head_width:  int   = 32              # of a linear head; full heads share the level's width
    time_width:  int   = 128             # of what the blocks know of t
    norm_groups: int   = 8               # GroupNorm groups

    @property
    def widths(self):
        """Channels of each level, highest resolution first."""
        return [self.width * mult for mult in self.mults]

    @property
    def factor(self):
        """What h and w must be multiples of."""
        return 2 ** (len(self.mults) - 1)


# [DDM Tab. 2] prints 117 M parameters, and at 16x16 1.06 G operations for K = 1024, 1.04 for 512.
# "paper117" has 117,586,568 and 117,454,984, and 1.06 and 1.04 G multiplications in its plain
# convolutions (1.11 and 1.09 in all). "ddpm117" takes the appendix by its words, DDPM's layout and
# attention at 16, 8 and 4: 116,412,544 parameters, but 2.88 G. "tiny" is our own.
# deviation D37
UNET_PRESETS = {
    "tiny":     UNetConfig(layout="ddpm", width=32, mults=(1, 2, 2), num_blocks=1, attention="full",
                           attn_levels=(2,), time_width=128),
    "paper117": UNetConfig(),
    "ddpm117":  UNetConfig(layout="ddpm", mults=(1, 2, 3, 4), num_blocks=3, attention="full",
                           attn_levels=(0, 1, 2), time_width=512, norm_groups=32),
}


def sinusoids(t, width):
    """t (B,), any real numbers -> sin and cos of t at width/2 frequencies, (B,width) float32.

    The frequencies fall geometrically from 1 to 1/10,000.
    """
    exponents = torch.linspace(0, 1, width // 2, device=t.device)           # (width/2)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponents)  # (B, width/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)                   # (B, width)


def _zero(layer):
    """The layer with all parameters at zero: a branch that starts silent."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


# ---------------------------------------------------------------- residual blocks


class ConvNormMish(nn.Sequential):
    """mish(norm(conv(x)))."""

    def __init__(self, in_channels, out_channels, norm_groups):
        super().__init__(nn.Conv2d(in_channels, out_channels, 3, padding=1),
                         nn.GroupNorm(norm_groups, out_channels), nn.Mish())


class AddTimeBlock(nn.Module):
    """x + f2(f1(x) + time), f = mish(norm(conv(·))); a 1x1 shortcut where the width changes."""

    def __init__(self, in_channels, out_channels, config):
        super().__init__()
        self.block1 = ConvNormMish(in_channels, out_channels, config.norm_groups)
        self.time = nn.Linear(config.time_width, out_channels)
        self.block2 = ConvNormMish(out_channels, out_channels, config.norm_groups)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, time):
        h = self.block1(x) + self.time(time)[:, :, None, None]              # (B, out, h, w)
        return self.block2(h) + self.shortcut(x)


class ScaleShiftBlock(nn.Module):
    """x + conv(silu(norm(h)·(1 + scale) + shift)), h = conv(silu(norm(x))); starts as x alone.

    scale and shift are linear in time. A 1x1 shortcut where the width changes.
    """

    def __init__(self, in_channels, out_channels, config):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(config.time_width, 2 * out_channels)
        self.norm2 = nn.GroupNorm(config.norm_groups, out_channels)
        self.conv2 = _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))                               # (B, out, h, w)
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)    # (B, out, 1, 1) each
        h = self.norm2(h) * (1 + scale) + shift
        return self.conv2(F.silu(h)) + self.shortcut(x)


# ---------------------------------------------------------------- attention


class LinearAttention(nn.Module):
    """x + gate · proj(v softmax(k)^T q): O(h·w). The gate starts at zero (ReZero).

    softmax runs over the positions: each row of k says where a feature is gathered from, and q, at
    each position, how much of it is spent there.
    """

    def __init__(self, channels, config):
        super().__init__()
        self.heads, inner = config.heads, config.heads * config.head_width
        self.qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.proj = nn.Conv2d(inner, channels, 1)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        B, _, h, w = x.shape
        qkv = self.qkv(x).reshape(B, 3, self.heads, -1, h * w)              # (B, 3, heads, d, hw)
        q, k, v = qkv.unbind(1)                                             # (B, heads, d, hw)
        weight = k.softmax(-1, dtype=torch.float32)                         # over the positions
        gathered = v @ weight.transpose(2, 3)                               # (B, heads, d, d)
        spent = (gathered @ q).reshape(B, -1, h, w)                         # (B, heads·d, h, w)
        return x + self.gate * self.proj(spent)                             # (B, C, h, w)


class FullAttention(nn.Module):
    """x + proj(v softmax(q^T k / sqrt(d))^T): O((h·w)²). proj starts at zero."""

    def __init__(self, channels, config):
        super().__init__()
        if channels % config.heads:
            raise ValueError(f"{config.heads} heads do not divide {channels} channels")
        self.heads = config.heads
        self.norm = nn.GroupNorm(config.norm_groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = _zero(nn.Linear(channels, channels))

    def forward(self, x):
        B, C, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)                    # (B, hw, C)
        qkv = self.qkv(tokens).view(B, h * w, 3, self.heads, -1)            # (B, hw, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, heads, hw, d)
        spent = F.scaled_dot_product_attention(q, k, v)                     # softmax in float32
        spent = self.proj(spent.transpose(1, 2).reshape(B, h * w, C))       # (B, hw, C)
        return x + spent.transpose(1, 2).reshape(B, C, h, w)                # (B, C, h, w)


# ---------------------------------------------------------------- trunks


class Cell(nn.Module):
    """num_blocks residual blocks, then attention where it is wanted: what skips join and leave."""

    def __init__(self, in_channels, out_channels, num_blocks, attends, config):
        super().__init__()
        Block = {"multinomial": AddTimeBlock, "ddpm": ScaleShiftBlock}[config.layout]
        Attention = {"linear": LinearAttention, "full": FullAttention}[config.attention]
        widths = [in_channels] + [out_channels] * num_blocks
        self.blocks = nn.ModuleList(Block(a, b, config) for a, b in pairwise(widths))
        self.attention = Attention(out_channels, config) if attends else nn.Identity()

    def forward(self, h, time):
        for block in self.blocks:
            h = block(h, time)                                              # (B, out, h, w)
        return self.attention(h)


class Middle(nn.Module):
    """Block, attention, block, at the lowest resolution."""

    def __init__(self, channels, config):
        super().__init__()
        self.first = Cell(channels, channels, 1, True, config)
        self.last = Cell(channels, channels, 1, False, config)

    def forward(self, h, time):
        return self.last(self.first(h, time), time)


class MultinomialTrunk(nn.Module):
    """The U-Net of multinomial diffusion (Hoogeboom et al. 2021): conv, norm, Mish.

    A level is one cell and one skip, which joins the cell of the way up at that level. At full
    resolution the way up has neither: what a cell of the map holds comes back through level 1, and
    Eq. 23's residual is the only direct way from Z_t to the logits.
    """

    def __init__(self, config):
        super().__init__()
        widths = config.widths

        def cell(level, in_channels, out_channels):
            return Cell(in_channels, out_channels, config.num_blocks,
                        level in config.attn_levels, config)

        self.down = nn.ModuleList(
            cell(i, a, b) for i, (a, b) in enumerate(pairwise([config.width, *widths])))
        self.downsample = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride=2, padding=1) for width in widths[:-1])
        self.middle = Middle(widths[-1], config)
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(1, len(widths))):                # up[0] is the lowest level's
            self.up.append(cell(i, 2 * widths[i], widths[i - 1]))
            self.upsample.append(
                nn.ConvTranspose2d(widths[i - 1], widths[i - 1], 4, stride=2, padding=1))
        self.out = ConvNormMish(widths[0], widths[0], config.norm_groups)

    def forward(self, h, time):
        """h (B,C,h,w), time (B,time_width) -> (B,C',h,w)."""
        skips = []
        for i, cell in enumerate(self.down):
            if i > 0:
                h = self.downsample[i - 1](h)                               # (B, C, h/2, w/2)
            h = cell(h, time)                                               # (B, C', h, w)
            skips.append(h)
        h = self.middle(h, time)
        for cell, upsample in zip(self.up, self.upsample):
            h = cell(torch.cat([h, skips.pop()], dim=1), time)              # (B, C', h, w)
            h = upsample(h)                                                 # (B, C', 2h, 2w)
        return self.out(h)


class DDPMTrunk(nn.Module):
    """The U-Net of improved DDPM (Nichol & Dhariwal 2021): norm, SiLU, conv.

    A level is num_blocks cells of one block. The way up has one cell more at each level, so that
    each of its cells joins one output of the way down: conv_in's, every cell's, every halving's.
    """

    def __init__(self, config):
        super().__init__()
        widths, skips = config.widths, [config.width]            # skips: their channels

        def cells(level, in_channels):
            attends = level in config.attn_levels
            return nn.ModuleList(Cell(a, widths[level], 1, attends, config) for a in in_channels)

        self.conv_in = nn.Conv2d(config.width, config.width, 3, padding=1)
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            if i > 0:
                self.downsample.append(nn.Conv2d(skips[-1], skips[-1], 3, stride=2, padding=1))
                skips.append(skips[-1])
            self.down.append(cells(i, [skips[-1]] + [width] * (config.num_blocks - 1)))
            skips += [width] * config.num_blocks
        self.middle = Middle(widths[-1], config)
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        below = widths[-1]
        for i in reversed(range(len(widths))):                   # up[0] is the lowest level's
            if len(self.up) > 0:
                self.upsample.append(Upsample(below))
            into = [below] + [widths[i]] * config.num_blocks
            self.up.append(cells(i, [channels + skips.pop() for channels in into]))
            below = widths[i]
        self.norm = nn.GroupNorm(config.norm_groups, widths[0])

    def forward(self, h, time):
        """h (B,C,h,w), time (B,time_width) -> (B,C',h,w)."""
        h = self.conv_in(h)
        skips = [h]
        for i, cells in enumerate(self.down):
            if i > 0:
                h = self.downsample[i - 1](h)                               # (B, C, h/2, w/2)
                skips.append(h)
            for cell in cells:
                h = cell(h, time)                                           # (B, C', h, w)
                skips.append(h)
        h = self.middle(h, time)
        for i, cells in enumerate(self.up):
            if i > 0:
                h = self.upsample[i - 1](h)                                 # (B, C, 2h, 2w)
            for cell in cells:
                h = cell(torch.cat([h, skips.pop()], dim=1), time)          # (B, C', h, w)
        return F.silu(self.norm(h))


# ---------------------------------------------------------------- the network


class UNet(nn.Module):
    """mu(Z_t, t): the logits of x̂0, all zero before training. [DDM Sec. 4.1]

    config: a row of UNET_PRESETS or another UNetConfig; K: codes; T: steps of the diffusion.
    """

    def __init__(self, config, K, T):
        super().__init__()
        if config.layout not in ("multinomial", "ddpm"):
            raise ValueError(f'layout must be "multinomial" or "ddpm", not {config.layout!r}')
        if config.attention not in ("linear", "full"):
            raise ValueError(f'attention must be "linear" or "full", not {config.attention!r}')
        self.config, self.K, self.T = config, K, T
        multinomial = config.layout == "multinomial"
        activation, Trunk = (nn.Mish, MultinomialTrunk) if multinomial else (nn.SiLU, DDPMTrunk)
        self.embedding = nn.Embedding(K, config.width)
        # The blocks' own activation of the time is the same for all: here, once.
        self.time = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), activation(),
            nn.Linear(4 * config.width, config.time_width), activation())
        self.trunk = Trunk(config)
        self.logits = _zero(nn.Conv2d(config.widths[0], K, 1))              # deviation D38

    def forward(self, indices, t):
        """indices (B,h,w) int64 in [0,K), t (B,) int64 in 1..T -> logits (B,K,h,w) float32.

        Raises ValueError where config.factor does not divide h and w.
        """
        factor = self.config.factor
        if indices.ndim != 3 or indices.shape[1] % factor or indices.shape[2] % factor:
            raise ValueError(f"a map of codes is (B,h,w) with h and w multiples of {factor}, "
                             f"not {tuple(indices.shape)}")
        time = self.time(sinusoids(t * (TIME_SCALE / self.T), self.config.width))  # (B, time_width)
        h = self.embedding(indices).permute(0, 3, 1, 2)                     # (B, C, h, w)
        return self.logits(self.trunk(h, time)).float()                     # (B, K, h, w)
