"""FID and inception score: the network against its graph written out, the arithmetic against
closed forms, exact fractions and 60 digits, and both against other programs.

The network always sees 299 x 299 pixels; what does not depend on that is tested on smaller ones.
"""

from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fid
from distributed import UserError
from fid import FILE, InceptionV3, frechet_distance, inception_score, moments

# -- the network -----------------------------------------------------------------------------------


def empty_network():
    """The network without its numbers, for its keys and shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "read_weights", lambda name, wanted, folder: wanted)
        return InceptionV3()


def random_weights():
    """What the published file holds, with random numbers: He-scaled, so that all layers live."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in empty_network().state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if key.endswith(("conv.weight", "fc.weight")):
            state[key] = noise * ((2 if "conv" in key else 1) / value[0].numel()) ** 0.5
        elif key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
        else:
            state[key] = 1 + 0.2 * noise.tanh() if key.endswith(("weight", "var")) else 0.1 * noise
    return state


@pytest.fixture(scope="module")
def state():
    return random_weights()


@pytest.fixture(scope="module")
def network(state):
    return InceptionV3(state)


def pictures(*shape):
    """Smooth coloured noise in [-1,1], unlike from picture to picture."""
    coarse = torch.randn(shape[0], 3, 5, 7)
    return F.interpolate(coarse, shape[1:], mode="bicubic").tanh()


def relative(ours, theirs):
    """The largest difference, in units of the largest entry."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


class Written:
    """The published graph as formulas on a state dict, which notes the keys that it reads."""

    def __init__(self, state):
        self.state, self.read = state, set()

    def get(self, key):
        self.read.add(key)
        return self.state[key]

    def conv(self, name, h, stride=1, padding="same"):
        h = F.conv2d(h, self.get(f"{name}.conv.weight"), None, stride, padding)
        mean, var, scale, shift = (
            self.get(f"{name}.bn.{key}").view(-1, 1, 1)
            for key in ("running_mean", "running_var", "weight", "bias"))
        return ((h - mean) / (var + 1e-3).sqrt() * scale + shift).clamp(min=0)

    def chain(self, name, h, count, last_stride=1):
        for k in range(1, count + 1):
            stride, padding = (last_stride, 0) if k == count and last_stride > 1 else (1, "same")
            h = self.conv(f"{name}_{k}", h, stride, padding)
        return h

    def a(self, name, h):
        return [self.conv(f"{name}.branch1x1", h), self.chain(f"{name}.branch5x5", h, 2),
                self.chain(f"{name}.branch3x3dbl", h, 3),
                self.conv(f"{name}.branch_pool", windows(h).nanmean(0))]

    def b(self, name, h):
        return [self.conv(f"{name}.branch3x3", h, 2, 0),
                self.chain(f"{name}.branch3x3dbl", h, 3, 2), F.max_pool2d(h, 3, 2)]

    def c(self, name, h):
        return [self.conv(f"{name}.branch1x1", h), self.chain(f"{name}.branch7x7", h, 3),
                self.chain(f"{name}.branch7x7dbl", h, 5),
                self.conv(f"{name}.branch_pool", windows(h).nanmean(0))]

    def d(self, name, h):
        return [self.chain(f"{name}.branch3x3", h, 2, 2),
                self.chain(f"{name}.branch7x7x3", h, 4, 2), F.max_pool2d(h, 3, 2)]

    def e(self, name, h):
        pooled = windows(h).nan_to_num(-torch.inf).amax(0) if name == "Mixed_7c" \
            else windows(h).nanmean(0)
        three = self.conv(f"{name}.branch3x3_1", h)
        twice = self.chain(f"{name}.branch3x3dbl", h, 2)
        return [self.conv(f"{name}.branch1x1", h),
                *(self.conv(f"{name}.branch3x3_2{side}", three) for side in "ab"),
                *(self.conv(f"{name}.branch3x3dbl_3{side}", twice) for side in "ab"),
                self.conv(f"{name}.branch_pool", pooled)]

    def map(self, h):
        h = self.conv("Conv2d_1a_3x3", h, 2, 0)
        h = self.conv("Conv2d_2b_3x3", self.conv("Conv2d_2a_3x3", h, 1, 0))
        h = F.max_pool2d(h, 3, 2)
        h = self.conv("Conv2d_4a_3x3", self.conv("Conv2d_3b_1x1", h), 1, 0)
        h = F.max_pool2d(h, 3, 2)
        for block, names in ((self.a, ("5b", "5c", "5d")), (self.b, ("6a",)),
                             (self.c, ("6b", "6c", "6d", "6e")), (self.d, ("7a",)),
                             (self.e, ("7b", "7c"))):
            for name in names:
                h = torch.cat(block(f"Mixed_{name}", h), 1)
        return h


def windows(h):
    """The nine shifts of h, (9,B,C,H,W), NaN where a window hangs over the border."""
    height, width = h.shape[2:]
    h = F.pad(h, (1, 1, 1, 1), value=torch.nan)
    return torch.stack([h[..., i:i + height, j:j + width] for i in range(3) for j in range(3)])


def test_the_network_is_the_published_graph_and_every_number_of_the_file_acts(network, state):
    image = pictures(1, 139, 139)                          # 3 x 3 in the last blocks
    exact = {key: value.double().requires_grad_() for key, value in state.items()
             if not key.endswith("num_batches_tracked")}
    written = Written(exact)
    features = written.map(image.double()).mean((2, 3))
    ours = network._map(image).mean((2, 3))
    assert ours.shape == (1, 2048)
    assert relative(ours, features) < 1e-5

    assert written.read == exact.keys() - {"fc.weight", "fc.bias"}
    gradients = torch.autograd.grad(features.square().sum(), [exact[key] for key in written.read])
    for key, gradient in zip(written.read, gradients):
        assert gradient.isfinite().all(), key
        dead = (gradient.flatten(1) == 0).all(1) if gradient.dim() > 1 else gradient == 0
        assert dead.float().mean() < 0.5, key              # ReLU silences some channels


def bilinear(size, n):
    """(size, n): what resizing n pixels to `size` does, from the pixels' centres."""
    place = ((torch.arange(size, dtype=torch.float64) + 0.5) * n / size - 0.5).clamp(0, n - 1)
    return (1 - (place[:, None] - torch.arange(n)).abs()).clamp(min=0)


@pytest.mark.parametrize("size", [(64, 64), (40, 333), (512, 300), (299, 299)])
def test_images_are_resized_to_299_pixels_without_antialiasing(size, network, monkeypatch):
    images, seen = pictures(2, *size), []
    monkeypatch.setattr(network, "_map", lambda h: seen.append(h) or h.new_zeros(2, 2048, 1, 1))
    network(images)
    expected = bilinear(299, size[0]) @ images.double() @ bilinear(299, size[1]).T
    torch.testing.assert_close(seen[0].double(), expected, rtol=0, atol=1e-5)
    assert size != (299, 299) or torch.equal(seen[0], images)


def test_features_are_means_of_the_last_map_and_logits_leave_out_the_bias(network, state):
    maps = []
    with network.Mixed_7c.register_forward_hook(lambda module, given, h: maps.append(h)):
        features, logits = network(pictures(2, 32, 48))
    assert features.shape == (2, 2048)
    assert logits.shape == (2, 1008)
    assert features.dtype == logits.dtype == torch.float32
    assert maps[0].shape == (2, 2048, 8, 8)
    torch.testing.assert_close(features, maps[0].sum((2, 3)) / 64)
    assert relative(logits.double(), features.double() @ state["fc.weight"].double().T) < 1e-6
    assert relative(logits, network.fc(features)) > 1e-3


def test_the_network_runs_in_float32_under_autocast_and_for_half_precision_images(network):
    images = pictures(1, 64, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = network(images)
    for ours, plain in zip(inside, network(images.float())):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, plain)


def test_the_network_is_frozen_in_eval_mode_and_draws_no_number(state):
    before = torch.get_rng_state()
    network = InceptionV3(state)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())


def shallow(state, dtype=torch.float32):
    """Keys and shapes of `state`, each tensor a 1 repeated, so that a file of it is small."""
    return {key: torch.ones((), dtype=dtype if value.is_floating_point() else value.dtype)
            .expand(value.shape) for key, value in state.items()}


def test_the_weights_are_the_files_whole_and_in_float32(state, tmp_path):
    torch.save({key: value.half() if value.is_floating_point() else value
                for key, value in state.items()}, tmp_path / FILE)
    loaded = InceptionV3(str(tmp_path)).state_dict()
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        assert loaded[key].dtype == value.dtype
        assert torch.equal(loaded[key], value.half().to(value.dtype))


@pytest.mark.parametrize(("change", "complaint"), [
    ({"AuxLogits.fc.bias": torch.ones(1000)}, r"AuxLogits.fc.bias is \(1000,\), not absent"),
    ({"fc.weight": torch.ones(1000, 2048)}, r"fc.weight is \(1000, 2048\), not \(1008, 2048\)"),
    ({"Mixed_7c.branch_pool.bn.bias": None}, r"_pool.bn.bias is absent, not \(192,\)"),
])
def test_torchvisions_and_other_foreign_files_are_refused_in_one_line(
        change, complaint, state, tmp_path):
    changed = shallow(state) | change
    torch.save({key: value for key, value in changed.items() if value is not None}, tmp_path / FILE)
    with pytest.raises(UserError, match=complaint) as caught:
        InceptionV3(tmp_path)
    assert str(tmp_path / FILE) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def pytorch_fid(state):
    """pytorch-fid's network with the same random weights in place of its download."""
    pytest.importorskip("torchvision")
    module = pytest.importorskip("pytorch_fid.inception")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: state)
        return module.InceptionV3([3]).eval()


@pytest.mark.parametrize("size", [(299, 299), (64, 64), (256, 256), (100, 380), (512, 512)])
def test_features_and_logits_are_those_of_pytorch_fid(size, network, pytorch_fid, state):
    images = pictures(1, *size)
    features, logits = network(images)
    theirs = pytorch_fid((images + 1) / 2)[0][:, :, 0, 0]
    assert relative(features, theirs) < 1e-5
    assert relative(logits, theirs @ state["fc.weight"].T) < 1e-5


# -- the distance ----------------------------------------------------------------------------------


def draw(n, dim, seed=0, mean=0.0):
    """Correlated features (n,dim), float64."""
    generator = np.random.default_rng(seed)
    mix = np.random.default_rng(dim).standard_normal((dim, dim))
    return torch.from_numpy(generator.standard_normal((n, dim)) @ mix + mean)


def distance(sigma1, sigma2, mu1=None, mu2=None):
    zero = np.zeros(len(sigma1))
    return frechet_distance(zero if mu1 is None else mu1, sigma1, zero if mu2 is None else mu2,
                            sigma2)


def test_distance_of_two_by_two_covariances_that_do_not_commute():
    sigma1, sigma2 = np.array([[2.0, 1], [1, 3]]), np.array([[5.0, -2], [-2, 1]])
    with localcontext(prec=50):
        # tr(M^(1/2)) = sqrt(tr M + 2 sqrt(det M)) for two eigenvalues; det = 5 * 1
        product = Decimal(int(np.trace(sigma1 @ sigma2)))
        expected = 5 + 6 - 2 * (product + 2 * Decimal(5).sqrt()).sqrt()
    assert distance(sigma1, sigma2) == pytest.approx(float(expected), rel=1e-14)


def test_distance_of_singular_covariances():
    a, b = np.array([3.0, 4, 0, 1]), np.array([1.0, -2, 5, 0])
    full = np.array([[4.0, 1, 0, 0], [1, 3, 1, 0], [0, 1, 2, 0], [0, 0, 0, 1]])
    one, two, none = np.outer(a, a), np.outer(b, b), np.zeros((4, 4))
    assert distance(one, two) == pytest.approx(a @ a + b @ b - 2 * abs(a @ b), rel=1e-7)
    assert distance(one, full) == pytest.approx(a @ a + 10 - 2 * (a @ full @ a) ** 0.5, rel=1e-7)
    assert distance(none, full) == pytest.approx(10, rel=1e-14)
    assert distance(none, none, a, b) == pytest.approx((a - b) @ (a - b))


@pytest.mark.parametrize(("n1", "n2", "rel"), [(4, 4, 1e-6), (4, 30, 1e-6), (30, 90, 1e-12)])
def test_distance_is_that_by_singular_values_also_where_covariances_are_singular(n1, n2, rel):
    one, two = draw(n1, 20), draw(n2, 20, seed=1, mean=0.5)
    F1, F2 = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (one, two))     # sigma = F^T F
    root = torch.linalg.svdvals(F1 @ F2.T).sum()
    means = (one.mean(0) - two.mean(0)).square().sum()
    expected = means + F1.square().sum() + F2.square().sum() - 2 * root
    one, two = moments(one), moments(two)
    assert frechet_distance(*one, *two) == pytest.approx(expected.item(), rel=rel)
    assert frechet_distance(*two, *one) == pytest.approx(expected.item(), rel=rel)
    assert 0 <= frechet_distance(*one, *one) < 1e-12 * one[1].trace()


# -- mean and covariance ---------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "dim"), [(2, 6), (6, 6), (300, 6), (600, 300)])
def test_mean_and_covariance_are_numpys(n, dim):
    features = draw(n, dim)
    mu, sigma = moments(features)
    np.testing.assert_allclose(mu, features.numpy().mean(0), rtol=0, atol=1e-13)
    expected = np.cov(features.numpy(), rowvar=False)
    np.testing.assert_allclose(sigma, expected, rtol=0, atol=1e-14 * expected.max())
    assert mu.dtype == sigma.dtype == np.float64


@pytest.mark.parametrize(("n", "dim"), [(7, 9), (700, 2)])
def test_a_large_mean_costs_no_digits(n, dim):
    features = (100 + 0.1 * torch.randn(n, dim)).float()
    exact = [[Fraction(x) for x in row] for row in features.T.tolist()]
    mean = [sum(row) / n for row in exact]
    centred = [[x - mean[i] for x in row] for i, row in enumerate(exact)]
    sigma = [[float(sum(x * y for x, y in zip(one, two)) / (n - 1)) for two in centred]
             for one in centred]
    ours = moments(features)
    assert abs(ours[1] - sigma).max() < 1e-13 * np.max(sigma)
    assert abs(ours[0] - [float(m) for m in mean]).max() < 1e-12


# -- the inception score ---------------------------------------------------------------------------


def naive_score(logits, splits):
    """Per split the exponential of the mean of KL(p || mean p), with loops."""
    scores, n = [], len(logits)
    logits = logits[np.random.RandomState(2020).permutation(n)]              # torch-fidelity's
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
    certain, order = torch.eye(8).repeat(10, 1) * 1e4, np.random.RandomState(2020)
    assert inception_score(certain, splits=1) == pytest.approx((8, 0), abs=1e-12)
    halves = torch.cat([certain[:8], torch.zeros(8, 8)])   # scores 8 and 1, if they are the splits
    halves = halves[np.argsort(order.permutation(16))]
    assert inception_score(halves, splits=2) == pytest.approx((4.5, 3.5), abs=1e-12)
    few = 3 * torch.randn(4, 12)                           # fewer than splits: each is a split
    assert inception_score(few) == pytest.approx((1, 0), abs=1e-12)


def test_images_sorted_by_class_have_the_score_of_shuffled_ones():
    logits = 8 * torch.eye(100).repeat_interleave(10, 0)         # 100 classes, 10 images of each
    mixed = logits[torch.randperm(1000)]
    one, other = inception_score(logits)[0], inception_score(mixed)[0]
    assert one == pytest.approx(other, rel=0.05)
    parts = [inception_score(part, splits=1)[0] for part in logits.chunk(10)]
    assert one > 3 * np.mean(parts)                              # in order: 10 classes in a split


def test_the_score_is_computed_in_float64_and_survives_certainty():
    logits = torch.randn(40, 12).bfloat16()
    assert inception_score(logits) == inception_score(logits.double())
    assert np.isfinite(inception_score(torch.randn(40, 12) * 1e5)).all()
