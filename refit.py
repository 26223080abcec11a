"""Rebuild the codebook, ReFiT's first half: cluster the features that occur. [DDM Sec. 3.2]

Codes that are trained beside their encoder follow it too slowly: most are never chosen again.

    images --encoder--> z_e (B,d,h,w) --a random cell--> features (P,d)         sample_features
    features --AFK-MC²--> K seeds --Lloyd--> codebook (K,d)                     rebuild_codebook
    VQGAN, codebook --> the same VQGAN, of which only the decoder trains        install_codebook
"""

from dataclasses import replace

import torch
from torch import nn

from distributed import gather_objects, rank, world_size
from quantize import nearest_code
from seeding import FEATURES, numpy_generator


@torch.no_grad()
def sample_features(encode, batches, images, P, key, batch_size=32):
    """Sample P features (P,d) float32 on the CPU, alike on every process. [DDM Sec. 4.1]

    Each is a uniform cell of an image drawn uniformly, with replacement, out of `images` (a count).
    Draw p is a function of key = (seed, stage id) and p alone: a larger P only adds.  deviation D41
    encode: x (b,3,H,W) -> z_e (b,d,h,w). batches: called once, with lists of image indices, yields
    the x of each list, in this order. Every process must call this: they share the images.
    """
    draws = torch.from_numpy(numpy_generator(FEATURES, *key).random((P, 2)))
    image = (draws[:, 0] * images).long()                                   # (P)
    parts = image.unique().split(batch_size)[rank()::world_size()]          # ascending, (b) each
    found = []
    for part, x in zip(parts, batches([part.tolist() for part in parts]), strict=True):
        z_e = encode(x).float().flatten(2).cpu()                            # (b, d, h·w)
        rows = ((image >= part[0]) & (image <= part[-1])).nonzero()[:, 0]   # (r), draws from part
        place = torch.searchsorted(part, image[rows])                       # (r)
        cell = (draws[rows, 1] * z_e.shape[2]).long()                       # (r)
        found.append((rows, z_e[place, :, cell]))                           # (r), (r, d)
    found = [pair for share in gather_objects(found) for pair in share]
    rows, values = map(torch.cat, zip(*found))                              # (P), (P, d)
    return values[rows.argsort()]


def rebuild_codebook(features, K, iterations=100, chain=200, generator=None):
    """Cluster features (P,d): codebook (K,d), inertia as kmeans. [DDM Sec. 3.2]  deviation D43

    Raises ValueError where K is larger than P, and for features that are not finite.
    """
    if not features.isfinite().all():
        raise ValueError("features are not finite: the encoder that made them has diverged")
    seeds = afkmc2_seeds(features, K, chain, generator)
    codebook, _, inertia = kmeans(features, features[seeds], iterations)
    return codebook, inertia


@torch.no_grad()
def afkmc2_seeds(features, K, chain=200, generator=None):
    """Seed k-means++ by a Markov chain: indices (K,) of features (n,d). [DDM Sec. 3.2]

    Bachem et al. 2016, Algorithm 1. k-means++ draws each seed x with probability ~ d(x,C)², its
    squared distance to the nearest of the seeds C so far: a pass over all features for each seed.
    Here d(x,C)² is the stationary law of a chain of length `chain` whose proposals come from

        q(x) = 1/2 d(x,c_1)² / sum_x' d(x',c_1)² + 1/(2n),    c_1 uniform,

    so only K · chain distances are needed. Raises ValueError unless 1 <= K <= n.
    """
    n = len(features)
    if not 1 <= K <= n:
        raise ValueError(f"{K} centres from {n} features: K must be from 1 to their number; "
                         "sample more features or ask for fewer codes")
    chosen = torch.randint(n, (1,), generator=generator).tolist()
    squared = _squared_distance(features, features[chosen])                 # (n), to c_1
    # Where all features are alike, no distance tells them apart: q is uniform.
    share = squared / squared.sum() if squared.any() else torch.full_like(squared, 1 / n)
    q = 0.5 * share + 0.5 / n                                               # (n)
    cdf = q.cumsum(0)                                                       # (n)
    proposal, level = torch.rand(2, K - 1, chain, dtype=torch.float64, generator=generator)
    proposals = torch.searchsorted(cdf / cdf[-1], proposal, right=True)     # (K-1, chain)
    for candidates, levels in zip(proposals, level.tolist()):
        part, seeds = features[candidates], features[chosen]                # (chain, d), (k, d)
        nearest = seeds[nearest_code(part, seeds)]                          # (chain, d)
        weight = (_squared_distance(part, nearest) / q[candidates]).tolist()
        x = 0                            # y replaces x with probability min(1, weight_y / weight_x)
        for y in range(1, chain):
            if weight[y] >= levels[y] * weight[x]:
                x = y
        chosen.append(candidates[x].item())
    return torch.tensor(chosen, device=features.device)


@torch.no_grad()
def kmeans(features, centres, iterations=100, tolerance=1e-4):
    """Run Lloyd's algorithm on features (n,d): (centres (K,d), assignment (n,), inertia).

    inertia: a list, sum |x - c|² at the start and after each move of the centres; it never rises,
    and its last value and `assignment` belong to the returned centres. Ends after `iterations`
    moves or when the squared length of a move, over all centres, is at most `tolerance` times the
    features' mean variance. An empty cluster takes over a feature far from its own centre.
    """
    standstill = tolerance * features.var(0, correction=0).mean().item()
    centres, inertia, move = centres.to(features), [], torch.inf
    for moves in range(iterations + 1):
        assignment = nearest_code(features, centres)                        # (n)
        distance = _squared_distance(features, centres[assignment])         # (n)
        assignment = assignment.cpu()
        inertia.append(distance.sum().item())
        if moves == iterations or move <= standstill:
            break
        _fill_empty(features, assignment, distance, len(centres))
        # Move each centre to its cluster's mean, summed in float64; one without features stays.
        total = torch.zeros(centres.shape, dtype=torch.float64)
        for part, index in zip(features.split(1024), assignment.split(1024)):
            total.index_add_(0, index, part.cpu().double())
        count = assignment.bincount(minlength=len(centres))[:, None]        # (K, 1)
        mean = (total / count).to(centres)                                  # (K, d), NaN if empty
        moved = torch.where(count.to(mean.device) > 0, mean, centres)       # (K, d)
        move = (moved - centres).square().sum().item()
        centres = moved
    return centres, assignment.to(features.device), inertia


def _squared_distance(a, b):
    """Compute |a - b|² row by row, a (n,d), b (n,d) or (1,d): (n,) float64 on the CPU."""
    return (a - b).square().sum(1).cpu().double()


def _fill_empty(features, assignment, distance, K):
    """Let each empty cluster take over one of the farthest features, in `assignment` (n,) itself.

    Never two equal ones, as one would be empty again; never a cluster's last one; never one on its
    centre.
    """
    count, taken = assignment.bincount(minlength=K), set()
    empty = (count == 0).nonzero()[:, 0].tolist()
    for i in distance.argsort(descending=True, stable=True).tolist() if empty else []:
        value, own = tuple(features[i].tolist()), assignment[i].item()
        if count[own] > 1 and distance[i] > 0 and value not in taken:
            count[own] -= 1
            taken.add(value)
            assignment[i] = empty.pop(0)
        if not empty:
            break


def install_codebook(model, codebook):
    """Give a VQGAN the codes (K,d) in place, K free. [DDM Sec. 4.1]  deviation D42

    From then on only decoder and post_quant_conv train. Raises ValueError for a KL latent and for
    codes of another width.
    """
    config, (K, d) = model.config, codebook.shape
    if config.latent != "vq":
        raise ValueError("a KL latent has no codebook to rebuild")
    if d != config.embed_dim:
        raise ValueError(f"codes of width {d} for a model with embed_dim={config.embed_dim}")
    old = model.quantize.embedding.weight
    codes = codebook.detach().to(old, copy=True)
    model.quantize.embedding = nn.Embedding.from_pretrained(codes)
    model.quantize.K, model.config = K, replace(config, K=K)
    model.requires_grad_(False)
    model.decoder.requires_grad_(True)
    model.post_quant_conv.requires_grad_(True)
