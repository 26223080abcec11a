"""Convolve known pixels only: the condition branch's layer when the blend is concat.

AVQ's Tables 7 and 8 name the layer and its source (Liu et al., Image inpainting for irregular holes
using partial convolutions). X is a window of x, M the same window of valid, sum(1) its size:

    y = W^T (X * M) * sum(1) / sum(M) + b where sum(M) > 0, else 0;  valid_out = [sum(M) > 0]

valid_out is the next layer's valid. At the image's border padding counts as missing, so y is scaled
up there, as in the published layer. `valid` is 1 - mask: 1 = known.
"""

import torch.nn.functional as F
from torch import nn


class PartialConv2d(nn.Conv2d):
    """Convolve valid pixels and scale up for the missing ones. [AVQ Tab. 7] [AVQ Tab. 8]

    Parameters, their names and initialisation are nn.Conv2d's. padding: at most half the kernel.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)

    def forward(self, x, valid):
        """Map x (B,C,H,W), valid (B,1,H,W) in {0,1} to y (B,C',H',W') and valid_out (B,1,H',W').

        valid_out is float32. The arithmetic is the published layer's for one mask of all channels.
        """
        # Sums of at most k*k ones, in float32: exact.  deviation D16
        count = F.avg_pool2d(valid.float(), self.kernel_size, self.stride, self.padding,
                             divisor_override=1)                            # (B, 1, H', W')
        valid_out = (count > 0).float()
        ratio = self.weight[0, 0].numel() / count.clamp(min=1) * valid_out
        y = F.conv2d(x * valid.to(x.dtype), self.weight, None,
                     self.stride, self.padding)                             # (B, C', H', W')
        y.mul_(ratio)        # in place: y stays bf16 under autocast, and no backward reads it
        if self.bias is not None:
            y.addcmul_(self.bias.to(y.dtype).view(1, -1, 1, 1), valid_out.to(y.dtype))
        return y, valid_out
