"""VQ-DDM's denoiser: from a noisy map of codes and its time t to K logits for each cell.

    indices (B,h,w) --embedding--> (B,C,h,w) --trunk--> (B,C',h,w) --1x1 conv--> logits (B,K,h,w)
                                                 ^
    t (B,) --sinusoids--> (B,C) --MLP--> time (B,time_width), to every block

The paper's words describe DDPM's U-Net. But its Table 2 fits the one of multinomial diffusion
(Hoogeboom et al. 2021), and the released code has it. So that one is here.  deviation D37
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from vqgan import GroupNorm

TIME_SCALE = 4000       # the embedding of t · 4000/T serves every T  deviation D39


@dataclass(frozen=True)
class UNetConfig:
    """Hold the sizes of a denoiser. Level i has 1/2^i of h and w."""
    width:       int   = 128             # of the embedded codes
    mults:       tuple = (1, 2, 4, 8)    # level i has width * mults[i] channels
    num_blocks:  int   = 2               # residual blocks per level, down and up
    top_skip:    bool  = False           # whether level 0 has a skip connection and a way up
    attn_levels: tuple = (0, 1, 2, 3)    # levels with attention; the middle always has it
    heads:       int   = 4               # of each attention
    head_width:  int   = 32              # of each head
    time_width:  int   = 128             # of the embedded time
    norm_groups: int   = 8               # GroupNorm groups

    @property
    def widths(self):
        """List the channels of each level, the highest resolution first."""
        return [self.width * mult for mult in self.mults]

    @property
    def factor(self):
        """Give the number of which h and w must be multiples."""
        return 2 ** (len(self.mults) - 1)


# [DDM Tab. 2] has 117 M parameters, and for 16x16 codes 1.06 G operations (K = 1024) or 1.04 (512).
# "paper117" has 117,586,568 and 117,454,984, and the plain convolutions of one call 1.06 and 1.04 G
# multiplications. Drawing a map takes one call per reverse step. "tiny" is not the paper's.
UNET_PRESETS = {
    "tiny": UNetConfig(width=40, mults=(1, 2, 2), num_blocks=1, top_skip=True, attn_levels=(2,)),
    "paper117": UNetConfig(),
}


def sinusoids(t, width):
    """Embed t (B,) as sin and cos of width/2 frequencies from 1 down to 1/10,000: (B,width)."""
    exponents = torch.linspace(0, 1, width // 2, device=t.device)           # (width/2)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponents)  # (B, width/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)                   # (B, width)


def conv_norm_mish(in_channels, out_channels, norm_groups):
    """Build mish(norm(conv(x))): (B,in,h,w) -> (B,out,h,w)."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1),
                         GroupNorm(norm_groups, out_channels), nn.Mish())


class Block(nn.Module):
    """Compute x + f2(f1(x) + time), f = mish(norm(conv(·))); x by a 1x1 conv if widths differ."""

    def __init__(self, in_channels, out_channels, config):
        super().__init__()
        self.block1 = conv_norm_mish(in_channels, out_channels, config.norm_groups)
        self.time = nn.Linear(config.time_width, out_channels)
        self.block2 = conv_norm_mish(out_channels, out_channels, config.norm_groups)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, time):
        h = self.block1(x) + self.time(time)[:, :, None, None]              # (B, out, h, w)
        return self.block2(h) + self.shortcut(x)


class LinearAttention(nn.Module):
    """Compute x + gate · proj(v softmax(k)^T q), in O(h·w). The gate starts at zero (ReZero).

    The softmax is over positions. Each feature is averaged over the positions that k weights, and q
    mixes these averages at each position.
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
        weight = k.softmax(-1, dtype=torch.promote_types(k.dtype, torch.float32))
        averages = v @ weight.transpose(2, 3)                               # (B, heads, d, d)
        mixed = (averages @ q).reshape(B, -1, h, w)                         # (B, heads·d, h, w)
        return x + self.gate * self.proj(mixed)                             # (B, C, h, w)


class Level(nn.Module):
    """Apply num_blocks residual blocks, then attention if `attends`."""

    def __init__(self, in_channels, out_channels, num_blocks, attends, config):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.blocks = nn.ModuleList(Block(a, b, config) for a, b in pairwise(widths))
        self.attention = LinearAttention(out_channels, config) if attends else nn.Identity()

    def forward(self, h, time):
        for block in self.blocks:
            h = block(h, time)                                              # (B, out, h, w)
        return self.attention(h)


class Trunk(nn.Module):
    """Go down the levels, through the middle, and up with the skip connection of each level.

    "paper117" has no way up at level 0. There Eq. 23's residual is the only path from Z_t to the
    logits at full resolution, and train.py adds 1 as the paper does. "tiny" has such a path itself
    (top_skip), and train.py adds nothing.  deviation D31
    """

    def __init__(self, config):
        super().__init__()
        widths = config.widths

        def level(i, a, b):
            return Level(a, b, config.num_blocks, i in config.attn_levels, config)
        self.down = nn.ModuleList(
            level(i, a, b) for i, (a, b) in enumerate(pairwise([config.width, *widths])))
        self.downsample = nn.ModuleList(nn.Conv2d(a, a, 3, 2, padding=1) for a in widths[:-1])
        self.middle = nn.ModuleDict({                            # block, attention, block
            name: Level(widths[-1], widths[-1], 1, name == "first", config)
            for name in ("first", "last")})
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(1, len(widths))):                # up[0] is the lowest level's
            self.up.append(level(i, 2 * widths[i], widths[i - 1]))
            self.upsample.append(
                nn.ConvTranspose2d(widths[i - 1], widths[i - 1], 4, stride=2, padding=1))
        self.top = level(0, 2 * widths[0], widths[0]) if config.top_skip else None
        self.out = conv_norm_mish(widths[0], widths[0], config.norm_groups)

    def forward(self, h, time):
        """h (B,C,h,w), time (B,time_width) -> (B,C',h,w)."""
        skips = []
        for i, level in enumerate(self.down):
            if i > 0:
                h = self.downsample[i - 1](h)                               # (B, C, h/2, w/2)
            h = level(h, time)                                              # (B, C', h, w)
            skips.append(h)
        h = self.middle.last(self.middle.first(h, time), time)
        for level, upsample in zip(self.up, self.upsample):
            h = level(torch.cat([h, skips.pop()], dim=1), time)             # (B, C', h, w)
            h = upsample(h)                                                 # (B, C', 2h, 2w)
        if self.top is not None:
            h = self.top(torch.cat([h, skips.pop()], dim=1), time)          # (B, C', h, w)
        return self.out(h)


class UNet(nn.Module):
    """Predict mu(Z_t, t), the logits of x0_hat. [DDM Sec. 4.1] [DDM App.]

    config: a row of UNET_PRESETS or another UNetConfig; K: codes; T: steps of the diffusion. The
    logits are zero at first, unless train_prior.start_from_codes changes the last layer.
    """

    def __init__(self, config, K, T):
        super().__init__()
        self.config, self.K, self.T = config, K, T
        self.embedding = nn.Embedding(K, config.width)
        self.time = nn.Sequential(      # the last Mish is applied here once, not in each block
            nn.Linear(config.width, 4 * config.width), nn.Mish(),
            nn.Linear(4 * config.width, config.time_width), nn.Mish())
        self.trunk = Trunk(config)
        self.logits = nn.Conv2d(config.widths[0], K, 1)                     # deviation D38
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def forward(self, indices, t):
        """Map indices (B,h,w) int64, t (B,) to logits (B,K,h,w) float32. Raises ValueError."""
        factor = self.config.factor
        if indices.ndim != 3 or indices.shape[1] % factor or indices.shape[2] % factor:
            raise ValueError(f"a map of codes is (B,h,w) with h and w multiples of {factor}, "
                             f"not {tuple(indices.shape)}")
        time = self.time(sinusoids(t * (TIME_SCALE / self.T), self.config.width))  # (B, time_width)
        h = self.embedding(indices).permute(0, 3, 1, 2)                     # (B, C, h, w)
        return self.logits(self.trunk(h, time)).float()                     # (B, K, h, w)
