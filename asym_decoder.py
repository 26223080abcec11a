"""The paper's contribution: a decoder with a condition branch. AVQ Sec. 3.2, Tables 7 and 8.

    image·(1-m) --ConditionBranch--> features 0..n      (0 and 1 at full resolution, each further one at half)
    z --conv_in, mid--> h --blend n--> level n-1 --blend n-1--> ... --> level 0 --blend 0--> norm, SiLU, conv --> x_hat

The mask m is 1 where pixels are to be generated. Level i takes feature i+1 and the output takes feature 0, as in the
tables; Eq. 3 counts the same features from 1. `blend="add"` is the paper's final choice (Sec. 4.1), with ordinary
convolutions in the branch; `blend="concat"` is what Tables 7 and 8 print, with partial ones.

The trunk is vqgan.Decoder, so its weights load from the first stage; the branch is `encoder.layers.N`, as the authors
call it. Sizes are rows of ASYM_PRESETS. Training is in stages.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from pconv import PartialConv2d
from vqgan import Decoder, check_image

# Relative to the first stage: width factor, ResBlocks a level (the decoder adds one). [AVQ App. D]
ASYM_PRESETS = {
    "tiny":   (1.0, 1),
    "base":   (1.0, 2),    # Table 7:  60,276,227 parameters on the kl-f8 plan (add)
    "large":  (1.5, 3),    # Table 8: 160,136,835
    "large2": (2.0, 5),    # Table 9: 371,966,467
}


class ConditionBranch(nn.Module):
    """The lightweight encoder E of the known pixels. [AVQ Eq. 3] [AVQ Tab. 7]

    widths: channels of feature 0, 1, 2, ...; 0 and 1 have the image's resolution, each further one half of the one
    before. partial: partial convolutions, which infer features inside the hole; plain ones otherwise.
    """

    def __init__(self, widths, partial):
        super().__init__()
        conv = PartialConv2d if partial else nn.Conv2d
        self.partial = partial
        self.layers = nn.ModuleList()
        for index, (a, b) in enumerate(zip([3, *widths[:-1]], widths)):
            kernel_size, stride = (3, 1) if index < 2 else (4, 2)
            self.layers.append(conv(a, b, kernel_size, stride=stride, padding=1))

    def forward(self, image, mask):
        """image (B,3,H,W), mask (B,1,H,W) -> [f_E^l], before the ReLU that leads to the next one."""
        features, valid = [], 1 - mask
        h = image * valid
        for layer in self.layers:
            if self.partial:
                h, valid = layer(h, valid)                                                  # (B,C,h,w), (B,1,h,w)
            else:
                h = layer(h)                                                                # (B,C,h,w)
            features.append(h)
            h = F.relu(h)
        return features


def mask_guided_blend(f_dec, f_enc, mask):
    """f_dec where the mask is 1, f_enc where it is 0. [AVQ Eq. 4]

    f_dec, f_enc: (B,C,h,w); mask: (B,1,h,w) in {0,1}.
    """
    mask = mask.to(f_dec.dtype)
    return f_dec * mask + f_enc * (1 - mask)                                                # (B,C,h,w)


class AsymDecoder(Decoder):
    """Decoder with a condition branch and a blend at every level. [AVQ Sec. 3.2] [AVQ Tab. 7] [AVQ Tab. 8]

    config: the first stage's; ch, num_res_blocks: this decoder's own; blend: "add" or "concat".
    """

    def __init__(self, config, ch, num_res_blocks, blend="add"):
        if blend not in ("add", "concat"):
            raise ValueError(f'blend must be "add" or "concat", not {blend!r}')
        super().__init__(config, ch, num_res_blocks)
        self.blend = blend
        widths = [ch * config.ch_mult[0], *self.in_widths]                # of feature 0 (out), 1 (level 0), ...
        self.encoder = ConditionBranch(widths, partial=blend == "concat")
        if blend == "concat":
            self.fuse = nn.ModuleList(nn.Conv2d(2 * width + 1, width, 1) for width in widths)

    @classmethod
    def from_preset(cls, config, preset, blend="add"):
        """A row of ASYM_PRESETS on the first stage's plan. Raises ValueError for an unknown name."""
        if preset not in ASYM_PRESETS:
            raise ValueError(f"unknown decoder size {preset!r}; choose from {', '.join(ASYM_PRESETS)}")
        factor, num_res_blocks = ASYM_PRESETS[preset]
        return cls(config, round(factor * config.ch), num_res_blocks, blend)

    def trunk_fits(self, decoder):
        """Whether the first stage's `decoder` has exactly this trunk, so that training can start from it."""
        ours = {name: p.shape for name, p in self.state_dict().items()}
        return all(ours.get(name) == p.shape for name, p in decoder.state_dict().items()) and \
            len(self.up[0].block) == len(decoder.up[0].block)

    def load_trunk(self, decoder):
        """Copy the first stage's `decoder` into the trunk. Raises ValueError where the sizes differ."""
        if not self.trunk_fits(decoder):
            raise ValueError("the first stage's decoder has other sizes than this trunk")
        self.load_state_dict(decoder.state_dict(), strict=False)          # the branch is all that is missing

    def trunk_parameters(self):
        """The parameters that the vanilla decoder has, too."""
        own = {id(p) for p in self.branch_parameters()}
        return [p for p in self.parameters() if id(p) not in own]

    def branch_parameters(self):
        """The parameters that only the asymmetric decoder has."""
        fuse = self.fuse.parameters() if self.blend == "concat" else []
        return [*self.encoder.parameters(), *fuse]

    def last_features(self, z, image=None, mask=None, rows=None):
        """As Decoder.last_features, with the known pixels blended in. Trusts its input.

        z: (B,z,h,w), after post_quant_conv; image: (B,3,H,W); mask: (B,1,H,W) in {0,1}.
        rows: int64 (n,) on z's device, the samples whose mask is not full; None stands for all. The branch runs on
        these only: for a full mask its features are multiplied by zero (add) or are zero (concat), so the others lose
        nothing. With no rows it runs on an empty batch, and its parameters receive zeros as gradients, not None.
        """
        blends = self._conditions(image, mask, rows, len(z))
        h = self.bottom(z)                                                                  # (B,C,h,w)
        for i in reversed(range(len(self.up))):
            h = self.run_level(i, self._blend(i + 1, h, blends))                            # (B,C,2h,2w)
        h = self._blend(0, h, blends)                                                       # (B,ch,H,W)
        return F.silu(self.norm_out(h))

    def forward(self, z, image=None, mask=None, rows=None):
        """-> x_hat (B,3,H,W); the arguments are those of `last_features`."""
        return self.conv_out(self.last_features(z, image, mask, rows))

    def _conditions(self, image, mask, rows, B):
        """[(f_E^l, m^l)] for every blend, all B samples; None without a mask."""
        if mask is None:
            return None
        if rows is None:
            features = self.encoder(image, mask)
        else:
            features = [_scatter(f, rows, B) for f in self.encoder(image[rows], mask[rows])]
        # Nearest-neighbour downsampling of the mask, once for all blends.
        return [(f, mask[:, :, ::mask.shape[2] // f.shape[2], ::mask.shape[3] // f.shape[3]]) for f in features]

    def _blend(self, l, h, blends):
        if self.blend == "add":
            return h if blends is None else mask_guided_blend(h, *blends[l])
        f_enc, mask = (torch.zeros_like(h), torch.ones_like(h[:, :1])) if blends is None else blends[l]
        return self.fuse[l](torch.cat([h, f_enc.to(h.dtype), mask.to(h.dtype)], 1))         # (B,2C+1,h,w) -> (B,C,h,w)


def _scatter(part, rows, B):
    """(n,C,h,w) -> (B,C,h,w), zero in the samples that `rows` does not name."""
    return part.new_zeros(B, *part.shape[1:]).index_copy(0, rows, part)


class AsymVQGAN(nn.Module):
    """A frozen first stage and its asymmetric decoder. [AVQ Sec. 3.2]

    Only `decoder` trains: encoder, codebook, quant_conv and post_quant_conv keep the weights they came with.
    """

    def __init__(self, first_stage, decoder):
        super().__init__()
        self.first_stage = first_stage.requires_grad_(False)
        self.decoder = decoder
        self.config = first_stage.config

    def encode(self, x, sample=False, generator=None):
        """As VQGAN.encode: x (B,3,H,W) in [-1,1] -> z (B,d,h,w)."""
        return self.first_stage.encode(x, sample, generator)

    def decode(self, z, *, image=None, mask=None):
        """z (B,d,h,w) -> x_hat (B,3,H,W), about [-1,1], not clamped.

        image: (B,3,H,W) in [-1,1], only its known pixels are looked at; mask: (B,1,H,W) in {0,1}, 1 = to be generated.
        Without them the decoder relies on z alone, as it does under a full mask.
        Raises ValueError for one without the other, for shapes that do not fit z, and for a mask that is not binary
        (not checked while training or compiling: it would wait for the device).
        """
        self._check(z, image, mask)
        return self.decoder(self.first_stage.post_quant_conv(z), image, mask).float()

    def forward(self, x, mask, rows=None, generator=None):
        """One training pass: encode the full x, decode with its pixels under `mask`.

        x: (B,3,H,W); mask: (B,1,H,W); rows: see AsymDecoder.last_features; generator: see DiagonalGaussian.sample.
        -> x_hat (B,3,H,W), {"last_features": (B,ch,H,W), detached}.
        """
        with torch.no_grad():
            z = self.first_stage.post_quant_conv(self.encode(x, sample=True, generator=generator))
        h = self.decoder.last_features(z, x, mask, rows)                                    # (B,ch,H,W)
        return self.decoder.conv_out(h).float(), {"last_features": h.detach()}              # (B,3,H,W)

    def _check(self, z, image, mask):
        config = self.config
        if z.ndim != 4 or z.shape[1] != config.embed_dim:
            raise ValueError(f"a latent is (B,{config.embed_dim},h,w), not {tuple(z.shape)}")
        if (image is None) != (mask is None):
            raise ValueError("image and mask go together: give both, or neither")
        if image is None:
            return
        check_image(image, config.f)
        B, _, h, w = z.shape
        if image.shape != (B, 3, h * config.f, w * config.f):
            raise ValueError(f"image {tuple(image.shape)} does not fit latent {tuple(z.shape)} at f={config.f}")
        if mask.shape != (B, 1, *image.shape[2:]):
            raise ValueError(f"mask {tuple(mask.shape)} must be {(B, 1, *image.shape[2:])}, one channel as large "
                             "as the image")
        if not self.training and not torch.compiler.is_compiling() and not ((mask == 0) | (mask == 1)).all():
            raise ValueError("mask has values other than 0 and 1; threshold it: mask = (mask > 0.5).float()")
