"""Frechet inception distance and inception score, from the features and logits of inception.py.

Both read like their formulas, in float64 on the CPU. Images come in batches, on several processes,
and none of them is kept:

    features (B,D) ──FeatureStatistics──► n, mu (D,), sigma (D,D) ──┐
    features of the other images ──────► n, mu, sigma ──────────────┴─frechet──► distance
    logits (B,1008), positions (B,) ──InceptionScore──► mean, std over splits

How many images there are belongs to every such number: the distance falls as n grows, which is
bias, not quality, and below D = 2048 images it is large. Not here: the network, which images form a
group, other distances.
"""

import zipfile

import numpy as np
import torch
from scipy.linalg import lapack

from distributed import UserError

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
