"""The two latents of the first stage: a vector quantiser and a diagonal Gaussian.

AVQ Sec. 3.1 quantises each encoder vector to its nearest codebook entry (Eq. 1) and trains codebook and encoder by
Eq. 2; Appendix B keeps the vectors continuous and pulls them towards N(0, 1) instead (Eq. 10).

    z_e (B,d,h,w) --nearest_code--> indices (B,h,w) --embedding--> z_q (B,d,h,w)      VectorQuantizer
    moments (B,2d,h,w) --> mean, logvar --> z (B,d,h,w)                               DiagonalGaussian

The encoder and decoder around them are in vqgan.py; the codebook's repair (ReFiT) is a stage of its own.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

MAX_SCORES = 2**23  # scores held at once: 32 MiB in float32, which is what keeps a large K affordable


@contextmanager
def _full_float32(device_type):
    """Neither autocast nor TF32 (nor oneDNN's bf16) inside: each of them moves the argmin."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.compiler.disable
@torch.no_grad()
def nearest_code(z, codebook, chunk=1024):
    """Index of the codebook row nearest to each row of z; the lowest index on ties. [AVQ Eq. 1]

    z: (N,d); codebook: (K,d), any float dtype. Returns (N,) int64, without an autograd graph.
    At most `chunk` rows are scored at once, fewer where K is large.

    |z - e|² = |z|² - 2 z·e + |e|², and |z|² is the same for every code: left out, it cannot eat the mantissa. Codes
    are centred first for the same reason. Rows whose two best scores are closer than float32 can tell are scored again
    in float64, so the answer is float64's.
    """
    with _full_float32(z.device.type):
        centre = codebook.float().mean(0)                                                   # (d)
        z, codes = z.float(), codebook.float() - centre                                     # (N,d), (K,d)
        K, d = codes.shape
        square = codes.square().sum(1)                                                      # (K)
        radius = square.max().sqrt()
        indices = torch.empty(len(z), dtype=torch.int64, device=z.device)                   # (N)
        rows = max(1, min(chunk, MAX_SCORES // K))
        for start in range(0, len(z), rows):
            part = z[start:start + rows] - centre                                           # (n,d)
            scores = torch.addmm(square, part, codes.T, alpha=-2)                           # (n,K)
            best, index = scores.min(1)                                                     # (n), (n)
            runner_up = scores.scatter_(1, index[:, None], torch.inf).amin(1)               # (n)
            del scores
            # The rounding error of a d-term dot product is below d eps |z||e|.
            margin = 2 * d * torch.finfo(torch.float32).eps * radius * (radius + 2 * part.norm(dim=1))
            close = (runner_up - best <= margin).nonzero()[:, 0]                            # (c)
            if len(close):
                index[close] = _nearest_in_float64(part[close], codes)
            indices[start:start + rows] = index
    return indices


def _nearest_in_float64(z, codes):
    """The same search in float64 (float32 on devices without it), a few rows at a time."""
    exact = torch.float32 if z.device.type == "mps" else torch.float64
    z, codes = z.to(exact), codes.to(exact)
    square = codes.square().sum(1)                                                          # (K)
    rows = max(1, MAX_SCORES // 8 // len(codes))
    parts = [torch.addmm(square, part, codes.T, alpha=-2).argmin(1) for part in z.split(rows)]
    return torch.cat(parts)                                                                 # (c)


class VectorQuantizer(nn.Module):
    """Nearest-neighbour quantisation with a straight-through gradient. [AVQ Eq. 1] [AVQ Eq. 2]

    K: codebook size; d: width of a code; beta: commitment weight, on the encoder's term.
    legacy_beta: taming-transformers' order, beta on the codebook's term instead; the public weights were trained with
    it. Both orders have the same loss value up to their weights and differ in the gradients.  # deviation D3
    """

    def __init__(self, K, d, beta=0.25, legacy_beta=False):
        super().__init__()
        self.K, self.d, self.beta, self.legacy_beta = K, d, beta, legacy_beta
        self.embedding = nn.Embedding(K, d)
        nn.init.uniform_(self.embedding.weight, -1 / K, 1 / K)

    def forward(self, z_e):
        """z_e (B,d,h,w) -> z_q (B,d,h,w), indices (B,h,w), loss (scalar, mean over all elements).

        z_q carries the codes' values and z_e's gradient.
        """
        B, d, h, w = z_e.shape
        z_e = z_e.float()
        flat = z_e.permute(0, 2, 3, 1).reshape(-1, d)                                       # (B·h·w,d)
        indices = nearest_code(flat, self.embedding.weight).view(B, h, w)                   # (B,h,w)
        z_q = self.lookup(indices)                                                          # (B,d,h,w)

        codebook_term = F.mse_loss(z_q, z_e.detach())             # moves the codes to the encoder's outputs
        commitment_term = F.mse_loss(z_e, z_q.detach())           # moves the encoder's outputs to the codes
        if self.legacy_beta:
            loss = self.beta * codebook_term + commitment_term
        else:
            loss = codebook_term + self.beta * commitment_term
        z_q = z_e + (z_q - z_e).detach()                          # straight through: dz_q/dz_e = 1
        return z_q, indices, loss

    def lookup(self, indices):
        """The codes' vectors: indices (B,h,w) in [0,K) -> z_q (B,d,h,w)."""
        return self.embedding(indices).permute(0, 3, 1, 2).contiguous()


class DiagonalGaussian:
    """q(z|x) = N(mean, exp(logvar)) for each latent element, from moments (B,2d,h,w). [AVQ Eq. 10]"""

    def __init__(self, moments):
        self.mean, logvar = moments.float().chunk(2, dim=1)                                 # (B,d,h,w) each
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, generator=None):
        """mean + std · noise, (B,d,h,w). generator: None, one CPU torch.Generator, or a list with one for each image.

        The noise is drawn on the CPU, so it does not depend on the device, and with one generator an image, neither on
        the batch.
        """
        if isinstance(generator, (list, tuple)):
            noise = torch.stack([torch.randn(self.mean.shape[1:], generator=g) for g in generator])
        else:
            noise = torch.randn(self.mean.shape, generator=generator)
        return self.mean + (0.5 * self.logvar).exp() * noise.to(self.mean.device)           # (B,d,h,w)

    def mode(self):
        """The mean, (B,d,h,w): what evaluation uses."""
        return self.mean

    def kl(self):
        """KL(q || N(0, 1)) in nats, summed over d,h,w: (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - self.logvar - 1).sum((1, 2, 3))


def codebook_usage(indices, K):
    """Fraction of the K codes that occur in `indices` (any shape); meant for a whole split, not for a batch."""
    return (torch.bincount(indices.flatten(), minlength=K) > 0).double().mean().item()


def perplexity(indices, K):
    """exp(entropy) of the codes' frequencies in `indices` (any shape): 1 = collapsed, K = uniform."""
    frequency = torch.bincount(indices.flatten(), minlength=K).double() / indices.numel()  # (K)
    return torch.special.entr(frequency).sum().exp().item()
