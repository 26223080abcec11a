"""Frechet inception distance and inception score: the network, and what its answers say.

    images (B,3,H,W) in [-1,1] ──InceptionV3──► features (B,2048), logits (B,1008)
    features (B,D) ──FeatureStatistics──► n, mu (D,), sigma (D,D) ──┐
    features of the other images ──────► n, mu, sigma ──────────────┴─frechet──► distance
    logits (B,1008), positions (B,) ──InceptionScore──► mean, std over splits

Scores are comparable only between programs that run this very network, Inception v3 as TensorFlow
published it in 2015, so it is rebuilt here layer by layer, and reads pytorch-fid's conversion of
its weights. It is not torchvision's network of that name: 1,008 classes instead of
1,000, no auxiliary classifier, average pools that leave out the padding, and a maximum in place of
the average in the very last block.

How many images there are belongs to every such number: the distance falls as n grows, which is
bias, not quality, and below D = 2048 images it is large.
"""

import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import lapack
from torch import nn

from distributed import UserError
from weight_files import read_weights

# ---------------------------------------------------------------- the network

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


# ---------------------------------------------------------------- statistics

BLOCK = 256                                # rows multiplied at once, once there are more than D

# ---------------------------------------------------------------- Frechet distance


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians N(mu, sigma), a float.

        |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2))

    mu (D,), sigma (D,D) symmetric and positive semi-definite, singular or not. With any F for which
    sigma = F^T F, the last trace is the nuclear norm of F1 F2^T (the sum of its singular values):
    no square root of a matrix, nor of a rounding error near 0, is ever taken. Never negative: where
    rounding, about 1e-15 of the traces, would make it so, it is 0. Source: Heusel et al.,
    arXiv 1706.08500. Raises ValueError for other shapes, values that are not finite, and a sigma
    with clearly negative eigenvalues.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    for mu, sigma in ((mu1, sigma1), (mu2, sigma2)):
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
            raise ValueError(f"mu {mu.shape} and sigma {sigma.shape}: expected (D,) and (D, D)")
    return _distance(mu1, _cholesky(sigma1), mu2, _cholesky(sigma2))


def _distance(mu1, F1, mu2, F2):
    """The distance of N(mu1, F1^T F1) and N(mu2, F2^T F2); mu (D,), F (any number of rows, D)."""
    if mu1.shape != mu2.shape:
        raise ValueError(f"features of {len(mu1)} and of {len(mu2)} dimensions: not comparable")
    if not (np.isfinite(mu1).all() and np.isfinite(mu2).all()):
        raise ValueError("features hold values that are not finite: there is no distance")
    means = np.square(mu1 - mu2).sum()
    traces = np.square(F1).sum() + np.square(F2).sum()
    return max(float(means + traces - 2 * np.linalg.norm(F1 @ F2.T, "nuc")), 0.0)


def _cholesky(sigma):
    """F (r,D) with F^T F = sigma (D,D) and r its numerical rank: Cholesky with pivoting.

    It ends where the largest variance left is below D eps of the largest of all, so what a singular
    sigma holds of rounding errors is left out; an eigenvalue's square root would magnify them.
    """
    if not np.isfinite(sigma).all():
        raise ValueError("sigma holds values that are not finite: there is no distance")
    upper, pivots, rank, _ = lapack.dpstrf(sigma)
    F = np.empty((rank, len(sigma)))
    F[:, pivots - 1] = np.triu(upper)[:rank]
    if abs(np.square(F).sum() - sigma.trace()) > 1e-3 * sigma.trace():
        raise ValueError("sigma is not positive semi-definite, hence no covariance")
    return F


class FeatureStatistics:
    """Number, mean and covariance of feature vectors (D = `dim`) that come in any batches.

    n: how many. mu: (D,), sigma: (D,D) unbiased (divided by n - 1); numpy, float64. Any order and
    size of batches and any order of `merge` give the same to rounding, also where the mean is large
    beside the deviation. Up to D vectors are kept as they are, 8 n D bytes; beyond, they become a
    D x D matrix. So the object is small where few images are, and can be pickled.
    """

    def __init__(self, dim):
        self.dim, self.n = dim, 0
        self._rows = []                    # vectors not yet in the matrix: arrays (b, D)
        self._folded, self._mean, self._scatter = 0, 0.0, 0.0  # those in it, sum (x-mean)(x-mean)^T

    def update(self, features):
        """Add `features` (B,D) of any float type and device; B may be 0. ValueError otherwise."""
        self._require_count()
        features = torch.as_tensor(features)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features {tuple(features.shape)}: expected (B, {self.dim})")
        if len(features):
            self._rows.append(features.detach().cpu().to(torch.float64, copy=True).numpy())
            self.n += len(features)
            self._fold_when_many()

    def merge(self, other):
        """Add all that `other` has seen: another process's share, or another file's."""
        self._require_count()
        other._require_count()
        if other.dim != self.dim:
            raise ValueError(f"features of {other.dim} dimensions cannot join {self.dim}")
        self._rows = self._rows + other._rows
        self.n += other.n
        if other._folded:
            self._absorb(other._folded, other._mean, other._scatter)
        self._fold_when_many()

    @property
    def factors(self):
        """The centred features (n,D) while n <= D, else None; None for those from a file, too."""
        rows = self._kept()
        return None if rows is None else rows - rows.sum(0) / max(self.n, 1)

    @property
    def mu(self):
        """Mean (D,). Raises ValueError without any vector."""
        if self.n == 0:
            raise ValueError("no features yet: they have no mean")
        rows = self._kept()
        if rows is not None:
            return rows.mean(0)
        self._fold()
        return self._mean

    @property
    def sigma(self):
        """Unbiased covariance (D,D). Raises ValueError for fewer than 2 vectors."""
        if self.n is None:
            return self._scatter
        if self.n < 2:
            raise ValueError(f"{self.n} feature vectors have no covariance: at least 2 are needed")
        factors = self.factors
        if factors is not None:
            return factors.T @ factors / (self.n - 1)
        self._fold()
        return self._scatter / (self.n - 1)

    def frechet(self, other):
        """Squared Frechet distance to `other` as `frechet_distance` has it, a float >= 0.

        The features themselves serve as factors while there are no more than D. Raises ValueError
        for fewer than 2 vectors, different D, and values that are not finite.
        """
        return _distance(self.mu, self._factor(), other.mu, other._factor())

    def save(self, path):
        """Write mu, sigma and n as pytorch-fid's `.npz`, which has no n and overlooks it."""
        arrays = {"mu": self.mu, "sigma": self.sigma}
        if self.n is not None:
            arrays["n"] = self.n
        with open(path, "wb") as file:     # by name, numpy would add an ending
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path):
        """Statistics from `save` or from pytorch-fid. Raises UserError for any other file.

        pytorch-fid's have n = None: they can be compared, not updated or merged (ValueError).
        """
        try:
            with np.load(path) as file:
                mu, sigma = (np.asarray(file[key], np.float64) for key in ("mu", "sigma"))
                n = int(file["n"]) if "n" in file else None
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: not a file of feature statistics, an .npz with mu and sigma "
                            f"({' '.join(str(error).split())})") from None
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
            raise UserError(f"{path}: mu {mu.shape} and sigma {sigma.shape}, not (D,) and (D, D)")
        statistics = cls(len(mu))
        statistics.n, statistics._folded, statistics._mean = n, n, mu
        statistics._scatter = sigma if n is None else sigma * (n - 1)
        return statistics

    def _factor(self):
        """F (r,D) with F^T F = sigma."""
        factors = self.factors
        if factors is None or self.n < 2:
            return _cholesky(self.sigma)
        return factors / np.sqrt(self.n - 1)

    def _kept(self):
        """All vectors as they came, (n,D), while there are no more than D, else None."""
        if self.n is None or self.n > self.dim or self._folded:
            return None
        return np.concatenate([np.empty((0, self.dim)), *self._rows])

    def _require_count(self):
        if self.n is None:
            raise ValueError("these statistics come from a file that does not say how many images "
                             "they are of: they can be compared, not updated or merged")

    def _fold_when_many(self):
        if self.n > self.dim and sum(map(len, self._rows)) >= BLOCK:
            self._fold()

    def _fold(self):
        """Move the waiting rows into the matrix."""
        if self._rows:
            rows = np.concatenate(self._rows)                                  # (b, D)
            self._rows = []
            mean = rows.mean(0)
            rows -= mean
            self._absorb(len(rows), mean, rows.T @ rows)

    def _absorb(self, n, mean, scatter):
        """Join two groups, each centred on its own mean (Chan, Golub and LeVeque 1979).

        No sum of squares is ever taken from the origin, where a large mean would eat the digits.
        """
        total = self._folded + n
        delta = mean - self._mean
        between = np.outer(delta, delta) * (self._folded * n / total)
        self._scatter = self._scatter + scatter + between                      # (D, D)
        self._mean = self._mean + delta * (n / total)                          # (D,)
        self._folded = total


# ---------------------------------------------------------------- inception score


def inception_score(logits, splits=10):
    """`InceptionScore` of logits (N,classes) that are all there, in their order: (mean, std)."""
    score = InceptionScore(len(logits), splits, logits.shape[1])
    score.update(torch.arange(len(logits)), logits)
    return score.result()


class InceptionScore:
    """Inception score of n images, whose logits come in any batches and any order.

    Image i belongs to the split s with s n // splits <= i < (s + 1) n // splits, and with p the
    softmax of its logits a split scores

        exp(mean KL(p || mean p)) = exp(H(mean p) - mean H(p)),   H(p) = -sum p log p,

    of which only sums are kept. Reported are the mean of all splits and their standard deviation,
    divided by the number of splits. Source: Salimans et al., arXiv 1606.03498, and their program,
    whose logits are without the bias, too. The field's tools differ: torch-fidelity does the same
    after one shuffle (seed 2020) unless told otherwise; torchmetrics shuffles at random, rounds the
    splits' size up and divides by their number less one. A split of m images scores at most m.

    Raises ValueError where there are fewer images than splits.
    """

    def __init__(self, n, splits=10, classes=1008):
        if not 1 <= splits <= n:
            raise ValueError(f"{n} images, {splits} splits: each split needs an image")
        self.n, self.splits = n, splits
        self._seen = torch.zeros(n, dtype=torch.bool)
        self._p = torch.zeros(splits, classes, dtype=torch.float64)            # sum of p
        self._entropy = torch.zeros(splits, dtype=torch.float64)               # sum of H(p)

    def update(self, indices, logits):
        """Add images: indices (B,), their positions 0..n-1, each once; logits (B,classes)."""
        indices = torch.as_tensor(indices, dtype=torch.int64).cpu()
        known = ((indices >= 0) & (indices < self.n)).all()
        if not known or len(indices.unique()) < len(indices) or self._seen[indices].any():
            raise ValueError(f"indices: expected each of 0..{self.n - 1} once")
        p = logits.detach().cpu().double().softmax(1)                          # (B, classes)
        split = self._split(indices)                                           # (B,)
        self._p.index_add_(0, split, p)
        self._entropy.index_add_(0, split, torch.special.entr(p).sum(1))
        self._seen[indices] = True

    def merge(self, other):
        """Add what `other` has seen of the same n images: another process's share."""
        if (other.n, other._p.shape) != (self.n, self._p.shape):
            raise ValueError("scores of other images or splits cannot be merged")
        if (self._seen & other._seen).any():
            raise ValueError("an image is in both of the scores to be merged")
        self._p += other._p
        self._entropy += other._entropy
        self._seen |= other._seen

    def result(self):
        """(mean, std) over splits. ValueError while images are missing or logits are not finite."""
        missing = int((~self._seen).sum())
        if missing:
            raise ValueError(f"{missing} of {self.n} images are missing")
        size = self._split(torch.arange(self.n)).bincount()                    # (splits,)
        q = self._p / size[:, None]                                            # (splits, classes)
        score = (torch.special.entr(q).sum(1) - self._entropy / size).exp()    # (splits,)
        if not score.isfinite().all():
            raise ValueError("logits hold values that are not finite: there is no score")
        return score.mean().item(), score.std(correction=0).item()

    def _split(self, indices):
        # the largest s with s n // splits <= i, that is, with s n < (i + 1) splits
        return ((indices + 1) * self.splits - 1) // self.n
