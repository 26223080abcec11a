import itertools
import math

import numpy as np
import pytest
import torch
from dense_diffusion import (
    BestDenoiser,
    all_maps,
    map_number,
    matrix,
    posterior,
    step_kernel,
    theta,
    total_variation,
)
from scipy.stats import chisquare

import diffusion as module
from diffusion import (
    HISTORY,
    UNIFORM_SHARE,
    MultinomialDiffusion,
    Timesteps,
    cosine_schedule,
    draw_codes,
    frequency_nats,
    held_out_bound,
    known_cells,
)
from seeding import uniforms

# Two cells of three codes that mostly agree.
JOINT = torch.tensor([[30, 2, 1], [3, 25, 4], [5, 2, 28]]).double() / 100
K, T = 4, 6
PAIRS = list(itertools.combinations(range(T + 1), 2))                       # all s < t
FORMS = [MultinomialDiffusion.terms, MultinomialDiffusion.closed_terms]
BOTH_FORMS = pytest.mark.parametrize("form", FORMS)
RESIDUALS = pytest.mark.parametrize("residual", ["none", "onehot"])


class Table:
    """A denoiser of one's own choice of logits for every map (K^D of them) and time."""

    def __init__(self, K, T, D):
        self.K, self.D = K, D
        self.logits = torch.randn(T + 1, K ** D, K, D, 1, dtype=torch.float64)

    def __call__(self, z, t):
        number = sum(z[:, d, 0] * self.K ** (self.D - 1 - d) for d in range(self.D))
        return self.logits[t, number]


def times(B, *values):
    """Times as (B,) tensors."""
    return [torch.full((B,), value) for value in values]


def generators(B, seed=0):
    return [torch.Generator().manual_seed(1000 * seed + n) for n in range(B)]


def agreeing(K, w):
    """A denoiser (K codes, any map) that likes a cell's left and right neighbour, and code 0."""
    def model(z, t):
        near = sum(torch.nn.functional.one_hot(z.roll(shift, 2), K) for shift in (1, -1))
        return (near + torch.arange(K).eq(0)).movedim(-1, 1) * (w / t).view(-1, 1, 1, 1).float()
    return model


def every_case(s, t, K=K):
    """All (z_t, z_0) of one cell as a batch: z_t, z_0 (K²,1,1), s, t (K²,)."""
    i, j = torch.meshgrid(torch.arange(K), torch.arange(K), indexing="ij")
    return i.reshape(-1, 1, 1), j.reshape(-1, 1, 1), *times(K ** 2, s, t)


def random_x(B, K=K, h=1, w=1):
    """log of random distributions, (B,K,h,w) float64."""
    return (2 * torch.randn(B, K, h, w, dtype=torch.float64)).log_softmax(1)


def enumerated_terms(diffusion, x, z_t, z_0, t):
    """L_{t-1} of cells (n,1,1) by K x K matrices and Eq. 24's sum, x (n,K) for x0_hat: (n,1,1)."""
    terms = []
    for row, i, j, now in zip(x, z_t.flatten(), z_0.flatten(), t.tolist()):
        p = theta(diffusion, row.expand(diffusion.K, -1), now - 1, now)[i]
        q = posterior(diffusion, now - 1, now)[i, j]
        terms.append(-p[j].log() if now == 1 else (q * (q.log() - p.log())).sum())
    return torch.stack(terms).view(-1, 1, 1)


def assert_drawn_from(codes, p):
    """A chi-square test at one in a thousand; the seed is fixed, so it fails always or never."""
    count = torch.bincount(codes.flatten(), minlength=len(p)).double()
    assert (count[p < 1e-12] == 0).all()
    count, p = count[p >= 1e-12], p[p >= 1e-12]
    assert chisquare(count.numpy(), (p / p.sum() * count.sum()).numpy()).pvalue > 1e-3


# -- the schedule ----------------------------------------------------------------------------------

def test_the_schedule_is_eq_19_and_only_its_last_step_is_clipped():
    T = 1000
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    alpha_bar_t = cosine_schedule(T).exp()
    assert alpha_bar_t[0] == 1
    assert alpha_bar_t[:-1].tolist() == pytest.approx([value / f[0] for value in f[:-1]], rel=1e-10)
    assert (alpha_bar_t[-1] / alpha_bar_t[-2]).item() == pytest.approx(0.001)


def test_the_schedule_has_the_known_end_and_so_has_the_root_of_its_steps():
    assert cosine_schedule(4000)[-1].exp().item() == pytest.approx(1.5e-10, rel=0.05)
    assert cosine_schedule(100)[-1].exp().item() == pytest.approx(2.4e-7, rel=0.05)
    assert (cosine_schedule(100)[-1] / 2).exp().item() == pytest.approx(4.9e-4, rel=0.05)


def test_the_first_step_keeps_its_digits_at_t_4000():
    """1 - alpha_1 = 9.87e-6, which float32 would know to three digits only."""
    _, log_b = MultinomialDiffusion(2, 4000).transition(*times(1, 0, 1), torch.empty(0))
    angles = [(t / 4000 + 0.008) / 1.008 * math.pi / 2 for t in (0, 1)]
    beta_1 = math.sin(sum(angles)) * math.sin(angles[1] - angles[0]) / math.cos(angles[0]) ** 2
    assert beta_1 == pytest.approx(9.87e-6, rel=1e-3)
    assert 2 * log_b.exp().item() == pytest.approx(beta_1, rel=2e-6)


# -- against K x K matrices ------------------------------------------------------------------------

def test_products_of_matrices_are_two_numbers():
    diffusion, like, z = MultinomialDiffusion(K, T), torch.empty(0).double(), torch.arange(K)
    for s, t in PAIRS:
        log_q = diffusion.log_q(z.view(1, K, 1), z, *times(1, s, t), like)[0, 0]
        torch.testing.assert_close(log_q.exp(), matrix(diffusion, s, t), rtol=0, atol=5e-16)
        log_a, log_b = diffusion.transition(*times(1, s, t), like)
        assert (log_a.exp() + K * log_b.exp()).item() == pytest.approx(1, abs=1e-15)


def test_the_posterior_is_bayes_rule_for_all_codes_and_times():
    diffusion, like = MultinomialDiffusion(K, T), torch.empty(0).double()
    for s, t in PAIRS:
        log_q = diffusion.log_posterior(*every_case(s, t), like)
        torch.testing.assert_close(log_q.exp().view(K, K, K), posterior(diffusion, s, t),
                                   rtol=0, atol=1e-15)
    z_t, z_0, *at_0 = every_case(0, 3)
    log_q = diffusion.log_posterior(z_t, z_0, *at_0, like)[..., 0, 0]
    assert torch.equal(log_q.exp().argmax(1), z_0[:, 0, 0])
    assert (log_q.exp() == 0).sum() == K ** 2 * (K - 1), "zeros are exact"
    assert log_q.isfinite().all()


def test_theta_is_its_formula_normalised_by_a_sum():
    diffusion = MultinomialDiffusion(K, T)
    for s, t in PAIRS:
        z_t, log_x = torch.arange(K).view(K, 1, 1), random_x(K)
        ours = diffusion.log_theta(log_x, z_t, *times(K, s, t))[..., 0, 0].exp()
        torch.testing.assert_close(ours, theta(diffusion, log_x[..., 0, 0].exp(), s, t),
                                   rtol=0, atol=1e-15)


def test_each_image_of_a_batch_has_its_own_times():
    diffusion = MultinomialDiffusion(K, T)
    t, s = torch.tensor([6, 1, 4]), torch.tensor([2, 0, 3])
    z_t, z_0 = torch.randint(K, (2, 3, 2, 5))
    log_x = random_x(3, h=2, w=5)
    log_theta, terms = diffusion.log_theta(log_x, z_t, s, t), diffusion.terms(log_x, z_t, z_0, t)
    for n in range(3):
        x, i, j, *of_one = (part[n:n + 1] for part in (log_x, z_t, z_0, s, t))
        torch.testing.assert_close(diffusion.log_theta(x, i, *of_one), log_theta[n:n + 1])
        for form in FORMS:
            torch.testing.assert_close(form(diffusion, x, i, j, of_one[1]), terms[n:n + 1])


def test_the_prior_kl_is_that_of_the_last_row_to_uniform():
    diffusion = MultinomialDiffusion(K, 3)
    row = matrix(diffusion, 0, 3)[0]
    assert diffusion.prior_kl() == pytest.approx((row * (row * K).log()).sum().item(), rel=1e-9)
    assert MultinomialDiffusion(1024, 100).prior_kl() == pytest.approx(3e-11, rel=0.1)


@RESIDUALS
def test_the_onehot_residual_adds_one_at_the_codes_own_logit(residual):
    z_t, logits = torch.randint(5, (2, 3, 3)), torch.randn(2, 5, 3, 3)
    one_hot = torch.nn.functional.one_hot(z_t, 5).movedim(-1, 1)
    torch.testing.assert_close(MultinomialDiffusion(5, 4, residual).log_x0_hat(logits, z_t),
                               (logits + (residual == "onehot") * one_hot).log_softmax(1))


# -- the terms of the bound ------------------------------------------------------------------------

@BOTH_FORMS
@RESIDUALS
@pytest.mark.parametrize("K", [2, 4, 7])
def test_the_terms_and_their_gradients_are_those_of_enumeration(K, residual, form):
    """At t = 1, 2, T/2 and T, for every z_t and z_0, in float64."""
    diffusion = MultinomialDiffusion(K, T, residual)
    for now in (1, 2, T // 2, T):
        z_t, z_0, _, t = every_case(0, now, K)
        logits = torch.randn(K ** 2, K, 1, 1, dtype=torch.float64, requires_grad=True)
        own = torch.nn.functional.one_hot(z_t, K).movedim(-1, 1) * (residual == "onehot")
        ours = form(diffusion, logits, z_t, z_0, t)
        enumerated = enumerated_terms(diffusion, (logits + own).softmax(1)[..., 0, 0], z_t, z_0, t)
        torch.testing.assert_close(ours, enumerated, rtol=1e-12, atol=1e-14)
        gradient, expected = (torch.autograd.grad(terms.sum(), logits)[0]
                              for terms in (ours, enumerated))
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-13)


@BOTH_FORMS
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_gradients_are_finite_for_certain_and_hopeless_predictions(kind, form):
    """Logits of +-200, whose probabilities float32 cannot hold, at the ends of T = 4000."""
    diffusion, t = MultinomialDiffusion(K, 4000), torch.tensor([1, 2, 2000, 4000])
    z_0 = torch.tensor([[[0, 0, 1, 1]]]).expand(4, -1, -1)
    z_t = torch.tensor([[[0, 1, 0, 1]]]).expand(4, -1, -1)
    logits = torch.zeros(4, K, 1, 4, dtype=kind)
    logits[:, 0] = 200.0
    terms = form(diffusion, logits.requires_grad_(), z_t, z_0, t)
    gradient, = torch.autograd.grad(terms.sum(), logits)
    assert terms.isfinite().all()
    assert gradient.isfinite().all()
    # -log p(z_0 = 1|z_1 = 0) = 200 + log theta's odds of staying, to be descended with slope 1.
    assert terms[0, 0, 2].item() == pytest.approx(200 + math.log(4 / 9.87e-6), rel=1e-4)
    torch.testing.assert_close(gradient[0, :2, 0, 2], torch.tensor([1, -1], dtype=kind))


def test_the_closed_terms_are_exact_where_torchs_own_softplus_is_not():
    """At t = 2 of 4000 log(a_0s/b_0s) is above 20, where softplus usually returns its argument."""
    diffusion = MultinomialDiffusion(6000, 4000)
    z = torch.zeros(1, 1, 1, dtype=torch.int64)
    log_x = torch.full((1, 6000, 1, 1), 0.1 / 5999).double()
    log_x[:, 0] = 0.9
    closed, summed = (form(diffusion, log_x.log(), z, z, torch.tensor([2])) for form in FORMS)
    assert closed.item() == pytest.approx(summed.item(), abs=1e-13)


@BOTH_FORMS
def test_float32_keeps_the_small_kl_of_late_steps(form):
    """With an x0_hat as sure as a trained network's: 2e-5 nats a cell at t = 3000 of T = 4000."""
    diffusion = MultinomialDiffusion(1024, 4000)
    z_0, t = torch.randint(1024, (3, 16, 16)), torch.tensor([1000, 3000, 3900])
    z_t = diffusion.q_sample(z_0, t)
    sure = torch.full((3, 1, 16, 16), 9.0)
    logits = torch.randn(3, 1024, 16, 16).scatter_add(1, z_0[:, None], sure)
    exact, single = (form(diffusion, given, z_t, z_0, t).double().mean((1, 2))
                     for given in (logits.double(), logits))
    assert exact.tolist() == pytest.approx([1e-4, 2e-5, 8e-7], rel=0.2)
    assert single.tolist() == pytest.approx(exact.tolist(), rel=0.01)


# -- draws -----------------------------------------------------------------------------------------

def test_codes_are_drawn_with_their_probabilities_and_one_of_0_never():
    p = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0]).double()
    log_x = p.log().view(1, -1, 1, 1).expand(-1, -1, 100, 100)
    assert_drawn_from(draw_codes(log_x, torch.rand(1, 100, 100, dtype=torch.float64)), p)
    ends = torch.tensor([[[0.0, 1 - 2 ** -53]]], dtype=torch.float64)
    for kind in (torch.float32, torch.float64):
        assert draw_codes(log_x[..., :1, :2].to(kind), ends).flatten().tolist() == [4, 1]


def test_noised_codes_follow_eq_17_and_from_s_to_t_the_matrix_between_them():
    diffusion = MultinomialDiffusion(K, T)
    for t in (1, 3, 6):
        z_0 = torch.full((1, 100, 100), 2)
        z_t = diffusion.q_sample(z_0, torch.tensor([t]), torch.Generator().manual_seed(t))
        assert_drawn_from(z_t, matrix(diffusion, 0, t)[2])
    z_t = diffusion.add_noise(torch.full((1, 100, 100), 1), *times(1, 2, 4))
    assert_drawn_from(z_t, matrix(diffusion, 2, 4)[1])
    z_0 = torch.randint(K, (2, 50, 50))
    assert torch.equal(diffusion.q_sample(z_0, torch.tensor([0, 0])), z_0)


def test_noising_forms_no_vector_over_codes():
    z_t = MultinomialDiffusion(2 ** 40, T).q_sample(torch.zeros(1, 8, 8).long(), torch.tensor([T]))
    assert 2 ** 38 < z_t.max() < 2 ** 40


@pytest.mark.parametrize(("s", "t"), [(0, 1), (0, 5), (1, 2), (2, 5), (5, 6)])
def test_a_drawn_step_follows_theta(s, t):
    diffusion = MultinomialDiffusion(K, T)
    x = torch.tensor([0.6, 0.0, 0.1, 0.3]).double()
    for i in (0, 1):
        log_x = x.log().view(1, -1, 1, 1).expand(-1, -1, 100, 100)
        z_t, u = torch.full((1, 100, 100), i), torch.rand(1, 100, 100, dtype=torch.float64)
        p = theta(diffusion, x.expand(K, -1), s, t)[i]
        log_p = diffusion.log_theta(log_x.float(), z_t, *times(1, s, t))
        assert_drawn_from(draw_codes(log_p, u), p)


def test_a_cell_leaves_its_code_at_its_rate_be_it_once_in_a_hundred_million():
    """At t = 1 of 4000 to each code of 1024 with 1e-8 of the probability, or to none but x's."""
    diffusion, z_t = MultinomialDiffusion(1024, 4000), torch.full((1, 1, 1), 5)
    both = torch.full((1024,), -20.0)
    both[[5, 700]] = math.log(0.5)
    for logits in (torch.zeros(1024), both):
        logits = logits.view(1, -1, 1, 1)
        log_x = logits.log_softmax(1)
        p = diffusion.log_theta(log_x.double(), z_t, *times(1, 0, 1)).exp().flatten()
        above = p[6:].sum().item()                       # what u in [0, above) goes to
        u = torch.linspace(0, 1.5 * above, 30_001, dtype=torch.float64)[None, None]
        log_p = diffusion.log_theta(log_x, z_t, *times(1, 0, 1)).expand(-1, -1, 1, u.shape[-1])
        z = draw_codes(log_p, u)
        assert (z > 5).double().mean().item() == pytest.approx(1 / 1.5, rel=1e-3)
        assert (z[z <= 5] == 5).all()
        if logits[0, 700] != 0:
            assert above == pytest.approx(9.6e-9, rel=0.01)
            assert (z[z > 5] == 700).all()


# -- the bound -------------------------------------------------------------------------------------

def exact_bound(diffusion, model, z_0):
    """L_T + sum_t E[L_{t-1}] of the one map z_0 (1,D,1), over all z_t."""
    D, maps = model.D, all_maps(diffusion.K, model.D)
    n, total = len(maps), D * diffusion.prior_kl()
    for t in range(1, diffusion.T + 1):
        q = matrix(diffusion, 0, t)[z_0[:, :, 0], maps[:, :, 0]].prod(1)    # (K^D)
        at, = times(n, t)
        term = diffusion.terms(model(maps, at), maps, z_0.expand(n, -1, -1), at)
        total += (q * term.sum((1, 2))).sum().item()
    return total


@RESIDUALS
@pytest.mark.parametrize(("K", "T", "D"), [(3, 6, 1), (5, 5, 1), (3, 4, 2), (2, 5, 2)])
def test_the_bound_is_the_sum_over_all_paths(K, T, D, residual):
    diffusion = MultinomialDiffusion(K, T, residual)
    table, maps = Table(K, T, D), all_maps(K, D)
    p = torch.stack([step_kernel(diffusion, table, t, t - 1) for t in range(1, T + 1)])
    q = [torch.stack([matrix(diffusion, t - 1, t)[z[:, 0], maps[:, :, 0]].prod(1) for z in maps])
         for t in range(1, T + 1)]
    paths = torch.tensor(list(itertools.product(range(K ** D), repeat=T)))  # z_1 .. z_T
    evidence = torch.full((K ** D,), K ** -D, dtype=torch.float64)
    for t in range(T, 0, -1):
        evidence = evidence @ p[t - 1]
    assert evidence.sum().item() == pytest.approx(1, abs=1e-13)
    for number in (0, K ** D - 2):
        path = torch.cat([torch.full((len(paths), 1), number), paths], 1)
        log_q = sum(q[t - 1][path[:, t - 1], path[:, t]].log() for t in range(1, T + 1))
        log_p = -D * math.log(K) + sum(p[t - 1][path[:, t], path[:, t - 1]].log()
                                       for t in range(1, T + 1))
        bound = exact_bound(diffusion, table, maps[number:number + 1])
        assert bound == pytest.approx((log_q.exp() * (log_q - log_p)).sum().item(), abs=1e-12)
        assert bound >= -evidence[number].log()


def test_of_a_single_cell_the_bound_is_the_entropy():
    """E[VLB] over a prior of five codes, with x0_hat = that prior for every z_t."""
    diffusion, prior = MultinomialDiffusion(5, 8), torch.tensor([8, 5, 4, 2, 1]).double() / 20
    table = Table(5, 8, 1)
    table.logits[:] = prior.log().view(1, 5, 1, 1)
    bound = sum(p.item() * exact_bound(diffusion, table, torch.tensor([[[code]]]))
                for code, p in enumerate(prior))
    # What is left is KL(q(z_T) || uniform), as alpha_bar_T is not quite 0.
    assert bound == pytest.approx(-(prior * prior.log()).sum().item(), abs=1e-7)


def test_vlb_draws_the_bound_and_its_parts():
    diffusion = MultinomialDiffusion(3, 4)
    table, z_0 = Table(3, 4, 2), torch.tensor([[[2], [0]]])
    parts = diffusion.vlb(table, z_0.expand(2000, -1, -1), torch.Generator().manual_seed(0))
    assert {name: (part.shape, part.dtype) for name, part in parts.items()} == dict.fromkeys(
        ("L_T", "KL", "L_0", "vlb"), ((2000,), torch.float64))
    assert torch.equal(parts["vlb"], parts["L_T"] + parts["KL"] + parts["L_0"])
    error = parts["vlb"].std().item() / 2000 ** 0.5
    assert parts["vlb"].mean().item() == pytest.approx(exact_bound(diffusion, table, z_0),
                                                       abs=4 * error)


def test_vlb_asks_each_t_once_or_one_of_each_stratum_without_bias(monkeypatch):
    """Of a process whose L_{t-1} is t² for every image."""
    diffusion, asked = MultinomialDiffusion(4, 30), []

    def square(logits, z_t, z_0, t):
        asked.append(t.item())
        return t.double().square().view(-1, 1, 1)

    monkeypatch.setattr(diffusion, "terms", square)
    exact = sum(t * t for t in range(2, 31))
    for images, strata in ((3, None), (2000, 7)):
        asked.clear()
        parts = diffusion.vlb(lambda z, t: torch.zeros(len(z), 4, 1, 1),
                              torch.zeros(images, 1, 1, dtype=torch.int64), strata=strata)
        if strata is None:
            assert asked == [t for t in range(1, 31) for _ in range(3)]
            assert parts["L_0"].tolist() == [1] * 3
            assert parts["KL"].tolist() == pytest.approx([exact] * 3)
    assert (len(asked), max(asked)) == (8 * 2000, 30)
    assert parts["KL"].mean().item() == pytest.approx(exact, rel=0.01)
    assert parts["KL"].std() < 0.1 * exact


def test_a_held_out_map_has_the_same_bound_in_any_batch():
    diffusion, model = MultinomialDiffusion(8, 20), agreeing(8, 3)
    z_0 = torch.randint(8, (5, 6, 6))
    whole = held_out_bound(diffusion, model, z_0, 40)
    parts = [held_out_bound(diffusion, model, z_0[:2], 40),
             held_out_bound(diffusion, model, z_0[2:], 42)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.allclose(held_out_bound(diffusion, model, z_0, 0), whole)


@pytest.mark.parametrize(("T", "training", "calls"), [
    (200, False, 200), (201, False, 65), (200, True, 5)])
def test_a_reports_bound_asks_all_t_or_64_strata_and_a_curves_4(T, training, calls):
    asked = []

    def model(z, t):
        asked.extend(t.tolist())
        return torch.zeros(1, 4, 2, 2)

    held_out_bound(MultinomialDiffusion(4, T), model, torch.zeros(1, 2, 2, dtype=int), 0, training)
    assert len(asked) == calls
    assert (sorted(asked) == list(range(1, T + 1))) == (calls == T)


def test_frequencies_cost_what_counting_by_hand_gives():
    rng = np.random.default_rng(0)
    maps, held_out = rng.integers(0, 4, (6, 2, 3)), rng.integers(0, 4, (5, 2, 3))
    maps[:, 0, 0] = held_out[:, 0, 0] = 3                            # so that some cells differ

    def u(k, others):
        return (np.sum(others == k) + 1) / (others.size + 4)

    def by_cell(k, cell, a, others, unigram):
        return (np.sum(others[:, *cell] == k) + a * unigram) / (len(others) + a)

    likelihood = {}
    for a in 4.0 ** np.arange(11):
        likelihood[a] = 0
        for i, *cell in np.ndindex(6, 2, 3):                         # each code is left out once
            k, rest = maps[i, *cell], np.delete(maps, i, 0)
            without = np.delete(maps, np.ravel_multi_index((i, *cell), maps.shape))
            likelihood[a] += math.log(by_cell(k, cell, a, rest, u(k, without)))
    a = max(likelihood, key=likelihood.get)
    assert 1 < a < 4**10
    nats = frequency_nats(maps.astype(np.uint16), held_out, 4)
    for i, one in enumerate(held_out):
        cells = list(np.ndindex(2, 3))
        unigram = -sum(math.log(u(one[cell], maps)) for cell in cells)
        shrunk = -sum(math.log(by_cell(one[cell], cell, a, maps, u(one[cell], maps)))
                      for cell in cells)
        assert nats["unigram"][i].item() == pytest.approx(unigram)
        assert nats["histogram"][i].item() == pytest.approx(shrunk)


def test_cells_count_for_themselves_only_as_far_as_they_differ():
    """900 maps of 32 codes, as few for each cell as real photos are."""
    rng, K, n = np.random.default_rng(0), 32, 900
    p = rng.dirichlet(np.ones(K))
    alike = rng.choice(K, (n + 300, 8, 8), p=p)
    found = {name: nats.mean().item() for name, nats in
             frequency_nats(alike[:n], alike[n:], K).items()}
    entropy = -64 * (p * np.log(p)).sum()
    assert found["unigram"] == pytest.approx(entropy, rel=0.01)
    assert found["histogram"] == pytest.approx(found["unigram"], rel=5e-4)   # Laplace: 1.5 % worse
    place = (alike + np.arange(64).reshape(8, 8)) % K                # each cell has its own law
    found = {name: nats.mean().item() for name, nats in
             frequency_nats(place[:n], place[n:], K).items()}
    assert found["unigram"] > 1.1 * entropy
    assert found["histogram"] == pytest.approx(entropy, rel=0.02)


# -- the loss --------------------------------------------------------------------------------------

def test_the_expected_loss_is_the_bound_whatever_t_is_drawn_by(monkeypatch):
    diffusion = MultinomialDiffusion(K, T)
    z_0, noisy = torch.randint(K, (2, T + 1, 3, 5))
    monkeypatch.setattr(diffusion, "q_sample", lambda z, t, generator: noisy[t])
    logits = torch.randn(T + 1, K, 3, 5, dtype=torch.float64)
    z_0, t = z_0[:1], torch.arange(1, T + 1)
    terms = diffusion.terms(logits[1:], noisy[1:], z_0.expand(T, -1, -1), t)
    exact = terms.sum().item() / 15 + diffusion.prior_kl()
    steps = Timesteps(T)
    for _ in range(10):
        steps.observe(t, torch.rand(T))
    steps.update()
    for p in (torch.full((T,), 1 / T, dtype=torch.float64), steps.probabilities()):
        losses = [diffusion.loss(lambda z, t: logits[t], z_0, t[n:n + 1], p[n:n + 1])[0]
                  for n in range(T)]
        assert sum(p * torch.stack(losses)).item() == pytest.approx(exact, rel=1e-12)


def test_the_loss_descends_to_the_best_denoiser():
    """Two cells and a table for a network, from ln 9 = 2.20 nats a map."""
    diffusion, steps = MultinomialDiffusion(3, 5), Timesteps(5)
    table, data = Table(3, 5, 2), all_maps(3, 2)
    table.logits = torch.zeros_like(table.logits).requires_grad_()
    optimizer = torch.optim.Adam([table.logits], lr=0.1)
    for step in range(100):
        z_0 = data[torch.multinomial(JOINT.flatten(), 64, replacement=True)]
        draws = generators(64, step)
        t, p = steps.draw(uniforms(draws, 1)[0])
        loss, terms = diffusion.loss(table, z_0, t, p, draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps.observe(t, terms)
        steps.update()
    assert steps.probabilities().std() > 0, "importance did not begin"
    learnt, best = (sum(p.item() * exact_bound(diffusion, model, data[n:n + 1])
                        for n, p in enumerate(JOINT.flatten()))
                    for model in (table, BestDenoiser(diffusion, JOINT)))
    assert best < learnt < best + 0.1 < 2.0


def test_half_precision_logits_are_judged_in_float32_and_float64_ones_in_float64():
    z_0, t = torch.randint(6, (2, 4, 4)), torch.tensor([3, 7])
    p = torch.full((2,), 1 / 9, dtype=torch.float64)
    for given, used in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        logits = torch.randn(2, 6, 4, 4).to(given).requires_grad_()
        loss, terms = MultinomialDiffusion(6, 9).loss(lambda z, t, out=logits: out, z_0, t, p)
        loss.backward()
        assert (loss.dtype, terms.dtype, logits.grad.dtype) == (used, used, given)
        assert not terms.requires_grad


def test_the_t_and_terms_of_an_image_do_not_depend_on_its_batch():
    diffusion, steps = MultinomialDiffusion(8, 20), filled(20, [float(t) for t in range(20)])
    z_0 = torch.randint(8, (5, 6, 6))

    def terms(images):
        draws = [generators(5)[n] for n in images]
        t, p = steps.draw(uniforms(draws, 1)[0])
        return diffusion.loss(agreeing(8, 3), z_0[images], t, p, draws)[1]

    torch.testing.assert_close(torch.cat([terms([3, 0]), terms([4])]), terms(range(5))[[3, 0, 4]])


# -- sampling --------------------------------------------------------------------------------------

def law_of_samples(diffusion, model, steps):
    """The exact distribution of `sample` over all maps of two cells: (9,)."""
    law = torch.full((9,), 1 / 9, dtype=torch.float64)
    for t, s in diffusion.reverse_times(steps):
        law = law @ step_kernel(diffusion, model, t, s)
    return law


def test_the_reverse_times_hold_t_and_0_and_fall_strictly():
    for T in (1, 7, 100, 4000):
        diffusion = MultinomialDiffusion(2, T)
        for steps in {1, 2, min(T, 10), T // 2 + 1, T}:
            grid = diffusion.reverse_times(min(steps, T))
            assert len(grid) == min(steps, T)
            assert (grid[0][0], grid[-1][1]) == (T, 0)
            assert all(t > s for t, s in grid)
            assert all(s == t for (_, s), (t, _) in itertools.pairwise(grid))
        every = [(t, t - 1) for t in range(T, 0, -1)]
        assert diffusion.reverse_times() == diffusion.reverse_times(T) == every


@RESIDUALS
def test_t_strided_steps_are_the_plain_loop_over_every_t_bit_for_bit(residual):
    diffusion, model = MultinomialDiffusion(8, 12, residual), agreeing(8, 9)
    draws = generators(3)
    z = (uniforms(draws, 1, 5, 4)[0] * 8).long()
    for t in range(12, 0, -1):
        uniforms(draws, 2, 5, 4)                         # for known cells, of which there are none
        log_p = diffusion.log_p(model(z, times(3, t)[0]), z, *times(3, t - 1, t))
        z = draw_codes(log_p, uniforms(draws, 1, 5, 4)[0])
    for steps in (12, None):
        assert torch.equal(diffusion.sample(model, (3, 5, 4), steps, generators(3)), z)


@RESIDUALS
def test_samples_follow_the_law_of_their_steps(residual):
    diffusion = MultinomialDiffusion(3, 20, residual)
    model = BestDenoiser(diffusion, JOINT)
    z = diffusion.sample(model, (1, 2, 10000), 4, torch.Generator().manual_seed(0))
    assert_drawn_from(map_number(z), law_of_samples(diffusion, model, 4))


def test_strided_steps_come_near_the_data_as_their_number_grows():
    """The exact error with a perfect denoiser: about 1/n, all of it from cells that move alone."""
    diffusion = MultinomialDiffusion(3, 400)
    model = BestDenoiser(diffusion, JOINT)
    errors = [total_variation(law_of_samples(diffusion, model, steps), JOINT.flatten())
              for steps in (1, 2, 4, 8, 20, 50, 100)]
    assert errors == pytest.approx([0.496, 0.334, 0.178, 0.087, 0.033, 0.013, 0.006], abs=6e-4)


def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in():
    diffusion, model = MultinomialDiffusion(40, 30), agreeing(40, 20)

    def sample(images):
        return diffusion.sample(model, (len(images), 6, 5), 7, [generators(4)[n] for n in images])

    whole = sample(range(4))
    assert torch.equal(torch.cat([sample([2, 0]), sample([3])]), whole[[2, 0, 3]])
    assert not torch.equal(whole[0], whole[1])
    one = torch.Generator().manual_seed(5)
    parts = [diffusion.sample(model, (B, 6, 5), 7, one) for B in (1, 2)]
    again = diffusion.sample(model, (3, 6, 5), 7, torch.Generator().manual_seed(5))
    assert torch.equal(torch.cat(parts), again)


# -- completion ------------------------------------------------------------------------------------

def test_known_codes_come_back_and_the_rest_is_filled():
    diffusion, model = MultinomialDiffusion(12, 10), agreeing(12, 5)
    indices, known = torch.randint(12, (3, 6, 7)), torch.rand(3, 6, 7) < 0.4
    for resample in (1, 3):
        z = diffusion.inpaint(model, indices, known, 5, resample, generators(3))
        assert torch.equal(z[known], indices[known])
        assert 0 < (z != indices)[~known].float().mean() <= 1
        other = torch.where(known, indices, 0)           # what stands in the hole does not matter
        assert torch.equal(diffusion.inpaint(model, other, known, 5, resample, generators(3)), z)
        alone = diffusion.inpaint(model, indices[1:2], known[1:2], 5, resample, generators(3)[1:2])
        assert torch.equal(alone, z[1:2]), "an image does not depend on its batch"


def test_with_all_known_nothing_changes_and_with_nothing_known_it_is_sampling():
    diffusion, model = MultinomialDiffusion(12, 10), agreeing(12, 5)
    indices = torch.randint(12, (2, 6, 7))
    known = torch.ones(2, 6, 7, dtype=torch.bool)
    assert torch.equal(diffusion.inpaint(model, indices, known, 4, 2), indices)
    assert torch.equal(diffusion.inpaint(model, indices, ~known, 4, generator=generators(2)),
                       diffusion.sample(model, (2, 6, 7), 4, generators(2)))


@pytest.mark.parametrize("resample", [1, 2])
def test_the_network_sees_known_cells_noised_as_data_at_every_step(resample):
    diffusion, seen = MultinomialDiffusion(4, 12), {}
    diffusion.log_alpha_bar_t = diffusion.log_alpha_bar_t / 10     # t = T shows the code, too
    diffusion.alpha_bar_t = diffusion.log_alpha_bar_t.exp()

    def model(z, t):
        seen.setdefault(int(t[0]), []).append(z[:, :40])
        return torch.zeros(1, 4, 80, 100)

    known = (torch.arange(80) < 40)[:, None].expand(1, 80, 100)
    diffusion.inpaint(model, torch.full((1, 80, 100), 2), known, 4, resample,
                      torch.Generator().manual_seed(0))
    assert {t: len(maps) for t, maps in seen.items()} == {12: resample, 9: resample, 6: resample,
                                                          3: 1}
    for t, maps in seen.items():
        kept = torch.stack(maps).eq(2).float().mean((1, 2, 3)).tolist()
        assert kept == pytest.approx([matrix(diffusion, 0, t)[2, 2].item()] * len(maps), abs=0.03)
    if resample == 2:
        assert not torch.equal(*seen[9]), "the step was not taken anew"


def law_of_inpainting(diffusion, model, code, resample):
    """The exact law of the second cell, the first being known: (3,)."""
    known = [matrix(diffusion, 0, t)[code] for t in range(diffusion.T + 1)]
    unknown = torch.full((3,), 1 / 3, dtype=torch.float64)
    for t, s in diffusion.reverse_times():
        for repeat in range(resample if s else 1):
            if repeat:
                unknown = unknown @ matrix(diffusion, s, t)
            both = torch.outer(known[t], unknown).flatten() @ step_kernel(diffusion, model, t, s)
            unknown = both.view(3, 3).sum(0)
    return unknown


def test_inpainting_follows_its_exact_law_and_resampling_brings_it_near_the_conditional():
    """One pass stays 0.2 from p(unknown|known), no matter how many steps; five come to 0.05."""
    diffusion = MultinomialDiffusion(3, 20)
    model, known = BestDenoiser(diffusion, JOINT), torch.tensor([[True], [False]])
    for code in range(3):
        conditional, errors = JOINT[code] / JOINT[code].sum(), []
        for resample in (1, 5):
            law = law_of_inpainting(diffusion, model, code, resample)
            errors.append(total_variation(law, conditional))
            z = diffusion.inpaint(model, torch.full((1, 2, 2000), code),
                                  known.expand(1, 2, 2000), None, resample,
                                  torch.Generator().manual_seed(code))
            assert_drawn_from(z[0, 1], law)
        assert errors == pytest.approx([[0.198, 0.052], [0.245, 0.095], [0.222, 0.085]][code],
                                       abs=6e-4)
    longer = MultinomialDiffusion(3, 100)
    law = law_of_inpainting(longer, BestDenoiser(longer, JOINT), 0, 1)
    assert total_variation(law, JOINT[0] / JOINT[0].sum()) == pytest.approx(0.178, abs=6e-4)


def sampling(steps=None):
    return MultinomialDiffusion(3, 4).sample(agreeing(3, 1), (1, 2, 2), steps)


def inpainting(known, **options):
    return MultinomialDiffusion(3, 4).inpaint(agreeing(3, 1), torch.zeros(1, 2, 2).long(), known,
                                              **options)


NONE_KNOWN = torch.zeros(1, 2, 2, dtype=torch.bool)


@pytest.mark.parametrize(("call", "reason"), [
    (lambda: MultinomialDiffusion(4, 5, "likelihood"), "'likelihood': choose from none, onehot"),
    (lambda: sampling(steps=0), "0 steps of a process of T = 4: give 1 to 4"),
    (lambda: sampling(steps=5), "5 steps of a process of T = 4: give 1 to 4"),
    (lambda: inpainting(NONE_KNOWN, resample=0), "resample = 0: each step is taken at least once"),
    (lambda: inpainting(NONE_KNOWN, generator=generators(2)), "2 generators for 1 images"),
])
def test_a_mistaken_call_is_refused_with_what_is_needed(call, reason):
    with pytest.raises(ValueError, match=reason):
        call()


@RESIDUALS
def test_maps_stay_on_their_device_and_times_on_the_cpu(residual):
    """On the meta device, which refuses to be mixed with the CPU as a GPU does."""
    diffusion = MultinomialDiffusion(6, 9, residual)

    def model(z, t):
        assert z.device.type == t.device.type == "meta"
        return torch.randn(2, 6, 4, 4, device="meta", requires_grad=True)

    z_0 = torch.zeros(2, 4, 4, dtype=torch.int64, device="meta")
    t, p = torch.tensor([1, 5]), torch.tensor([0.1, 0.2]).double()
    loss, terms = diffusion.loss(model, z_0, t, p)
    loss.backward()
    made = [loss, terms, diffusion.q_sample(z_0, t),
            diffusion.log_theta(diffusion.log_x0_hat(model(z_0, z_0), z_0), z_0, t - 1, t),
            diffusion.inpaint(model, z_0, z_0.bool(), 3, 2),
            diffusion.sample(model, (2, 4, 4), 3, device="meta")]
    assert {each.device.type for each in made} == {"meta"}


# -- the known grid --------------------------------------------------------------------------------

def test_a_cell_is_known_only_if_all_its_pixels_are():
    mask = torch.zeros(2, 1, 32, 48)
    assert known_cells(mask, 8).all()
    mask[1, 0, 15, 16] = 1
    known = known_cells(mask, 8)
    assert known.shape == (2, 4, 6)
    assert (~known).nonzero().tolist() == [[1, 1, 2]]
    assert not known_cells(torch.ones(1, 1, 32, 32), 8).any()


# -- which t ---------------------------------------------------------------------------------------

def filled(T, losses, times=HISTORY):
    """Timesteps whose every t has seen its own of `losses` so many times."""
    steps = Timesteps(T)
    for _ in range(times):
        steps.observe(torch.arange(1, T + 1), torch.tensor(losses))
    steps.update()
    return steps


def test_t_is_drawn_in_1_to_t_with_its_probability():
    losses = [8.0, 1.0, 4.0, 0.0, 2.0]
    steps = filled(5, losses)
    expected = (1 - UNIFORM_SHARE) * torch.tensor(losses).double() / 15 + UNIFORM_SHARE / 5
    torch.testing.assert_close(steps.probabilities(), expected)
    t, p = steps.draw(torch.rand(2000, dtype=torch.float64))
    torch.testing.assert_close(p, expected[t - 1])
    assert (t.min(), t.max()) == (1, 5)
    seen = torch.bincount(t - 1, minlength=5) / 2000
    torch.testing.assert_close(seen.double(), expected, rtol=0, atol=0.03)


def test_the_probability_is_the_root_of_the_mean_square_not_the_mean():
    steps = Timesteps(2)
    for n in range(HISTORY):
        steps.observe(torch.tensor([1, 2]), torch.tensor([2.0 * (n % 2), 1.0]))
    steps.update()
    p = (steps.probabilities() - UNIFORM_SHARE / 2) / (1 - UNIFORM_SHARE)
    assert (p[0] / p[1]).item() == pytest.approx(2 ** 0.5)


def test_t_is_uniform_until_every_t_has_its_ten_losses():
    steps = filled(3, [9.0, 1.0, 1.0], times=HISTORY - 1)
    steps.observe(torch.tensor([1, 2]), torch.tensor([9.0, 1.0]))
    steps.update()
    assert steps.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    steps.observe(torch.tensor([3]), torch.tensor([1.0]))
    steps.update()
    assert steps.probabilities()[0] > 0.8


def test_the_oldest_of_ten_losses_gives_way_also_to_several_of_one_batch():
    steps = filled(2, [1.0, 1.0])
    steps.observe(torch.tensor([1, 1, 2, 1]), torch.tensor([5.0, 6.0, 7.0, 8.0]))
    steps.update()
    assert steps.losses[0].tolist() == [5, 6, 8] + [1] * 7
    assert steps.losses[1].tolist() == [7] + [1] * 9


def test_losses_that_are_all_zero_leave_t_uniform_and_one_that_is_not_finite_is_left_out():
    assert filled(4, [0.0] * 4).probabilities().tolist() == pytest.approx([0.25] * 4)
    steps = filled(3, [1.0, 2.0, 3.0])
    before = steps.losses.clone()
    steps.observe(torch.tensor([1, 2, 3]), torch.tensor([float("nan"), float("inf"), 4.0]))
    steps.update()
    assert torch.equal(steps.losses[:2], before[:2])
    assert steps.losses[2, 0] == 4


def test_processes_and_micro_batches_make_no_difference(monkeypatch):
    """Images 0..7 of one step: at once, in micro-batches, and as the shares of two processes."""
    t, losses = torch.tensor([2, 1, 2, 2, 1, 2, 2, 1]), torch.arange(8.0)

    def after(parts):
        steps = Timesteps(2)
        before = steps.probabilities()
        for part in parts:
            steps.observe(t[part], losses[part])
        assert torch.equal(steps.probabilities(), before), "within a step the history moved"
        return steps

    whole, micro = after([slice(0, 8)]), after([slice(0, 3), slice(3, 8)])
    ranks = [after([slice(0, 2), slice(2, 4)]), after([slice(4, 6), slice(6, 8)])]
    whole.update()
    micro.update()
    shares = torch.cat([torch.cat(rank.observed) for rank in ranks])
    monkeypatch.setattr(module, "gather", lambda own: shares)
    for rank in ranks:
        rank.update()
    for steps in [micro, *ranks]:
        assert torch.equal(steps.losses, whole.losses)
        assert torch.equal(steps.counts, whole.counts)


def test_a_restored_history_goes_on_with_the_same_draws(tmp_path):
    steps, other = filled(20, [float(t) for t in range(20)]), Timesteps(20)
    torch.save(steps.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in range(3):
        u = uniforms(generators(8, seed), 1)[0]
        draws = [each.draw(u) for each in (steps, other)]
        for each, (t, _) in zip((steps, other), draws):
            each.observe(t, t * 0.5)
            each.update()
        assert torch.equal(draws[0][0], draws[1][0])
        assert torch.equal(draws[0][1], draws[1][1])
