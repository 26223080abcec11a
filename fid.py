"""Compute the Frechet inception distance (FID) and the inception score, network included.

    images (B,3,H,W) ──InceptionV3──► features (B,2048), logits (B,1008)
    features (N,D) of either set ──moments──► mu (D,), sigma (D,D) ──frechet_distance──► FID
    logits (N,1008) ──inception_score──► mean, std over splits

Scores are comparable only between programs that run the same network: here TensorFlow's Inception
v3 of 2015 in pytorch-fid's conversion. torchvision's has other classes, pools and last block. The
distance falls as n grows. This is bias, not quality, and it is large below D = 2048 images.
"""

from collections import OrderedDict
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
            self.Conv2d_1a_3x3 = conv(3, 32, 3, stride=2)
            self.Conv2d_2a_3x3 = conv(32, 32, 3)
            self.Conv2d_2b_3x3 = conv(32, 64, 3, padding=1)
            self.Conv2d_3b_1x1 = conv(64, 80, 1)
            self.Conv2d_4a_3x3 = conv(80, 192, 3)
            for name, (channels, pool, branches) in BLOCKS.items():
                self.add_module(name, Block(channels, pool, branches))
            self.fc = nn.Linear(2048, 1008)
        if not isinstance(weights, dict):
            weights = read_weights(FILE, self.state_dict(), weights)
        self.load_state_dict(weights, assign=True)
        self.requires_grad_(False).eval()

    def forward(self, images):
        """Compute features and logits of images as they are, neither clamped nor rounded.

        The resize is bilinear without antialiasing, as in pytorch-fid. The logits lack `fc.bias`,
        as in the original inception score, torch-fidelity and torchmetrics.
        """
        with torch.autocast(images.device.type, enabled=False):
            h = F.interpolate(images.float(), SIZE, mode="bilinear")           # (B, 3, 299, 299)
            features = self._map(h).mean((2, 3))                               # (B, 2048)
            return features, features @ self.fc.weight.T                       # (B, 1008)

    def _map(self, h):
        h = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(h)))      # (B, 64, 147, 147)
        h = F.max_pool2d(h, 3, 2)                                              # (B, 64, 73, 73)
        h = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(h))                          # (B, 192, 71, 71)
        h = F.max_pool2d(h, 3, 2)                                              # (B, 192, 35, 35)
        for name in BLOCKS:
            h = self.get_submodule(name)(h)
        return h                                                               # (B, 2048, 8, 8)


def conv(channels, width, kernel, stride=1, padding=0):
    """Build a convolution without bias, batch normalisation by stored statistics, and ReLU."""
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(channels, width, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(width, eps=0.001), relu=nn.ReLU(inplace=True)))


class Block(nn.Module):
    """Concatenate branches of convolutions and a pool, which "branch_pool" begins with.

    branches: {name: steps}; a step is (width, kernel), or (width, kernel, kernel) for two side by
    side. Without "branch_pool", the pool and the last step of each branch halve the map.
    """

    def __init__(self, channels, pool, branches):
        super().__init__()
        self.pool, self.chains = pool, {}                # {branch: the names of each step}
        self.halves = "branch_pool" not in branches
        for branch, steps in branches.items():
            inputs, self.chains[branch] = channels, []
            for n, (width, *kernels) in enumerate(steps, 1):
                numbered = branch if len(steps) == 1 else f"{branch}_{n}"   # branch5x5_1
                names = [numbered + side for side in ("ab" if len(kernels) > 1 else [""])]
                stride, padding = (2, 0) if self.halves and n == len(steps) else (1, "same")
                for name, kernel in zip(names, kernels):
                    self.add_module(name, conv(inputs, width, kernel, stride, padding))
                self.chains[branch].append(names)
                inputs = width

    def forward(self, h):
        pooled, outputs = self.pool(h), []
        for branch, (*first, last) in self.chains.items():
            out = pooled if branch == "branch_pool" else h
            for (name,) in first:
                out = getattr(self, name)(out)
            outputs += [getattr(self, name)(out) for name in last]
        return torch.cat([*outputs, pooled] if self.halves else outputs, 1)


# Pool each 3x3 window; at the border the average is over the pixels that exist.
AVERAGE = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
MAXIMUM = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
HALVING = partial(F.max_pool2d, kernel_size=3, stride=2)
ROW, COLUMN = (1, 7), (7, 1)


def _block_a(pool_width):
    return {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)],
            "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": [(pool_width, 1)]}


def _block_c(width):
    row, column = (width, ROW), (width, COLUMN)
    return {"branch1x1": [(192, 1)], "branch7x7": [(width, 1), row, (192, COLUMN)],
            "branch7x7dbl": [(width, 1), column, row, column, (192, ROW)],
            "branch_pool": [(192, 1)]}


_BLOCK_E = {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), (384, (1, 3), (3, 1))],
            "branch3x3dbl": [(448, 1), (384, 3), (384, (1, 3), (3, 1))],
            "branch_pool": [(192, 1)]}
BLOCKS = {                                       # {name: (input channels, pool, branches)}
    "Mixed_5b": (192, AVERAGE, _block_a(32)),
    "Mixed_5c": (256, AVERAGE, _block_a(64)),
    "Mixed_5d": (288, AVERAGE, _block_a(64)),                                  # (B, 288, 35, 35)
    "Mixed_6a": (288, HALVING, {"branch3x3": [(384, 3)],
                                "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}),
    "Mixed_6b": (768, AVERAGE, _block_c(128)),
    "Mixed_6c": (768, AVERAGE, _block_c(160)),
    "Mixed_6d": (768, AVERAGE, _block_c(160)),
    "Mixed_6e": (768, AVERAGE, _block_c(192)),                                 # (B, 768, 17, 17)
    "Mixed_7a": (768, HALVING, {"branch3x3": [(192, 1), (320, 3)],
                                "branch7x7x3": [(192, 1), (192, ROW), (192, COLUMN), (192, 3)]}),
    "Mixed_7b": (1280, AVERAGE, _BLOCK_E),
    "Mixed_7c": (2048, MAXIMUM, _BLOCK_E),                                     # (B, 2048, 8, 8)
}


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Compute the squared Frechet distance of two Gaussians N(mu, sigma), a float >= 0.

        |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2))

    mu (D,), sigma (D,D). With R = sigma1^(1/2), the symmetric R sigma2 R has the eigenvalues of
    sigma1 sigma2, and the last trace is the sum of their roots. Source: Heusel et al., arXiv
    1706.08500.
    """
    values, vectors = np.linalg.eigh(sigma1)
    R = vectors * np.sqrt(values.clip(0)) @ vectors.T                          # (D, D)
    root = np.sqrt(np.linalg.eigvalsh(R @ sigma2 @ R).clip(0)).sum()
    means = np.square(mu1 - mu2).sum()
    return max(float(means + sigma1.trace() + sigma2.trace() - 2 * root), 0.0)


def moments(features):
    """Compute mean (D,) and unbiased covariance (D,D) of features (N,D), numpy float64."""
    rows = np.asarray(features, np.float64)                                    # (N, D)
    return rows.mean(0), np.cov(rows, rowvar=False)                            # (D,), (D, D)


def inception_score(logits, splits=10):
    """Compute the inception score of logits (N,classes): (mean, std) over equal random splits.

    With p the softmax of an image's logits, a split scores

        exp(mean KL(p || mean p)) = exp(H(mean p) - mean H(p)),   H(p) = -sum p log p.

    A split of images that are sorted by class has few classes, hence a far too low score. So the
    images are first put in torch-fidelity's order, a permutation by a fixed seed, the same for each
    N. With fewer images than splits, each image is a split; std is the population's. Source:
    Salimans et al., arXiv 1606.03498.  deviation D53
    """
    p, entropy = logits.detach().cpu().double().softmax(1), torch.special.entr
    n, splits = len(p), min(splits, len(p))
    p = p[np.random.RandomState(2020).permutation(n)]      # its stream is the same in every numpy
    parts = [p[s * n // splits:(s + 1) * n // splits] for s in range(splits)]
    scores = torch.stack([(entropy(part.mean(0)).sum() - entropy(part).sum(1).mean()).exp()
                          for part in parts])                                  # (splits,)
    return scores.mean().item(), scores.std(correction=0).item()
