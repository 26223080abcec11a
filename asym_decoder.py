"""Decode a latent together with known pixels, the paper's contribution (AVQ Sec. 3.2, Tables 7-8).

    image·(1-m) --ConditionBranch--> features 0..n   (0 and 1 at full resolution, then halves)
    z --conv_in, mid--> h --blend n--> level n-1 --blend n-1--> ... --blend 1--> level 0
                          --blend 0--> norm, SiLU, conv_out --> x_hat

Level i takes feature i+1 and the output feature 0, as in the tables. Eq. 3 counts from 1.
`blend="add"` is the paper's final choice (Sec. 4.1), with plain convolutions in the branch.
`blend="concat"` is what Tables 7 and 8 print, with partial convolutions. The trunk is a
vqgan.Decoder and can start from the first stage's. The authors name the branch `encoder.layers.N`.

Why not paste the known pixels over the vanilla decoder's image? That leaves a step at the border,
which metrics.seam measures, because the decoder's colours differ from the photo's (AVQ Sec. 4.1,
Fig. 4). This decoder draws both sides from joint features, so it can fit the hole to the photo.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from pconv import PartialConv2d
from vqgan import Decoder

# Relative to the first stage: width factor, ResBlocks per level (the decoder adds one).
# A size without a recipe in recipes.py trains by tiny's on a tiny first stage, else by base's.
# [AVQ Tab. 9] [AVQ App. D]  deviation D20
ASYM_PRESETS = {
    "tiny":   (1.0, 1),
    "tiny2":  (2.0, 1),    # wide, on an unchanged first stage
    "base":   (1.0, 2),    # Table 7:  60,276,227 parameters on the kl-f8 plan (add)
    "large":  (1.5, 3),    # Table 8: 160,136,835
    "large2": (2.0, 5),    # Table 9's "Large x2": 371,966,467
}


class ConditionBranch(nn.Module):
    """Extract features of the known pixels: the lightweight encoder E. [AVQ Eq. 3] [AVQ Tab. 7]

    widths: channels of feature 0, 1, 2, ...; 0 and 1 have the image's resolution, 2 has half of it,
    3 a quarter and so on.  deviation D13
    partial: use partial convolutions, which infer features inside the hole, instead of plain ones.
    """

    def __init__(self, widths, partial):
        super().__init__()
        conv = PartialConv2d if partial else nn.Conv2d
        self.partial = partial
        self.layers = nn.ModuleList()
        for index, (a, b) in enumerate(zip([3, *widths], widths)):
            kernel_size, stride = (3, 1) if index < 2 else (4, 2)
            self.layers.append(conv(a, b, kernel_size, stride=stride, padding=1))

    def forward(self, image, mask):
        """Map image (B,3,H,W), mask (B,1,H,W) to [f_E^0, f_E^1, ...], each before its ReLU."""
        features, valid = [], 1 - mask
        h = image * valid                                                   # (B, 3, H, W)
        for layer in self.layers:
            if self.partial:
                h, valid = layer(h, valid)                                  # (B, C, h, w)
            else:
                h = layer(h)                                                # (B, C, h, w)
            features.append(h)
            h = F.relu(h)
        return features


def mask_guided_blend(f_dec, f_enc, mask):
    """Take f_dec (B,C,h,w) where the mask (B,1,h,w) is 1, f_enc where it is 0. [AVQ Eq. 4]"""
    mask = mask.to(f_dec.dtype)
    return f_dec * mask + f_enc * (1 - mask)                                # (B, C, h, w)


class AsymDecoder(Decoder):
    """Decode with a condition branch and a blend at every level. [AVQ Sec. 3.2] [AVQ App. C]

    [AVQ Tab. 7] [AVQ Tab. 8]  config: the first stage's; ch, num_res_blocks: this decoder's own.
    blend: "add" with plain convolutions in the branch, or "concat" with partial.  deviations D1 D2
    A full mask equals no mask. "add" gives h·1 + f_E·0 = h. "concat" joins a mask of 1 and features
    0, which partial convolutions give without known pixels.
    If the trunk starts from the first stage's decoder, "add" computes the same as that decoder
    under a full mask. "concat", whose `fuse` layers start at random, does so after pass_trunk.
    """

    def __init__(self, config, ch, num_res_blocks, blend="add"):
        if blend not in ("add", "concat"):
            raise ValueError(f'blend must be "add" or "concat", not {blend!r}')
        super().__init__(config, ch, num_res_blocks)
        self.blend = blend
        widths = [ch * config.ch_mult[0], *self.in_widths]   # [0] the output's, [i + 1] level i's
        self.encoder = ConditionBranch(widths, partial=blend == "concat")
        if blend == "concat":
            self.fuse = nn.ModuleList(nn.Conv2d(2 * width + 1, width, 1) for width in widths)

    @classmethod
    def from_preset(cls, config, preset, blend="add"):
        """Build a row of ASYM_PRESETS for a first stage."""
        factor, num_res_blocks = ASYM_PRESETS[preset]
        return cls(config, round(factor * config.ch), num_res_blocks, blend)

    def split_parameters(self):
        """Split the parameters by name: those of the vanilla decoder, too, and the branch's."""
        parts = {}, {}
        for name, parameter in self.named_parameters():
            parts[name.startswith(("encoder.", "fuse."))][name] = parameter
        return parts

    @torch.no_grad()
    def load_trunk(self, decoder):
        """Start the trunk from the first stage's `decoder` if its blocks fit; tell if they do.

        They fit if they are equally many and the trunk is n times as wide, n = 1, 2, ... Then it
        begins with n copies of each channel, and computes the same. Of the random weights that read
        n copies only the mean is replaced, so that the copies do not stay equal in training: equal
        inputs times weights without their mean sum to 0.  deviation D10
        """
        ours, theirs = self.split_parameters()[0], dict(decoder.named_parameters())
        n, rest = divmod(len(self.conv_in.weight), len(decoder.conv_in.weight))
        if ours.keys() != theirs.keys() or rest:
            return False
        for name, wide in ours.items():
            weight = theirs[name].repeat_interleave(len(wide) // len(theirs[name]), 0)
            if wide.ndim == 4:                                              # (out, in / n, k, k)
                inputs = wide.unflatten(1, (weight.shape[1], -1))           # (out, in / n, n, k, k)
                weight = weight[:, :, None] / inputs.shape[2] + (inputs - inputs.mean(2, True))
            if ".q." in name:                    # q k^T / sqrt(C) sums over n times as many
                weight = weight / math.sqrt(n)
            wide.copy_(weight.reshape(wide.shape))
        return True

    def pass_trunk(self):
        """Start each `fuse` of "concat" as h + W f_E, W random: under a full mask f_E is 0."""
        for fuse in self.fuse if self.blend == "concat" else ():
            width = len(fuse.weight)
            nn.init.dirac_(fuse.weight[:, :width])       # of [h, f_E, m]: h
            nn.init.zeros_(fuse.weight[:, 2 * width:])   # m
            nn.init.zeros_(fuse.bias)

    @torch.no_grad()
    def pin_statistics(self, latents, size=3.0):
        """Make what the last GroupNorm divides by nearly equal in all images.  deviation D56

        It divides each group of c channels by its standard deviation s in this image. Known pixels
        pass through it, so their colours would depend on the rest of the image. Adding D to a
        group's first channel and -D to its second keeps the mean, and the variance becomes

            s² + 2D²/c + 2D (m_1 - m_2)/c,    m_1, m_2: the means of these two channels

        The larger D, the less the terms that differ between images matter beside 2D²/c. D is `size`
        · sqrt(c)/2 times the mean of s over `latents` (N,z,h,w), after post_quant_conv, so that
        2D²/c has the same share for any c. The norm's weight and bias then undo the change: exactly
        for an image with the mean deviations, without a mask.
        """
        norm, means, variances = self.norm_out, [], []
        for z in latents:
            h = self.blended(z[None])[0].cpu().double()                     # (ch, H, W)
            groups = h.unflatten(0, (norm.num_groups, -1))                  # (G, c, H, W)
            means.append(groups.mean((2, 3)))                               # (G, c)
            variances.append(groups.var((1, 2, 3), correction=0) + norm.eps)    # (G)
        means, variances = torch.stack(means), torch.stack(variances)       # (N, G, c), (N, G)
        width, before = means.shape[2], variances.sqrt().mean(0)            # c, (G)
        D = size * before * math.sqrt(width) / 2                            # (G)
        added = 2 * D * (D + means[..., 0] - means[..., 1]) / width         # (N, G)
        scale = (variances + added).sqrt().mean(0) / before                 # (G)
        constants = torch.zeros_like(means[0])                              # (G, c)
        constants[:, 0], constants[:, 1] = D, -D
        shift = (constants / (scale * before)[:, None]).flatten()           # (ch), of normed values
        # Add the constants to the biases of all that is blended, and compensate.
        level = self.up[0]
        last = level.attn[-1].proj_out if len(level.attn) else level.block[-1].conv2
        for layer in [self.fuse[0]] if self.blend == "concat" else [last, self.encoder.layers[0]]:
            layer.bias.copy_(layer.bias.cpu() + constants.flatten())
        norm.weight.copy_(norm.weight.cpu() * scale.repeat_interleave(width))
        norm.bias.copy_(norm.bias.cpu() - norm.weight.cpu() * shift)

    def last_features(self, z, image=None, mask=None):
        """Compute what enters the last layer, (B,ch,H,W), with the known pixels blended in."""
        return F.silu(self.norm_out(self.blended(z, image, mask)))          # (B, ch, H, W)

    def blended(self, z, image=None, mask=None):
        """Compute what enters the last GroupNorm, (B,ch,H,W), with the known pixels blended in.

        z: (B,z,h,w), after post_quant_conv; image: (B,3,H,W); mask: (B,1,H,W) in {0,1}. The input
        is not checked. Comments name the rows of Tables 7 and 8, which have four levels, 0 to 3.
        """
        conditions = None
        if mask is not None:
            features = self.encoder(image, mask)         # rows Condition 0, 1, ...
            # Downsample the mask by nearest neighbour: every stride-th pixel.
            strides = [mask.shape[-1] // f.shape[-1] for f in features]
            conditions = [(f, mask[..., ::s, ::s]) for f, s in zip(features, strides)]
        # Row Main 4: Conv2d (3, 3), ResBlock, AttnBlock, ResBlock.
        h = self.mid(self.conv_in(z))                                       # (B, C, h, w)
        for i in reversed(range(len(self.up))):
            # Rows Main 3, 2, 1, 0: Concat, Conv2d (1, 1); then ResBlocks, Upsample (none in row 0).
            h = self._blend(i + 1, h, conditions)                           # (B, C, h, w)
            h = self.run_level(i, h)                                        # (B, C', 2h, 2w)
        # Row Main Out: Concat, Conv2d (1, 1), GroupNorm; its Conv2d (3, 3) is conv_out.
        return self._blend(0, h, conditions)                                # (B, ch, H, W)

    def forward(self, z, image=None, mask=None):
        """Decode to x_hat (B,3,H,W); arguments as for last_features."""
        return self.conv_out(self.last_features(z, image, mask))            # (B, 3, H, W)

    def _blend(self, index, h, conditions):
        """Blend h (B,C,h,w) with condition `index`, a pair (f_E, m), if there is a mask."""
        if self.blend == "add":
            return h if conditions is None else mask_guided_blend(h, *conditions[index])
        # Concat [h, f_E, m], Conv2d (1, 1); without a mask f_E = 0 and m = 1.  deviation D15
        if conditions is None:
            f_enc, mask = torch.zeros_like(h), torch.ones_like(h[:, :1])
        else:
            f_enc, mask = conditions[index]
        joined = torch.cat([h, f_enc.to(h.dtype), mask.to(h.dtype)], 1)     # (B, 2C+1, h, w)
        return self.fuse[index](joined)                                     # (B, C, h, w)


class AsymVQGAN(nn.Module):
    """Join a frozen first stage and its asymmetric decoder. [AVQ Sec. 3.2]

    Only `decoder` trains. Encoder, codebook, quant_conv and post_quant_conv keep their weights.
    The `first_stage` given is frozen itself, not a copy of it.  deviation D9
    """

    def __init__(self, first_stage, decoder):
        super().__init__()
        self.first_stage = first_stage.requires_grad_(False)
        self.decoder = decoder
        self.config = first_stage.config

    def encode(self, x, sample=False, generator=None):
        """Encode x (B,3,H,W) in [-1,1] by VQGAN.encode: z (B,d,h,w)."""
        return self.first_stage.encode(x, sample, generator)

    def decode(self, z, *, image=None, mask=None):
        """Decode z (B,d,h,w): x_hat (B,3,H,W), about [-1,1], not clamped.

        image: (B,3,H,W) in [-1,1], of which only known pixels matter; mask: (B,1,H,W) in {0,1} of
        any type, 1 = to be generated. Without them the decoder relies on z alone, as under a full
        mask. Raises ValueError for shapes that do not fit z and for a mask that is not binary. Its
        values are not checked in train mode or compiled, where the check would wait for the device.
        """
        B, f = len(z), self.config.f
        if z.ndim != 4 or z.shape[1] != self.config.embed_dim:
            raise ValueError(f"a latent is (B,{self.config.embed_dim},h,w), not {tuple(z.shape)}")
        if (image is None) != (mask is None):
            raise ValueError("image and mask go together: give both, or neither")
        if image is not None:
            H, W = z.shape[2] * f, z.shape[3] * f
            if image.shape != (B, 3, H, W) or mask.shape != (B, 1, H, W):
                raise ValueError(f"image {tuple(image.shape)} and mask {tuple(mask.shape)} must be "
                                 f"{(B, 3, H, W)} and {(B, 1, H, W)} for latent {tuple(z.shape)}")
            checked = not (self.training or torch.compiler.is_compiling())
            if checked and not ((mask == 0) | (mask == 1)).all():
                raise ValueError("mask has values other than 0 and 1; threshold it: "
                                 "mask = (mask > 0.5).float()")
            mask = mask.to(image.dtype)
        return self.decoder(self.first_stage.post_quant_conv(z), image, mask).float()

    def forward(self, x, mask, generator=None):
        """Pass training images up to the last layer: encode the full x, blend its known pixels.

        x: (B,3,H,W) in [-1,1]; mask: (B,1,H,W) in {0,1}; generator: see DiagonalGaussian.sample.
        Returns h (B,ch,H,W); decoder.conv_out(h) is x_hat.
        """
        # In float32 under autocast too, because rounding would exchange codes.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            z = self.encode(x, sample=True, generator=generator)            # (B, d, h, w)
            z = self.first_stage.post_quant_conv(z)                         # (B, z, h, w)
        return self.decoder.last_features(z, x, mask)                       # (B, ch, H, W)
