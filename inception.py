"""The network behind FID and inception score: Inception v3 as TensorFlow published it in 2015.

Scores are comparable only between programs that run this very network, so it is rebuilt here layer
by layer, and reads pytorch-fid's conversion of its weights (weights.py):

    images (B,3,H,W) in [-1,1] ──resize──► (B,3,299,299) ──stem──► (B,192,35,35)
        ──Mixed_5──► (B,288,35,35) ──Mixed_6──► (B,768,17,17) ──Mixed_7──► (B,2048,8,8)
        ──mean over the map──► features (B,2048) ──fc──► logits (B,1008)

Each Mixed block runs branches side by side on the same input and concatenates their channels.
It is not torchvision's network of that name: 1,008 classes instead of 1,000, no auxiliary
classifier, average pools that leave out the padding, and a maximum in place of the average in the
very last block. Not here: what is computed from features and logits (fid.py).
"""

import torch
import torch.nn.functional as F
from torch import nn

from weights import read_weights

FILE = "pt_inception-2015-12-05-6726825d.pth"
SIZE = 299                                                 # pixels a side that the network sees


class InceptionV3(nn.Module):
    """images (B,3,H,W) in [-1,1] -> features (B,2048) and logits (B,1008), both float32.

    weights: the folder of the published file (default: torch hub's cache; see `find_weights`), or
    a float32 state dict with its keys, which are torchvision's.

    Frozen, always in eval mode, in float32 also under autocast; whether CUDA may round to TF32 is
    the caller's matter. Without a graph it takes 11.4 GFLOP and 12 MiB an image, whatever the
    images' size; on a CPU `.to(memory_format=torch.channels_last)` makes it 1.4 times as fast.
    Raises UserError for a missing, unreadable or foreign file.
    """

    def __init__(self, weights=None):
        super().__init__()
        with torch.device("meta"):  # all numbers come from the file; none is drawn at random
            self._build()
        if not isinstance(weights, dict):
            weights = read_weights(FILE, self.state_dict(), weights)
        self.load_state_dict(weights, assign=True)
        self.requires_grad_(False).eval()

    def _build(self):
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB()
        self.Mixed_6b = BlockC(128)
        self.Mixed_6c = BlockC(160)
        self.Mixed_6d = BlockC(160)
        self.Mixed_6e = BlockC(192)
        self.Mixed_7a = BlockD()
        self.Mixed_7b = BlockE(1280, average_pool)
        self.Mixed_7c = BlockE(2048, maximum_pool)
        self.fc = nn.Linear(2048, 1008)

    def train(self, mode=True):
        """Stays in eval mode: a parent's `.train()` must not reach a frozen measure."""
        return super().train(False)

    def forward(self, images):
        """Images are taken as they are: clamped, and rounded to 8 bits where that is wanted.

        The resize is bilinear without antialiasing, as pytorch-fid's. The logits lack `fc.bias`:
        inception scores are computed from these "unbiased" logits in the original program and in
        torch-fidelity and torchmetrics; `logits + fc.bias` are the network's own.
        """
        with torch.autocast(images.device.type, enabled=False):
            h = F.interpolate(images.float(), size=(SIZE, SIZE), mode="bilinear",
                              align_corners=False)                             # (B, 3, 299, 299)
            features = self._map(h).mean((2, 3))                               # (B, 2048)
            return features, features @ self.fc.weight.T                       # (B, 1008)

    def _map(self, h):
        """The last map before the mean over it: (B,3,299,299) -> (B,2048,8,8)."""
        h = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(h)))      # (B, 64, 147, 147)
        h = F.max_pool2d(h, 3, 2)                                              # (B, 64, 73, 73)
        h = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(h))                          # (B, 192, 71, 71)
        h = F.max_pool2d(h, 3, 2)                                              # (B, 192, 35, 35)
        h = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(h)))                     # (B, 288, 35, 35)
        h = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(h)))                     # (B, 768, 17, 17)
        h = self.Mixed_6e(self.Mixed_6d(h))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(h)))                  # (B, 2048, 8, 8)


class Conv(nn.Module):
    """Convolution without bias, batch normalisation by the stored statistics, ReLU."""

    def __init__(self, channels, width, kernel=1, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, h):
        return F.relu(self.bn(self.conv(h)), inplace=True)


def average_pool(h):
    """Mean of each 3x3 window, at the border of those pixels that exist."""
    return F.avg_pool2d(h, 3, 1, 1, count_include_pad=False)


def maximum_pool(h):
    """Maximum of each 3x3 window."""
    return F.max_pool2d(h, 3, 1, 1)


class BlockA(nn.Module):
    """Mixed_5b to 5d: 1x1, 5x5 and two 3x3 convolutions, and the average, side by side."""

    def __init__(self, channels, pool_width):
        super().__init__()
        self.branch1x1 = Conv(channels, 64)
        self.branch5x5_1 = Conv(channels, 48)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(channels, 64)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(channels, pool_width)

    def forward(self, h):
        one = self.branch1x1(h)                                                # (B, 64, 35, 35)
        five = self.branch5x5_2(self.branch5x5_1(h))                           # (B, 64, 35, 35)
        three = self.branch3x3dbl_2(self.branch3x3dbl_1(h))                    # (B, 96, 35, 35)
        three = self.branch3x3dbl_3(three)
        pool = self.branch_pool(average_pool(h))                               # (B, 32|64, 35, 35)
        return torch.cat((one, five, three, pool), 1)                          # (B, 256|288, ...)


class BlockB(nn.Module):
    """Mixed_6a: halves the map and widens it from 288 to 768 channels."""

    def __init__(self):
        super().__init__()
        self.branch3x3 = Conv(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(288, 64)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, h):
        three = self.branch3x3dbl_2(self.branch3x3dbl_1(h))                    # (B, 96, 35, 35)
        three = self.branch3x3dbl_3(three)                                     # (B, 96, 17, 17)
        return torch.cat((self.branch3x3(h), three, F.max_pool2d(h, 3, 2)), 1)  # (B, 768, 17, 17)


class BlockC(nn.Module):
    """Mixed_6b to 6e: 7x7 convolutions, each as a row of 7 and a column of 7."""

    def __init__(self, width):
        super().__init__()
        row = {"kernel": (1, 7), "padding": (0, 3)}
        column = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Conv(768, 192)
        self.branch7x7_1 = Conv(768, width)
        self.branch7x7_2 = Conv(width, width, **row)
        self.branch7x7_3 = Conv(width, 192, **column)
        self.branch7x7dbl_1 = Conv(768, width)
        self.branch7x7dbl_2 = Conv(width, width, **column)
        self.branch7x7dbl_3 = Conv(width, width, **row)
        self.branch7x7dbl_4 = Conv(width, width, **column)
        self.branch7x7dbl_5 = Conv(width, 192, **row)
        self.branch_pool = Conv(768, 192)

    def forward(self, h):
        one = self.branch1x1(h)                                                # (B, 192, 17, 17)
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(h)))        # (B, 192, 17, 17)
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(h)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))                # (B, 192, 17, 17)
        pool = self.branch_pool(average_pool(h))                               # (B, 192, 17, 17)
        return torch.cat((one, seven, twice, pool), 1)                         # (B, 768, 17, 17)


class BlockD(nn.Module):
    """Mixed_7a: halves the map and widens it from 768 to 1,280 channels."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = Conv(768, 192)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, h):
        three = self.branch3x3_2(self.branch3x3_1(h))                          # (B, 320, 8, 8)
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(h)))
        seven = self.branch7x7x3_4(seven)                                      # (B, 192, 8, 8)
        return torch.cat((three, seven, F.max_pool2d(h, 3, 2)), 1)             # (B, 1280, 8, 8)


class BlockE(nn.Module):
    """Mixed_7b and 7c: branches that end in a row and a column of 3, side by side.

    pool: the average in 7b and the maximum in 7c, as in the published graph.
    """

    def __init__(self, channels, pool):
        super().__init__()
        row = {"kernel": (1, 3), "padding": (0, 1)}
        column = {"kernel": (3, 1), "padding": (1, 0)}
        self.pool = pool
        self.branch1x1 = Conv(channels, 320)
        self.branch3x3_1 = Conv(channels, 384)
        self.branch3x3_2a = Conv(384, 384, **row)
        self.branch3x3_2b = Conv(384, 384, **column)
        self.branch3x3dbl_1 = Conv(channels, 448)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, **row)
        self.branch3x3dbl_3b = Conv(384, 384, **column)
        self.branch_pool = Conv(channels, 192)

    def forward(self, h):
        three = self.branch3x3_1(h)                                            # (B, 384, 8, 8)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(h))                    # (B, 384, 8, 8)
        return torch.cat((
            self.branch1x1(h),                                                 # (B, 320, 8, 8)
            self.branch3x3_2a(three), self.branch3x3_2b(three),                # (B, 384, 8, 8) each
            self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice),          # (B, 384, 8, 8) each
            self.branch_pool(self.pool(h)),                                    # (B, 192, 8, 8)
        ), 1)                                                                  # (B, 2048, 8, 8)
