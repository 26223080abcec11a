"""VQ-DDM's prior over code maps, discrete diffusion. DDM Sec. 3.1 (Eq. 7, 15-24) and 4.4.

    training     z_0 --q_sample--> z_t --model--> logits --log_x0_hat--> x0_hat --kl--> L_{t-1}
    sampling     z_T uniform --model--> x0_hat --draw from theta--> z_s --> ... --> z_0
    completion   the same, the known cells replaced by noised given codes after each step

A step of noise keeps a code with probability alpha_t, else replaces it by one of all K, drawn
uniformly; so do many. Between any two times a cell needs two numbers and no K x K matrix: a, that
it was never replaced, and b, what each code gets otherwise; a + K b = 1. For times 0 <= s < t <= T
(the paper's step is s = t-1), and with i = z_t and j = z_0 of one cell:

    a_0s = alpha_bar_s                  b_0s = (1 - a_0s) / K        from 0 to s; 1 and 0 for s = 0
    a_st = alpha_bar_t / alpha_bar_s    b_st = (1 - a_st) / K        from s to t
    a_0t = a_0s a_st                    b_0t = a_st b_0s + b_st      from 0 to t

theta multiplies "noise on z_t" with x0_hat, so x0_hat must not contain what the cell's own z_t
says: the best one is p(z_0^i | all other cells). With it theta is the true reverse for *every*
s < t, which is why steps may be skipped. tests/textbook/dense_diffusion.py has K x K matrices.

`model`: codes (B,h,w), t (B,) int64 on their device -> logits (B,K,h,w). Other times are int64 (B,)
on the CPU, as the float64 tables are. `generator`: a CPU torch.Generator, a list with one for each
image, or None; an image does not depend on the batch it is drawn in.
"""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from distributed import gather_objects
from seeding import per_image, uniforms

HISTORY = 10              # latest losses of each t, as in Improved DDPM
UNIFORM_SHARE = 0.001     # of p_t, so that no t is forgotten
STRATA = 4                # times t at which a held-out map's bound is looked at, and t = 1

# log(1 + e^y), which torch replaces by y from a threshold on: at its usual 20 that costs 2e-9.
softplus = partial(F.softplus, threshold=40.0)


def known_cells(mask, f):
    """Find the cells with no pixel to be generated: True = the code is given. [DDM Sec. 4.4]

    mask (B,1,H,W), f: pixels a cell -> bool (B,H/f,W/f). Raises ValueError unless f divides H, W.
    """
    if mask.shape[2] % f or mask.shape[3] % f:
        raise ValueError(f"a mask of {tuple(mask.shape[2:])} px has no grid of {f} px cells; "
                         "pad it to multiples")
    return F.max_pool2d((mask > 0).float(), f)[:, 0] == 0                           # (B, h, w)


def draw_codes(log_x, u):
    """Draw a code for each cell by its cumulative sums: log_x (B,K,h,w), u (B,h,w) -> (B,h,w).

    u is in [0,1), so the first code whose sum reaches 1 - u has a probability above zero.
    """
    cumulative = log_x.exp().cumsum(1)                                              # (B, K, h, w)
    level = (1 - u)[:, None].to(cumulative.dtype).to(cumulative.device)             # (B, 1, h, w)
    return (cumulative < level * cumulative[:, -1:]).sum(1)                         # (B, h, w)


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
    """The noise q, its inversion by Bayes' rule and the learnt one. [DDM Sec. 3.1] [DDM Eq. 15]

    Q_t = alpha_t I + (1 - alpha_t)/K 11^T, symmetric; a product of such matrices is another one.
    K: codes; T: steps. residual: "onehot" adds Eq. 23's 1 to the network's logits at z_t's code,
    "none" nothing.  deviation D31  deviation D32
    """

    def __init__(self, K, T, residual="none"):
        if K < 2 or T < 1:
            raise ValueError(f"K = {K}, T = {T}: give at least 2 codes and 1 step")
        if residual not in ("none", "onehot"):
            raise ValueError(f"residual {residual!r}: choose from none, onehot")
        self.K, self.T, self.residual = K, T, residual
        self.log_alpha_bar_t = cosine_schedule(T)                                   # (T+1)
        self.alpha_bar_t = self.log_alpha_bar_t.exp()                               # (T+1)

    def coefficients(self, t, s, like):
        """a_0s, b_0s, a_st, b_st, a_0t, b_0t for s < t, (B,): (6,B,1,1,1) of `like`'s type."""
        log_a_0s, log_a_0t = self.log_alpha_bar_t[s], self.log_alpha_bar_t[t]
        # 1 - a is -expm1(log a): a difference would lose the first steps' digits.
        table = torch.stack([number for log_a in (log_a_0s, log_a_0t - log_a_0s, log_a_0t)
                             for number in (log_a.exp(), -torch.expm1(log_a) / self.K)])  # (6, B)
        return table.to(like.dtype).to(like.device)[..., None, None, None]

    def q_sample(self, z_0, t, generator=None):
        """Draw z_t ~ q(z_t|z_0): codes (B,h,w), times (B,) -> (B,h,w). [DDM Eq. 17] [DDM Eq. 18]"""
        u = uniforms(per_image(generator, len(z_0)), 2, *z_0.shape[1:])             # (2, B, h, w)
        return self.forward(z_0, torch.zeros_like(t), t, u)

    def forward(self, z_s, s, t, u):
        """Draw z_t ~ q(z_t|z_s) = Cat(a z_s + b) from uniforms u (2,B,h,w) float64. [DDM Eq. 16]

        What is rare, that the code is lost, is asked near u = 0, where numbers are finest.
        """
        lost = -torch.expm1(self.log_alpha_bar_t[t] - self.log_alpha_bar_t[s])      # (B), 1 - a
        lost = (u[0] < lost[:, None, None]).to(z_s.device)                          # (B, h, w)
        return torch.where(lost, (u[1] * self.K).long().to(z_s.device), z_s)

    def log_posterior(self, z_t, z_0, t, s):
        """Compute log q(z_s|z_t,z_0): (B,K,h,w) float64 on the CPU. [DDM Eq. 20]

        Bayes: q(z_t|z_s) q(z_s|z_0) / q(z_t|z_0). As the matrix from s to t is symmetric, the first
        factor is like noise put on z_t, so this is log_theta with a one-hot for x0_hat.
        """
        code = torch.arange(self.K).view(-1, 1, 1)                                  # (K, 1, 1)
        one_hot = (code == z_0.cpu()[:, None]).double()                             # (B, K, h, w)
        return self.log_theta(one_hot.log(), z_t.cpu(), t, s)

    def log_theta(self, log_x, z_t, t, s):
        """Compute log N[theta(z_t,x)] over z_s, x in the place of z_0: (B,K,h,w). [DDM Eq. 21]

        theta_k = (a_st 1[k=i] + b_st)(a_0s x_k + b_0s). Its second factor sums to 1 over k, so
            S = sum_k theta_k = a_st (a_0s x_i + b_0s) + b_st = a_0t x_i + b_0t.
        """
        a_0s, b_0s, a_st, b_st, a_0t, b_0t = self.coefficients(t, s, log_x)
        i = z_t[:, None]                                                            # (B, 1, h, w)
        code = torch.arange(self.K, device=z_t.device).view(-1, 1, 1)               # (K, 1, 1)
        first = torch.where(code == i, (a_st + b_st).log(), b_st.log())             # (B, K, h, w)
        second = torch.logaddexp(log_x + a_0s.log(), b_0s.log())                    # (B, K, h, w)
        log_x_i = log_x.gather(1, i)                                                # (B, 1, h, w)
        log_S = torch.logaddexp(log_x_i + a_0t.log(), b_0t.log())                   # (B, 1, h, w)
        return first + second - log_S

    def draw(self, log_x, z_t, t, s, u):
        """Draw z_s ~ N[theta(z_t,x)] from uniforms u (3,B,h,w) float64: (B,h,w). [DDM Eq. 22]

        One formula for all t, also for the last step to s = 0.  deviation D30
            theta_k = 1[k=i] a_st (a_0s x_i + b_0s) + b_st (a_0s x_k + b_0s)
        and the second part sums to b_st. So with probability b_st / S the cell leaves z_t, for a
        draw from x with probability a_0s, else for one of all K codes. Cumulative sums over theta
        in float32 would lose b_st, which is 1e-8 near t = 1.
        """
        _, b_0s, _, b_st, a_0t, b_0t = self.coefficients(t, s, log_x)
        S = a_0t * log_x.gather(1, z_t[:, None]).exp() + b_0t                       # (B, 1, h, w)
        leave, noise = u[:2, :, None].to(log_x.dtype).to(log_x.device)              # (B, 1, h, w)
        elsewhere = torch.where((noise < self.K * b_0s)[:, 0],
                                (u[2] * self.K).long().to(z_t.device),
                                draw_codes(log_x, u[2]))                            # (B, h, w)
        return torch.where((leave < b_st / S)[:, 0], elsewhere, z_t)

    def logits(self, model, z_t, t):
        """Ask the network for z_t's logits at times t (B,), in float32 at least: (B,K,h,w)."""
        logits = model(z_t, t.to(z_t.device))
        B, h, w = z_t.shape
        if logits.shape != (B, self.K, h, w):
            raise ValueError(f"the denoiser gave {tuple(logits.shape)}, not logits for K = "
                             f"{self.K}: {(B, self.K, h, w)}")
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def log_x0_hat(self, logits, z_t):
        """Compute log x0_hat, the network's distribution over z_0: (B,K,h,w). [DDM Eq. 23]"""
        if self.residual == "onehot":
            logits = logits.scatter_add(1, z_t[:, None], torch.ones_like(logits[:, :1]))
        return F.log_softmax(logits, dim=1)

    def kl(self, log_x, z_t, z_0, t, s):
        """Compute KL(q(z_s|z_t,z_0) || N[theta(z_t,x)]) in nats: (B,h,w). [DDM Eq. 24]

        q and p share theta's first factor. With r_k = log(a_0s x_k / b_0s + 1), a softplus,
            q_k / p_k = (a_0s/b_0s 1[k=j] + 1) / exp(r_k) · S(x)/S(z_0),
            KL = q_j log(a_0s/b_0s + 1) - sum_k q_k r_k + log S(x)/S(z_0).
        q has one value at all k but i and j, so the sum is one over r_k and two corrections:
            sum_k q_k r_k = q_k sum_k r_k + (q_i - q_k) r_i + 1[i!=j] (q_j - q_k) r_j.
        For s = 0 all of q is at j, and the KL is -log p_j, with -log x_j for the first two terms.
        At t = 1 it is the bound's L_0.
        """
        a_0s, b_0s, a_st, b_st, a_0t, b_0t = self.coefficients(t, s, log_x)
        i, j = z_t[:, None], z_0[:, None]                                           # (B, 1, h, w)
        same, last = i == j, b_0s == 0
        log_x_i, log_x_j = log_x.gather(1, torch.cat([i, j], 1)).chunk(2, 1)        # (B, 1, h, w)

        S = torch.where(same, a_0t + b_0t, b_0t)                                    # (B, 1, h, w)
        q_i = (a_st + b_st) * torch.where(same, a_0s + b_0s, b_0s) / S
        q_j = torch.where(same, a_st + b_st, b_st) * (a_0s + b_0s) / S
        q_k = b_st * b_0s / S

        odds = a_0s / torch.where(last, 1, b_0s)     # finite for s = 0, or gradients were NaN
        r = softplus(log_x + odds.log()).sum(1, keepdim=True)                       # (B, 1, h, w)
        r_i, r_j = softplus(log_x_i + odds.log()), softplus(log_x_j + odds.log())
        expected = q_k * r + (q_i - q_k) * r_i + torch.where(same, 0, (q_j - q_k) * r_j)
        divergence = torch.where(last, -log_x_j, q_j * odds.log1p() - expected)     # (B, 1, h, w)

        odds = a_0t / b_0t                           # S(x) = b_0t (odds x_i + 1)
        log_S_ratio = softplus(log_x_i + odds.log()) - torch.where(same, odds.log1p(), 0)
        return (divergence + log_S_ratio)[:, 0]

    def prior_kl(self):
        """Compute L_T = KL(q(z_T|z_0) || uniform) of one cell in nats: tiny, without parameters."""
        K, a = self.K, self.alpha_bar_t[-1].item()
        b = (1 - a) / K                      # one code has probability a + b, the K - 1 others b
        return (a + b) * math.log1p((K - 1) * a) + (K - 1) * b * math.log1p(-a)

    def loss(self, model, z_0, t, p, generator=None):
        """Draw the bound once, to descend on it: (loss, terms). [DDM Eq. 7]

        z_0: codes (B,h,w); t, p: (B,) of `Timesteps.draw`. loss: the mean over images of
        L_{t-1}/p_t + L_T in nats a cell, whose expectation is the bound. terms: L_{t-1} in nats a
        map, (B,) without graph, for `Timesteps.observe`.
        """
        z_t = self.q_sample(z_0, t, generator)
        log_x0_hat = self.log_x0_hat(self.logits(model, z_t, t), z_t)
        terms = self.kl(log_x0_hat, z_t, z_0, t, t - 1).sum((1, 2))                 # (B)
        weighted = terms / p.to(terms.dtype).to(terms.device)
        return weighted.mean() / z_0[0].numel() + self.prior_kl(), terms.detach()

    @torch.no_grad()
    def vlb(self, model, z_0, generator=None, strata=None):
        """Compute the bound on -log p(z_0) in nats a map, (B,) float64, in parts. [DDM Eq. 7]

        {"L_T": KL at the end, "L_t": sum over t = 2..T, "L_0": at t = 1, "vlb": their sum}, z_t
        drawn once at each t. strata: so many equal parts of 2..T are seen at one t each, drawn
        without bias, instead of at every t.
        """
        B, h, w = z_0.shape
        generators = per_image(generator, B)

        def term(t):                                     # L_{t-1}: (B,) float64 on the CPU
            z_t = self.q_sample(z_0, t, generators)
            logits = self.logits(model, z_t, t).cpu().double()                      # (B, K, h, w)
            log_x0_hat = self.log_x0_hat(logits, z_t.cpu())
            return self.kl(log_x0_hat, z_t.cpu(), z_0.cpu(), t, t - 1).sum((1, 2))

        L_0 = term(torch.ones(B, dtype=torch.int64))
        L_t, strata = torch.zeros_like(L_0), strata or self.T - 1
        for n in range(strata):
            (u,) = uniforms(generators, 1)                                          # (B)
            t = 2 + ((n + u) * (self.T - 1) / strata).long().clamp(max=self.T - 2)
            L_t += term(t) * (self.T - 1) / strata
        L_T = torch.full_like(L_0, h * w * self.prior_kl())
        return {"L_T": L_T, "L_t": L_t, "L_0": L_0, "vlb": L_T + L_t + L_0}

    def grid(self, steps=None):
        """List reverse steps [(T, s), ..., (t, 0)], evenly spread; None or T is every step.

        A step from t to s < t - 1 is exact for each cell, but all cells move independently.
        deviation D36  Raises ValueError outside 1..T.
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

        After each step the known cells are drawn from q(z_s|z_0) of the given codes; at the end
        they are these codes. Raises ValueError for shapes that differ or numbers out of range.

        resample: U of RePaint. In one pass (1, the paper) the unknown cells follow the known ones
        too loosely. U - 1 times the step is undone by fresh noise and taken again.  deviation D35
        """
        if known.shape != indices.shape or known.dtype != torch.bool:
            raise ValueError(f"known must be bool {tuple(indices.shape)}, like the indices, not "
                             f"{known.dtype} {tuple(known.shape)}")
        if resample < 1:
            raise ValueError(f"resample = {resample}: each step is taken at least once")
        B, h, w = indices.shape
        generators = per_image(generator, B)
        times = [(torch.full((B,), t), torch.full((B,), s)) for t, s in self.grid(steps)]
        T, zero = times[0][0], times[-1][1]                                         # (B) each

        u = uniforms(generators, 3, h, w)                                           # (3, B, h, w)
        z = (u[0] * self.K).long().to(indices.device)                               # (B, h, w)
        z = torch.where(known, self.forward(indices, zero, T, u[1:]), z)
        for t, s in times:
            for repeat in range(resample if s[0] else 1):
                if repeat:
                    u = uniforms(generators, 4, h, w)                               # (4, B, h, w)
                    z = torch.where(known, self.forward(indices, zero, t, u[:2]),
                                    self.forward(z, s, t, u[2:]))
                u = uniforms(generators, 5, h, w)                                   # (5, B, h, w)
                log_x0_hat = self.log_x0_hat(self.logits(model, z, t), z)
                z = torch.where(known, self.forward(indices, zero, s, u[:2]),
                                self.draw(log_x0_hat, z, t, s, u[2:]))
        return z


class Timesteps:
    """Draw the t that a training image is noised to, by importance. DDM's appendix  deviation D34

    The terms L_t of the bound differ by orders of magnitude over t, and one image sees one t. So t
    is drawn with probability p_t ~ sqrt(E[L_t²]), and the loss is weighed by 1/p_t, which keeps its
    mean and lowers its variance. p_t is uniform until each of t = 1..T has HISTORY losses.

    `update` enters what `observe` saw once a step, in the order of the images, so that the number
    of processes and micro-batches changes no draw.
    """

    def __init__(self, T):
        self.T = T
        self.losses = torch.zeros(T, HISTORY, dtype=torch.float64)      # ring buffers
        self.counts = torch.zeros(T, dtype=torch.int64)                 # losses ever seen
        self.observed = []

    def probabilities(self):
        """Compute p_t for t = 1..T: (T,) float64, index 0 is t = 1."""
        if (self.counts < HISTORY).any():
            return torch.full((self.T,), 1 / self.T, dtype=torch.float64)
        weights = self.losses.square().mean(1).sqrt()                               # (T)
        weights = weights.clamp(min=torch.finfo(torch.float64).tiny)    # all zero is uniform
        return (1 - UNIFORM_SHARE) * weights / weights.sum() + UNIFORM_SHARE / self.T

    def draw(self, generators):
        """Draw a t (B,) from each image's generator; also give its probability p (B,) float64."""
        p = self.probabilities()                                                    # (T)
        cumulative = p.cumsum(0)
        (u,) = uniforms(generators, 1)                                              # (B)
        index = torch.searchsorted(cumulative, (1 - u) * cumulative[-1])            # (B)
        return index + 1, p[index]

    def observe(self, t, losses):
        """Note the losses of a micro-batch: t (B,), L_t (B,) in nats, on any device."""
        self.observed += zip(t.tolist(), losses.tolist())

    def update(self):
        """Enter what all processes observed since the last update. Every process must call this."""
        observed, self.observed = self.observed, []
        shares = gather_objects(observed)                    # rank by rank is image by image
        for t, loss in (pair for share in shares for pair in share):
            if abs(loss) < math.inf:                         # one that is not would poison all p
                self.losses[t - 1, self.counts[t - 1] % HISTORY] = loss
                self.counts[t - 1] += 1

    def state_dict(self):
        """Copy what a checkpoint must hold so that a run continues with the same draws."""
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state):
        """Restore a state_dict. Raises ValueError for the history of another T."""
        if state["losses"].shape != self.losses.shape:
            raise ValueError(f"a history of {len(state['losses'])} times cannot serve T = {self.T}")
        self.losses.copy_(state["losses"])
        self.counts.copy_(state["counts"])


def held_out_bound(diffusion, model, indices, first):
    """Bound -log p of held-out maps (B,h,w), in nats: (B,) float64.

    t and noise depend on a map's place alone, first + n, so that bounds can be compared.
    """
    generators = [torch.Generator().manual_seed(first + n) for n in range(len(indices))]
    return diffusion.vlb(model, indices, generators, STRATA)["vlb"]                 # (B)


def histogram_nats(codes, held_out, K):
    """Compute the nats a map of held_out (m,h,w) by the frequencies of codes (n,h,w) at each cell.

    A model can reach this mean over maps by knowing where a cell is, but not its neighbours. Each
    count begins at one (Laplace), so that no code is impossible.
    """
    cells = codes[0].size
    first = np.arange(cells) * K                                                    # (h·w)
    counts = np.ones(cells * K, np.int64)
    for start in range(0, len(codes), 4096):
        part = codes[start:start + 4096].reshape(-1, cells)                         # (b, h·w)
        counts += np.bincount((part + first).ravel(), minlength=cells * K)
    nats = -np.log(counts / (len(codes) + K))                                       # (h·w·K)
    return nats[held_out.reshape(-1, cells).astype(np.int64) + first].sum(1).mean().item()
