"""Generate and complete code maps by discrete diffusion. DDM Sec. 3.1 (Eq. 7, 15-24) and 4.4.

    training     z_0 --q_sample--> z_t --model--> x0_hat --theta--> p(z_{t-1}|z_t) --> L_{t-1}
    sampling     z_T uniform --model--> x0_hat --theta--> p(z_s|z_t) --draw--> z_s --> ... --> z_0
    completion   the same, with the known cells replaced by noised given codes before each step

One step of noise keeps a code with probability alpha_t and otherwise replaces it by one of all K
codes, drawn uniformly. Several steps do the same with other numbers: between any two times s < t
a code is kept with probability a and each of the K codes is drawn with b = (1 - a)/K besides:

    a_0s = alpha_bar_s                  b_0s = (1 - a_0s)/K        from 0 to s
    a_st = alpha_bar_t / alpha_bar_s    b_st = (1 - a_st)/K        from s to t

The paper has s = t - 1, where a_st is its alpha_t and b_st its beta_t/K. The reverse step holds
for any s < t, so sampling may skip times. Let x be the law of z_0 in a cell given the *other* cells
of z_t. Bayes' rule then gives the law of z_s in that cell given all of z_t:

    p(z_s=k | z_t)  ∝  q(z_t|z_s=k) p(z_s=k | other cells)       as each cell has its own noise
                    =  q(z_t|z_s=k) sum_j x_j q(z_s=k|z_0=j)
                    =  (a_st 1[k=z_t] + b_st) (a_0s x_k + b_0s)  which is theta(z_t, x) of Eq. 21

Theta contains the evidence of the cell's own z_t, which the network sees as well. In x0_hat it
would count twice, so the bound is lowest for an x0_hat without it, which is x. Skipping costs one
thing: within a step all cells are drawn independently.
tests/textbook/dense_diffusion.py has the same by K x K matrices.

`model`: codes (B,h,w), t (B,) int64 on their device -> logits (B,K,h,w). Other times are int64 (B,)
on the CPU, like the float64 tables. `generator`: a CPU torch.Generator, a list with one for each
image, or None. With a list an image does not depend on the batch it is drawn in. `add_noise` and
`loss` also take the uniforms themselves, (2,B,h,w) float64.
"""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from distributed import gather
from quantize import float64
from seeding import per_image, uniforms

HISTORY = 10              # latest losses of each t, as in Improved DDPM
UNIFORM_SHARE = 0.001     # of p_t, so that no t is forgotten
STRATA = 4                # parts of 2..T, with one t each, that bound a held-out map in training
ALL_T, FINAL_STRATA = 200, 64       # in reports: every t for T up to 200, else so many parts

# log(1 + e^y), which torch replaces by y from a threshold on: at its usual 20 that costs 2e-9.
softplus = partial(F.softplus, threshold=40.0)


def known_cells(mask, f):
    """Find the cells with no pixel to be generated: True = the code is given. [DDM Sec. 4.4]

    mask (B,1,H,W), f: pixels a cell, which divides H and W -> bool (B,H/f,W/f).
    """
    return F.max_pool2d((mask > 0).float(), f)[:, 0] == 0                           # (B, h, w)


def beside(x, like):
    """Copy x to `like`'s device. A CUDA device is not waited for, so that it is never idle."""
    return x.to(like.device, non_blocking=like.is_cuda)


def draw_codes(log_p, u):
    """Draw a code in each cell by inverting the cumulative sums of p: log_p (B,K,h,w) -> (B,h,w).

    Take the first code whose sum reaches 1 - u, for uniforms u (B,h,w) in [0,1). A code of
    probability 0 is never drawn. The sums are float64, because near t = 1 a code may have 1e-8.
    """
    cumulative = float64(log_p.exp()).cumsum(1)                                     # (B, K, h, w)
    level = beside((1 - u)[:, None], cumulative) * cumulative[:, -1:]               # (B, 1, h, w)
    return beside((cumulative < level).sum(1), log_p)                               # (B, h, w)


def cosine_schedule(T):
    """Compute log alpha_bar_t for t = 0..T: (T+1,) float64. [DDM Eq. 19]  deviation D33

    alpha_bar_t = f(t) / f(0), f(t) = cos²((t/T + s)/(1 + s) · pi/2), s = 0.008. As f(T) = 0, the
    last step alpha_t = f(t) / f(t-1) is clipped to 0.001.
    """
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2                       # (T+1)
    log_alpha_t = (f[1:] / f[:-1]).clamp(min=0.001).log()                           # (T)
    return torch.cat([torch.zeros(1, dtype=torch.float64), log_alpha_t.cumsum(0)])  # (T+1)


class MultinomialDiffusion:
    """Noise codes, and learn to invert the noise. [DDM Sec. 3.1]

    K: codes; T: steps. residual: "onehot" adds Eq. 23's 1 to the network's logit at z_t's code,
    "none" adds nothing.  deviation D31  deviation D32
    """

    def __init__(self, K, T, residual="none"):
        if residual not in ("none", "onehot"):
            raise ValueError(f"residual {residual!r}: choose from none, onehot")
        self.K, self.T, self.residual = K, T, residual
        self.log_alpha_bar_t = cosine_schedule(T)                                   # (T+1)
        self.alpha_bar_t = self.log_alpha_bar_t.exp()                               # (T+1)

    def transition(self, s, t, like):
        """Compute log a and log b of the matrix Q = a I + b 11^T from s to t. [DDM Eq. 15]

        a + K b = 1; Q itself is never formed. Returns (B,1,1,1) each, of `like`'s type and device.
        """
        log_a = self.log_alpha_bar_t[t] - self.log_alpha_bar_t[s]                   # (B)
        b = -torch.expm1(log_a) / self.K     # 1 - exp(log a) would lose the first steps' digits
        log_b = b.log().clamp(min=-1e4)      # for s = t = 0: 0 · -1e4 is 0, and 0 · -inf is NaN
        return [beside(log.to(like.dtype), like).view(-1, 1, 1, 1) for log in (log_a, log_b)]

    def log_q(self, z_t, z_s, s, t, like):
        """Compute log q(z_t|z_s) = log (a 1[z_t=z_s] + b), symmetric in the two. [DDM Eq. 16]

        z_t, z_s: codes that broadcast to (B,·,h,w); s, t: times (B,).
        """
        log_a, log_b = self.transition(s, t, like)                                  # (B, 1, 1, 1)
        return torch.where(z_t == z_s, torch.logaddexp(log_a, log_b), log_b)

    def add_noise(self, z_s, s, t, generator=None):
        """Draw z_t ~ q(z_t|z_s) = Cat(a z_s + b): codes (B,h,w) -> (B,h,w). [DDM Eq. 16]

        Keep the code with probability a, else draw one of all K. The test is u < 1 - a and not
        u > a, because floats are finer near 0 than near 1.
        """
        u, v = generator if torch.is_tensor(generator) else (                       # (B, h, w)
            uniforms(per_image(generator, len(z_s)), 2, *z_s.shape[1:]))
        lose = -torch.expm1(self.log_alpha_bar_t[t] - self.log_alpha_bar_t[s])      # (B), 1 - a
        lost, drawn = u < beside(lose[:, None, None], u), (v * self.K).long()       # (B, h, w)
        return torch.where(beside(lost, z_s), beside(drawn, z_s), z_s)

    def q_sample(self, z_0, t, generator=None):
        """Draw z_t ~ q(z_t|z_0) = Cat(alpha_bar_t z_0 + (1 - alpha_bar_t)/K): (B,h,w).

        [DDM Eq. 17] [DDM Eq. 18]  The product of the steps' matrices is again one a I + b 11^T.
        """
        return self.add_noise(z_0, torch.zeros_like(t), t, generator)               # (B, h, w)

    def log_posterior(self, z_t, z_0, s, t, like):
        """Compute log q(z_s|z_t,z_0) for every code z_s by Bayes' rule. [DDM Eq. 20]

        q(z_t|z_s) q(z_s|z_0) / q(z_t|z_0): codes (B,h,w), times s < t (B,) -> (B,K,h,w).
        """
        z_s = torch.arange(self.K, device=z_t.device)[:, None, None]                # (K, 1, 1)
        z_t, z_0, zero = z_t[:, None], z_0[:, None], torch.zeros_like(s)
        return (self.log_q(z_t, z_s, s, t, like) + self.log_q(z_s, z_0, zero, s, like)
                - self.log_q(z_t, z_0, zero, t, like))                              # (B, K, h, w)

    def log_theta(self, log_x0_hat, z_t, s, t):
        """Compute log N[theta(z_t,x0_hat)] for every code z_s: (B,K,h,w). [DDM Eq. 21]

        theta = [a_st z_t + b_st] * [a_0s x0_hat + b_0s], elementwise, and N divides by its sum over
        k. The sum has a closed form, a_0t x0_hat + b_0t at the code z_t.
        """
        z_s = torch.arange(self.K, device=z_t.device)[:, None, None]                # (K, 1, 1)
        z_t, zero = z_t[:, None], torch.zeros_like(s)                               # (B, 1, h, w)
        log_a_0s, log_b_0s = self.transition(zero, s, log_x0_hat)                   # (B, 1, 1, 1)
        log_a_0t, log_b_0t = self.transition(zero, t, log_x0_hat)                   # (B, 1, 1, 1)
        first = self.log_q(z_t, z_s, s, t, log_x0_hat)                              # (B, K, h, w)
        second = torch.logaddexp(log_a_0s + log_x0_hat, log_b_0s)                   # (B, K, h, w)
        log_sum = torch.logaddexp(log_a_0t + log_x0_hat.gather(1, z_t), log_b_0t)   # (B, 1, h, w)
        return first + second - log_sum                                             # (B, K, h, w)

    def logits(self, model, z_t, t):
        """Run the network on z_t at times t (B,): logits (B,K,h,w), float32 or wider."""
        logits = model(z_t, beside(t, z_t))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def log_x0_hat(self, logits, z_t):
        """Compute log x0_hat, the network's distribution over z_0: (B,K,h,w). [DDM Eq. 23]"""
        if self.residual == "onehot":
            logits = logits.scatter_add(1, z_t[:, None], torch.ones_like(logits[:, :1]))
        return F.log_softmax(logits, dim=1)

    def log_p(self, logits, z_t, s, t):
        """Compute log p(z_s|z_t), the learnt reverse step: (B,K,h,w). [DDM Eq. 22]

        One formula serves all t, also the last step to s = 0.  deviation D30
        """
        return self.log_theta(self.log_x0_hat(logits, z_t), z_t, s, t)

    def terms(self, logits, z_t, z_0, t):
        """Compute the bound's term L_{t-1} of each cell in nats, (B,h,w). [DDM Eq. 24]

        logits (B,K,h,w) of the network for codes z_t, z_0 (B,h,w), times t (B,).
        """
        log_p = self.log_p(logits, z_t, t - 1, t)                                   # (B, K, h, w)
        log_q = self.log_posterior(z_t, z_0, t - 1, t, log_p)                       # (B, K, h, w)
        L_0 = -log_p.gather(1, z_0[:, None])[:, 0]       # -log p(z_0|z_1), (B, h, w)
        KL = (log_q.exp() * (log_q - log_p)).sum(1)      # sum_k q (log q - log p), (B, h, w)
        return torch.where(beside(t == 1, KL)[:, None, None], L_0, KL)

    def closed_terms(self, logits, z_t, z_0, t):
        """Compute `terms` without forming log q and log p, for training: (B,h,w). [DDM Eq. 24]

        `terms` takes 8 times the memory of the logits, this 3 to 4 times; at K = 16,384 and 32x32
        a step with `terms` is a third slower (benchmarks/diffusion.py, on an H100). q and p share
        theta's first factor. With i = z_t, j = z_0 and x = x0_hat, or z_0 itself for q,

            r_k(x) = log(a_0s x_k / b_0s + 1),    S(x) = a_0t x_i + b_0t
            log q_k - log p_k = r_k(z_0) - r_k(x) + log S(x) - log S(z_0)
            KL = q_j r_j(z_0) - sum_k q_k r_k(x) + log S(x) - log S(z_0)

        because r_k(z_0) is 0 but at j. q has one value at all codes but i and j, so the sum is that
        value times sum_k r_k(x) and two corrections.
        """
        s, zero, log_x = t - 1, torch.zeros_like(t), self.log_x0_hat(logits, z_t)
        del logits                                       # so that its memory can be used below
        a_0s, b_0s = (log.exp() for log in self.transition(zero, s, log_x))         # (B, 1, 1, 1)
        a_st, b_st = (log.exp() for log in self.transition(s, t, log_x))
        a_0t, b_0t = (log.exp() for log in self.transition(zero, t, log_x))
        i, j = z_t[:, None], z_0[:, None]                                           # (B, 1, h, w)
        same, at_0 = i == j, b_0s == 0                                              # at_0: s = 0
        log_x_i, log_x_j = log_x.gather(1, torch.cat([i, j], 1)).chunk(2, 1)        # (B, 1, h, w)
        # The posterior q at z_t, at z_0 and at any other code.
        S = torch.where(same, a_0t + b_0t, b_0t)                                    # (B, 1, h, w)
        q_i = (a_st + b_st) * torch.where(same, a_0s + b_0s, b_0s) / S
        q_j = torch.where(same, a_st + b_st, b_st) * (a_0s + b_0s) / S
        q_k = b_st * b_0s / S
        # The sum of q_k r_k, where r is a softplus.
        odds = a_0s / torch.where(at_0, 1, b_0s)         # finite for s = 0, or gradients were NaN
        r = softplus(log_x + odds.log()).sum(1, keepdim=True)                       # (B, 1, h, w)
        r_i, r_j = softplus(log_x_i + odds.log()), softplus(log_x_j + odds.log())
        sum_q_r = q_k * r + (q_i - q_k) * r_i + torch.where(same, 0, (q_j - q_k) * r_j)
        # Both kinds of terms, with S(x) = b_0t (a_0t/b_0t x_i + 1).
        log_odds = (a_0t / b_0t).log()
        log_S_ratio = softplus(log_x_i + log_odds) - torch.where(same, softplus(log_odds), 0)
        L_0 = -log_x_j + log_S_ratio                                                # (B, 1, h, w)
        KL = q_j * odds.log1p() - sum_q_r + log_S_ratio                             # (B, 1, h, w)
        return torch.where(at_0, L_0, KL)[:, 0]

    def prior_kl(self):
        """Compute L_T = KL(q(z_T|z_0) || uniform) of one cell in nats: tiny, without parameters."""
        K, a = self.K, self.alpha_bar_t[-1].item()
        b = (1 - a) / K                      # one code has probability a + b, the K - 1 others b
        return (a + b) * math.log1p((K - 1) * a) + (K - 1) * b * math.log1p(-a)

    def loss(self, model, z_0, t, p, generator=None):
        """Estimate the bound L_0 + sum_t KL + L_T from one t for each image. [DDM Eq. 7]

        z_0: codes (B,h,w); t, p: (B,) of `Timesteps.draw`. Returns (loss, terms). loss: the mean
        over images of L_{t-1}/p_t + L_T in nats a cell, whose expectation is the bound. terms:
        L_{t-1} in nats a map, (B,) without graph, for `Timesteps.observe`.
        """
        z_t = self.q_sample(z_0, t, generator)
        terms = self.closed_terms(self.logits(model, z_t, t), z_t, z_0, t).sum((1, 2))      # (B)
        weighted = terms / beside(p.to(terms.dtype), terms)
        return weighted.mean() / z_0[0].numel() + self.prior_kl(), terms.detach()

    @torch.no_grad()
    def vlb(self, model, z_0, generator=None, strata=None):
        """Compute the bound on -log p(z_0) in nats a map, (B,) float64, in parts. [DDM Eq. 7]

        Returns {"L_T": KL at the end, "KL": sum over t = 2..T, "L_0": at t = 1, "vlb": their sum},
        with z_t drawn once at each t. strata: divide 2..T into so many equal parts and take one t
        of each instead of all. The t is drawn uniformly, so the sum stays unbiased.
        """
        B, h, w = z_0.shape
        generators = per_image(generator, B)

        def term(t):                                     # L_{t-1}: (B,)
            z_t = self.q_sample(z_0, t, generators)
            logits, terms = self.logits(model, z_t, t), []
            # Few maps at a time, on a GPU up to 128 MiB: in float64 the sum over k is large.
            most = max(1, 2**24 // logits[0].numel()) if logits.is_cuda else 1
            for part, *codes, when in zip(*(x.split(most) for x in (logits, z_t, z_0, t))):
                wide = float64(part)                                                # (b, K, h, w)
                codes = (beside(z, wide) for z in codes)
                terms.append(self.terms(wide, *codes, when).sum((1, 2)))
            return torch.cat(terms)                                                 # (B)

        L_0 = term(torch.ones(B, dtype=torch.int64))
        KL, strata = torch.zeros_like(L_0), strata or self.T - 1
        for n in range(strata):
            (u,) = uniforms(generators, 1)                                          # (B)
            t = 2 + ((n + u) * (self.T - 1) / strata).long().clamp(max=self.T - 2)
            KL += term(t) * (self.T - 1) / strata
        L_T = torch.full_like(L_0, h * w * self.prior_kl())
        return {"L_T": L_T, "KL": KL, "L_0": L_0, "vlb": L_T + KL + L_0}

    def reverse_times(self, steps=None):
        """List reverse steps [(T, s), ..., (t, 0)], evenly spread; None or T is every step.

        Raises ValueError outside 1..T.  deviation D36
        """
        steps = self.T if steps is None else steps
        if not 1 <= steps <= self.T:
            raise ValueError(f"{steps} steps of a process of T = {self.T}: give 1 to {self.T}")
        return list(pairwise(self.T * n // steps for n in range(steps, -1, -1)))

    def sample(self, model, shape, steps=None, generator=None, *, device="cpu"):
        """Draw maps from nothing, (B,h,w) = shape on `device`: `inpaint` with no cell known."""
        nothing = torch.zeros(shape, dtype=torch.int64, device=device)
        return self.inpaint(model, nothing, nothing.bool(), steps, generator=generator)

    @torch.no_grad()
    def inpaint(self, model, indices, known, steps=None, resample=1, generator=None):
        """Fill in the cells of indices (B,h,w) that are not `known`, bool: int64. [DDM Sec. 4.4]

        Before each step the known cells are drawn from q(z_t|z_0) of the given codes. At the end
        they are these codes. Raises ValueError for numbers out of range.
        resample: U of RePaint. A step draws unknown and known cells independently, so after one
        pass (1, the paper) they fit each other only loosely. With U each step is undone by fresh
        noise and repeated, U times in all.  deviation D35
        """
        if resample < 1:
            raise ValueError(f"resample = {resample}: each step is taken at least once")
        B, h, w = indices.shape
        generators = per_image(generator, B)
        (u,) = uniforms(generators, 1, h, w)                                        # (B, h, w)
        z = beside((u * self.K).long(), indices)                                    # (B, h, w)
        for now, then in self.reverse_times(steps):
            t, s = torch.full((B,), now), torch.full((B,), then)                    # (B) each
            for repeat in range(resample if then > 0 else 1):
                if repeat:
                    z = self.add_noise(z, s, t, generators)
                z = torch.where(known, self.q_sample(indices, t, generators), z)
                log_p = self.log_p(self.logits(model, z, t), z, s, t)               # (B, K, h, w)
                (u,) = uniforms(generators, 1, h, w)                                # (B, h, w)
                z = draw_codes(log_p, u)
        return torch.where(known, indices, z)


class Timesteps(nn.Module):
    """Draw the t that a training image is noised to, by importance. [DDM App.]  deviation D34

    The bound's terms L_{t-1} differ by orders of magnitude, and each image is noised to one t. So t
    is drawn with probability p_t ∝ sqrt(E[L_{t-1}²]) and its loss is divided by p_t, which keeps
    the mean and lowers the variance. p_t is uniform until each t has HISTORY losses.
    """

    def __init__(self, T):
        super().__init__()             # a module without weights, for its state_dict
        self.T, self.observed = T, []
        self.register_buffer("losses", torch.zeros(T, HISTORY, dtype=torch.float64))    # rings
        self.register_buffer("counts", torch.zeros(T, dtype=torch.int64))       # losses ever seen

    def probabilities(self):
        """Compute p_t for t = 1..T: (T,) float64, index 0 is t = 1."""
        if (self.counts < HISTORY).any():
            return torch.full((self.T,), 1 / self.T, dtype=torch.float64)
        weights = self.losses.square().mean(1).sqrt().clamp(min=1e-300)     # all zero is uniform
        return (1 - UNIFORM_SHARE) * weights / weights.sum() + UNIFORM_SHARE / self.T

    def draw(self, u):
        """Draw a t (B,) by uniforms u (B,) float64; also give its probability p (B,) float64."""
        p = self.probabilities()                                                    # (T)
        cumulative = p.cumsum(0)
        index = torch.searchsorted(cumulative, (1 - u) * cumulative[-1])            # (B)
        return index + 1, p[index]

    def observe(self, t, losses):
        """Collect the losses of a micro-batch: t (B,), L_{t-1} (B,) in nats, on any device."""
        self.observed.append(torch.stack([beside(t.to(losses.dtype), losses), losses], 1))  # (B, 2)

    def update(self):
        """Store what all processes observed, once a step. Every process must call this."""
        # Rank by rank is image by image, so that no draw depends on how the batch was divided.
        pairs = gather(torch.cat(self.observed))                                    # (B, 2)
        self.observed = []
        for t, loss in pairs.tolist():
            row = int(t) - 1
            if math.isfinite(loss):                              # another would poison all p
                self.losses[row, self.counts[row] % HISTORY] = loss
                self.counts[row] += 1


def held_out_bound(diffusion, model, indices, first, training=False):
    """Bound -log p of maps (B,h,w), in nats: (B,) float64.

    Over all t for T up to ALL_T, else over FINAL_STRATA; while training over STRATA, for a curve.
    t and noise depend on a map's place alone, first + n, so that bounds can be compared.
    """
    strata = STRATA if training else FINAL_STRATA if diffusion.T > ALL_T else None
    generators = [torch.Generator().manual_seed(first + n) for n in range(len(indices))]
    return diffusion.vlb(model, indices, generators, strata)["vlb"].cpu()           # (B)


def frequency_nats(codes, held_out, K):
    """Compute the nats of maps held_out (m,h,w) by the codes' frequencies in maps (n,h,w).

    Returns {"unigram": by those over all cells, u_k = (N_k + 1)/(N + K), "histogram": by those at
    each cell, (n_ck + a u_k)/(n + a)}, (m,) float64 each. Few maps tell little of one cell, so its
    frequencies are shrunk towards u, as if by `a` more maps. a is the power of 4 by which the
    training codes are likeliest, each left out of its own counts.
    """
    n, cells = len(codes), codes[0].size
    cell = np.arange(cells)                                                         # (h·w)
    parts = np.array_split(codes.reshape(n, cells), n // 4096 + 1)                  # (b, h·w)
    counts = sum(np.bincount((part + cell * K).ravel(), minlength=cells * K) for part in parts)
    counts = counts.reshape(cells, K)                                               # (h·w, K)
    N_k, where = counts.sum(0), counts.nonzero()
    unigram, n_ck = (N_k + 1) / (n * cells + K), counts[where]
    others = N_k[where[1]] / (n * cells - 1 + K)         # u_k without one of the N_k
    a = max((4.0**power for power in range(11)), key=lambda a: (
        n_ck * np.log((n_ck - 1 + a * others) / (n - 1 + a))).sum())
    histogram = (counts + a * unigram) / (n + a)                                    # (h·w, K)
    z = held_out.reshape(-1, cells).astype(np.int64)                                # (m, h·w)
    return {"unigram": torch.from_numpy(-np.log(unigram[z]).sum(1)),
            "histogram": torch.from_numpy(-np.log(histogram[cell, z]).sum(1))}
