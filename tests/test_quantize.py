import math

import pytest
import torch
from torch import nn

import quantize
from quantize import (
    DiagonalGaussian,
    VectorQuantizer,
    code_statistics,
    exact_float32,
    nearest_code,
)

# ---------------------------------------------------------------- the nearest code


def definition(z, codes):
    """(index, decided) of Eq. 1 from float64 differences, the lowest index on ties; decided where
    the two best distances differ by more than 1e-12 of the larger."""
    indices, decided = [], []
    for row in z.double():
        distance = (codes.double() - row).square().sum(1)
        indices.append(int((distance == distance.min()).nonzero()[0]))
        best, second = distance.topk(2, largest=False).values
        decided.append(bool(second - best > 1e-12 * second))
    return torch.tensor(indices), torch.tensor(decided)


def initial(N, K, d):
    """As at the start of training: codes near 0, encoder outputs far from all of them."""
    return torch.randn(N, d) + 3, (2 * torch.rand(K, d) - 1) / K


def offset(N, K, d, by=1e4):
    """All far from the origin, where |z|² and |e|² are alike in their first digits."""
    return torch.randn(N, d) + by, torch.randn(K, d) + by


def clusters(N, K, d, radius=1e-2):
    """Codes in tight bunches, and outputs at these very codes, slightly moved."""
    codes = torch.randn(8, d).repeat(K // 8, 1) + radius * torch.randn(K, d)
    return codes[torch.randint(K, (N,))] + radius / 2 * torch.randn(N, d), codes


def collapsed(N, K, d):
    """All codes but two in a spot, outputs spread out: the field's dead codebook."""
    codes = 0.3 + 1e-4 * torch.randn(K, d)
    codes[-2:] = torch.randn(2, d)
    return torch.randn(N, d), codes


HARD = [
    (initial, 64, 1024, 256), (initial, 256, 1024, 4), (initial, 24, 16384, 4),
    (initial, 8, 16384, 256), (offset, 128, 512, 64), (offset, 128, 512, 4),
    (clusters, 128, 512, 64), (clusters, 128, 512, 4), (collapsed, 128, 512, 16),
    (initial, 64, 512, 1), (initial, 64, 2, 8),
]


@pytest.mark.parametrize(("data", "N", "K", "d"), HARD)
def test_the_index_is_that_of_the_definition_on_hard_data(data, N, K, d):
    z, codes = data(N, K, d)
    expected, decided = definition(z, codes)
    assert decided.float().mean() > 0.9, "the case says too little"
    assert torch.equal(nearest_code(z, codes)[decided], expected[decided])


def test_none_of_16384_vectors_gets_another_code_at_the_start_of_training():
    z, codes = initial(16384, 1024, 256)
    expected = torch.cdist(z.double(), codes.double()).argmin(1)
    assert (nearest_code(z, codes) != expected).sum() == 0


def test_the_usual_expression_would_be_wrong_on_the_hard_data():
    """What makes the cases above hard."""
    z, codes = initial(2048, 1024, 4)
    expected, decided = definition(z, codes)
    usual = (z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * z @ codes.T).argmin(1)
    assert (usual != expected)[decided].any()
    assert torch.equal(nearest_code(z, codes)[decided], expected[decided])


def test_of_codes_at_the_same_distance_the_lowest_index_is_taken():
    """Whole numbers around 0, so that every score is exact in any order of summation."""
    codes = torch.randint(-2, 3, (200, 5)).float()
    codes = torch.cat([codes, -codes])[torch.randperm(400)]
    z = torch.randint(-2, 3, (300, 5)).float()
    expected, decided = definition(z, codes)
    assert not decided.all(), "no tie in the case"
    assert torch.equal(nearest_code(z, codes), expected)
    base = torch.randn(50, 16)
    copies = base.repeat(3, 1)[torch.randperm(150)]
    assert torch.equal(nearest_code(base, copies), definition(base, copies)[0])
    assert (nearest_code(torch.randn(9, 16), torch.ones(40, 16)) == 0).all()
    none = nearest_code(torch.randn(0, 3), torch.randn(7, 3))
    assert (none.shape, none.dtype) == ((0,), torch.int64)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float64, torch.float32),
                                    (torch.bfloat16, torch.float32),
                                    (torch.bfloat16, torch.bfloat16)], ids=str)
def test_any_float_type_is_compared_at_its_own_values(dtypes):
    # Around 1e4 float32 would round the float64 values to steps of 1e-3.
    z, codes = offset(100, 60, 6, by=1e4 if dtypes[0] == torch.float64 else 0)
    z = (torch.randn(100, 6, dtype=torch.float64) * 1e-3 + z.double().mean()).to(dtypes[0])
    codes = (torch.randn(60, 6, dtype=torch.float64) * 1e-3 + codes.double().mean()).to(dtypes[1])
    expected, decided = definition(z, codes)
    assert torch.equal(nearest_code(z, codes)[decided], expected[decided])


@pytest.fixture
def scores(monkeypatch):
    """The scores that nearest_code forms, each with the state of the machine at that moment."""
    made, addmm = [], torch.addmm

    def spy(*args, **kwargs):
        made.append((addmm(*args, **kwargs), torch.is_grad_enabled(),
                     torch.is_autocast_enabled("cpu"), *precisions()))
        return made[-1][0]

    monkeypatch.setattr(torch, "addmm", spy)
    return made


def precisions():
    return [backend.fp32_precision for backend in (torch.backends.cuda.matmul,
                                                   torch.backends.mkldnn.matmul)]


@pytest.fixture
def _keep_precision():
    backends = [torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [backend.fp32_precision for backend in backends]
    yield
    torch.set_float32_matmul_precision("highest")
    for backend, precision in zip(backends, before):
        backend.fp32_precision = precision


@pytest.mark.usefixtures("_keep_precision")
@pytest.mark.parametrize("setting", ["medium", "high", "newer"])
def test_scores_are_plain_float32_without_a_graph_whatever_the_surroundings(scores, setting):
    z, codes = initial(64, 256, 32)
    expected, _ = definition(z, codes)
    if setting == "newer":                       # the setting that torch 2.9 added
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    else:
        torch.set_float32_matmul_precision(setting)
    before = precisions()
    with torch.autocast("cpu", torch.bfloat16):
        indices = nearest_code(z.requires_grad_(), codes.requires_grad_())
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(indices, expected)
    assert {(score.dtype, *state) for score, *state in scores} == {
        (torch.float32, False, False, "ieee", "ieee")}
    with pytest.raises(RuntimeError):            # after an error, too, the setting is as before
        nearest_code(torch.randn(4, 3), torch.randn(4, 5))
    assert before == precisions()


def test_neither_tf32_nor_bf16_products_inside_exact_float32_and_as_before_outside():
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    with exact_float32():
        assert [backend.fp32_precision for backend in backends] == 3 * ["ieee"]
    assert [backend.fp32_precision for backend in backends] == before


def test_a_large_codebooks_scores_are_never_held_at_once_and_chunks_change_nothing(scores,
                                                                                  monkeypatch):
    nearest_code(*initial(300, 16384, 4))
    assert max(score.numel() for score, *_ in scores) <= quantize.MAX_SCORES == 2**21
    assert sum(len(score) for score, *_ in scores) == 300
    z, codes = initial(200, 300, 8)
    whole = nearest_code(z, codes)
    for rows in (1, 7, 199):
        monkeypatch.setattr(quantize, "MAX_SCORES", 300 * rows)
        assert torch.equal(nearest_code(z, codes), whole)


# ---------------------------------------------------------------- the quantiser


@pytest.mark.parametrize("beta", [0.25, 0.6])
@pytest.mark.parametrize("legacy", [False, True])
def test_beta_weighs_the_encoders_gradient_and_in_legacy_order_the_codebooks(beta, legacy):
    quantizer = VectorQuantizer(12, 5, beta=beta, legacy_beta=legacy)
    nn.init.normal_(quantizer.embedding.weight)
    z_e = torch.randn(2, 5, 3, 4, requires_grad=True)
    _, indices, loss = quantizer(z_e)
    loss.backward()
    flat = z_e.detach().permute(0, 2, 3, 1).reshape(-1, 5)                  # (B·h·w, d)
    difference = flat - quantizer.embedding.weight.detach()[indices.flatten()]
    by_z = (2 / z_e.numel() * difference).view(2, 3, 4, 5).permute(0, 3, 1, 2)
    by_codes = torch.stack([-2 / z_e.numel() * difference[indices.flatten() == k].sum(0)
                            for k in range(12)])
    assert loss.item() == pytest.approx((1 + beta) * difference.square().mean().item(), rel=1e-5)
    on_encoder, on_codebook = (1, beta) if legacy else (beta, 1)
    torch.testing.assert_close(z_e.grad, on_encoder * by_z, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(quantizer.embedding.weight.grad, on_codebook * by_codes,
                               rtol=1e-5, atol=1e-8)


def test_adam_moves_the_codes_alike_in_both_orders_of_beta_and_plain_descent_does_not():
    def moved(legacy, optimizer, lr):
        torch.manual_seed(0)
        quantizer = VectorQuantizer(12, 5, legacy_beta=legacy, code_range=1)
        before = quantizer.embedding.weight.detach().clone()
        quantizer(torch.randn(2, 5, 3, 4))[2].backward()
        optimizer(quantizer.parameters(), lr=lr).step()
        return quantizer.embedding.weight.detach() - before

    adam, descent = ([moved(legacy, optimizer, lr) for legacy in (False, True)]
                     for optimizer, lr in ((torch.optim.Adam, 1e-3), (torch.optim.SGD, 1)))
    torch.testing.assert_close(adam[1], adam[0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(descent[1], 0.25 * descent[0], rtol=1e-3, atol=1e-6)


def test_gradients_pass_straight_through_to_the_encoder_and_not_to_the_codebook():
    quantizer = VectorQuantizer(8, 3)
    z_e = torch.randn(2, 3, 4, 4, requires_grad=True)
    z_q, _, _ = quantizer(z_e)
    direction = torch.randn_like(z_q)
    (z_q * direction).sum().backward()
    assert torch.equal(z_e.grad, direction)
    assert quantizer.embedding.weight.grad is None


def test_the_quantised_vectors_are_the_nearest_codes_bit_for_bit():
    quantizer = VectorQuantizer(32, 3)
    z_e = 1e4 * torch.randn(2, 3, 4, 5)          # z_e + (z_q - z_e) would lose every digit of z_q
    z_q, indices, _ = quantizer(z_e)
    expected, _ = definition(z_e.permute(0, 2, 3, 1).reshape(-1, 3), quantizer.embedding.weight)
    assert torch.equal(indices, expected.view(2, 4, 5))
    assert torch.equal(z_q, quantizer.lookup(indices))
    for b, i, j in [(0, 0, 0), (1, 3, 4), (0, 2, 1)]:
        assert torch.equal(z_q[b, :, i, j], quantizer.embedding.weight[indices[b, i, j]])


def test_the_quantiser_is_float32_under_autocast():
    quantizer = VectorQuantizer(64, 8)
    z_e = torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(z_e)
    for a, b in zip(inside, quantizer(z_e)):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize(("code_range", "most"), [(None, 1 / 500), (0.3, 0.3)])
def test_codes_start_uniform_within_one_over_k_or_the_range_asked_for(code_range, most):
    weight = VectorQuantizer(500, 40, code_range=code_range).embedding.weight
    assert weight.abs().max() <= most
    assert weight.std().item() == pytest.approx(most / 3 ** 0.5, rel=0.02)


def test_usage_and_perplexity_of_a_known_assignment():
    counts = torch.tensor([5, 2, 0, 0, 1, 0, 0, 0])
    entropy = -sum(p * math.log(p) for p in (5 / 8, 2 / 8, 1 / 8))
    assert code_statistics(counts) == {"K": 8, "usage": 3 / 8,
                                       "perplexity": pytest.approx(math.exp(entropy))}
    even, one = (code_statistics(torch.tensor(counts)) for counts in ([5] * 8, [0, 48, 0]))
    assert (even["usage"], even["perplexity"]) == (1, pytest.approx(8))
    assert (one["usage"], one["perplexity"]) == (1 / 3, 1)


# ---------------------------------------------------------------- the KL latent


def test_kl_is_the_closed_form_summed_over_each_image():
    gaussian = DiagonalGaussian(torch.randn(3, 8, 2, 5))
    q = torch.distributions.Normal(gaussian.mean, (gaussian.logvar / 2).exp())
    p = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(q, p).sum((1, 2, 3))
    torch.testing.assert_close(gaussian.kl(), expected)
    assert gaussian.kl().shape == (3,)
    assert DiagonalGaussian(torch.zeros(1, 8, 2, 2)).kl().item() == 0


def test_logvar_is_clamped_to_minus_30_and_20_and_has_no_gradient_beyond():
    moments = torch.zeros(1, 2, 1, 4)
    moments[0, 1, 0] = torch.tensor([-100.0, -30.0, 20.0, 1000.0])
    moments.requires_grad_()
    gaussian = DiagonalGaussian(moments)
    assert gaussian.logvar.flatten().tolist() == [-30, -30, 20, 20]
    gaussian.kl().sum().backward()
    assert moments.grad.isfinite().all()
    assert (moments.grad[0, 1, 0, [0, 3]] == 0).all()


def test_a_sample_is_mean_plus_std_times_noise_and_has_that_gradient():
    moments = torch.randn(2, 6, 3, 3, requires_grad=True)
    gaussian = DiagonalGaussian(moments)
    assert torch.equal(gaussian.mode(), moments[:, :3])
    assert torch.equal(gaussian.logvar, moments[:, 3:])
    sample = gaussian.sample(torch.Generator().manual_seed(1))
    noise = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    std = (gaussian.logvar / 2).exp()
    torch.testing.assert_close(sample, gaussian.mean + std * noise)
    sample.sum().backward()
    torch.testing.assert_close(moments.grad[:, :3], torch.ones(2, 3, 3, 3))
    torch.testing.assert_close(moments.grad[:, 3:], (0.5 * std * noise).detach())


def test_one_generator_for_each_image_makes_its_noise_independent_of_the_batch():
    moments = torch.randn(4, 6, 3, 5)

    def sample(images):
        generators = [torch.Generator().manual_seed(100 + i) for i in images]
        return DiagonalGaussian(moments[images]).sample(generators)

    whole = sample([0, 1, 2, 3])
    assert torch.equal(sample([2, 0]), whole[[2, 0]])
    assert torch.equal(sample([3]), whole[3:])
    with pytest.raises(ValueError, match="shorter"):
        DiagonalGaussian(moments).sample([torch.Generator()])


def test_the_gaussian_is_float32_even_of_bf16_moments():
    gaussian = DiagonalGaussian(torch.randn(1, 4, 2, 2).bfloat16())
    assert gaussian.sample().dtype == gaussian.kl().dtype == gaussian.mode().dtype == torch.float32
