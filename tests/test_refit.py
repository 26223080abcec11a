from collections import Counter
from itertools import pairwise, permutations

import pytest
import torch

import refit
from quantize import code_statistics, nearest_code
from refit import afkmc2_seeds, install_codebook, kmeans, rebuild_codebook, sample_features
from vqgan import VQGAN, VQGANConfig

TINY = VQGANConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_levels=(), z_channels=4,
                   embed_dim=4, K=8, norm_groups=4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(n, K, d, spread=0.2):
    """n features around K centres."""
    return torch.randn(K, d)[torch.arange(n) % K] + spread * torch.randn(n, d)


def chi_square(observed, law, draws):
    """(statistic, its limit at 4 standard deviations) of counts against probabilities, by cell."""
    law = {cell: p for cell, p in law.items() if p > 0}
    assert observed.keys() <= law.keys(), "a cell of probability 0 occurred"
    statistic = sum((observed[cell] - draws * p) ** 2 / (draws * p) for cell, p in law.items())
    cells = len(law) - 1
    return statistic, cells + 4 * (2 * cells) ** 0.5


# ---------------------------------------------------------------- sampling


class Pictures:
    """A data set whose encoder answers (image, cell) at each cell, and that notes what is read."""

    def __init__(self, cells):
        self.cells, self.read, self.sizes = cells, [], []

    def batches(self, parts):
        for part in parts:
            self.read += part
            self.sizes.append(len(part))
            yield torch.tensor(part).double().view(-1, 1, 1, 1)

    def encode(self, x):
        h, w = self.cells
        image = x.expand(-1, 1, h, w)
        cell = torch.arange(h * w).view(1, 1, h, w).expand(len(x), 1, h, w)
        return torch.cat([image, cell.to(x)], 1)                            # (b, 2, h, w)

    def sample(self, images, P, key=(0, 1), **options):
        """(image, cell) of each draw: (P,2) int64."""
        features = sample_features(self.encode, self.batches, images, P, key, **options)
        assert features.dtype == torch.float32
        return features.long()


def test_every_image_and_every_cell_is_drawn_alike_and_independently():
    draws = Pictures((2, 3)).sample(images=5, P=6000)
    law = {(image, cell): 1 / 30 for image in range(5) for cell in range(6)}
    statistic, limit = chi_square(Counter(map(tuple, draws.tolist())), law, 6000)
    assert statistic < limit


def test_more_draws_begin_with_the_same_ones_and_another_key_draws_others():
    few, many = (Pictures((4, 4)).sample(images=50, P=P) for P in (40, 300))
    assert torch.equal(many[:40], few)
    for batch_size in (1, 7, 100):
        assert torch.equal(Pictures((4, 4)).sample(50, 300, batch_size=batch_size), many)
    assert not torch.equal(Pictures((4, 4)).sample(50, 40, key=(1, 1)), few)
    assert not torch.equal(Pictures((4, 4)).sample(50, 40, key=(0, 2)), few)


def test_an_image_that_is_drawn_often_is_encoded_once():
    pictures = Pictures((3, 3))
    draws = pictures.sample(images=10, P=500, batch_size=4)
    assert pictures.read == list(range(10))
    assert pictures.sizes == [4, 4, 2]
    assert len(draws) == 500


def test_the_processes_share_the_images_and_all_get_the_same_features(monkeypatch):
    alone = Pictures((4, 4))
    expected = alone.sample(images=30, P=100, batch_size=3)
    shares, readers = [], [Pictures((4, 4)) for _ in range(2)]
    monkeypatch.setattr(refit, "world_size", lambda: 2)
    monkeypatch.setattr(refit, "gather_objects", lambda share: shares.append(share) or [share])
    for rank, reader in enumerate(readers):
        monkeypatch.setattr(refit, "rank", lambda rank=rank: rank)
        reader.sample(30, 100, batch_size=3)
    assert sorted(readers[0].read + readers[1].read) == alone.read
    assert abs(len(readers[0].read) - len(readers[1].read)) <= 3

    monkeypatch.setattr(refit, "gather_objects", lambda share: shares)
    assert torch.equal(Pictures((4, 4)).sample(30, 100, batch_size=3), expected)
    with pytest.raises(ValueError, match="shorter"):                # a reader that leaves some out
        sample_features(alone.encode, lambda parts: alone.batches(parts[1:]), 10, 80, (0, 1), 2)


def test_features_are_the_frozen_encoders_outputs():
    model = VQGAN(TINY).eval()
    x = 2 * torch.rand(6, 3, 8, 8) - 1
    features = sample_features(model.moments, lambda parts: (x[part] for part in parts), 6, 40,
                               (0, 1), batch_size=2)
    assert not features.requires_grad
    z_e = model.moments(x).detach().permute(0, 2, 3, 1).reshape(-1, 4)      # (6·h·w, d)
    assert naive_inertia(features, z_e) < 1e-8                      # each is one of them
    assert len(features.unique(dim=0)) > 30


# ---------------------------------------------------------------- seeding

POINTS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [-2.0, -2.0]])


def squared_distances(seeds):
    """d(x,C)² of each of POINTS, float64."""
    return torch.cdist(POINTS.double(), POINTS[list(seeds)].double()).amin(1).square()


def law_of_the_second_seed(first, chain):
    """q A^(chain - 1): the proposal, moved by the 5x5 Metropolis kernel."""
    squared = squared_distances([first])
    q = 0.5 * squared / squared.sum() + 0.5 / 5
    A = torch.zeros(5, 5, dtype=torch.float64)
    for x in range(5):
        for y in range(5):
            if x != y:
                ratio = squared[y] * q[x] / (squared[x] * q[y]) if squared[x] > 0 else 1.0
                A[x, y] = q[y] * min(1.0, float(ratio))
        A[x, x] = 1 - A[x].sum()
    return q @ torch.linalg.matrix_power(A, chain - 1)


def test_the_chains_law_goes_from_the_proposal_to_that_of_k_means_plus_plus():
    for first in range(5):
        exact = squared_distances([first])
        exact = exact / exact.sum()
        distance = [(law_of_the_second_seed(first, m) - exact).abs().max() for m in (1, 3, 50)]
        assert distance[0] > 0.05
        assert distance[0] > distance[1] > distance[2]
        assert distance[2] < 1e-4


@pytest.mark.parametrize("chain", [1, 3, 50])
def test_the_second_seed_follows_the_metropolis_law(chain):
    draws, stream = 800, generator(chain)
    seen = Counter(tuple(afkmc2_seeds(POINTS, 2, chain, stream).tolist()) for _ in range(draws))
    law = {(first, second): law_of_the_second_seed(first, chain)[second].item() / 5
           for first in range(5) for second in range(5)}
    rare = {pair for pair, p in law.items() if draws * p < 1}        # nearly impossible at 50
    assert sum(seen.pop(pair, 0) for pair in rare) <= 3
    statistic, limit = chi_square(seen, {k: p for k, p in law.items() if k not in rare}, draws)
    assert statistic < limit


def test_a_long_chain_gives_the_third_seed_its_distance_to_both_others():
    draws, stream = 600, generator()
    seen = Counter(tuple(afkmc2_seeds(POINTS, 3, 100, stream).tolist()) for _ in range(draws))
    law = {}
    for a, b, c in permutations(range(5), 3):
        one, two = squared_distances([a]), squared_distances([a, b])
        law[a, b, c] = (one[b] / one.sum() * two[c] / two.sum()).item() / 5
    statistic, limit = chi_square(seen, law, draws)
    assert statistic < limit


def test_well_separated_clusters_get_a_seed_each():
    features = 100 * torch.eye(16)[torch.arange(320) % 16] + 0.01 * torch.randn(320, 16)
    assert sorted((afkmc2_seeds(features, 16, generator=generator()) % 16).tolist()) == [*range(16)]


def test_a_far_offset_does_not_blur_the_distances():
    features = blobs(300, 10, 6).double()
    expected = afkmc2_seeds(features, 10, generator=generator())
    assert torch.equal(afkmc2_seeds(features + 1e6, 10, generator=generator()), expected)


def test_of_equal_features_any_may_be_chosen():
    seen = Counter()
    for seed in range(40):
        seen.update(afkmc2_seeds(torch.ones(6, 3), 6, 20, generator(seed)).tolist())
    assert set(seen) == set(range(6))


@pytest.mark.parametrize("K", [0, 11])
def test_more_centres_than_features_or_none_are_refused(K):
    with pytest.raises(ValueError, match=f"{K} centres from 10 features"):
        afkmc2_seeds(torch.randn(10, 3), K)


# ---------------------------------------------------------------- Lloyd


def naive_inertia(features, centres):
    return torch.cdist(features.double(), centres.double(),
                       compute_mode="donot_use_mm_for_euclid_dist").amin(1).square().sum().item()


def naive_lloyd(features, centres, iterations):
    """Loops over clusters, in float64; no cluster may run empty."""
    features, centres = features.double(), centres.double()
    for _ in range(iterations):
        nearest = torch.cdist(features, centres).argmin(1)
        centres = torch.stack([features[nearest == k].mean(0) for k in range(len(centres))])
    return centres


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_few_passes_are_those_of_the_definition(dtype):
    features = blobs(600, 12, 5).to(dtype) + 50                     # far from the origin
    centres, inertia = kmeans(features, features[:12], iterations=4, tolerance=0)
    expected = naive_lloyd(features, features[:12], 4)
    torch.testing.assert_close(centres, expected.to(dtype))
    assert centres.dtype == dtype
    assert len(inertia) == 5
    assert inertia[0] == pytest.approx(naive_inertia(features, features[:12]))
    assert inertia[-1] == pytest.approx(naive_inertia(features, centres))


@pytest.mark.parametrize("start", ["seeds", "far"])
def test_inertia_never_rises(start):
    features = torch.randn(800, 4, dtype=torch.float64)
    centres = features[:40].clone()
    if start == "far":
        centres[10:] += 1000                                        # 30 clusters begin empty
    centres, inertia = kmeans(features, centres, iterations=60, tolerance=0)
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(inertia))
    assert inertia[-1] < 0.7 * inertia[0]
    assert nearest_code(features, centres).bincount(minlength=40).min() > 0


def test_it_ends_at_a_fixed_point_where_every_centre_is_its_clusters_mean():
    features = blobs(300, 8, 3)
    centres, inertia = kmeans(features, features[:8], tolerance=0)
    assignment = nearest_code(features, centres)
    assert len(inertia) < 90
    assert inertia[-1] == inertia[-2]
    means = torch.stack([features[assignment == k].double().mean(0) for k in range(8)])
    torch.testing.assert_close(centres, means.float(), rtol=1e-6, atol=1e-7)
    again, history = kmeans(features, centres, tolerance=0)
    assert torch.equal(again, centres)
    assert len(history) == 2


def test_a_tolerance_ends_it_earlier():
    features = torch.randn(2000, 3)
    lengths = [len(kmeans(features, features[:30], tolerance=t)[1]) for t in (0, 1e-3, 1.0)]
    assert lengths[0] > lengths[1] > lengths[2]
    scaled = kmeans(1000 * features, 1000 * features[:30], tolerance=1e-3)[1]
    assert len(scaled) == lengths[1]                                # relative to the variance


@pytest.mark.parametrize(("features", "centres", "moved"), [
    # 14 is farthest from 0.5; without it, the mean of the others is 11/3.
    ([0, 1, 10, 14], [0.5, 500], [11 / 3, 14]),
    # Two equal ones never: one would be left without features again.
    ([0, 0, 0.5, 9, 9, 9, 7], [0, 100, 200], [18.5 / 5, 9, 7]),
    # 5 is farthest from its centre but alone there.
    ([0, 1, 5], [0, 8, 50], [0, 5, 1]),
    # 3 is taken from {0, 3}; 0, the second farthest, is then alone, and 10.5 goes.
    ([0, 3, 10, 10.5, 10.25], [1, 10, 100, 200], [0, 10.125, 3, 10.5]),
    # One on its centre is not moved.
    ([0, 0, 5], [0, 5, 100], [0, 5, 100]),
])
def test_empty_clusters_take_far_features_never_equal_ones_and_never_a_clusters_last(
        features, centres, moved):
    column = [torch.tensor(values, dtype=torch.float32)[:, None] for values in (features, centres)]
    centres, inertia = kmeans(*column, iterations=1)
    assert centres.flatten().tolist() == pytest.approx(moved)
    assert inertia[-1] == pytest.approx(naive_inertia(column[0], centres))


def test_with_fewer_distinct_features_than_centres_the_surplus_is_never_used():
    features = torch.randn(4, 3)[torch.arange(40) % 4]
    codebook, inertia = rebuild_codebook(features, 10, generator=generator())
    assert inertia[-1] == 0
    assert codebook.isfinite().all()
    assert len(nearest_code(features, codebook).unique()) == 4


def test_inertia_from_the_same_start_is_scikit_learns():
    cluster = pytest.importorskip("sklearn.cluster")
    for dtype in (torch.float32, torch.float64):
        features = 5 + torch.randn(3000, 16, dtype=dtype)
        start = features[:50]
        theirs = cluster.KMeans(50, init=start.numpy(), n_init=1, max_iter=15, tol=0,
                                algorithm="lloyd").fit(features.numpy())
        centres, inertia = kmeans(features, start, iterations=15, tolerance=0)
        assert inertia[-1] == pytest.approx(theirs.inertia_, rel=1e-6)
        torch.testing.assert_close(centres, torch.from_numpy(theirs.cluster_centers_).to(dtype),
                                   rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- both, and the model


def test_a_rebuilt_codebook_finds_the_clusters_that_the_features_have():
    truth = torch.randn(30, 8)
    features = truth[torch.arange(3000) % 30] + 0.01 * torch.randn(3000, 8)
    before = torch.get_rng_state()
    codebook, inertia = rebuild_codebook(features, 30, generator=generator())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.cdist(truth, codebook).amin(1).max() < 0.02
    assert inertia[-1] < 3000 * 8 * 1.1e-4
    again, _ = rebuild_codebook(features, 30, generator=generator())
    assert torch.equal(again, codebook)


def test_features_that_are_not_finite_are_refused():
    features = torch.randn(20, 3)
    features[7, 1] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        rebuild_codebook(features, 4)


@pytest.mark.parametrize("K", [5, 8, 21])
def test_a_model_takes_a_codebook_of_another_size(K):
    model = VQGAN(TINY)
    codebook = torch.randn(K, 4)
    before, given = torch.get_rng_state(), codebook.clone()
    install_codebook(model, given)
    given.zero_()                                                   # the model owns its codes
    assert torch.equal(torch.get_rng_state(), before)
    assert (model.config.K, model.quantize.K) == (K, K)
    x = 2 * torch.rand(2, 3, 8, 8) - 1
    indices = model.indices(x)
    flat = model.moments(x).permute(0, 2, 3, 1).reshape(-1, 4)
    assert torch.equal(indices.flatten(), nearest_code(flat, codebook))
    h, _ = model(x)
    torch.testing.assert_close(model.decoder.conv_out(h), model.decode_indices(indices))
    same = VQGAN(model.config)
    same.load_state_dict(model.state_dict())                        # strict: the keys are the same
    assert torch.equal(same.quantize.embedding.weight, codebook)


def test_only_the_decoder_trains_on_new_codes():
    model = VQGAN(TINY)
    install_codebook(model, torch.randn(6, 4))
    trains = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert trains == {"decoder", "post_quant_conv"}
    assert frozen == {"encoder", "quant_conv", "quantize"}
    h, latent_loss = model(2 * torch.rand(1, 3, 8, 8) - 1)
    assert not latent_loss.requires_grad                            # nothing left to move it
    model.decoder.conv_out(h).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_rebuilding_uses_codes_that_training_left_dead():
    """ReFiT in small: codes far from all features but one are all used afterwards."""
    model = VQGAN(TINY).eval()
    x = 2 * torch.rand(64, 3, 8, 8) - 1
    with torch.no_grad():
        model.quantize.embedding.weight[1:] += 100
    before = code_statistics(model.indices(x).flatten().bincount(minlength=8))
    features = sample_features(model.moments, lambda parts: (x[part] for part in parts), 64, 500,
                               (0, 1))
    codebook, _ = rebuild_codebook(features, 16, generator=generator())
    install_codebook(model, codebook)
    after = code_statistics(model.indices(x).flatten().bincount(minlength=16))
    assert before == {"K": 8, "usage": 1 / 8, "perplexity": 1.0}
    assert after["usage"] == 1
    assert after["perplexity"] > 8
