"""Make a latent of the encoder's output: quantise its vectors, or read it as a Gaussian.

AVQ Sec. 3.1 replaces each encoder vector by its nearest code (Eq. 1) and trains both by Eq. 2.
Appendix B keeps the vectors continuous and pulls them towards N(0, 1) (Eq. 10).

    z_e (B,d,h,w) --nearest_code--> indices (B,h,w) --embedding--> z_q (B,d,h,w)   VectorQuantizer
    moments (B,2d,h,w) --> mean, logvar --> z (B,d,h,w)                            DiagonalGaussian
    counts (K) of a split's indices --> usage, perplexity                          code_statistics
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

MAX_SCORES = 2**21       # scores held at once, 8 MiB in float32, so that memory stays bounded


@torch.compiler.disable
@torch.no_grad()
def nearest_code(z, codebook):
    """Compute argmin_k |z - e_k|² over the codes e_k for each row of z. [AVQ Eq. 1] [DDM Eq. 12]

    z: (N,d), codebook: (K,d), of any float type. Returns (N,) int64, without an autograd graph.
    |z - e|² is |z|² - 2 z·e + |e|². The same |z|² for every code is left out, because a large
    common number costs float32 its last digits. The codes are centred for the same reason, on their
    median, which a few far codes hardly move. Rounding decides between codes whose distances agree
    to a millionth of their squared spread. Of equal scores the lowest index wins.  deviation D22
    """
    dtype = torch.promote_types(torch.promote_types(z.dtype, codebook.dtype), torch.float32)
    # Autocast, TF32 and oneDNN's bf16 would each round the scores and change indices.
    with torch.autocast(z.device.type, enabled=False), exact_float32():
        centre = codebook.to(dtype).median(0).values                        # (d)
        codes = codebook - centre                                           # (K, d)
        square = codes.square().sum(1)                                      # (K)
        nearest = []
        for part in z.split(max(1, MAX_SCORES // len(codes))):              # (n, d)
            scores = torch.addmm(square, part - centre, codes.T, alpha=-2)  # |e|² - 2 z·e, (n, K)
            nearest.append(scores.argmin(1))
        return torch.cat(nearest)                                           # (N)


class VectorQuantizer(nn.Module):
    """Replace each vector by its nearest code. [AVQ Eq. 1] [AVQ Eq. 2] [DDM Eq. 14]

    Straight through: argmin has no gradient, so z_q's gradient is handed to z_e unchanged. Stages
    with a frozen encoder do not use it; the decoder stage even encodes under no_grad.
    K: codebook size; d: width of a code; beta: commitment weight, on the encoder's term.
    legacy_beta: put beta on the codebook's term instead, as the public weights were trained. The
    loss keeps its value; the encoder's gradient has weight 1 and the codes' beta.  deviation D3
    code_range: codes start uniform in ±code_range. None is taming's 1/K, from which a short run
    comes to use a few codes only.  deviation D26
    """

    def __init__(self, K, d, beta=0.25, legacy_beta=False, code_range=None):
        super().__init__()
        self.K, self.d, self.beta, self.legacy_beta = K, d, beta, legacy_beta
        self.embedding = nn.Embedding(K, d)
        nn.init.uniform_(self.embedding.weight, -(code_range or 1 / K), code_range or 1 / K)

    def forward(self, z_e):
        """Quantise z_e (B,d,h,w): z_q (B,d,h,w), indices (B,h,w), loss (0-d, mean over elements).

        z_q has the codes' values, bit for bit, and passes its gradient to z_e. All in float32.
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
        # Straight through: dz_q/dz_e = 1. The bracket is exactly 0, so z_q keeps the codes' values.
        z_q = z_q.detach() + (z_e - z_e.detach())
        return z_q, indices, loss

    def lookup(self, indices):
        """Look up the codes of indices (B,h,w) in [0,K): z_q (B,d,h,w)."""
        return self.embedding(indices).permute(0, 3, 1, 2).contiguous()     # (B, d, h, w)


class DiagonalGaussian:
    """Read moments (B,2d,h,w) as q(z|x) = N(mean, exp(logvar)). [AVQ Eq. 10] [AVQ App. B]"""

    def __init__(self, moments):
        self.mean, logvar = moments.float().chunk(2, dim=1)                 # (B, d, h, w) each
        self.logvar = logvar.clamp(-30.0, 20.0)                   # latent-diffusion's range

    @torch.compiler.disable          # a compiled graph cannot hold a generator's state
    def sample(self, generator=None):
        """Draw mean + std · noise, (B,d,h,w). The noise is drawn on the CPU for every device.

        generator: None, one CPU torch.Generator, or a list of one per image.
        """
        if isinstance(generator, list):
            pairs = zip(self.mean, generator, strict=True)
            noise = torch.stack([torch.randn(mean.shape, generator=each) for mean, each in pairs])
        else:
            noise = torch.randn(self.mean.shape, generator=generator)       # (B, d, h, w)
        return self.mean + (0.5 * self.logvar).exp() * noise.to(self.mean.device)

    def mode(self):
        """Give the mean, (B,d,h,w), as evaluation uses it."""
        return self.mean

    def kl(self):
        """Compute KL(q || N(0, 1)) in nats, summed over d, h and w: (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - self.logvar - 1).sum((1, 2, 3))


def code_statistics(counts):
    """Compute {"K", "usage", "perplexity"} of the counts (K,) of a whole split. [DDM Tab. 1]

    usage: fraction of codes that occur. perplexity: exp(entropy in nats) of their frequencies,
    from 1 (one code only) to K (all equally often). [DDM Sec. 4.2]  deviation D44
    """
    frequency = counts.double() / counts.sum()                              # (K)
    return {"K": len(counts), "usage": (counts > 0).double().mean().item(),
            "perplexity": torch.special.entr(frequency).sum().exp().item()}


def float64(x):
    """Convert a tensor to float64, on the CPU where its device has none (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


@contextmanager
def exact_float32():
    """Switch off TF32 and oneDNN's bf16 products in the block: they round to 10 and 7 bits."""
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision
