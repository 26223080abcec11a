import itertools
import math

import pytest
import torch
from dense_diffusion import matrix, posterior
from scipy.stats import chisquare

from seeding import per_image, uniforms
from uniform_noise import UniformNoise, cosine_schedule, draw_codes

K, T = 4, 6
PAIRS = list(itertools.combinations(range(T + 1), 2))                       # all s < t


def noise(K=K, T=T, schedule="cosine"):
    return UniformNoise(K, T, schedule)


def every_case(process, s, t):
    """All (z_t, z_0) of one cell as a batch: z_t, z_0 (K²,1,1), t, s (K²,)."""
    i, j = torch.meshgrid(torch.arange(process.K), torch.arange(process.K), indexing="ij")
    times = torch.full((2, process.K ** 2), t)
    times[1] = s
    return i.reshape(-1, 1, 1), j.reshape(-1, 1, 1), *times


def random_x(B, K=K, h=1, w=1, scale=2.0):
    """log of random distributions, (B,K,h,w) float64."""
    return (scale * torch.randn(B, K, h, w, dtype=torch.float64)).log_softmax(1)


def dense_kl(process, log_x, z_t, z_0, t, s):
    """sum_k q_k (log q_k - log p_k), with 0 log 0 = 0: (B,h,w)."""
    log_q = process.log_posterior(z_t, z_0, t, s).to(log_x.dtype)
    log_p = process.log_theta(log_x, z_t, t, s)
    return torch.where(log_q == -torch.inf, 0, log_q.exp() * (log_q - log_p)).sum(1)


# ---------------------------------------------------------------- the schedule


def test_the_schedule_is_eq_19_and_only_its_last_step_is_clipped():
    T = 1000
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    alpha_bar_t = cosine_schedule(T).exp()
    assert alpha_bar_t[0] == 1
    assert alpha_bar_t[:-1].tolist() == pytest.approx([value / f[0] for value in f[:-1]], rel=1e-10)
    assert (alpha_bar_t[-1] / alpha_bar_t[-2]).item() == pytest.approx(0.001)


def test_the_schedules_have_the_known_ends():
    assert noise(T=4000).alpha_bar_t[-1].item() == pytest.approx(1.5e-10, rel=0.05)
    assert noise(T=100).alpha_bar_t[-1].item() == pytest.approx(2.4e-7, rel=0.05)
    assert noise(T=4000, schedule="cosine_sqrt").alpha_bar_t[-1].item() == pytest.approx(
        1.2e-5, rel=0.05)
    assert noise(T=100, schedule="cosine_sqrt").alpha_bar_t[-1].item() == pytest.approx(
        4.9e-4, rel=0.05)


def test_the_root_of_the_schedule_is_taken_after_clipping():
    torch.testing.assert_close(cosine_schedule(50, "cosine_sqrt"), cosine_schedule(50) / 2)


def test_the_first_step_keeps_its_digits_at_t_4000():
    """1 - alpha_1 = 9.87e-6, which float32 would know to three digits only."""
    process = noise(K=2, T=4000)
    one, zero = torch.tensor([1]), torch.tensor([0])
    c = process.coefficients(one, zero, torch.empty(0, dtype=torch.float32))
    angles = [(t / 4000 + 0.008) / 1.008 * math.pi / 2 for t in (0, 1)]
    beta_1 = math.sin(sum(angles)) * math.sin(angles[1] - angles[0]) / math.cos(angles[0]) ** 2
    assert beta_1 == pytest.approx(9.87e-6, rel=1e-3)
    assert 2 * c.b_st.item() == pytest.approx(beta_1, rel=1e-6)


def test_a_wrong_size_or_schedule_is_refused():
    with pytest.raises(ValueError, match="K = 1, T = 5: give at least 2 codes"):
        UniformNoise(1, 5)
    with pytest.raises(ValueError, match="'linear': choose from cosine, cosine_sqrt"):
        UniformNoise(4, 5, "linear")


# ---------------------------------------------------------------- against K x K matrices


@pytest.mark.parametrize("schedule", ["cosine", "cosine_sqrt"])
def test_products_of_matrices_are_two_numbers(schedule):
    process = noise(schedule=schedule)
    for s, t in PAIRS:
        c = process.coefficients(torch.tensor([t]), torch.tensor([s]), torch.empty(0).double())
        for a, b, begin, end in [(c.a_0s, c.b_0s, 0, s), (c.a_st, c.b_st, s, t),
                                 (c.a_0t, c.b_0t, 0, t)]:
            closed = a[0, 0] * torch.eye(K) + b[0, 0]
            torch.testing.assert_close(closed, matrix(process, begin, end), rtol=0, atol=5e-16)


def test_the_posterior_is_bayes_rule_for_all_codes_and_times():
    process = noise()
    for s, t in PAIRS:
        log_q = process.log_posterior(*every_case(process, s, t))
        torch.testing.assert_close(log_q.exp().view(K, K, K), posterior(process, s, t),
                                   rtol=0, atol=1e-15)


def test_the_posterior_at_0_is_the_code_itself_with_exact_zeros():
    z_t, z_0, t, s = every_case(noise(), 0, 3)
    log_q = noise().log_posterior(z_t, z_0, t, s)[..., 0, 0]
    assert torch.equal(log_q.exp().argmax(1), z_0[:, 0, 0])
    assert (log_q == -torch.inf).sum() == K ** 2 * (K - 1)


def test_theta_is_its_formula_normalised_by_a_sum():
    process = noise()
    for s, t in PAIRS:
        z_t, _, times_t, times_s = every_case(process, s, t)
        log_x = random_x(K ** 2)
        first = matrix(process, s, t)[:, z_t[:, 0, 0]].T                    # q(z_t|z_s=k)
        second = log_x[..., 0, 0].exp() @ matrix(process, 0, s)
        theta = first * second
        torch.testing.assert_close(process.log_theta(log_x, z_t, times_t, times_s)[..., 0, 0].exp(),
                                   theta / theta.sum(1, keepdim=True), rtol=0, atol=1e-15)


def test_each_image_of_a_batch_has_its_own_times():
    process = noise()
    t, s = torch.tensor([6, 1, 4]), torch.tensor([2, 0, 3])
    z_t, z_0 = torch.randint(K, (2, 3, 2, 5))
    log_x = random_x(3, h=2, w=5)
    log_theta, kl = process.log_theta(log_x, z_t, t, s), process.kl(log_x, z_t, z_0, t, s)
    for n in range(3):
        x, i, j, *times = (part[n:n + 1] for part in (log_x, z_t, z_0, t, s))
        torch.testing.assert_close(process.log_theta(x, i, *times), log_theta[n:n + 1])
        torch.testing.assert_close(process.kl(x, i, j, *times), kl[n:n + 1])


def test_lambda_is_the_log_ratio_of_the_two_likelihoods():
    process = noise()
    for t in range(1, T + 1):
        q = matrix(process, 0, t)
        assert process.lambda_t[t].item() == pytest.approx((q[0, 0] / q[1, 0]).log().item())


def test_the_prior_kl_is_that_of_the_last_row_to_uniform():
    for schedule in ("cosine", "cosine_sqrt"):
        process = noise(T=3, schedule=schedule)
        row = matrix(process, 0, 3)[0]
        assert process.prior_kl() == pytest.approx((row * (row * K).log()).sum().item(), rel=1e-9)
    assert UniformNoise(1024, 100).prior_kl() == pytest.approx(3e-11, rel=0.1)
    assert UniformNoise(1024, 100, "cosine_sqrt").prior_kl() == pytest.approx(1.1e-4, rel=0.1)


# ---------------------------------------------------------------- the closed KL


def test_the_closed_kl_is_the_sum_over_codes():
    process = noise()
    for s, t in PAIRS:
        case = every_case(process, s, t)
        log_x = random_x(K ** 2)
        torch.testing.assert_close(process.kl(log_x, *case), dense_kl(process, log_x, *case),
                                   rtol=1e-12, atol=1e-14)


def test_with_two_codes_and_with_many_the_closed_kl_holds_too():
    for K in (2, 300):
        process = noise(K=K, T=20)
        z_t, z_0 = torch.randint(K, (2, 5, 3, 4))
        t, s = torch.tensor([2, 5, 9, 20, 1]), torch.tensor([1, 2, 8, 19, 0])
        log_x = random_x(5, K, 3, 4)
        torch.testing.assert_close(process.kl(log_x, z_t, z_0, t, s),
                                   dense_kl(process, log_x, z_t, z_0, t, s), rtol=1e-11, atol=1e-14)


def test_the_closed_kl_is_exact_where_torchs_own_softplus_is_not():
    """At t = 2 of 4000 log(a_0s/b_0s) is above 20, where softplus usually returns its argument."""
    process = noise(K=6000, T=4000)
    z = torch.zeros(1, 1, 1, dtype=torch.int64)
    log_x = torch.full((1, 6000, 1, 1), 0.1 / 5999).double()
    log_x[:, 0] = 0.9
    case = log_x.log(), z, z, torch.tensor([2]), torch.tensor([1])
    assert process.kl(*case).item() == pytest.approx(dense_kl(process, *case).item(), abs=1e-13)


def test_the_gradient_of_the_closed_kl_is_that_of_the_sum_over_codes():
    process = noise()
    for s, t in PAIRS:
        case = every_case(process, s, t)
        logits = torch.randn(K ** 2, K, 1, 1, dtype=torch.float64, requires_grad=True)
        closed, = torch.autograd.grad(process.kl(logits.log_softmax(1), *case).sum(), logits)
        dense, = torch.autograd.grad(dense_kl(process, logits.log_softmax(1), *case).sum(), logits)
        torch.testing.assert_close(closed, dense, rtol=1e-11, atol=1e-13)


def test_a_step_to_0_costs_the_nll_and_has_a_finite_gradient_beside_other_steps():
    process = noise()
    z_t, z_0 = torch.randint(K, (2, 3, 2, 2))
    t, s = torch.tensor([1, 4, 3]), torch.tensor([0, 0, 2])
    logits = torch.randn(3, K, 2, 2, dtype=torch.float64, requires_grad=True)
    log_x = logits.log_softmax(1)
    kl = process.kl(log_x, z_t, z_0, t, s)
    at_z_0 = process.log_theta(log_x, z_t, t, s).gather(1, z_0[:, None])[:, 0]
    torch.testing.assert_close(kl[:2], -at_z_0[:2])
    torch.testing.assert_close(process.nll(log_x, z_t, z_0, t)[:2], kl[:2], rtol=0, atol=0)
    gradient, = torch.autograd.grad(kl.sum(), logits)
    assert gradient.isfinite().all()
    assert (gradient != 0).any((1, 2, 3)).all()


def test_the_kl_to_the_right_answer_is_0():
    process = noise()
    for s, t in PAIRS:
        z_t, z_0, *times = every_case(process, s, t)
        log_x = (torch.arange(K).view(-1, 1, 1) == z_0[:, None]).double().log()
        assert process.kl(log_x, z_t, z_0, *times).abs().max() < 1e-14


def test_float32_keeps_the_small_kl_of_late_steps():
    """With an x as sure as a trained network's: 2e-5 nats a cell at t = 3000 of T = 4000."""
    process = UniformNoise(1024, 4000)
    z_0 = torch.randint(1024, (3, 16, 16))
    t = torch.tensor([1000, 3000, 3900])
    z_t = process.q_sample(z_0, t)
    sure = torch.full((3, 1, 16, 16), 9.0)
    logits = torch.randn(3, 1024, 16, 16).scatter_add(1, z_0[:, None], sure)
    exact, single = (process.kl(log_x, z_t, z_0, t, t - 1).double().mean((1, 2))
                     for log_x in (logits.double().log_softmax(1), logits.log_softmax(1)))
    assert exact.tolist() == pytest.approx([1e-4, 2e-5, 8e-7], rel=0.2)
    assert single.tolist() == pytest.approx(exact.tolist(), rel=0.01)


# ---------------------------------------------------------------- random numbers


def test_one_generator_seeds_images_that_do_not_depend_on_how_many_there_are():
    whole = uniforms(per_image(torch.Generator().manual_seed(3), 5), 2, 4)
    generator = torch.Generator().manual_seed(3)
    parts = [uniforms(per_image(generator, B), 2, 4) for B in (2, 3)]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert whole.shape == (2, 5, 4)
    assert whole.unique().numel() == 40


def test_a_list_of_generators_is_taken_as_it_is_and_its_length_is_checked():
    generators = [torch.Generator().manual_seed(n) for n in range(3)]
    assert per_image(generators, 3) is generators
    with pytest.raises(ValueError, match="3 generators for 4 images"):
        per_image(generators, 4)


def frequencies(codes, K):
    return torch.bincount(codes.flatten(), minlength=K).double()


def assert_drawn_from(codes, p):
    """A chi-square test at one in a thousand; the seed is fixed, so it fails always or never."""
    count = frequencies(codes, len(p))
    assert (count[p < 1e-12] == 0).all()
    count, p = count[p >= 1e-12], p[p >= 1e-12]
    assert chisquare(count.numpy(), (p / p.sum() * count.sum()).numpy()).pvalue > 1e-3


def test_codes_are_drawn_with_their_probabilities_and_one_of_0_never():
    p = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0]).double()
    log_x = p.log().view(1, -1, 1, 1).expand(-1, -1, 100, 100)
    assert_drawn_from(draw_codes(log_x, torch.rand(1, 100, 100, dtype=torch.float64)), p)
    ends = torch.tensor([[[0.0, 1 - 2 ** -53]]], dtype=torch.float64)
    for kind in (torch.float32, torch.float64):
        assert draw_codes(log_x[..., :1, :2].to(kind), ends).flatten().tolist() == [4, 1]


def test_noised_codes_follow_eq_17():
    process = noise()
    for t in (1, 3, 6):
        z_0 = torch.full((1, 100, 100), 2)
        z_t = process.q_sample(z_0, torch.tensor([t]), torch.Generator().manual_seed(t))
        assert_drawn_from(z_t, matrix(process, 0, t)[2])


def test_noising_on_from_s_to_t_follows_the_matrix_between_them():
    process = noise()
    z_s = torch.full((1, 100, 100), 1)
    u = torch.rand(2, 1, 100, 100, dtype=torch.float64)
    z_t = process.forward(z_s, torch.tensor([2]), torch.tensor([4]), u)
    assert_drawn_from(z_t, matrix(process, 2, 4)[1])


def test_time_0_is_the_map_itself():
    z_0 = torch.randint(K, (2, 50, 50))
    assert torch.equal(noise().q_sample(z_0, torch.tensor([0, 0])), z_0)


def test_noising_forms_no_vector_over_codes():
    process = noise(K=2 ** 40)
    z_t = process.q_sample(torch.zeros(1, 8, 8, dtype=torch.int64), torch.tensor([T]))
    assert 2 ** 38 < z_t.max() < 2 ** 40


@pytest.mark.parametrize(("s", "t"), [(0, 1), (0, 5), (1, 2), (2, 5), (5, 6)])
def test_a_drawn_step_follows_theta(s, t):
    process = noise()
    x = torch.tensor([0.6, 0.0, 0.1, 0.3]).double()
    for i in (0, 1):
        log_x = x.log().view(1, -1, 1, 1).expand(-1, -1, 100, 100)
        z_t, u = torch.full((1, 100, 100), i), torch.rand(3, 1, 100, 100, dtype=torch.float64)
        times = torch.tensor([t]), torch.tensor([s])
        p = process.log_theta(log_x[..., :1, :1], z_t[:, :1, :1], *times).exp().flatten()
        assert_drawn_from(process.draw(log_x.float(), z_t, *times, u), p)


def test_a_step_that_leaves_once_in_ten_million_draws_its_code_by_x():
    """At t = 1 of 4000 the cell leaves z_t with probability 9e-9: only u below it moves a cell."""
    process = UniformNoise(1024, 4000)
    log_x = torch.full((1, 1024, 1, 4), -20.0)
    log_x[:, [5, 700]] = math.log(0.5)
    u = torch.tensor([[1e-9, 1e-9, 1e-9, 1e-7], [0.1] * 4, [0.1, 0.6, 0.9, 0.5]]).double()
    z = process.draw(log_x, torch.full((1, 1, 4), 5), torch.tensor([1]), torch.tensor([0]),
                     u.view(3, 1, 1, 4))
    assert z.flatten().tolist() == [700, 5, 5, 5]
