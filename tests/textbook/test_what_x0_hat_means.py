"""Why theta wants an x0_hat that is blind to the cell's own z_t, on data that can be enumerated.

The paper leaves open what x0_hat estimates (D32), adds 1 to a logit (D31) and has another formula
for t = 1 (D30). Each of the alternatives is here as its definition, with K x K matrices.
"""

import itertools

import pytest
import torch
from dense_diffusion import BestDenoiser, all_maps, log_p, matrix, mixture, posterior, theta

from diffusion import MultinomialDiffusion

# Two cells of three codes that mostly agree.
JOINT = torch.tensor([[30, 2, 1], [3, 25, 4], [5, 2, 28]]).double() / 100


def reverse_law(diffusion, s, t):
    """The true q(z_s^d|Z_t) for data JOINT, from all maps: [Z_t, k, d]."""
    to_s, on = matrix(diffusion, 0, s), matrix(diffusion, s, t)
    at_s = torch.einsum("ab,ac,bd->cd", JOINT, to_s, to_s)                  # (z_s^1, z_s^2)
    both = torch.einsum("cd,ce,df->efcd", at_s, on, on)                     # (Z_t, Z_s)
    law = torch.stack([both.sum(3), both.sum(2)], -1).view(9, 3, 2)
    return law / law.sum(1, keepdim=True)


def largest_error(diffusion, full, form, s, t):
    """How far p(z_s|Z_t) is from the truth, x0_hat given the other cells or, with full, all."""
    maps = all_maps(3, 2)
    x = BestDenoiser(diffusion, JOINT, full)(maps, torch.full((9,), t)).softmax(1)[..., 0]
    p = torch.empty(9, 3, 2, dtype=torch.float64)
    for d in range(2):
        rows = x[:, None, :, d].expand(9, 3, 3)                             # (Z_t, i, j)
        p[..., d] = form(diffusion, rows, s, t)[torch.arange(9), maps[:, d, 0]]
    return (p - reverse_law(diffusion, s, t)).abs().max().item()


def test_the_best_x0_hat_gives_the_true_reverse_between_all_times():
    """theta's is p(z_0^i | the other cells), the mixture's p(z_0^i | all cells)."""
    diffusion = MultinomialDiffusion(3, 5)
    for s, t in itertools.combinations(range(6), 2):
        assert largest_error(diffusion, False, theta, s, t) < 1e-14
        assert largest_error(diffusion, True, mixture, s, t) < 1e-14
        blind = BestDenoiser(diffusion, JOINT)                              # and what runs is theta
        ours = log_p(diffusion, blind, all_maps(3, 2), t, s)[..., 0].exp()
        torch.testing.assert_close(ours, reverse_law(diffusion, s, t), rtol=0, atol=1e-14)


def test_the_other_x0_hat_does_not():
    diffusion = MultinomialDiffusion(3, 5)
    assert largest_error(diffusion, True, theta, 2, 3) > 0.1
    assert largest_error(diffusion, False, mixture, 2, 3) > 0.1


def test_the_mixture_is_theta_with_the_likelihoods_own_residual_not_with_1():
    """One logit is between them: lambda_t = log(1 + K abar/(1 - abar)), what z_t says of itself."""
    diffusion, logits = MultinomialDiffusion(4, 6), 2 * torch.randn(4, 4, dtype=torch.float64)
    own, errors_of_1 = torch.eye(4, dtype=torch.float64), []                # (z_t, z_0)
    for s, t in itertools.combinations(range(7), 2):
        abar = diffusion.alpha_bar_t[t]
        lambda_t = (4 * abar / (1 - abar)).log1p()
        expected = theta(diffusion, logits.softmax(1), s, t)
        errors = [(mixture(diffusion, (logits + residual * own).softmax(1), s, t) - expected)
                  .abs().max().item() for residual in (lambda_t, 1)]
        assert errors[0] < 1e-14
        errors_of_1.append(errors[1])
    assert max(errors_of_1) > 0.1


def expected_bound(diffusion, prior, first_line):
    """E[VLB] of one cell with x0_hat = prior for every z_t, by Eq. 24 term by term."""
    x, total = prior.expand(diffusion.K, -1), 0                             # (z_t, z_0)
    for t in range(1, diffusion.T + 1):
        at_t = prior[:, None] * matrix(diffusion, 0, t)                     # (z_0, z_t)
        p = theta(diffusion, x, t - 1, t)                                   # (z_t, z_{t-1})
        if t == 1:
            p = x if first_line else p
            total -= (at_t * p.T.log()).sum()
        else:
            q = posterior(diffusion, t - 1, t)                              # (z_t, z_0, z_{t-1})
            total += (at_t.T * (q * (q / p[:, None]).log()).sum(2)).sum()
    return total.item()


def test_eq_22s_first_line_makes_the_bound_loose_and_one_formula_makes_it_the_entropy():
    diffusion = MultinomialDiffusion(5, 8)
    prior = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05]).double()
    entropy = -(prior * prior.log()).sum().item()
    # What is left is KL(q(z_T) || uniform), as alpha_bar_T is not quite 0.
    assert expected_bound(diffusion, prior, False) == pytest.approx(entropy, abs=1e-7)
    assert expected_bound(diffusion, prior, True) > entropy + 0.5
