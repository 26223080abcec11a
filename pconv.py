"""Partial convolution, AVQ Tables 7 and 8: the condition branch's layer when the blend is concat.

The paper names the layer and its source (Liu et al., Image inpainting for irregular holes using
partial convolutions). With X a window of x, M the same window of valid, sum(1) its positions:

    y = W^T (X * M) * sum(1) / sum(M) + b where sum(M) > 0, else 0;  valid_out = [sum(M) > 0]

Data flow: x (B,C,H,W), valid (B,1,H,W) -> y (B,C',H',W'), valid_out (B,1,H',W'), which is the
next layer's valid. Zero padding counts in sum(1) but never in sum(M), as in the published layer:
at the image's border the ratio exceeds 1. `valid` is 1 - mask: here, and only here, 1 = known.
Not here: which layer goes with which blend (AVQ Sec. 4.1); asym_decoder.py settles that.
"""

import torch.nn.functional as F
from torch import nn


class PartialConv2d(nn.Conv2d):
    """A convolution that sees valid pixels only and makes up for the missing ones.

    Parameters, their names and initialisation are nn.Conv2d's. padding: at most half the kernel.
    [AVQ Tab. 7] [AVQ Tab. 8]
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)

    def forward(self, x, valid):
        """x (B,C,H,W), valid (B,1,H,W) in {0,1}, 1 = known -> (y (B,C',H',W'), valid_out).

        valid_out (B,1,H',W') is in {0,1}, float32. A window without a valid pixel gives exactly
        0, without bias. Raises ValueError for another shape of valid. Source: the published
        layer's arithmetic for a mask that is the same in all channels.
        """
        expected = (x.shape[0], 1, *x.shape[2:])
        if valid.shape != expected:
            raise ValueError(f"valid is {tuple(valid.shape)}; x {tuple(x.shape)} needs {expected}")
        # Sums of at most k*k ones, in float32: exact.  deviation D16
        count = F.avg_pool2d(valid.float(), self.kernel_size, self.stride, self.padding,
                             divisor_override=1)                            # (B, 1, H', W')
        valid_out = (count > 0).float()
        window = self.kernel_size[0] * self.kernel_size[1]
        ratio = window / count.clamp(min=1) * valid_out
        y = F.conv2d(x * valid.to(x.dtype), self.weight, None,
                     self.stride, self.padding)                             # (B, C', H', W')
        # In place: the convolution's backward never reads its output, and under bf16 y stays bf16
        # while the ratio multiplies in float32.
        y.mul_(ratio)
        if self.bias is not None:
            y.addcmul_(self.bias.to(y.dtype).view(1, -1, 1, 1), valid_out.to(y.dtype))
        return y, valid_out
