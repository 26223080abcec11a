"""Write out the asymmetric decoder as AVQ Tables 7 and 8 print it."""

import torch
import torch.nn.functional as F


def slow_forward(decoder, z, image, mask):
    """Compute x_hat by Tables 7 and 8, row by row, for three levels instead of four."""
    f = decoder.encoder(image, mask)                                    # rows Condition 0 .. 3
    m = [F.interpolate(mask, size=feature.shape[2:], mode="nearest") for feature in f]

    def blend(index, h):
        if decoder.blend == "add":
            return h * m[index] + f[index] * (1 - m[index])             # Eq. 4
        return decoder.fuse[index](torch.cat([h, f[index], m[index]], 1))

    def blocks(level, h):
        for block in level.block:
            h = block(h)
        return h

    h = decoder.conv_in(z)                                              # row Main 3 (the tables' 4)
    h = decoder.mid.block_2(decoder.mid.attn_1(decoder.mid.block_1(h)))
    h = decoder.up[2].upsample(blocks(decoder.up[2], blend(3, h)))      # row Main 2
    h = decoder.up[1].upsample(blocks(decoder.up[1], blend(2, h)))      # row Main 1
    h = blocks(decoder.up[0], blend(1, h))                              # row Main 0
    h = blend(0, h)                                                     # row Main Out
    return decoder.conv_out(F.silu(decoder.norm_out(h)))
