import itertools
import math

import pytest
import torch
from dense_diffusion import (
    BestDenoiser,
    all_maps,
    map_number,
    matrix,
    posterior,
    step_kernel,
    total_variation,
)
from scipy.stats import chisquare

from diffusion import MultinomialDiffusion, bits_per_dim, known_cells
from seeding import uniforms
from timesteps import Timesteps

# Two cells of three codes that mostly agree.
JOINT = torch.tensor([[30, 2, 1], [3, 25, 4], [5, 2, 28]]).double() / 100
# As different as the options make them; the first is the default.
OPTIONS = [{}, {"residual": "onehot"}, {"form": "mixture"}, {"last_step": "x0hat"},
           {"form": "mixture", "residual": "onehot", "schedule": "cosine_sqrt"}]


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


# ---------------------------------------------------------------- what x means


def reverse_law(noise, s, t):
    """The true q(z_s^d|Z_t) for data JOINT, from all maps: [Z_t, k, d]."""
    K = 3
    to_s, on = matrix(noise, 0, s), matrix(noise, s, t)
    at_s = torch.einsum("ab,ac,bd->cd", JOINT, to_s, to_s)                  # (z_s^1, z_s^2)
    both = torch.einsum("cd,ce,df->efcd", at_s, on, on)                     # (Z_t, Z_s)
    law = torch.stack([both.sum(3), both.sum(2)], -1).view(K * K, K, 2)
    return law / law.sum(1, keepdim=True)


@pytest.mark.parametrize(("form", "full"), [("theta", False), ("mixture", True)])
def test_the_best_x_gives_the_true_reverse_between_all_times(form, full):
    diffusion = MultinomialDiffusion(3, 5, form=form)
    model, maps = BestDenoiser(diffusion, JOINT, full=full), all_maps(3, 2)
    for s, t in itertools.combinations(range(6), 2):
        log_p = diffusion.log_p(model(maps, times(9, t)[0]), maps, *times(9, t, s))[..., 0]
        torch.testing.assert_close(log_p.exp(), reverse_law(diffusion, s, t), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("form", "full"), [("theta", True), ("mixture", False)])
def test_the_other_x_does_not(form, full):
    diffusion = MultinomialDiffusion(3, 5, form=form)
    model, maps = BestDenoiser(diffusion, JOINT, full=full), all_maps(3, 2)
    log_p = diffusion.log_p(model(maps, times(9, 3)[0]), maps, *times(9, 3, 2))[..., 0]
    assert (log_p.exp() - reverse_law(diffusion, 2, 3)).abs().max() > 0.1


def test_the_mixture_is_the_sum_over_x0hat_of_posteriors():
    K, T = 4, 6
    diffusion = MultinomialDiffusion(K, T, form="mixture")
    z_t = torch.arange(K).view(K, 1, 1)
    for s, t in itertools.combinations(range(T + 1), 2):
        logits = 2 * torch.randn(K, K, 1, 1, dtype=torch.float64)
        x0hat = logits.softmax(1)[..., 0, 0]                                # (z_t, z_0)
        dense = torch.einsum("ij,ijk->ik", x0hat, posterior(diffusion, s, t))
        p = diffusion.log_p(logits, z_t, *times(K, t, s)).exp()[..., 0, 0]
        torch.testing.assert_close(p, dense, rtol=0, atol=1e-15)


def test_a_mixture_with_the_likelihood_residual_is_theta_without_one():
    theta = MultinomialDiffusion(7, 9)
    mixture = MultinomialDiffusion(7, 9, form="mixture", residual="likelihood")
    z_t, t = torch.randint(7, (9, 2, 3)), torch.arange(1, 10)
    logits = torch.randn(9, 7, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(mixture.log_p(logits, z_t, t, t - 1),
                               theta.log_p(logits, z_t, t, t - 1), rtol=0, atol=1e-12)


def test_the_onehot_residual_adds_one_at_the_codes_own_logit():
    diffusion = MultinomialDiffusion(5, 4, residual="onehot")
    z_t = torch.randint(5, (2, 3, 3))
    logits = torch.randn(2, 5, 3, 3)
    one_hot = torch.nn.functional.one_hot(z_t, 5).movedim(-1, 1)
    torch.testing.assert_close(diffusion.log_x0hat(logits, z_t, *times(2, 2)),
                               (logits + one_hot).log_softmax(1))


def test_a_step_to_0_gives_the_full_posterior_to_show():
    diffusion = MultinomialDiffusion(3, 5)
    maps = all_maps(3, 2)
    blind, full = (BestDenoiser(diffusion, JOINT, full=full) for full in (False, True))
    for t in range(1, 6):
        log_p = diffusion.log_p(blind(maps, times(9, t)[0]), maps, *times(9, t, 0))
        torch.testing.assert_close(log_p, full(maps, times(9, t)[0]).log_softmax(1))


def test_unknown_options_are_refused_by_name():
    for name in ("form", "residual", "last_step", "schedule"):
        with pytest.raises(ValueError, match=f"{name} 'wrong': choose from"):
            MultinomialDiffusion(4, 5, **{name: "wrong"})


# ---------------------------------------------------------------- the bound


def reverse_kernels(diffusion, table):
    """p(z_{t-1}|Z_t) between all maps for t = 1..T: (T, K^D, K^D)."""
    return torch.stack([step_kernel(diffusion, table, t, t - 1) for t in range(1, diffusion.T + 1)])


def exact_bound(diffusion, table, z_0):
    """L_T + sum_t E[L_{t-1}] of the one map z_0 (1,D,1), over all z_t."""
    D, maps = table.D, all_maps(diffusion.K, table.D)
    n, total = len(maps), D * diffusion.prior_kl()
    for t in range(1, diffusion.T + 1):
        q = matrix(diffusion, 0, t)[z_0[:, :, 0], maps[:, :, 0]].prod(1)    # (K^D)
        time, = times(n, t)
        log_x0hat = diffusion.log_x0hat(table(maps, time), maps, time)
        term = diffusion.bound_term(log_x0hat, maps, z_0.expand(n, -1, -1), time)
        total += (q * term.sum((1, 2))).sum().item()
    return total


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("K", "T", "D"), [(3, 6, 1), (5, 5, 1), (3, 4, 2), (2, 5, 2)])
def test_the_bound_is_the_sum_over_all_paths(K, T, D, options):
    diffusion = MultinomialDiffusion(K, T, **options)
    table, maps = Table(K, T, D), all_maps(K, D)
    p = reverse_kernels(diffusion, table)
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


def expected_bound_of_one_cell(diffusion):
    """E[VLB] over a prior of five codes, with x̂0 = that prior for every z_t; and its entropy."""
    prior = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05]).double()
    table = Table(5, diffusion.T, 1)
    table.logits[:] = prior.log().view(1, 5, 1, 1)
    bound = sum(p.item() * exact_bound(diffusion, table, torch.tensor([[[code]]]))
                for code, p in enumerate(prior))
    return bound, -(prior * prior.log()).sum().item()


def test_of_a_single_cell_the_bound_is_the_entropy():
    bound, entropy = expected_bound_of_one_cell(MultinomialDiffusion(5, 8))
    # What is left is KL(q(z_T) || uniform), as alpha_bar_T is not quite 0.
    assert bound == pytest.approx(entropy, abs=1e-7)


def test_eq_22s_first_line_is_loose_with_theta_and_right_with_the_mixture():
    loose, entropy = expected_bound_of_one_cell(MultinomialDiffusion(5, 8, last_step="x0hat"))
    assert loose > entropy + 0.5
    mixtures = [MultinomialDiffusion(5, 8, form="mixture", last_step=last_step)
                for last_step in ("theta", "x0hat")]
    bounds = [expected_bound_of_one_cell(mixture)[0] for mixture in mixtures]
    assert bounds[0] == pytest.approx(bounds[1], abs=1e-12)
    logits, z_t = torch.randn(3, 5, 2, 2, dtype=torch.float64), torch.randint(5, (3, 2, 2))
    first, second = (mixture.log_p(logits, z_t, *times(3, 4, 0)) for mixture in mixtures)
    torch.testing.assert_close(first, second)
    assert torch.equal(second, logits.log_softmax(1))


def test_vlb_draws_the_bound_and_its_parts():
    diffusion = MultinomialDiffusion(3, 4)
    table, z_0 = Table(3, 4, 2), torch.tensor([[[2], [0]]])
    parts = diffusion.vlb(table, z_0.expand(2000, -1, -1), torch.Generator().manual_seed(0))
    assert {name: (part.shape, part.dtype) for name, part in parts.items()} == dict.fromkeys(
        ("L_T", "L_t", "L_0", "vlb"), ((2000,), torch.float64))
    assert torch.equal(parts["vlb"], parts["L_T"] + parts["L_t"] + parts["L_0"])
    error = parts["vlb"].std().item() / 2000 ** 0.5
    assert parts["vlb"].mean().item() == pytest.approx(exact_bound(diffusion, table, z_0),
                                                       abs=4 * error)


def fake_terms(monkeypatch, diffusion):
    """Make L_{t-1} = t² for every image; returns the list of all t asked for, (B,) each."""
    asked = []

    def term(model, z_0, t, generators):
        asked.append(t)
        return t.double() ** 2
    monkeypatch.setattr(diffusion, "_term_in_float64", term)
    return asked


def test_vlb_of_all_t_asks_each_t_once(monkeypatch):
    diffusion = MultinomialDiffusion(4, 30)
    asked = fake_terms(monkeypatch, diffusion)
    parts = diffusion.vlb(None, torch.zeros(3, 1, 1, dtype=torch.int64))
    assert [t.tolist() for t in asked] == [[t] * 3 for t in range(1, 31)]
    assert parts["L_0"].tolist() == [1] * 3
    assert parts["L_t"].tolist() == pytest.approx([sum(t * t for t in range(2, 31))] * 3)


def test_strata_of_t_have_no_bias_and_little_variance(monkeypatch):
    diffusion = MultinomialDiffusion(4, 30)
    asked = fake_terms(monkeypatch, diffusion)
    parts = diffusion.vlb(None, torch.zeros(2000, 1, 1, dtype=torch.int64), strata=7)
    exact = sum(t * t for t in range(2, 31))
    assert len(asked) == 8
    assert torch.stack(asked).max() == 30
    assert parts["L_t"].mean().item() == pytest.approx(exact, rel=0.01)
    assert parts["L_t"].std() < 0.1 * exact


def test_bits_per_dim_of_a_uniform_model_are_log2_k():
    assert bits_per_dim(256 * math.log(1024), 256) == pytest.approx(10)


# ---------------------------------------------------------------- the loss


def test_the_expected_loss_is_the_bound_whatever_t_is_drawn_by(monkeypatch):
    K, T = 4, 6
    diffusion = MultinomialDiffusion(K, T)
    z_0, noisy = torch.randint(K, (2, T + 1, 3, 5))
    monkeypatch.setattr(diffusion, "q_sample", lambda z, t, generator: noisy[t])
    logits = torch.randn(T + 1, K, 3, 5, dtype=torch.float64)
    z_0 = z_0[:1]
    t = torch.arange(1, T + 1)
    terms = diffusion.bound_term(logits[1:].log_softmax(1), noisy[1:], z_0.expand(T, -1, -1), t)
    exact = terms.sum().item() / 15 + diffusion.prior_kl()
    steps = Timesteps(T)
    for _ in range(10):
        steps.observe(t, torch.rand(T))
    steps.update()
    for p in (torch.full((T,), 1 / T, dtype=torch.float64), steps.probabilities()):
        losses = [diffusion.loss(lambda z, t: logits[t], z_0, t[n:n + 1], p[n:n + 1])[0]
                  for n in range(T)]
        assert sum(p * torch.stack(losses)).item() == pytest.approx(exact, rel=1e-12)


def test_the_loss_of_a_network_that_knows_nothing_is_ln_k_a_cell():
    diffusion = MultinomialDiffusion(50, 20)
    losses = []
    for t in range(1, 21):
        z_0 = torch.randint(50, (4, 30, 30))
        p = torch.ones(4, dtype=torch.float64)
        losses.append(diffusion.loss(lambda z, t: torch.zeros(4, 50, 30, 30), z_0, *times(4, t), p)
                      [0].item() - diffusion.prior_kl())
    assert sum(losses) == pytest.approx(math.log(50), rel=0.02)


def test_the_loss_descends_to_the_best_denoiser():
    """Two cells and a table for a network, from ln 9 = 2.20 nats a map."""
    diffusion, steps = MultinomialDiffusion(3, 5), Timesteps(5)
    table, data = Table(3, 5, 2), all_maps(3, 2)
    table.logits = torch.zeros_like(table.logits).requires_grad_()
    optimizer = torch.optim.Adam([table.logits], lr=0.1)
    for step in range(100):
        z_0 = data[torch.multinomial(JOINT.flatten(), 64, replacement=True)]
        draws = generators(64, step)
        t, p = steps.draw(draws)
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


def test_the_auxiliary_term_is_the_cross_entropy_of_the_full_posterior():
    z_0 = torch.randint(6, (3, 4, 4))
    t, p = torch.tensor([1, 5, 9]), torch.tensor([0.2, 0.5, 0.1]).double()
    logits = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    plain, auxiliary = MultinomialDiffusion(6, 9), MultinomialDiffusion(6, 9, aux_weight=0.01)
    losses = [each.loss(lambda z, t: logits, z_0, t, p, generators(3))
              for each in (plain, auxiliary)]
    assert torch.equal(losses[0][1], losses[1][1])
    z_t = plain.q_sample(z_0, t, generators(3))
    nll = -plain.log_p(logits, z_t, t, 0 * t).gather(1, z_0[:, None]).sum((1, 2, 3))
    expected = 0.01 * (nll / p).mean() / 16
    torch.testing.assert_close(losses[1][0] - losses[0][0], expected)


def test_half_precision_logits_are_judged_in_float32_and_float64_ones_in_float64():
    diffusion = MultinomialDiffusion(6, 9)
    z_0, t = torch.randint(6, (2, 4, 4)), torch.tensor([3, 7])
    p = torch.full((2,), 1 / 9, dtype=torch.float64)
    for given, used in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        logits = torch.randn(2, 6, 4, 4).to(given).requires_grad_()
        loss, terms = diffusion.loss(lambda z, t, logits=logits: logits, z_0, t, p)
        loss.backward()
        assert (loss.dtype, terms.dtype, logits.grad.dtype) == (used, used, given)
        assert not terms.requires_grad


def test_logits_of_another_shape_are_refused():
    diffusion = MultinomialDiffusion(6, 9)
    with pytest.raises(ValueError, match=r"gave \(2, 5, 4, 4\), not logits for K = 6: \(2, 6, 4"):
        diffusion.sample(lambda z, t: torch.zeros(2, 5, 4, 4), (2, 4, 4))


def test_the_terms_of_an_image_do_not_depend_on_its_batch():
    diffusion, steps = MultinomialDiffusion(8, 20), Timesteps(20)
    z_0 = torch.randint(8, (5, 6, 6))

    def terms(images):
        draws = [generators(5)[n] for n in images]
        return diffusion.loss(agreeing(8, 3), z_0[images], *steps.draw(draws), draws)[1]

    torch.testing.assert_close(torch.cat([terms([3, 0]), terms([4])]), terms(range(5))[[3, 0, 4]])


# ---------------------------------------------------------------- sampling


def law_of_samples(diffusion, model, steps):
    """The exact distribution of `sample` over all maps of two cells: (9,)."""
    law = torch.full((9,), 1 / 9, dtype=torch.float64)
    for t, s in diffusion.grid(steps):
        law = law @ step_kernel(diffusion, model, t, s)
    return law


def assert_drawn_from(z, law):
    """Maps of two cells, one in each column, against a law over all nine: chi-square at 1/1000."""
    count = torch.bincount(map_number(z).flatten(), minlength=9).double()
    assert chisquare(count.numpy(), (law * count.sum()).numpy()).pvalue > 1e-3


def test_the_grid_holds_t_and_0_and_falls_strictly():
    for T in (1, 7, 100, 4000):
        diffusion = MultinomialDiffusion(2, T)
        for steps in {1, 2, min(T, 10), T // 2 + 1, T}:
            grid = diffusion.grid(min(steps, T))
            assert len(grid) == min(steps, T)
            assert (grid[0][0], grid[-1][1]) == (T, 0)
            assert all(t > s for t, s in grid)
            assert all(s == t for (_, s), (t, _) in itertools.pairwise(grid))
        assert diffusion.grid() == diffusion.grid(T) == [(t, t - 1) for t in range(T, 0, -1)]


@pytest.mark.parametrize("steps", [0, 8, -1])
def test_a_wrong_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=f"{steps} steps of a process of T = 7: give 1 to 7"):
        MultinomialDiffusion(2, 7).sample(agreeing(2, 1), (1, 2, 2), steps)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_t_strided_steps_are_the_plain_loop_over_every_t_bit_for_bit(options):
    diffusion, model = MultinomialDiffusion(8, 12, **options), agreeing(8, 9)
    draws = generators(3)
    z = diffusion.random_codes(uniforms(draws, 3, 5, 4)[0])
    for t in range(12, 0, -1):
        u = uniforms(draws, 5, 5, 4)[2:]
        now, then = times(3, t, t - 1)
        log_x0hat = diffusion.log_x0hat(model(z, now), z, now)
        if t == 1 and diffusion.last_step == "x0hat":
            log_x = log_x0hat.exp().cumsum(1)
            z = (log_x < (1 - u[2])[:, None].float() * log_x[:, -1:]).sum(1)
        else:
            z = diffusion.draw(diffusion.log_x(log_x0hat, z, now), z, now, then, u)
    for steps in (12, None):
        assert torch.equal(diffusion.sample(model, (3, 5, 4), steps, generators(3)), z)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_samples_follow_the_law_of_their_steps(options):
    diffusion = MultinomialDiffusion(3, 20, **options)
    model = BestDenoiser(diffusion, JOINT)
    z = diffusion.sample(model, (1, 2, 10000), 4, torch.Generator().manual_seed(0))
    assert_drawn_from(z, law_of_samples(diffusion, model, 4))


def test_strided_steps_come_near_the_data_as_their_number_grows():
    """The exact error with a perfect denoiser: about 1/n, all of it from cells that move alone."""
    diffusion = MultinomialDiffusion(3, 400)
    model = BestDenoiser(diffusion, JOINT)
    errors = [total_variation(law_of_samples(diffusion, model, steps), JOINT.flatten())
              for steps in (1, 2, 4, 8, 20, 50, 100)]
    assert errors == pytest.approx([0.496, 0.334, 0.178, 0.087, 0.033, 0.013, 0.006], abs=6e-4)


def test_a_low_temperature_takes_the_likeliest_code():
    diffusion = MultinomialDiffusion(9, 10)
    logits = torch.randn(2, 9, 6, 6)
    z = diffusion.sample(lambda z, t: logits, (2, 6, 6), 3, generators(2), temperature=1e-3)
    assert torch.equal(z, logits.argmax(1))
    warm = diffusion.sample(lambda z, t: logits, (2, 6, 6), 3, generators(2))
    assert (warm != z).float().mean() > 0.2


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="'ddim': choose from strided, route"):
        MultinomialDiffusion(4, 5).sample(agreeing(4, 1), (1, 2, 2), sampler="ddim")


@pytest.mark.parametrize("sampler", ["strided", "route"])
def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in(sampler):
    diffusion, model = MultinomialDiffusion(40, 30), agreeing(40, 20)

    def sample(images):
        return diffusion.sample(model, (len(images), 6, 5), 7, [generators(4)[n] for n in images],
                                sampler=sampler)

    whole = sample(range(4))
    assert torch.equal(torch.cat([sample([2, 0]), sample([3])]), whole[[2, 0, 3]])
    assert not torch.equal(whole[0], whole[1])
    one = torch.Generator().manual_seed(5)
    parts = [diffusion.sample(model, (B, 6, 5), 7, one, sampler=sampler) for B in (1, 2)]
    again = diffusion.sample(model, (3, 6, 5), 7, torch.Generator().manual_seed(5), sampler=sampler)
    assert torch.equal(torch.cat(parts), again)


# ---------------------------------------------------------------- the route sampler


def test_the_route_fixes_the_cells_that_are_sure_first():
    """Sure of the left half only: after the step to alpha_bar_s = 1/2 just that half is clean."""
    diffusion = MultinomialDiffusion(50, 200)
    truth, seen = torch.randint(50, (2, 4, 8)), []
    logits = torch.zeros(2, 50, 4, 8)
    logits[..., :4] = 100 * torch.nn.functional.one_hot(truth[..., :4], 50).movedim(-1, 1)

    def model(z, t):
        seen.append((z, diffusion.alpha_bar_t[t[0]].item()))
        return logits

    z = diffusion.sample(model, (2, 4, 8), 2, generators(2), sampler="route")
    assert seen[1][1] == pytest.approx(0.5, abs=0.02)
    right = [(each == truth).float().mean((0, 1)) for each in (seen[0][0], seen[1][0], z)]
    assert right[0].max() < 0.5
    assert (right[1][:4] == 1).all()
    assert right[1][4:].max() < 0.5
    assert (seen[0][0] == seen[1][0])[..., 4:].float().mean() < 0.2, "noise is drawn anew"
    assert (right[2][:4] == 1).all()


def test_few_routed_steps_make_likelier_maps_than_as_many_strided_ones():
    chain = 0.05 + 0.85 * torch.eye(3)                                      # K = 3, four cells
    joint = torch.einsum("a,ab,bc,cd->abcd", torch.tensor([0.5, 0.3, 0.2]), chain, chain, chain)
    diffusion = MultinomialDiffusion(3, 100)
    model, nats = BestDenoiser(diffusion, joint), {}
    for sampler in ("strided", "route"):
        z = diffusion.sample(model, (800, 4, 1), 6, torch.Generator().manual_seed(0),
                             sampler=sampler)
        nats[sampler] = -joint.flatten()[map_number(z)].log().mean().item()
        assert map_number(z).unique().numel() > 40
    assert nats["route"] < nats["strided"] - 0.15


# ---------------------------------------------------------------- inpainting


def test_known_codes_come_back_and_the_rest_is_filled():
    diffusion, model = MultinomialDiffusion(12, 10), agreeing(12, 5)
    indices, known = torch.randint(12, (3, 6, 7)), torch.rand(3, 6, 7) < 0.4
    for resample in (1, 3):
        z = diffusion.inpaint(model, indices, known, 5, resample, generators(3))
        assert torch.equal(z[known], indices[known])
        assert 0 < (z != indices)[~known].float().mean() <= 1
        other = torch.where(known, indices, 0)           # what stands in the hole does not matter
        assert torch.equal(diffusion.inpaint(model, other, known, 5, resample, generators(3)), z)


def test_with_all_known_nothing_changes_and_with_nothing_known_it_is_sampling():
    diffusion, model = MultinomialDiffusion(12, 10), agreeing(12, 5)
    indices = torch.randint(12, (2, 6, 7))
    known = torch.ones(2, 6, 7, dtype=torch.bool)
    assert torch.equal(diffusion.inpaint(model, indices, known, 4, 2), indices)
    assert torch.equal(diffusion.inpaint(model, indices, ~known, 4, generator=generators(2)),
                       diffusion.sample(model, (2, 6, 7), 4, generators(2)))


def test_an_image_does_not_depend_on_the_batch_it_is_filled_in():
    diffusion, model = MultinomialDiffusion(12, 10), agreeing(12, 5)
    indices, known = torch.randint(12, (3, 6, 7)), torch.rand(3, 6, 7) < 0.4
    whole = diffusion.inpaint(model, indices, known, 5, 2, generators(3))
    alone = diffusion.inpaint(model, indices[1:2], known[1:2], 5, 2, generators(3)[1:2])
    assert torch.equal(alone, whole[1:2])


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
    for t, s in diffusion.grid():
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
            count = torch.bincount(z[0, 1], minlength=3).double()
            assert chisquare(count.numpy(), (2000 * law).numpy()).pvalue > 1e-3
        assert errors == pytest.approx([[0.198, 0.052], [0.245, 0.095], [0.222, 0.085]][code],
                                       abs=6e-4)


def test_more_steps_do_not_replace_resampling():
    model = BestDenoiser(MultinomialDiffusion(3, 100), JOINT)
    law = law_of_inpainting(model.noise, model, 0, 1)
    assert total_variation(law, JOINT[0] / JOINT[0].sum()) == pytest.approx(0.178, abs=6e-4)


def test_a_mistaken_call_is_refused_with_what_is_needed():
    diffusion, model = MultinomialDiffusion(3, 4), agreeing(3, 1)
    indices = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"known must be bool \(1, 2, 2\), like the indices"):
        diffusion.inpaint(model, indices, torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match=r"known must be bool \(1, 2, 2\)"):
        diffusion.inpaint(model, indices, torch.ones(1, 1, 2, 2).bool())
    with pytest.raises(ValueError, match="resample = 0: each step is taken at least once"):
        diffusion.inpaint(model, indices, indices.bool(), resample=0)
    with pytest.raises(ValueError, match="2 generators for 1 images"):
        diffusion.inpaint(model, indices, indices.bool(), generator=generators(2))


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("options", [*OPTIONS, {"residual": "likelihood", "aux_weight": 0.1}],
                         ids=str)
def test_maps_stay_on_their_device_and_times_on_the_cpu(options):
    """On the meta device, which refuses to be mixed with the CPU as a GPU does."""
    diffusion = MultinomialDiffusion(6, 9, **options)

    def model(z, t):
        assert z.device.type == t.device.type == "meta"
        return torch.randn(2, 6, 4, 4, device="meta", requires_grad=True)

    z_0 = torch.zeros(2, 4, 4, dtype=torch.int64, device="meta")
    t, p = torch.tensor([1, 5]), torch.tensor([0.1, 0.2]).double()
    loss, terms = diffusion.loss(model, z_0, t, p)
    loss.backward()
    made = [loss, terms, diffusion.q_sample(z_0, t),
            diffusion.log_p(model(z_0, z_0), z_0, t, t - 1),
            diffusion.inpaint(model, z_0, z_0.bool(), 3, 2),
            diffusion.sample(model, (2, 4, 4), 3, sampler="route", device="meta")]
    assert {each.device.type for each in made} == {"meta"}


# ---------------------------------------------------------------- the known grid


def test_a_cell_is_known_only_if_all_its_pixels_are():
    mask = torch.zeros(2, 1, 32, 48)
    assert known_cells(mask, 8).all()
    mask[1, 0, 15, 16] = 1
    known = known_cells(mask, 8)
    assert known.shape == (2, 4, 6)
    assert (~known).nonzero().tolist() == [[1, 1, 2]]
    assert not known_cells(torch.ones(1, 1, 32, 32), 8).any()


@pytest.mark.parametrize("margin", [0, 1, 2])
def test_a_margin_around_the_hole_is_not_known_either(margin):
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 24:40, 40:56] = 1                           # rows 3 and 4, columns 5 and 6, of 8
    expected = torch.ones(8, 8, dtype=torch.bool)
    expected[3 - margin:5 + margin, 5 - margin:7 + margin] = False
    assert torch.equal(known_cells(mask, 8, margin)[0], expected)


def test_the_papers_three_masks_have_their_numbers_of_known_cells():
    def known(rows, columns):
        mask = torch.ones(1, 1, 256, 256)
        mask[..., rows, columns] = 0
        return known_cells(mask, 16).sum().item()

    everything = slice(None)
    assert known(slice(160, None), everything) == 96
    assert known(slice(128, None), slice(128, None)) == 64
    assert known(slice(64, 192), slice(64, 192)) == 64


def test_a_mask_that_is_no_multiple_of_the_cell_is_refused():
    with pytest.raises(ValueError, match=r"\(30, 32\) px has no grid of 8 px cells; pad"):
        known_cells(torch.zeros(1, 1, 30, 32), 8)
