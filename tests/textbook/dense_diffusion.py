"""The slow, obvious versions: K x K matrices, every map enumerated, the best possible denoiser."""

import itertools

import torch


def matrix(diffusion, s, t):
    """Q_{s+1} ... Q_t as a product of K x K matrices, float64."""
    identity = torch.eye(diffusion.K, dtype=torch.float64)
    product = identity
    for step in range(s + 1, t + 1):
        alpha_t = diffusion.alpha_bar_t[step] / diffusion.alpha_bar_t[step - 1]
        product = product @ (alpha_t * identity + (1 - alpha_t) / diffusion.K)
    return product


def posterior(diffusion, s, t):
    """q(z_s=k|z_t=i,z_0=j) as a table [i,j,k], by Bayes' rule."""
    first, second = matrix(diffusion, 0, s), matrix(diffusion, s, t)      # [j,k], [k,i]
    joint = torch.einsum("jk,ki->ijk", first, second)
    return joint / joint.sum(2, keepdim=True)


def theta(diffusion, x, s, t):
    """N[theta(z_t=i,x)]_k for x (...,i,j): q(z_t=i|z_s=k) (x Q_{0s})_k, normalised: (...,i,k)."""
    product = matrix(diffusion, s, t).T * (x @ matrix(diffusion, 0, s))
    return product / product.sum(-1, keepdim=True)


def mixture(diffusion, x, s, t):
    """D3PM's p(z_s=k|z_t=i): the sum over j of x (...,i,j) q(z_s=k|z_t=i,z_0=j): (...,i,k)."""
    return torch.einsum("...ij,ijk->...ik", x, posterior(diffusion, s, t))


def all_maps(K, D):
    """Every map of D cells: (K^D, D, 1) int64, in the order of a table of shape (K,) * D."""
    return torch.tensor(list(itertools.product(range(K), repeat=D)))[:, :, None]


def map_number(z):
    """Places of maps (B,D,w) with K = 3 in all_maps(3, D), column by column: (B,w)."""
    D = z.shape[1]
    return sum(z[:, d] * 3 ** (D - 1 - d) for d in range(D))


class BestDenoiser:
    """The exact answer for data with a given joint distribution of D cells.

    joint: table (K,) * D. Called with maps (B,D,w), each column a sample of its own, and times (B),
    it gives log p(z_0^d = k | the other cells of the column), or with full=True | all of them.
    """

    def __init__(self, diffusion, joint, full=False):
        self.diffusion, self.full = diffusion, full
        self.joint, self.D = joint.double().flatten(), joint.ndim
        self.maps = all_maps(diffusion.K, self.D)[:, :, 0]                # (K^D, D)

    def __call__(self, z, t):
        K = self.diffusion.K
        abar = self.diffusion.alpha_bar_t[t].view(-1, 1, 1, 1)
        same = (z[:, None] == self.maps[None, :, :, None]).double()       # (B, K^D, D, w)
        likelihood = abar * same + (1 - abar) / K
        logits = torch.empty(z.shape[0], K, *z.shape[1:], dtype=torch.float64)
        for d in range(self.D):
            cells = [c for c in range(self.D) if self.full or c != d]
            weight = self.joint[:, None] * likelihood[:, :, cells].prod(2)  # (B, K^D, w)
            for k in range(K):
                logits[:, k, d] = weight[:, self.maps[:, d] == k].sum(1).log()
        return logits


def log_p(diffusion, model, maps, t, s):
    """log p(z_s|Z_t) of every cell of maps (B,D,w), the reverse step of Eq. 22: (B,K,D,w)."""
    s, t = torch.full((len(maps),), s), torch.full((len(maps),), t)
    return diffusion.log_p(model(maps, t), maps, s, t)


def step_kernel(diffusion, model, t, s):
    """p(all cells of z_s | Z_t) between all maps of D cells, cells independent: (K^D, K^D)."""
    maps = all_maps(diffusion.K, model.D)
    table = log_p(diffusion, model, maps, t, s)[..., 0]                   # (K^D, K, D)
    return torch.stack([table[:, z[:, 0], torch.arange(model.D)].sum(1) for z in maps], 1).exp()


def total_variation(p, q):
    return 0.5 * (p - q).abs().sum().item()
