"""The Inception network against its graph written out, and against the programs it must agree with.

The network always sees 299 x 299 pixels; what does not depend on that is tested on smaller ones.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distributed import UserError
from inception import FILE, InceptionV3, average_pool, maximum_pool
from weights import PUBLISHED_FILES


def empty_network():
    """The network without its numbers, for its keys and shapes."""
    network = InceptionV3.__new__(InceptionV3)
    nn.Module.__init__(network)
    with torch.device("meta"):
        network._build()
    return network


def random_weights():
    """What the published file holds, with random numbers: He-scaled, so that all layers live."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in empty_network().state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        match key.rsplit(".", 2)[-2:]:
            case ["conv", "weight"]:
                state[key] = noise * (2 / value[0].numel()) ** 0.5
            case ["fc", "weight"]:
                state[key] = noise / value.shape[1] ** 0.5
            case ["bn", "weight" | "running_var"]:
                state[key] = 1 + 0.2 * noise.tanh()
            case ["bn", "num_batches_tracked"]:
                state[key] = torch.tensor(0)
            case _:
                state[key] = 0.1 * noise
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


# ---------------------------------------------------------------- the graph, written out


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


def test_number_and_names_of_the_weights_are_those_of_the_published_network():
    network = empty_network()
    convolutions = [name for name, module in network.named_modules()
                    if isinstance(module, nn.Conv2d)]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert len(convolutions) == 94
    assert set(network.state_dict()) == {"fc.weight", "fc.bias"} | {
        f"{name}.weight" for name in convolutions} | {
        f"{name.removesuffix('conv')}bn.{key}" for name in convolutions for key in norm}
    # torchvision's 27,161,264, less the auxiliary classifier, with eight classes more
    auxiliary = 768 * 128 + 2 * 128 + 128 * 768 * 25 + 2 * 768 + 769 * 1000
    assert sum(p.numel() for p in network.parameters()) == 27_161_264 - auxiliary + 8 * 2049


def test_average_pools_leave_out_the_padding():
    h = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(average_pool(h), windows(h).nanmean(0))
    assert torch.equal(average_pool(torch.ones(1, 1, 2, 3)), torch.ones(1, 1, 2, 3))


def test_the_very_last_block_takes_the_maximum_and_the_one_before_it_the_average(network):
    h = -torch.rand(2, 3, 5, 4)                            # padding by zeros would win everywhere
    assert torch.equal(maximum_pool(h), windows(h).nan_to_num(-torch.inf).amax(0))
    assert network.Mixed_7c.pool is maximum_pool
    assert network.Mixed_7b.pool is average_pool


# ---------------------------------------------------------------- images in, two answers out


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


def test_the_network_is_frozen_and_a_parents_train_does_not_reach_it(state):
    parent = nn.ModuleList([InceptionV3(state)]).train()
    assert parent.training
    assert not any(module.training for module in parent[0].modules())
    assert not any(p.requires_grad for p in parent[0].parameters())


# ---------------------------------------------------------------- the file


def shallow(state, dtype=torch.float32):
    """Keys and shapes of `state`, each tensor a 1 repeated, so that a file of it is small."""
    return {key: torch.ones((), dtype=dtype if value.is_floating_point() else value.dtype)
            .expand(value.shape) for key, value in state.items()}


def test_building_the_network_draws_no_random_numbers(state):
    before = torch.get_rng_state()
    InceptionV3(state)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_weights_are_the_files_whole_and_in_float32(state, tmp_path):
    torch.save({key: value.half() if value.is_floating_point() else value
                for key, value in state.items()}, tmp_path / FILE)
    loaded = InceptionV3(str(tmp_path)).state_dict()
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        assert loaded[key].dtype == value.dtype
        assert torch.equal(loaded[key], value.half().to(value.dtype))


def test_by_default_the_file_is_read_from_torch_hubs_cache(state, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(shallow(state), tmp_path / "checkpoints" / FILE)
    assert InceptionV3().fc.bias.tolist() == [1] * 1008


@pytest.mark.parametrize(("change", "complaint"), [
    ({"AuxLogits.fc.bias": torch.ones(1000)}, "unknown key AuxLogits.fc.bias"),
    ({"fc.weight": torch.ones(1000, 2048)}, r"fc.weight is \(1000, 2048\), not \(1008, 2048\)"),
    ({"Mixed_7c.branch_pool.bn.bias": None}, "no key Mixed_7c.branch_pool.bn.bias"),
])
def test_torchvisions_and_other_foreign_files_are_refused_in_one_line(
        change, complaint, state, tmp_path):
    changed = shallow(state) | change
    torch.save({key: value for key, value in changed.items() if value is not None}, tmp_path / FILE)
    with pytest.raises(UserError, match=complaint) as caught:
        InceptionV3(tmp_path)
    assert str(tmp_path / FILE) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_with_its_address(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError, match=f"get {PUBLISHED_FILES[FILE][0]}{FILE} and put it there"):
        InceptionV3(tmp_path)


def test_a_state_dict_with_a_key_missing_or_too_many_is_refused(state):
    for wrong in (state | {"extra": torch.ones(1)},
                  {key: value for key, value in state.items() if key != "fc.bias"}):
        with pytest.raises(RuntimeError, match=r"fc\.bias|extra"):
            InceptionV3(wrong)


# ---------------------------------------------------------------- other programs


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


def test_logits_are_torch_fidelitys_unbiased_ones(network, state, tmp_path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.save(state, tmp_path / "weights.pth")
    names = ["2048", "logits_unbiased", "logits"]
    peer = module.FeatureExtractorInceptionV3("peer", names, str(tmp_path / "weights.pth"))
    pixels = (pictures(1, 299, 299) * 127.5 + 127.5).round().to(torch.uint8)
    theirs = peer(pixels)
    features, logits = network((pixels.float() - 128) / 128)
    for ours, peers in zip((features, logits, logits + network.fc.bias), theirs):
        assert relative(ours, peers) < 1e-5
