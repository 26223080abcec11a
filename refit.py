"""Rebuild the codebook from the encoder's outputs: the first half of ReFiT. [DDM Sec. 3.2]

A VQGAN uses few of its codes because only chosen codes get a gradient, while the encoder's outputs
move away from the other codes, which are never chosen again. A start in ±1/K makes it worse, as the
codes then lie so close together that a few of them are nearest to nearly all outputs. ReFiT keeps
the trained encoder, makes the cluster centres of its outputs the codebook, so that nearly all codes
are chosen, and fine-tunes the decoder (train_autoencoder.Refit).

    images --encoder--> z_e (B,d,h,w) --a random cell--> features (P,d)         sample_features
    features --AFK-MC²--> K seeds --Lloyd--> codebook (K,d)                     rebuild_codebook
    VQGAN, codebook --> a VQGAN whose decoder alone trains                      install_codebook
"""

from dataclasses import replace

import torch
from torch import nn

from distributed import gather_objects, heed, rank, world_size
from quantize import nearest_code
from seeding import FEATURES, numpy_generator


@torch.no_grad()
def sample_features(encode, batches, n_images, P, key, batch_size=32):
    """Sample P features (P,d) float32 on the CPU, the same on every process. [DDM Sec. 4.1]

    A draw is a uniform cell of an image drawn uniformly, with replacement, from `n_images`. Draw p
    is a function of key = (seed, stage id) and p alone, so a larger P only adds.  deviation D41
    encode: x (b,3,H,W) -> z_e (b,d,h,w). batches(lists of image indices)
    yields one x for each list. Every process must call this, because they share the images.
    """
    u = torch.from_numpy(numpy_generator(FEATURES, *key).random((P, 2)))
    index = (u[:, 0] * n_images).long()                                     # (P)
    # Encode each drawn image once, and take the cells of all draws of it.
    parts = index.unique().split(batch_size)[rank()::world_size()]          # ascending, (b) each
    found = []
    for part, x in zip(parts, batches([part.tolist() for part in parts]), strict=True):
        z_e = encode(x).float().flatten(2).cpu()                            # (b, d, h·w)
        draws = ((index >= part[0]) & (index <= part[-1])).nonzero()[:, 0]  # (r)
        place = torch.searchsorted(part, index[draws])                      # (r), in the batch
        cell = (u[draws, 1] * z_e.shape[2]).long()                          # (r)
        found.append((draws, z_e[place, :, cell]))                          # (r), (r, d)
    # Gather the features of all processes, in the order of the draws.
    found = [pair for share in gather_objects(found) for pair in share]
    draws, features = map(torch.cat, zip(*found))                           # (P), (P, d)
    return features[draws.argsort()]


def rebuild_codebook(features, K, iterations=100, chain=200, generator=None):
    """Cluster features (P,d): codebook (K,d) on the CPU, inertia. [DDM Sec. 3.2]  deviation D43

    Raises ValueError for K larger than P and for features that are not finite.
    """
    if not features.isfinite().all():
        raise ValueError("features are not finite: the encoder that made them has diverged")
    seeds = afkmc2_seeds(features, K, chain, generator)
    codebook, inertia = kmeans(features, features[seeds], iterations)
    return codebook.cpu(), inertia


@torch.no_grad()
def afkmc2_seeds(features, K, chain=200, generator=None):
    """Draw the seeds of k-means by AFK-MC²: indices (K,) of features (n,d). [DDM Sec. 3.2]

    Bachem et al. 2016, Algorithm 1. k-means++ draws a seed x in proportion to d(x,C)², the squared
    distance to the nearest of the seeds C so far, in a pass over all features for each seed. Here a
    Metropolis-Hastings chain of `chain` states approaches that law. Its proposals come from

        q(x) = 1/2 d(x,c_1)² / sum_x' d(x',c_1)² + 1/(2n),    c_1 uniform,

    so it needs K · chain distances in all. Raises ValueError unless 1 <= K <= n.
    """
    n = len(features)
    if not 1 <= K <= n:
        raise ValueError(f"{K} centres from {n} features: K must be from 1 to their number; "
                         "sample more features or ask for fewer codes")
    # Compute q from the distances to c_1. It is uniform where all features are equal.
    C = torch.randint(n, (1,), generator=generator).tolist()
    squared = _squared_distance(features, features[C])                      # (n), to c_1
    share = squared / squared.sum() if squared.any() else torch.full_like(squared, 1 / n)
    q = 0.5 * share + 0.5 / n                                               # (n)
    # Draw each chain's proposals from q, by its cumulative sums, and the uniform numbers u.
    cdf = q.cumsum(0)                                                       # (n)
    proposal, u = torch.rand(2, K - 1, chain, dtype=torch.float64, generator=generator)
    proposals = torch.searchsorted(cdf / cdf[-1], proposal, right=True)     # (K-1, chain)
    # Run a chain for each seed after c_1. Its last state joins C.
    for candidates, u_i in heed(zip(proposals, u.tolist())):
        part, seeds = features[candidates], features[C]                     # (chain, d), (k, d)
        nearest = seeds[nearest_code(part, seeds)]                          # (chain, d)
        d2 = _squared_distance(part, nearest).tolist()                      # d(·,C)²
        q_i = q[candidates].tolist()
        x = 0                            # the chain's state, as a position among the candidates
        for y in range(1, chain):        # accept y where d(y,C)² q(x) / (d(x,C)² q(y)) >= u
            if d2[y] * q_i[x] >= u_i[y] * d2[x] * q_i[y]:
                x = y
        C.append(candidates[x].item())
    return torch.tensor(C, device=features.device)


@torch.no_grad()
def kmeans(features, centres, iterations=100, tolerance=1e-4):
    """Run Lloyd's algorithm on features (n,d): (centres (K,d), inertia).

    inertia: a list, sum |x - c|² before each move of the centres and after the last. It never
    rises. Ends after `iterations` moves, or when the centres have almost stopped: |move|² at most
    `tolerance` times the features' mean variance. An empty cluster gets a far feature.
    """
    standstill = tolerance * features.var(0, correction=0).mean().item()
    centres, inertia, move = centres.to(features), [], torch.inf
    for moves in heed(range(iterations + 1)):
        # Assign each feature to its nearest centre.
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
    return centres, inertia


def _squared_distance(a, b):
    """Compute |a - b|² row by row, a (n,d), b (n,d) or (1,d): (n,) float64 on the CPU."""
    return (a - b).square().sum(1).cpu().double()


def _fill_empty(features, assignment, distance, K):
    """Give each empty cluster the feature farthest from its centre, by changing `assignment` (n,).

    Two equal features are not both taken, because one of their clusters would be empty again. The
    last feature of a cluster and a feature that lies on its centre stay.
    """
    count, taken = assignment.bincount(minlength=K), set()
    empty = (count == 0).nonzero()[:, 0].tolist()
    for i in distance.argsort(descending=True, stable=True).tolist():
        if not empty:
            break
        value, own = tuple(features[i].tolist()), assignment[i].item()
        if count[own] > 1 and distance[i] > 0 and value not in taken:
            count[own] -= 1
            taken.add(value)
            assignment[i] = empty.pop(0)


def install_codebook(model, codebook):
    """Replace the codebook of a VQGAN by codes (K,d), of any K. [DDM Sec. 4.1]  deviation D42

    Changes the model in place. Afterwards only decoder and post_quant_conv train.
    """
    codes = codebook.detach().to(model.quantize.embedding.weight, copy=True)
    model.quantize.embedding = nn.Embedding.from_pretrained(codes)
    model.quantize.K = len(codes)
    model.config = replace(model.config, K=len(codes))
    model.requires_grad_(False)
    model.decoder.requires_grad_(True)
    model.post_quant_conv.requires_grad_(True)
