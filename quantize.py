"""The two latents of the first stage: a vector quantiser and a diagonal Gaussian.

AVQ Sec. 3.1 quantises each encoder vector to its nearest codebook entry (Eq. 1) and trains codebook
and encoder by Eq. 2; Appendix B keeps the vectors continuous and pulls them towards N(0, 1) instead
(Eq. 10).

    z_e (B,d,h,w) --nearest_code--> indices (B,h,w) --embedding--> z_q (B,d,h,w)   VectorQuantizer
    moments (B,2d,h,w) --> mean, logvar --> z (B,d,h,w)                            DiagonalGaussian

Not here: the encoder and decoder around them (vqgan.py); the codebook's repair, ReFiT, which is a
stage of its own.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

MAX_SCORES = 2**23       # held at once, 32 MiB in float32: what keeps a large codebook affordable


@contextmanager
def _plain_float32(device_type):
    """Neither autocast nor TF32 nor oneDNN's bf16 inside: each of them moves the argmin."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


@torch.compiler.disable
@torch.no_grad()
def nearest_code(z, codebook, chunk=1024):
    """Index of the codebook row nearest to each row of z, the lowest on ties. [AVQ Eq. 1]

    z: (N,d), codebook: (K,d), of any float type. Returns (N,) int64, without an autograd graph.
    At most `chunk` rows are scored at once, fewer where K is large.

    |z - e|² = |z|² - 2 z·e + |e|², and |z|² is the same for every code: left out, it cannot eat the
    mantissa; codes are centred for the same reason. Where float32 cannot tell the two best scores
    apart, float64 decides, so the answer is float64's.  deviation D22
    """
    with _plain_float32(z.device.type):
        indices, undecided = _nearest_in_float32(z, codebook, chunk)        # (N), (N)
        rows = undecided.nonzero()[:, 0]                                    # (c)
        if len(rows):
            indices[rows] = _nearest_in_float64(z[rows], codebook)
    return indices


def _nearest_in_float32(z, codebook, chunk):
    """indices (N,) int64 and undecided (N,) bool: where the runner-up is within rounding error."""
    K, d = codebook.shape
    centre = codebook.mean(0, dtype=torch.promote_types(codebook.dtype, torch.float32))
    codes = (codebook - centre).float()
    square = torch.linalg.vector_norm(codes, dim=1).square()                # (K)
    radius = square.max().sqrt()
    indices = torch.empty(len(z), dtype=torch.int64, device=z.device)
    undecided = torch.empty(len(z), dtype=torch.bool, device=z.device)
    rows = max(1, min(chunk, MAX_SCORES // K, len(z)))
    buffer = square.new_empty(rows, K)       # one for all chunks: it stays in the cache
    for start in range(0, len(z), rows):
        part = (z[start:start + rows] - centre).float()                     # (n, d)
        scores = buffer[:len(part)]                                         # (n, K)
        torch.addmm(square, part, codes.T, alpha=-2, out=scores)
        best, index = scores.min(1)                                         # (n), (n)
        runner_up = scores.scatter_(1, index[:, None], torch.inf).amin(1)   # (n)
        # A score's rounding error is below (d + 8) eps/2 (|e|² + 2|z||e|), centring included;
        # twice that may stand between two scores.
        bound = (d + 8) * torch.finfo(torch.float32).eps * radius
        margin = bound * (radius + 2 * part.norm(dim=1))                    # (n)
        indices[start:start + rows] = index
        undecided[start:start + rows] = runner_up - best <= margin
    return indices, undecided


def _nearest_in_float64(z, codebook):
    """The definition itself, in float64: z (c,d), codebook (K,d) -> (c,)."""
    device = "cpu" if z.device.type == "mps" else z.device       # MPS has no float64
    codes = codebook.to(device, torch.float64)
    rows = max(1, MAX_SCORES // 8 // len(codes))
    indices = [torch.cdist(part.double(), codes, compute_mode="donot_use_mm_for_euclid_dist")
               .argmin(1) for part in z.to(device).split(rows)]
    return torch.cat(indices).to(z.device)


class VectorQuantizer(nn.Module):
    """Nearest-neighbour quantisation with a straight-through gradient. [AVQ Eq. 1] [AVQ Eq. 2]

    K: codebook size; d: width of a code; beta: commitment weight, on the encoder's term.
    legacy_beta: taming-transformers' order, beta on the codebook's term instead; the public weights
    were trained with it. The gradients differ.  deviation D3
    code_range: codes start uniform in ±code_range; None is taming's 1/K, which a short run leaves
    with a few codes only.  deviation D26
    """

    def __init__(self, K, d, beta=0.25, legacy_beta=False, code_range=None):
        super().__init__()
        self.K, self.d, self.beta, self.legacy_beta = K, d, beta, legacy_beta
        self.embedding = nn.Embedding(K, d)
        code_range = code_range or 1 / K
        nn.init.uniform_(self.embedding.weight, -code_range, code_range)

    def forward(self, z_e):
        """z_e (B,d,h,w) -> z_q (B,d,h,w), indices (B,h,w), loss (scalar, mean over all elements).

        z_q has the codes' values, bit for bit, and z_e's gradient. All in float32.
        """
        B, d, h, w = z_e.shape
        z_e = z_e.float()
        flat = z_e.permute(0, 2, 3, 1).reshape(-1, d)                       # (B·h·w, d)
        indices = nearest_code(flat, self.embedding.weight).view(B, h, w)   # (B, h, w)
        z_q = self.lookup(indices)                                          # (B, d, h, w)

        codebook_term = F.mse_loss(z_q, z_e.detach())        # moves the codes to the outputs
        commitment_term = F.mse_loss(z_e, z_q.detach())      # moves the encoder's outputs to them
        if self.legacy_beta:
            loss = self.beta * codebook_term + commitment_term
        else:
            loss = codebook_term + self.beta * commitment_term
        # Straight through, dz_q/dz_e = 1. In this order the sum adds a zero and rounds nothing.
        z_q = z_q.detach() + (z_e - z_e.detach())
        return z_q, indices, loss

    def lookup(self, indices):
        """The codes' vectors: indices (B,h,w) in [0,K) -> z_q (B,d,h,w)."""
        return self.embedding(indices).permute(0, 3, 1, 2).contiguous()     # (B, d, h, w)


class DiagonalGaussian:
    """q(z|x) = N(mean, exp(logvar)) of each latent element, from moments (B,2d,h,w). [AVQ Eq. 10]

    logvar is clamped to [-30, 20], as in latent-diffusion.
    """

    def __init__(self, moments):
        self.mean, logvar = moments.float().chunk(2, dim=1)                 # (B, d, h, w) each
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, generator=None):
        """mean + std · noise, (B,d,h,w).

        generator: None, one CPU torch.Generator, or a list with one for each image. The noise is
        drawn on the CPU, so it does not depend on the device, and with a list, neither on the
        batch. Raises ValueError for a list of another length.
        """
        noise = _noise(self.mean.shape, generator).to(self.mean.device)     # (B, d, h, w)
        return self.mean + (0.5 * self.logvar).exp() * noise

    def mode(self):
        """The mean, (B,d,h,w): what evaluation uses."""
        return self.mean

    def kl(self):
        """KL(q || N(0, 1)) in nats, summed over d,h,w: (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - self.logvar - 1).sum((1, 2, 3))


@torch.compiler.disable          # a generator's state has no place in a graph
def _noise(shape, generator):
    if not isinstance(generator, list):
        return torch.randn(shape, generator=generator)                      # (B, d, h, w)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} images; give one for each")
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generator])


def codebook_usage(indices, K):
    """Fraction of the K codes that occur in `indices` (any shape); meant for a whole split."""
    return (_counts(indices, K) > 0).double().mean().item()


def perplexity(indices, K):
    """exp(entropy) of the codes' frequencies in `indices`: 1 = collapsed, K = uniform."""
    return torch.special.entr(_counts(indices, K) / indices.numel()).sum().exp().item()


def _counts(indices, K):
    """How often each code occurs: (K,) float64."""
    return torch.bincount(indices.flatten().cpu(), minlength=K).double()
