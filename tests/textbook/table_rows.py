"""The asymmetric decoder as AVQ Tables 7 and 8 print it."""

import torch
import torch.nn.functional as F


def slow_forward(decoder, z, image, mask):
    """Tables 7 and 8, row by row, for three levels."""
    f = decoder.encoder(image, mask)
    at = [F.interpolate(mask, size=feature.shape[2:], mode="nearest") for feature in f]

    def blend(index, h):
        if decoder.blend == "add":
            return h * at[index] + f[index] * (1 - at[index])
        return decoder.fuse[index](torch.cat([h, f[index], at[index]], 1))

    def blocks(level, h):
        for block in level.block:
            h = block(h)
        return h

    h = decoder.mid.block_2(decoder.mid.attn_1(decoder.mid.block_1(decoder.conv_in(z))))
    h = decoder.up[2].upsample(blocks(decoder.up[2], blend(3, h)))
    h = decoder.up[1].upsample(blocks(decoder.up[1], blend(2, h)))
    h = blocks(decoder.up[0], blend(1, h))
    h = blend(0, h)
    return decoder.conv_out(F.silu(decoder.norm_out(h)))
