"""The losses and their balance against naive formulas."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ports import free_port
from torch import nn

import losses
from distributed import UserError
from losses import (
    LPIPS,
    TRUNKS,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    frozen,
    generator_gan_loss,
    pixel_loss,
)

NETS = ("vgg", "alex", "squeeze")


def random_weights(net):
    """Fill what the two files of `net` hold with random numbers: He-scaled trunk, heads >= 0."""
    build, _, _, widths = TRUNKS[net]
    state = {f"features.{key}": torch.randn(value.shape) * (2 / value[0].numel()) ** 0.5
             if value.dim() == 4 else 0.1 * torch.randn(value.shape)
             for key, value in build().state_dict().items()}
    return state | {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1)
                    for k, width in enumerate(widths)}


def write_files(folder, net, state, trunk_extra=(), dtype=torch.float32):
    """The two files in the published format; returns (trunk's, heads') path."""
    trunk = {key: value.to(dtype) for key, value in state.items() if key.startswith("features.")}
    heads = {key: value.to(dtype) for key, value in state.items() if key.startswith("lin")}
    paths = folder / TRUNKS[net][1], folder / f"{net}.pth"
    torch.save(trunk | dict(trunk_extra), paths[0])
    torch.save(heads, paths[1])
    return paths


# ---------------------------------------------------------------- pixel loss and LPIPS


@pytest.mark.parametrize("network", [*NETS, 1, 2, 3])
def test_the_least_side_is_the_least_that_leaves_something_after_all_layers(network):
    with torch.device("meta" if network in NETS else "cpu"):     # torch 2.11's meta checks less
        if network in NETS:
            layers, least = TRUNKS[network][0](), LPIPS(network, random_weights(network)).least_side
        else:
            layers, least = PatchDiscriminator(n_layers=network).eval(), 3 * 2**network
        assert layers(torch.empty(1, 3, least, least + 9)).numel()
        with pytest.raises(RuntimeError, match=r"[Ss]ize|[Kk]ernel"):
            layers(torch.empty(1, 3, least - 1, least + 9))


def test_pixel_loss_is_the_mean_absolute_difference_or_the_squared_one():
    a, b = torch.randn(2, 2, 3, 4, 5)
    errors = [abs(float(p) - float(q)) for p, q in zip(a.flatten(), b.flatten())]
    assert pixel_loss(a, b).item() == pytest.approx(sum(errors) / a.numel(), rel=1e-6)
    squared = sum(error**2 for error in errors) / a.numel()
    assert pixel_loss(a, b, "l2").item() == pytest.approx(squared, rel=1e-6)
    assert pixel_loss(a, b).dim() == 0
    with pytest.raises(ValueError, match="l1, l2"):
        pixel_loss(a, b, "l3")


def naive_squeezenet(state, h):
    """The seven tapped layers of SqueezeNet 1.1, written out."""
    def conv(name, h, **kwargs):
        return F.relu(F.conv2d(h, state[f"{name}.weight"], state[f"{name}.bias"], **kwargs))

    def fire(n, h):
        h = conv(f"features.{n}.squeeze", h)
        return torch.cat([conv(f"features.{n}.expand1x1", h),
                          conv(f"features.{n}.expand3x3", h, padding=1)], 1)

    def pool(h):  # windows that hang over the edge count, too
        return F.max_pool2d(F.pad(h, (0, (h.shape[3] - 3) % 2, 0, (h.shape[2] - 3) % 2)), 3, 2)

    one = conv("features.0", h, stride=2)
    two = fire(4, fire(3, pool(one)))
    three = fire(7, fire(6, pool(two)))
    four = fire(9, pool(three))
    five = fire(10, four)
    six = fire(11, five)
    return one, two, three, four, five, six, fire(12, six)


def naive_plain(state, h, net):
    """The tapped layers of VGG16 or AlexNet: a pool where torchvision's numbering leaves a gap."""
    tapped, last = [], 0
    kernel, wide = (2, {}) if net == "vgg" else (3, {"features.0": (4, 2), "features.3": (1, 2)})
    for n in sorted({int(key.split(".")[1]) for key in state if key.startswith("features.")}):
        if n - last == 3:
            h = F.max_pool2d(h, kernel, 2)
        stride, padding = wide.get(f"features.{n}", (1, 1))
        h = F.relu(F.conv2d(h, state[f"features.{n}.weight"], state[f"features.{n}.bias"],
                            stride, padding))
        tapped.append(h)
        last = n
    return [tapped[n] for n in (1, 3, 6, 9, 12)] if net == "vgg" else tapped


def naive_lpips(state, a, b, net):
    shift, scale = torch.tensor([-.030, -.088, -.188]), torch.tensor([.458, .448, .450])
    total = torch.zeros(len(a))
    levels = [naive_squeezenet(state, h) if net == "squeeze" else naive_plain(state, h, net)
              for h in ((i - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for i in (a, b))]
    for k, (phi_a, phi_b) in enumerate(zip(*levels)):
        phi_a, phi_b = (p / ((p * p).sum(1, keepdim=True).sqrt() + 1e-10) for p in (phi_a, phi_b))
        weight = state[f"lin{k}.model.1.weight"].view(-1, 1, 1)
        total += (weight * (phi_a - phi_b) ** 2).sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize("net", NETS)
def test_lpips_is_the_formula_written_out_for_each_trunk(net):
    state = random_weights(net)
    a, b = torch.rand(2, 2, 3, 70, 64) * 2 - 1  # 70: the pools of squeeze must round up
    torch.testing.assert_close(LPIPS(net, state)(a, b), naive_lpips(state, a, b, net),
                               rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("net", NETS)
def test_lpips_equals_the_lpips_package_with_the_same_weights(net):
    pytest.importorskip("torchvision")
    package = pytest.importorskip("lpips").LPIPS(
        net=net, pnet_rand=True, pretrained=False, verbose=False)
    state = random_weights(net)
    theirs = {key: value for key, value in state.items() if key.startswith("lin")}
    # The package cuts the trunk into slices and keeps torchvision's number as the last part.
    numbers = {key.split(".", 2)[2]: key for key in package.state_dict()
               if key.startswith("net.slice")}
    theirs |= {numbers[key.removeprefix("features.")]: value
               for key, value in state.items() if key.startswith("features.")}
    missing, unknown = package.load_state_dict(theirs, strict=False)
    assert not unknown
    assert all(key.startswith(("scaling_layer.", "lins.")) for key in missing)
    a, b = torch.rand(2, 2, 3, 64, 96) * 2 - 1
    a.requires_grad_()
    ours, peer = LPIPS(net, state)(a, b), package(a, b).view(-1)
    torch.testing.assert_close(ours, peer, rtol=1e-6, atol=1e-6)
    ours, peer = (torch.autograd.grad(value.sum(), a)[0] for value in (ours, peer))
    assert (ours - peer).abs().max() < 1e-5 * peer.abs().max()


@pytest.mark.parametrize("net", NETS)
def test_lpips_has_a_finite_gradient_where_all_features_are_zero(net):
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    lpips = LPIPS(net, {key: 0 * value for key, value in random_weights(net).items()})
    for index, layer in enumerate(lpips.features):
        if isinstance(layer, nn.ReLU):  # whose own backward would turn a NaN at 0 into 0
            lpips.features[index] = nn.Identity()
    value = lpips(image, torch.randn(1, 3, 64, 64)).sum()
    value.backward()
    assert value.item() == 0
    assert image.grad.isfinite().all()


def test_unit_length_changes_only_the_gradient_at_zero():
    features = torch.randn(2, 5, 4, 4) * torch.logspace(-6, 2, 4)
    features[0, :, 0, 0] = 0
    features.requires_grad_()
    plain = features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
    safe = losses._unit_length(features)
    torch.testing.assert_close(safe, plain, rtol=0, atol=1e-6)
    direction = torch.randn_like(plain)
    ours, naive = (torch.autograd.grad((v * direction).sum(), features)[0] for v in (safe, plain))
    assert naive[0, :, 0, 0].isnan().all()
    assert ours.isfinite().all()
    naive[0, :, 0, 0] = ours[0, :, 0, 0]
    torch.testing.assert_close(ours, naive)


def test_lpips_is_frozen_in_eval_mode_and_draws_no_random_numbers():
    state, before = random_weights("alex"), torch.get_rng_state()
    lpips = LPIPS("alex", state)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in lpips.modules())
    assert not any(p.requires_grad for p in lpips.parameters())


def test_lpips_runs_in_float32_under_autocast():
    lpips = LPIPS("alex", random_weights("alex"))
    a, b = torch.rand(2, 1, 3, 64, 64) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        inside = lpips(a, b)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, lpips(a, b))
    assert lpips(a.bfloat16(), b.bfloat16()).dtype == torch.float32


# ---------------------------------------------------------------- weight files


@pytest.mark.parametrize(("net", "dtype"), [("alex", torch.float16), ("squeeze", torch.bfloat16),
                                            ("alex", torch.float64)])
def test_any_float_type_is_read_and_the_classifier_is_ignored(net, dtype, tmp_path):
    state = {key: value.to(dtype) for key, value in random_weights(net).items()}
    write_files(tmp_path, net, state, {"classifier.1.weight": torch.ones(10, 4)}, dtype)
    lpips = LPIPS(net, str(tmp_path))
    assert {p.dtype for p in lpips.parameters()} == {torch.float32}
    assert all(torch.equal(value, state[key].float()) for key, value in lpips.state_dict().items())


def test_by_default_the_files_are_read_from_torch_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    state = random_weights("alex")
    write_files(tmp_path / "checkpoints", "alex", state)
    assert torch.equal(LPIPS("alex").lin0.model[1].weight, state["lin0.model.1.weight"])


def refusal(folder):
    """Load AlexNet's files from `folder`; return the error, which must be one line."""
    with pytest.raises(UserError) as caught:
        LPIPS("alex", folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("which", "change", "complaint"), [
    (0, {"features.99.weight": torch.ones(1)}, "features.99.weight is (1,), not absent"),
    (0, {"features.0.bias": torch.ones(7)}, "features.0.bias is (7,), not (64,)"),
    (1, {"classifier.0": torch.ones(1)}, "classifier.0 is (1,), not absent"),
    (1, {"lin4.model.1.weight": None}, "lin4.model.1.weight is absent, not (1, 256, 1, 1)")])
def test_other_keys_and_shapes_are_refused_in_one_line(which, change, complaint, tmp_path):
    paths = write_files(tmp_path, "alex", random_weights("alex"))
    state = torch.load(paths[which]) | change
    torch.save({key: value for key, value in state.items() if value is not None}, paths[which])
    assert f"{paths[which]}: {complaint}" in refusal(tmp_path)


class _Trap:
    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", [1, 2],
                                     {"features.0.bias": _Trap()}])
def test_a_damaged_file_is_named_in_one_line_and_runs_no_code(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, _ = write_files(tmp_path, "alex", random_weights("alex"))
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert f"{path}: truncated or no checkpoint" in refusal(tmp_path)
    assert not Path("trapped").exists()


def test_a_web_page_in_the_place_of_the_weights_is_named(tmp_path):
    path, _ = write_files(tmp_path, "alex", random_weights("alex"))
    path.write_bytes(b"<html>not found</html>")
    assert f"{path}: a web page; download the file itself" in refusal(tmp_path)


# ---------------------------------------------------------------- the discriminator


def test_the_discriminator_has_tamings_parameters_and_key_names():
    for n_layers, count in ((3, 2_765_633), (2, 663_361)):
        network = PatchDiscriminator(3, 64, n_layers)
        assert sum(p.numel() for p in network.parameters()) == count
    keys = set(PatchDiscriminator(3, 8, 3).state_dict())
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert keys == {f"main.{n}.{k}" for n in (0, 11) for k in ("weight", "bias")} | {
        f"main.{n}.weight" for n in (2, 5, 8)} | {f"main.{n}.{k}" for n in (3, 6, 9) for k in norm}
    convolutions = [m for m in PatchDiscriminator(3, 4, 5).main if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [4, 8, 16, 32, 32, 32, 1]   # to eightfold
    assert [m.stride[0] for m in convolutions] == [2, 2, 2, 2, 2, 1, 1]


def test_the_discriminator_is_the_layers_written_out():
    discriminator = PatchDiscriminator(3, 8, 2).eval()
    state = discriminator.state_dict()
    image = torch.randn(2, 3, 32, 32)
    h = F.leaky_relu(F.conv2d(image, state["main.0.weight"], state["main.0.bias"], 2, 1), 0.2)
    for n, stride in ((2, 2), (5, 1)):
        h = F.conv2d(h, state[f"main.{n}.weight"], None, stride, 1) / (1 + 1e-5) ** 0.5
        h = h * state[f"main.{n + 1}.weight"].view(-1, 1, 1)
        h = F.leaky_relu(h, 0.2)
    h = F.conv2d(h, state["main.8.weight"], state["main.8.bias"], 1, 1)
    assert h.shape == (2, 1, 6, 6)
    torch.testing.assert_close(discriminator(image), h)


def test_the_discriminator_starts_from_tamings_distributions():
    for layer in PatchDiscriminator(3, 64, 3).main:
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.mean().abs() < 4 * 0.02 / layer.weight.numel() ** 0.5
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.25)
            assert not layer.bias.any()


# ---------------------------------------------------------------- hinge and log


LOGITS = torch.tensor([-3.0, -1.5, -0.2, 0.0, 0.3, 0.9, 1.1, 4.0], dtype=torch.float64)


def naive_gan(real, fake, gan):
    """(discriminator's, generator's loss), each term by itself."""
    if gan == "hinge":
        d = [0.5 * max(0, 1 - r) / len(real) for r in real]
        d += [0.5 * max(0, 1 + f) / len(fake) for f in fake]
        return sum(d), sum(-f for f in fake) / len(fake)
    real, fake = (1 / (1 + (-logits).exp()) for logits in (real, fake))  # D(x), D(x_hat)
    value = real.log().mean() + (1 - fake).log().mean()  # Eq. 7
    return -value, (1 - fake).log().mean()


@pytest.mark.parametrize("gan", ["hinge", "log"])
def test_both_players_losses_and_gradients_are_the_naive_formulas(gan):
    real, fake = LOGITS.clone().requires_grad_(), (LOGITS.flip(0) * 0.7 + 0.1).requires_grad_()
    ours = discriminator_loss(real, fake, gan), generator_gan_loss(fake, gan)
    for mine, naive in zip(ours, naive_gan(real, fake, gan)):
        torch.testing.assert_close(mine, naive, rtol=1e-12, atol=0)
        mine, naive = (torch.autograd.grad(v, (real, fake), retain_graph=True, allow_unused=True)
                       for v in (mine, naive))
        for a, b in zip(mine, naive):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, rtol=1e-12, atol=1e-15)


def test_an_undecided_discriminator_pays_1_by_hinge_and_2_log_2_by_log():
    zero = torch.zeros(2, 1, 6, 6)
    assert discriminator_loss(zero, zero).item() == 1
    assert discriminator_loss(zero, zero, "log").item() == pytest.approx(1.3862944)


@pytest.mark.parametrize("gan", ["hinge", "log"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_no_logit_is_large_enough_to_overflow(gan, sign):
    logits = torch.full((4,), sign * 1e4, requires_grad=True)
    for loss in (discriminator_loss(logits, logits, gan), generator_gan_loss(logits, gan)):
        assert loss.isfinite()
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize(("call", "complaint"), [
    (lambda: LPIPS("vgg19"), "LPIPS net 'vgg19': expected one of vgg, alex, squeeze"),
    (lambda: discriminator_loss(LOGITS, LOGITS, "wgan"), "gan 'wgan': expected one of hinge, log"),
    (lambda: generator_gan_loss(LOGITS, "wgan"), "gan 'wgan': expected one of hinge, log"),
    (lambda: adaptive_weight(LOGITS, LOGITS, LOGITS, "dome"),
     "lambda 'dome': expected one of paper, taming")])
def test_an_unknown_choice_is_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()


# ---------------------------------------------------------------- lambda


def losses_with_gradients(*gradients):
    """(a weight, scalar losses whose gradients with respect to it are these)."""
    weight = torch.ones(2, requires_grad=True)
    return weight, [(weight * torch.tensor(g)).sum() for g in gradients]


def test_the_papers_lambda_is_the_ratio_of_norms_without_clamp():
    weight, (rec, gan, nothing) = losses_with_gradients([3.0, 4.0], [0.0, 0.5], [0.0, 0.0])
    assert adaptive_weight(rec, gan, weight).item() == pytest.approx(5 / (0.5 + 1e-4))
    assert adaptive_weight(rec, nothing, weight).item() == pytest.approx(5e4)


def test_tamings_lambda_is_clamped_at_1e4_and_scaled_by_0_8():
    weight, (rec, gan, nothing) = losses_with_gradients([3.0, 4.0], [0.0, 0.5], [0.0, 0.0])
    taming = adaptive_weight(rec, gan, weight, "taming")
    assert taming.item() == pytest.approx(0.8 * 5 / (0.5 + 1e-4))
    assert adaptive_weight(rec, nothing, weight, "taming").item() == pytest.approx(8000)


def test_latent_diffusions_lambda_is_clamped_at_1e4_of_a_sum_over_the_elements_and_halved():
    weight, (rec, gan, nothing) = losses_with_gradients([3.0, 4.0], [0.0, 0.5], [0.0, 0.0])
    for gan_loss, elements in ((gan, 12), (gan, 3072), (nothing, 12)):
        ratio = 5 * elements / ((0.5 if gan_loss is gan else 0) + 1e-4)         # of the sum's norm
        ours = adaptive_weight(rec, gan_loss, weight, "ldm", elements)
        assert ours.item() * elements == pytest.approx(0.5 * min(ratio, 1e4))


def test_lambda_keeps_the_losses_graphs_has_none_and_leaves_no_gradient_behind():
    weight, (rec, gan) = losses_with_gradients([3.0, 4.0], [0.0, 0.5])
    lam = adaptive_weight(rec, gan, weight)
    assert not lam.requires_grad
    assert weight.grad is None
    (rec + lam * gan).backward()
    torch.testing.assert_close(weight.grad, torch.tensor([3.0, 4.0]) + lam * torch.tensor([0, 0.5]))


def test_a_frozen_network_passes_gradients_on_and_gets_none():
    discriminator = PatchDiscriminator(3, 4, 1)
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    with frozen(discriminator):
        loss = generator_gan_loss(discriminator(x))
    assert all(p.requires_grad for p in discriminator.parameters())
    loss.backward()
    assert x.grad.any()
    assert all(p.grad is None for p in discriminator.parameters())
    with pytest.raises(ZeroDivisionError), frozen(discriminator):
        raise ZeroDivisionError
    assert all(p.requires_grad for p in discriminator.parameters())


TWO_PROCESSES = """
import json, sys
sys.path[:0] = sys.argv[1:3]
from distributed import close, rank, setup
from test_losses import small_lambda
setup("cpu")
print(json.dumps(small_lambda(slice(rank(), rank() + 1), sys.argv[3])))
close()
"""


def small_lambda(images, rule):
    """lambda of a small generator on some of two images, in float64."""
    torch.manual_seed(1)
    layer, discriminator = nn.Conv2d(4, 3, 3, padding=1).double(), PatchDiscriminator(3, 4, 2)
    discriminator.double().eval()
    h = torch.randn(2, 4, 32, 32, dtype=torch.float64)[images]
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)[images]
    x_hat = layer(h)
    return adaptive_weight(pixel_loss(x_hat, x), generator_gan_loss(discriminator(x_hat)),
                           layer.weight, rule).item()


@pytest.mark.parametrize("rule", ["paper", "taming"])
def test_two_processes_share_the_lambda_of_the_whole_batch(rule):
    here = Path(__file__).resolve().parent
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    run = [subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, here, here.parent, rule],
                            stdout=subprocess.PIPE, env=os.environ | group | {"RANK": str(rank)})
           for rank in range(2)]
    lambdas = [json.loads(process.communicate(timeout=120)[0]) for process in run]
    whole = small_lambda(slice(0, 2), rule)
    halves = [small_lambda(slice(i, i + 1), rule) for i in range(2)]
    assert lambdas[0] == lambdas[1] == pytest.approx(whole, rel=1e-12)
    assert abs(sum(halves) / 2 - whole) > 1e-6 * whole  # the mean of the lambdas would not do
