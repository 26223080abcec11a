"""FID's and IS's arithmetic against closed forms, exact fractions, 60 digits and other programs."""

import itertools
import pickle
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch

from distributed import UserError
from fid import FeatureStatistics, InceptionScore, frechet_distance, inception_score


def seen(features, batch=None):
    """The statistics of features (n,D) that came in batches of `batch`."""
    statistics = FeatureStatistics(features.shape[1])
    for part in torch.as_tensor(features).split(batch or len(features)):
        statistics.update(part)
    return statistics


def draw(n, dim, seed=0, mean=0.0):
    """Correlated features (n,dim), float64."""
    generator = np.random.default_rng(seed)
    mix = np.random.default_rng(dim).standard_normal((dim, dim))
    return torch.from_numpy(generator.standard_normal((n, dim)) @ mix + mean)


def distance(sigma1, sigma2, mu1=None, mu2=None):
    zero = np.zeros(len(sigma1))
    return frechet_distance(zero if mu1 is None else mu1, sigma1, zero if mu2 is None else mu2,
                            sigma2)


# ---------------------------------------------------------------- closed forms


def test_distance_of_diagonal_gaussians_adds_up_over_dimensions():
    mu1, mu2 = np.array([1.0, -2, 0.5]), np.array([0.0, 2, 0.75])
    deviation1, deviation2 = np.array([1.0, 3, 0.25]), np.array([2.0, 0.5, 0.25])
    expected = sum((mu1 - mu2) ** 2) + sum((deviation1 - deviation2) ** 2)
    value = distance(np.diag(deviation1 ** 2), np.diag(deviation2 ** 2), mu1, mu2)
    assert isinstance(value, float)
    assert value == pytest.approx(expected, rel=1e-14)


def test_distance_of_scaled_identities_is_the_difference_of_deviations():
    assert distance(9 * np.eye(40), 4 * np.eye(40)) == pytest.approx(40, rel=1e-14)


def test_distance_of_commuting_covariances_follows_from_their_eigenvalues():
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 12)))[0]
    one, two = np.arange(1.0, 13), np.arange(13.0, 1, -1) ** 2
    value = distance(turn * one @ turn.T, turn * two @ turn.T)
    assert value == pytest.approx(((one ** 0.5 - two ** 0.5) ** 2).sum(), rel=1e-12)


def test_distance_of_two_by_two_covariances_that_do_not_commute():
    sigma1, sigma2 = np.array([[2.0, 1], [1, 3]]), np.array([[5.0, -2], [-2, 1]])
    with localcontext(prec=50):
        # tr(M^(1/2)) = sqrt(tr M + 2 sqrt(det M)) for two eigenvalues; det = 5 * 1
        product = Decimal(int(np.trace(sigma1 @ sigma2)))
        expected = 5 + 6 - 2 * (product + 2 * Decimal(5).sqrt()).sqrt()
    assert distance(sigma1, sigma2) == pytest.approx(float(expected), rel=1e-14)


def test_distance_of_singular_covariances():
    a, b = np.array([3.0, 4, 0, 1]), np.array([1.0, -2, 5, 0])
    rank_one = distance(np.outer(a, a), np.outer(b, b))
    assert rank_one == pytest.approx(a @ a + b @ b - 2 * abs(a @ b), rel=1e-14)
    full = np.array([[4.0, 1, 0, 0], [1, 3, 1, 0], [0, 1, 2, 0], [0, 0, 0, 1]])
    value = distance(np.outer(a, a), full)
    assert value == pytest.approx(a @ a + 10 - 2 * (a @ full @ a) ** 0.5, rel=1e-14)
    assert distance(np.zeros((4, 4)), full) == pytest.approx(10, rel=1e-14)
    assert distance(np.zeros((4, 4)), np.zeros((4, 4)), a, b) == pytest.approx((a - b) @ (a - b))


@pytest.mark.parametrize(("n1", "n2"), [(4, 4), (4, 7), (3, 40), (40, 40)])
def test_distance_is_right_to_14_digits_also_where_covariances_are_singular(n1, n2):
    mp = pytest.importorskip("mpmath").mp
    dim = 7
    one, two = (np.random.default_rng(n).integers(-9, 10, (n, dim)) for n in (n1, n2 + 100))
    with mp.workdps(60):
        exact = []
        for rows in (one, two):
            rows = mp.matrix(rows.tolist())
            mean = mp.ones(1, rows.rows) * rows / rows.rows
            centred = rows - mp.ones(rows.rows, 1) * mean
            exact.append((mean, centred.T * centred / (rows.rows - 1)))
        (mu1, sigma1), (mu2, sigma2) = exact
        eigenvalues = mp.eig(sigma1 * sigma2, left=False, right=False)
        root = sum(mp.sqrt(abs(value)) for value in eigenvalues)
        trace = sum(sigma1[i, i] + sigma2[i, i] for i in range(dim))
        expected = mp.norm(mu1 - mu2) ** 2 + trace - 2 * root
    ours = seen(one).frechet(seen(two))
    by_covariance = frechet_distance(seen(one).mu, np.cov(one.T), seen(two).mu, np.cov(two.T))
    assert abs(mp.mpf(ours) / expected - 1) < 1e-14
    assert abs(mp.mpf(by_covariance) / expected - 1) < 1e-12


def test_distance_equals_pytorch_fids_where_covariances_have_full_rank():
    pytest.importorskip("torchvision")
    peer = pytest.importorskip("pytorch_fid.fid_score").calculate_frechet_distance
    one, two = seen(draw(300, 24)), seen(draw(400, 24, seed=1, mean=0.3))
    given = one.mu, one.sigma, two.mu, two.sigma
    try:
        theirs = peer(*given)
    except (TypeError, ValueError) as error:
        pytest.skip(f"this scipy does not have the sqrtm that pytorch-fid calls: {error}")
    assert frechet_distance(*given) == pytest.approx(theirs, rel=1e-9)


def test_distance_is_symmetric_zero_to_itself_and_never_negative():
    for seed, n in itertools.product(range(5), (3, 8, 30)):
        one, two = seen(draw(n, 8, seed)), seen(draw(n, 8, seed + 50))
        assert one.frechet(two) == pytest.approx(two.frechet(one), rel=1e-12)
        assert 0 <= one.frechet(one) < 1e-13 * one.sigma.trace()
        assert frechet_distance(one.mu, one.sigma, one.mu, one.sigma) >= 0


@pytest.mark.parametrize(("mu", "sigma", "complaint"), [
    (np.zeros((1, 3)), np.eye(3), r"mu \(1, 3\) and sigma \(3, 3\)"),
    (np.zeros(3), np.eye(2), r"mu \(3,\) and sigma \(2, 2\)"),
    (np.zeros(3), np.zeros(3), r"sigma \(3,\)"),
    (np.zeros(2), np.eye(2), "features of 2 and of 3 dimensions"),
    (np.array([0, np.nan, 0]), np.eye(3), "not finite"),
    (np.zeros(3), np.diag([1, np.inf, 1]), "not finite"),
    (np.zeros(3), np.full((3, 3), np.nan), "not finite"),
    (np.zeros(3), np.array([[1.0, 2, 0], [2, 1, 0], [0, 0, 1]]), "not positive semi-definite"),
    (np.zeros(3), -np.eye(3), "not positive semi-definite"),
])
def test_what_is_no_gaussian_is_refused(mu, sigma, complaint):
    with pytest.raises(ValueError, match=complaint):
        frechet_distance(mu, sigma, np.zeros(3), np.eye(3))


# ---------------------------------------------------------------- statistics of a stream


SIZES = [(2, 6), (5, 6), (6, 6), (7, 6), (300, 6), (1000, 6), (600, 300)]


@pytest.mark.parametrize(("n", "dim"), SIZES)
@pytest.mark.parametrize("batch", [1, 7, None])
def test_mean_and_covariance_are_numpys_for_any_batches(n, dim, batch):
    features = draw(n, dim)
    statistics = seen(features, batch)
    assert statistics.n == n
    np.testing.assert_allclose(statistics.mu, features.numpy().mean(0), rtol=0, atol=1e-13)
    expected = np.cov(features.numpy(), rowvar=False)
    np.testing.assert_allclose(statistics.sigma, expected, rtol=0, atol=1e-14 * expected.max())
    assert statistics.mu.dtype == statistics.sigma.dtype == np.float64


@pytest.mark.parametrize(("n", "dim"), [(7, 9), (700, 2)])
def test_a_large_mean_costs_no_digits(n, dim):
    features = (100 + 0.1 * torch.randn(n, dim)).float()
    exact = [[Fraction(x) for x in row] for row in features.T.tolist()]
    mean = [sum(row) / n for row in exact]
    centred = [[x - mean[i] for x in row] for i, row in enumerate(exact)]
    sigma = [[float(sum(x * y for x, y in zip(one, two)) / (n - 1)) for two in centred]
             for one in centred]
    ours = seen(features, 13)
    assert abs(ours.sigma - sigma).max() < 1e-13 * np.max(sigma)
    assert abs(ours.mu - [float(m) for m in mean]).max() < 1e-13
    halves = seen(features[:n // 2])
    halves.merge(seen(features[n // 2:], 5))
    assert abs(halves.sigma - sigma).max() < 1e-13 * np.max(sigma)


@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_shares_merge_in_any_order(n, dim):
    features = draw(n, dim, mean=20.0)
    whole = seen(features)
    bounds = [0, n // 5, n // 5, n // 2, n]                # one share is empty, the last is large
    shares = [features[a:b] for a, b in itertools.pairwise(bounds)]
    for order in itertools.permutations(range(4)):
        merged = FeatureStatistics(dim)
        for k in order:
            merged.merge(pickle.loads(pickle.dumps(seen(shares[k]))))
        assert merged.n == n
        assert (merged.factors is None) == (n > dim)
        np.testing.assert_allclose(merged.mu, whole.mu, rtol=0, atol=1e-13)
        np.testing.assert_allclose(merged.sigma, whole.sigma, rtol=0,
                                   atol=1e-13 * whole.sigma.max())


def test_merging_leaves_the_other_as_it_was():
    one, two = seen(draw(500, 3)), seen(draw(400, 3, seed=1))
    before = two.mu.copy(), two.sigma.copy()
    empty = FeatureStatistics(3)
    empty.merge(two)
    empty.merge(one)
    empty.update(draw(300, 3))
    assert empty.n == 1200
    assert two.n == 400
    assert np.array_equal(two.mu, before[0])
    assert np.array_equal(two.sigma, before[1])


def test_factors_are_the_centred_features_up_to_as_many_as_dimensions():
    features = draw(6, 5).numpy()
    statistics = FeatureStatistics(5)
    assert statistics.factors.shape == (0, 5)
    statistics.update(torch.from_numpy(features[:5]))
    np.testing.assert_allclose(statistics.factors, features[:5] - features[:5].mean(0), atol=1e-15)
    statistics.update(torch.from_numpy(features[5:]))
    assert statistics.factors is None


def test_few_images_are_small_and_many_do_not_grow():
    few, many = FeatureStatistics(200), FeatureStatistics(20)
    few.update(torch.randn(10, 200))
    assert len(pickle.dumps(few)) < 10 * 200 * 8 + 1000
    sizes = set()
    for _ in range(5):
        for _ in range(40):
            many.update(torch.randn(64, 20))
        sizes.add(len(pickle.dumps(many)))
    assert max(sizes) < (20 * 20 + 20 + 256 * 20) * 8 + 2000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_features_of_any_type_are_copied_without_rounding(dtype):
    features = torch.randn(4, 3).to(dtype).requires_grad_()
    statistics = seen(features, 2)
    exact = features.detach().double().numpy().copy()
    with torch.no_grad():
        features.zero_()                                   # the caller's buffer is the caller's
    np.testing.assert_allclose(statistics.mu, exact.mean(0), rtol=1e-14)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 1)])
def test_features_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(B, 3\)"):
        FeatureStatistics(3).update(torch.zeros(shape))
    with pytest.raises(ValueError, match="features of 4 dimensions cannot join 3"):
        FeatureStatistics(3).merge(FeatureStatistics(4))


def test_an_empty_batch_changes_nothing():
    statistics = seen(draw(5, 3), 2)
    before = statistics.sigma
    statistics.update(torch.zeros(0, 3))
    assert statistics.n == 5
    assert np.array_equal(statistics.sigma, before)


@pytest.mark.parametrize(("n", "complaint"), [(0, "no features yet"), (1, "at least 2")])
def test_fewer_than_two_images_have_no_distance(n, complaint):
    few, some = seen(torch.zeros(2, 3)[:n]), seen(draw(5, 3))
    for one, two in ((few, some), (some, few)):
        with pytest.raises(ValueError, match=complaint):
            one.frechet(two)
    with pytest.raises(ValueError, match="at least 2"):
        _ = few.sigma


@pytest.mark.parametrize("n", [3, 400])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused_by_the_distance(n, value):
    features = draw(n, 4)
    features[1, 2] = value
    with pytest.raises(ValueError, match="not finite"), np.errstate(invalid="ignore"):
        seen(features).frechet(seen(draw(5, 4)))


@pytest.mark.parametrize(("n1", "n2"), [(5, 9), (20, 9), (9, 300), (40, 300)])
def test_the_distance_of_statistics_is_that_of_their_means_and_covariances(n1, n2):
    one, two = seen(draw(n1, 20)), seen(draw(n2, 20, seed=1, mean=0.5))
    expected = frechet_distance(one.mu, np.cov(draw(n1, 20).numpy().T),
                                two.mu, np.cov(draw(n2, 20, 1, 0.5).numpy().T))
    assert one.frechet(two) == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("n", [4, 50])
def test_a_saved_file_comes_back_and_can_be_added_to(n, tmp_path):
    statistics, more = seen(draw(n, 6)), draw(30, 6, seed=1)
    statistics.save(tmp_path / "real.npz")
    statistics.save(tmp_path / "real")                     # the name is taken as it is given
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real", "real.npz"]
    loaded = FeatureStatistics.load(tmp_path / "real.npz")
    assert (loaded.n, loaded.dim, loaded.factors) == (n, 6, None)
    assert np.array_equal(loaded.mu, statistics.mu)
    np.testing.assert_allclose(loaded.sigma, statistics.sigma, rtol=1e-15)
    assert loaded.frechet(seen(more)) == pytest.approx(statistics.frechet(seen(more)), rel=1e-12)
    loaded.update(more)
    statistics.update(more)
    np.testing.assert_allclose(loaded.sigma, statistics.sigma, rtol=1e-12, atol=1e-12)
    merged = seen(more)
    merged.merge(FeatureStatistics.load(tmp_path / "real.npz"))
    assert merged.n == n + 30
    np.testing.assert_allclose(merged.sigma, statistics.sigma, rtol=1e-12, atol=1e-12)


def test_a_file_of_pytorch_fid_is_compared_but_not_added_to(tmp_path):
    features = draw(50, 6)
    mu, sigma = features.numpy().mean(0), np.cov(features.numpy(), rowvar=False)
    np.savez_compressed(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
    loaded = FeatureStatistics.load(str(tmp_path / "theirs.npz"))
    assert loaded.n is None
    assert np.array_equal(loaded.mu, mu)
    assert np.array_equal(loaded.sigma, sigma)
    other = seen(draw(4, 6, seed=1))
    expected = seen(features).frechet(other)
    assert loaded.frechet(other) == pytest.approx(expected, rel=1e-12)
    assert other.frechet(loaded) == pytest.approx(expected, rel=1e-12)
    for change in (lambda: loaded.update(features), lambda: loaded.merge(other),
                   lambda: other.merge(loaded)):
        with pytest.raises(ValueError, match="not updated or merged"):
            change()
    loaded.save(tmp_path / "again.npz")
    assert set(np.load(tmp_path / "again.npz")) == {"mu", "sigma"}


def test_pytorch_fid_reads_our_file(tmp_path):
    pytest.importorskip("torchvision")
    peer = pytest.importorskip("pytorch_fid.fid_score")
    statistics = seen(draw(50, 6))
    statistics.save(tmp_path / "ours.npz")
    mu, sigma = peer.compute_statistics_of_path(str(tmp_path / "ours.npz"), None, 1, 6, "cpu")
    assert np.array_equal(mu, statistics.mu)
    assert np.array_equal(sigma, statistics.sigma)


def test_a_file_that_is_none_of_statistics_is_named_in_one_line(tmp_path):
    np.savez(tmp_path / "keys.npz", mu=np.zeros(3))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(2))
    np.savez(tmp_path / "words.npz", mu=np.array(["a"]), sigma=np.eye(1))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "garbage.npz").write_bytes(b"PK\x03\x04 cut off")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("hello")
    torch.save({"mu": 1}, tmp_path / "torch.npz")
    for path in (*tmp_path.iterdir(), tmp_path / "missing.npz", tmp_path):
        with pytest.raises(UserError) as caught:
            FeatureStatistics.load(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_statistics_without_a_covariance_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="at least 2"):
        seen(torch.zeros(1, 3)).save(tmp_path / "one.npz")
    assert not (tmp_path / "one.npz").exists()


# ---------------------------------------------------------------- inception score


def naive_score(logits, splits):
    """Per split the exponential of the mean of KL(p || mean p), with loops."""
    scores, n = [], len(logits)
    for s in range(splits):
        p = logits[s * n // splits:(s + 1) * n // splits].double().softmax(1).numpy()
        kl = [sum(x * np.log(x / y) for x, y in zip(row, p.mean(0))) for row in p]
        scores.append(np.exp(np.mean(kl)))
    mean = sum(scores) / splits
    return mean, (sum((score - mean) ** 2 for score in scores) / splits) ** 0.5


@pytest.mark.parametrize(("n", "splits"), [(40, 10), (43, 10), (7, 7), (19, 4), (9, 1)])
def test_inception_score_is_its_formula(n, splits):
    logits = 3 * torch.randn(n, 12)
    assert inception_score(logits, splits) == pytest.approx(naive_score(logits, splits), rel=1e-12)


def test_inception_score_of_known_answers():
    assert inception_score(torch.zeros(50, 8)) == pytest.approx((1, 0), abs=1e-14)
    certain = torch.eye(8).repeat(10, 1) * 1e4             # each split sees every class once
    assert inception_score(certain) == pytest.approx((8, 0), abs=1e-12)
    halves = torch.cat([certain[:8], torch.zeros(8, 8)])   # scores 8 and 1
    assert inception_score(halves, splits=2) == pytest.approx((4.5, 3.5), abs=1e-12)


def test_inception_score_equals_torch_fidelitys_without_its_shuffle():
    peer = pytest.importorskip("torch_fidelity.metric_isc").isc_features_to_metric
    logits = 3 * torch.randn(123, 40)
    theirs = peer(logits, splits=10, shuffle=False)
    assert inception_score(logits) == pytest.approx(
        (theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-12)


@pytest.mark.parametrize("batch", [1, 5, 61])
def test_the_streamed_score_is_the_same_in_any_order_batches_and_shares(batch):
    logits = 3 * torch.randn(61, 12)
    expected = inception_score(logits, 4)
    shares = [InceptionScore(61, 4, 12) for _ in range(3)]
    for k, indices in enumerate(torch.randperm(61).split(batch)):
        shares[k % 3].update(indices, logits[indices])
    for order in itertools.permutations(range(3)):
        whole = InceptionScore(61, 4, 12)
        for k in order:
            whole.merge(pickle.loads(pickle.dumps(shares[k])))
        assert whole.result() == pytest.approx(expected, rel=1e-12)


def test_the_score_is_computed_in_float64_and_survives_certainty():
    logits = torch.randn(40, 12).bfloat16()
    assert inception_score(logits) == inception_score(logits.double())
    far = torch.randn(40, 12) * 1e5
    assert np.isfinite(inception_score(far)).all()


def test_images_that_are_missing_or_come_twice_are_noticed():
    logits = torch.randn(6, 12)
    score = InceptionScore(6, 2, 12)
    score.update([0, 1, 2, 3], logits[:4])
    score.update([], logits[:0])
    with pytest.raises(ValueError, match="2 of 6 images are missing"):
        score.result()
    for indices in ([3, 4], [4, 4], [5, 6], [-1, 4]):
        with pytest.raises(ValueError, match=r"each of 0\.\.5 once"):
            score.update(indices, logits[:2])
    twice = InceptionScore(6, 2, 12)
    twice.update([3, 4], logits[3:5])
    with pytest.raises(ValueError, match="in both"):
        score.merge(twice)
    for other in (InceptionScore(7, 2, 12), InceptionScore(6, 3, 12), InceptionScore(6, 2, 13)):
        with pytest.raises(ValueError, match="other images or splits"):
            score.merge(other)


@pytest.mark.parametrize(("n", "splits"), [(9, 10), (0, 1), (5, 0)])
def test_fewer_images_than_splits_are_refused(n, splits):
    with pytest.raises(ValueError, match=f"{n} images, {splits} splits"):
        inception_score(torch.zeros(n, 12), splits)


def test_logits_that_are_not_finite_have_no_score():
    logits = torch.randn(20, 12)
    logits[3, 4] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        inception_score(logits)
