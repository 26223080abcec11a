"""The noise of DDM and its algebra, in closed form. DDM Sec. 3.1, Eq. 15-22 and 24.

One step of noise keeps a code with probability alpha_t, else replaces it by one of all K, drawn
uniformly. Many steps do the same with another probability, so from any time to any later one, and
back, a cell needs two numbers and no K x K matrix: a, that it was never replaced, and b = (1-a)/K,
what each code gets otherwise; a + K b = 1. For times 0 <= s < t <= T:

    a_0s = alpha_bar_s                  b_0s = (1 - a_0s) / K        from 0 to s
    a_st = alpha_bar_t / alpha_bar_s    b_st = (1 - a_st) / K        from s to t
    a_0t = a_0s a_st                    b_0t = a_st b_0s + b_st      from 0 to t

    z_0 --q_sample--> z_t                       Eq. 17
    z_t, z_0 --log_posterior--> q(z_s|z_t,z_0)  Eq. 20
    z_t, x --log_theta, draw--> N[theta(z_t,x)] Eq. 22: the same, with a distribution x for z_0
    z_t, x, z_0 --kl--> nats                    Eq. 24: how far apart these two are

alpha_bar_0 = 1, so s = 0 is no special case: a_0s = 1, b_0s = 0. The paper's step is s = t - 1.
Below, of one cell, i = z_t and j = z_0; each docstring derives its form. Times are int64 tensors
(B,) on the CPU, where the tables are, in float64; maps of codes are (B,h,w) int64 and
log-probabilities (B,K,h,w), on any device.

Not here: the network that says what x is, the bound, samplers (diffusion.py).
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from seeding import per_image, uniforms

SCHEDULES = ("cosine", "cosine_sqrt")

# log(1 + e^y), which torch replaces by y from a threshold on: at its usual 20 that costs 2e-9.
softplus = partial(F.softplus, threshold=40.0)


def draw_codes(log_x, u):
    """Codes of distribution x, one for each cell, by the inverse of its cumulative sums.

    log_x (B,K,h,w), u (B,h,w) in [0,1) -> (B,h,w). The first code whose cumulative sum reaches
    1 - u, in (0,1], has a probability above zero. A Gumbel draw would need K numbers a cell.
    """
    cumulative = log_x.exp().cumsum(1)                                              # (B, K, h, w)
    level = (1 - u)[:, None].to(cumulative.dtype).to(cumulative.device)             # (B, 1, h, w)
    return (cumulative < level * cumulative[:, -1:]).sum(1)                         # (B, h, w)


# ---------------------------------------------------------------- schedule


def cosine_schedule(T, schedule="cosine"):
    """log alpha_bar_t for t = 0..T: (T+1,) float64. [DDM Eq. 19]  deviation D33

    alpha_bar_t = f(t) / f(0), f(t) = cos²((t/T + s)/(1 + s) · pi/2), s = 0.008. As f(T) = 0, the
    steps alpha_t = f(t) / f(t-1) are clipped to at least 0.001, which touches the last one only.
    "cosine_sqrt" takes the root of each step, alpha_bar_t = cos, as Hoogeboom et al.'s code does
    and the paper's appendix does not.
    """
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2                       # (T+1)
    log_alpha_t = (f[1:] / f[:-1]).clamp(min=0.001).log()                           # (T)
    if schedule == "cosine_sqrt":
        log_alpha_t = log_alpha_t / 2
    return torch.cat([torch.zeros(1, dtype=torch.float64), log_alpha_t.cumsum(0)])  # (T+1)


# ---------------------------------------------------------------- the process


class Coefficients(NamedTuple):
    """The six numbers of the module's docstring, each (B,1,1,1)."""

    a_0s: torch.Tensor
    b_0s: torch.Tensor
    a_st: torch.Tensor
    b_st: torch.Tensor
    a_0t: torch.Tensor
    b_0t: torch.Tensor


class UniformNoise:
    """The process q and its inversion by Bayes' rule. [DDM Sec. 3.1] [DDM Eq. 15]

    Q_t = alpha_t I + (1 - alpha_t)/K 11^T is symmetric, and products of such matrices are such
    matrices, with the product of their alphas: the code never forms one.

    K: codes; T: steps; schedule: "cosine" (Eq. 19) or "cosine_sqrt".
    alpha_bar_t, log_alpha_bar_t, lambda_t: (T+1,) float64, indexed by t; lambda_t is
    log q(z_t=k|z_0=k) - log q(z_t=k|z_0=l), l != k: what z_t says for z_0 being the same code.
    """

    def __init__(self, K, T, schedule="cosine"):
        if K < 2 or T < 1:
            raise ValueError(f"K = {K}, T = {T}: give at least 2 codes and 1 step")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule {schedule!r}: choose from {', '.join(SCHEDULES)}")
        self.K, self.T, self.schedule = K, T, schedule
        self.log_alpha_bar_t = cosine_schedule(T, schedule)
        self.alpha_bar_t = self.log_alpha_bar_t.exp()
        # 1 - alpha_bar is -expm1(log alpha_bar): a difference would lose the first steps' digits.
        odds = K * self.alpha_bar_t / -torch.expm1(self.log_alpha_bar_t)
        self.lambda_t = odds.log1p()

    def coefficients(self, t, s, like):
        """Coefficients for times s < t, (B,) each, in the type and on the device of `like`."""
        log_a_0s, log_a_0t = self.log_alpha_bar_t[s], self.log_alpha_bar_t[t]
        table = torch.stack([number for log_a in (log_a_0s, log_a_0t - log_a_0s, log_a_0t)
                             for number in (log_a.exp(), -torch.expm1(log_a) / self.K)])  # (6, B)
        table = table.to(like.dtype).to(like.device)
        return Coefficients(*table[..., None, None, None])

    def random_codes(self, u):
        """Uniform codes: u in [0,1), float64 -> int64 of the same shape."""
        return (u * self.K).long()

    # ------------------------------------------------ forward

    def q_sample(self, z_0, t, generator=None):
        """z_t ~ q(z_t|z_0): codes (B,h,w), times (B,) -> (B,h,w). [DDM Eq. 17] [DDM Eq. 18]

        generator: as for `per_image`.
        """
        u = uniforms(per_image(generator, len(z_0)), 2, *z_0.shape[1:])             # (2, B, h, w)
        return self.forward(z_0, torch.zeros_like(t), t, u)

    def forward(self, z_s, s, t, u):
        """z_t ~ q(z_t|z_s) from uniforms u (2,B,h,w) float64. [DDM Eq. 16]

        Cat(a z_s + b) in words: keep the code with probability a, else draw one of all K, among
        them the same again. What is rare is asked near u = 0, where numbers are finest.
        """
        lost = -torch.expm1(self.log_alpha_bar_t[t] - self.log_alpha_bar_t[s])      # (B), 1 - a
        lost = (u[0] < lost[:, None, None]).to(z_s.device)                          # (B, h, w)
        return torch.where(lost, self.random_codes(u[1]).to(z_s.device), z_s)

    def prior_kl(self):
        """L_T = KL(q(z_T|z_0) || uniform) of one cell in nats; without parameters, and tiny.

        With a = alpha_bar_T, one code has probability a + b, the K - 1 others b, and Kb = 1 - a:
            (a + b) log(1 + (K-1) a) + (K-1) b log(1 - a).
        """
        K, a = self.K, self.alpha_bar_t[-1].item()
        b = (1 - a) / K
        return (a + b) * math.log1p((K - 1) * a) + (K - 1) * b * math.log1p(-a)

    # ------------------------------------------------ backward, one step

    def log_posterior(self, z_t, z_0, t, s):
        """log q(z_s|z_t,z_0): (B,K,h,w) float64 on the CPU. [DDM Eq. 20]

        Bayes: q(z_t|z_s) q(z_s|z_0) / q(z_t|z_0). As a function of z_s the first factor is the
        column z_t of the matrix from s to t. That is symmetric, so it is the row z_t, which looks
        like noise put on z_t: a_st 1[k=i] + b_st. All in all log_theta with a one-hot for x.
        """
        code = torch.arange(self.K).view(-1, 1, 1)                                  # (K, 1, 1)
        one_hot = (code == z_0.cpu()[:, None]).double()                             # (B, K, h, w)
        return self.log_theta(one_hot.log(), z_t.cpu(), t, s)

    def log_theta(self, log_x, z_t, t, s):
        """log N[theta(z_t,x)] over z_s, x in the place of z_0: (B,K,h,w). [DDM Eq. 21]

        theta_k = (a_st 1[k=i] + b_st)(a_0s x_k + b_0s), and its sum over k needs no sum: the second
        factor alone sums to a_0s + K b_0s = 1, so
            S = a_st (a_0s x_i + b_0s) + b_st = a_0t x_i + b_0t.
        """
        c = self.coefficients(t, s, log_x)
        i = z_t[:, None]                                                            # (B, 1, h, w)
        code = torch.arange(self.K, device=z_t.device).view(-1, 1, 1)               # (K, 1, 1)
        first = torch.where(code == i, (c.a_st + c.b_st).log(), c.b_st.log())       # (B, K, h, w)
        second = torch.logaddexp(log_x + c.a_0s.log(), c.b_0s.log())                # (B, K, h, w)
        log_x_i = log_x.gather(1, i)                                                # (B, 1, h, w)
        log_S = torch.logaddexp(log_x_i + c.a_0t.log(), c.b_0t.log())               # (B, 1, h, w)
        return first + second - log_S

    def draw(self, log_x, z_t, t, s, u):
        """z_s ~ N[theta(z_t,x)] from uniforms u (3,B,h,w) float64: (B,h,w).

            theta_k = 1[k=i] a_st (a_0s x_i + b_0s) + b_st (a_0s x_k + b_0s)
        and the second part sums to b_st. So with probability b_st / S the cell leaves z_t, for a
        draw from x with probability a_0s, else for one of all K codes. Cumulative sums over theta
        itself would lose b_st, which is 1e-8 near t = 1, in float32.
        """
        c = self.coefficients(t, s, log_x)
        S = c.a_0t * log_x.gather(1, z_t[:, None]).exp() + c.b_0t                   # (B, 1, h, w)
        leave, noise = u[:2, :, None].to(log_x.dtype).to(log_x.device)              # (B, 1, h, w)
        elsewhere = torch.where((noise < self.K * c.b_0s)[:, 0],
                                self.random_codes(u[2]).to(z_t.device),
                                draw_codes(log_x, u[2]))                            # (B, h, w)
        return torch.where((leave < c.b_st / S)[:, 0], elsewhere, z_t)

    # ------------------------------------------------ what a wrong x costs

    def nll(self, log_x, z_t, z_0, t):
        """-log N[theta(z_t,x)] at z_0, for one step from t to s = 0: nats (B,h,w).

        There (second factor x_k) it is -log x_j + log S(x) - log S(z_0). At t = 1 this is L_0.
        """
        c = self.coefficients(t, torch.zeros_like(t), log_x)
        i, j = z_t[:, None], z_0[:, None]                                           # (B, 1, h, w)
        log_x_i, log_x_j = log_x.gather(1, torch.cat([i, j], 1)).chunk(2, 1)        # (B, 1, h, w)
        return (_log_S_ratio(log_x_i, i == j, c) - log_x_j)[:, 0]

    def kl(self, log_x, z_t, z_0, t, s):
        """KL(q(z_s|z_t,z_0) || N[theta(z_t,x)]) in nats: (B,h,w). [DDM Eq. 24]

        q and p share theta's first factor. With r_k = log(a_0s x_k / b_0s + 1), a softplus,
            q_k / p_k = (a_0s/b_0s 1[k=j] + 1) / exp(r_k) · S(x)/S(z_0),
            KL = q_j log(a_0s/b_0s + 1) - sum_k q_k r_k + log S(x)/S(z_0).
        q has one value at all k but i and j, so the sum is one over r_k and two corrections:
            sum_k q_k r_k = q_k sum_k r_k + (q_i - q_k) r_i + 1[i!=j] (q_j - q_k) r_j.
        For s = 0 all of q is at j and the KL is -log p_j: `nll`, the limit of the same formula.
        """
        c = self.coefficients(t, s, log_x)
        i, j = z_t[:, None], z_0[:, None]                                           # (B, 1, h, w)
        same, last = i == j, c.b_0s == 0
        log_x_i, log_x_j = log_x.gather(1, torch.cat([i, j], 1)).chunk(2, 1)        # (B, 1, h, w)

        S = torch.where(same, c.a_0t + c.b_0t, c.b_0t)                              # (B, 1, h, w)
        q_i = (c.a_st + c.b_st) * torch.where(same, c.a_0s + c.b_0s, c.b_0s) / S
        q_j = torch.where(same, c.a_st + c.b_st, c.b_st) * (c.a_0s + c.b_0s) / S
        q_k = c.b_st * c.b_0s / S

        odds = c.a_0s / torch.where(last, 1, c.b_0s)     # finite for s = 0, or gradients were NaN
        r = softplus(log_x + odds.log()).sum(1, keepdim=True)                       # (B, 1, h, w)
        r_i, r_j = softplus(log_x_i + odds.log()), softplus(log_x_j + odds.log())
        expected = q_k * r + (q_i - q_k) * r_i + torch.where(same, 0, (q_j - q_k) * r_j)
        divergence = torch.where(last, -log_x_j, q_j * odds.log1p() - expected)     # (B, 1, h, w)
        return (divergence + _log_S_ratio(log_x_i, same, c))[:, 0]


def _log_S_ratio(log_x_i, same, c):
    """log S(x)/S(z_0): S(x) = b_0t (a_0t/b_0t x_i + 1), S(z_0) the same with 1[i=j] for x_i."""
    odds = c.a_0t / c.b_0t
    return softplus(log_x_i + odds.log()) - torch.where(same, odds.log1p(), 0)      # (B, 1, h, w)
