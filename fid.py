"""Compute the Frechet inception distance (FID) and the inception score, network included.

    images (B,3,H,W) ──InceptionV3──► features (B,2048), logits (B,1008)
    features (N,D) of either set ──moments──► mu (D,), sigma (D,D) ──frechet_distance──► FID
    logits (N,1008) ──inception_score──► mean, std over splits

Scores are comparable only between programs that run the same network: here TensorFlow's Inception
v3 of 2015 in pytorch-fid's conversion. torchvision's has other classes, pools and last block. The
distance falls as n grows. This is bias, not quality, and it is large below D = 2048 images.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from weight_files import read_weights

FILE = "pt_inception-2015-12-05-6726825d.pth"
SIZE = 299                                                 # pixels a side that the network sees


class InceptionV3(nn.Module):
    """Map images (B,3,H,W) in [-1,1] to features (B,2048) and logits (B,1008), both float32.

    weights: the folder of the published file (see `find_weights`), or a float32 state dict. Frozen,
    in eval mode, in float32 also under autocast. UserError: the file is missing or another one.
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
        """Stay in eval mode, because a parent's `.train()` must not change a frozen network."""
        return super().train(False)

    def forward(self, images):
        """Compute features and logits of images as they are, neither clamped nor rounded.

        The resize is bilinear without antialiasing, as in pytorch-fid. The logits lack `fc.bias`,
        as in the original inception score, torch-fidelity and torchmetrics.
        """
        with torch.autocast(images.device.type, enabled=False):
            h = F.interpolate(images.float(), size=(SIZE, SIZE), mode="bilinear",
                              align_corners=False)                             # (B, 3, 299, 299)
            features = self._map(h).mean((2, 3))                               # (B, 2048)
            return features, features @ self.fc.weight.T                       # (B, 1008)

    def _map(self, h):
        h = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(h)))      # (B, 64, 147, 147)
        h = F.max_pool2d(h, 3, 2)                                              # (B, 64, 73, 73)
        h = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(h))                          # (B, 192, 71, 71)
        h = F.max_pool2d(h, 3, 2)                                              # (B, 192, 35, 35)
        h = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(h)))                     # (B, 288, 35, 35)
        h = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(h)))                     # (B, 768, 17, 17)
        h = self.Mixed_6e(self.Mixed_6d(h))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(h)))                  # (B, 2048, 8, 8)


class Conv(nn.Module):
    """Apply a convolution without bias, batch normalisation by stored statistics, and ReLU."""

    def __init__(self, channels, width, kernel=1, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, h):
        return F.relu(self.bn(self.conv(h)), inplace=True)


# Pool each 3x3 window; at the border the average is over the pixels that exist.
average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)


class BlockA(nn.Module):
    """Concatenate 1x1, 5x5, two 3x3 convolutions and the average pool: Mixed_5b to 5d."""

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
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(h)))   # (B, 96, ...)
        pool = self.branch_pool(average_pool(h))                               # (B, 32|64, 35, 35)
        return torch.cat((one, five, three, pool), 1)                          # (B, 256|288, ...)


class BlockB(nn.Module):
    """Halve the map and widen it from 288 to 768 channels: Mixed_6a."""

    def __init__(self):
        super().__init__()
        self.branch3x3 = Conv(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(288, 64)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, h):
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(h)))   # (B, 96, 17, 17)
        return torch.cat((self.branch3x3(h), three, F.max_pool2d(h, 3, 2)), 1)  # (B, 768, 17, 17)


class BlockC(nn.Module):
    """Factor 7x7 convolutions into rows and columns of 7: Mixed_6b to 6e."""

    def __init__(self, width):
        super().__init__()
        row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
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
    """Halve the map and widen it from 768 to 1,280 channels: Mixed_7a."""

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
    """End branches in a row and a column of 3: Mixed_7b, 7c. pool: average or maximum."""

    def __init__(self, channels, pool):
        super().__init__()
        row, column = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
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


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Compute the squared Frechet distance of two Gaussians N(mu, sigma), a float >= 0.

        |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2))

    mu (D,), sigma (D,D). With R = sigma1^(1/2), the symmetric R sigma2 R has the eigenvalues of
    sigma1 sigma2, and the last trace is the sum of their roots. Source: Heusel et al., arXiv
    1706.08500. Raises ValueError for other shapes and for values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    shapes = [a.shape for a in (mu1, sigma1, mu2, sigma2)]
    if mu1.ndim != 1 or shapes != 2 * [mu1.shape, 2 * mu1.shape]:
        raise ValueError(f"mu and sigma {shapes}: expected (D,), (D, D), (D,), (D, D)")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("mu or sigma is not finite: there is no distance")
    values, vectors = np.linalg.eigh(sigma1)
    R = vectors * np.sqrt(values.clip(0)) @ vectors.T                          # (D, D)
    root = np.sqrt(np.linalg.eigvalsh(R @ sigma2 @ R).clip(0)).sum()
    means = np.square(mu1 - mu2).sum()
    return max(float(means + sigma1.trace() + sigma2.trace() - 2 * root), 0.0)


def moments(features):
    """Compute mean (D,) and unbiased covariance (D,D) of features (N,D), numpy float64.

    Raises ValueError for other shapes and for fewer than 2 features.
    """
    rows = np.asarray(features, np.float64)                                    # (N, D)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"features {rows.shape}: expected (N, D), N at least 2")
    mu = rows.mean(0)                                                          # (D,)
    rows = rows - mu
    return mu, rows.T @ rows / (len(rows) - 1)


def inception_score(logits, splits=10):
    """Compute the inception score of logits (N,classes): (mean, std) over equal random splits.

    With p the softmax of an image's logits, a split scores

        exp(mean KL(p || mean p)) = exp(H(mean p) - mean H(p)),   H(p) = -sum p log p.

    A split of images that are sorted by class has few classes, hence a far too low score. So the
    images are first put in torch-fidelity's order, a permutation by a fixed seed, the same for each
    N. With fewer images than splits, each image is a split; std is the population's. Source:
    Salimans et al., arXiv 1606.03498. ValueError: no images, not finite values.  deviation D53
    """
    p, entropy = logits.detach().cpu().double().softmax(1), torch.special.entr
    n, splits = len(p), min(splits, len(p))
    if splits < 1:
        raise ValueError(f"{n} images, {splits} splits: there is nothing to score")
    p = p[np.random.RandomState(2020).permutation(n)]      # its stream is the same in every numpy
    parts = [p[s * n // splits:(s + 1) * n // splits] for s in range(splits)]
    scores = torch.stack([(entropy(part.mean(0)).sum() - entropy(part).sum(1).mean()).exp()
                          for part in parts])                                  # (splits,)
    if not scores.isfinite().all():
        raise ValueError("logits hold values that are not finite: there is no score")
    return scores.mean().item(), scores.std(correction=0).item()
