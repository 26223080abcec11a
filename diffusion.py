"""VQ-DDM's prior over code maps: multinomial diffusion. DDM Sec. 3.1 (Eq. 22-24) and 4.4.

uniform_noise.py noises a map; here a network runs that backwards. It sees the whole noisy map and
gives, for each cell, logits of a distribution over codes; everything else is closed form.

    training     z_0 --q_sample--> z_t --model--> logits --log_x0hat, log_x--> x --bound_term--> L_t
    sampling     z_T uniform --model--> x --draw from theta--> z_s --> ... --> z_0
    inpainting   the same, the known cells replaced by noised given codes after each step

What x means (tests/test_diffusion.py shows each on enumerable data):

- theta multiplies "noise on z_t" with x, so x must not contain what the cell's own z_t says: the
  best x is p(z_0^i | all other cells), and with it theta is the true reverse for *every* s < t,
  which is why steps may be skipped. That is form="theta".
- The D3PM mixture, sum_k x̂0_k q(z_s|z_t,z_0=k), wants the full p(z_0^i | all cells).
- They differ by Bayes' rule for that one observation, which is one logit: lambda_t on z_t's code.
  So form="mixture" subtracts it and goes on as theta; its sum over k is never formed.

`model` is any callable: indices (B,h,w) int64, t (B,) int64 on the same device -> logits (B,K,h,w).
A generator is one CPU torch.Generator, a list with one for each image, or None; either way an image
does not depend on the batch it is drawn in. Not here: the network; which t to train on
(timesteps.py).
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F

from seeding import per_image, uniforms
from uniform_noise import UniformNoise, draw_codes

FORMS = ("theta", "mixture")
RESIDUALS = ("none", "onehot", "likelihood")
LAST_STEPS = ("theta", "x0hat")
SAMPLERS = ("strided", "route")
ROUTE_NOISE = 0.5         # Gumbel noise on the route sampler's confidence: 0 repeats itself most


def known_cells(mask, f, margin=0):
    """The code grid's known cells: those with no pixel to be generated. [DDM Sec. 4.4]

    mask (B,1,H,W), anything above 0 = to be generated; f: pixels a cell -> bool (B,H/f,W/f), True =
    the code is given. margin: cells around the hole that are not given either, as an encoder looks
    further than its own cell. Raises ValueError where f does not divide H and W.
    """
    if mask.shape[2] % f or mask.shape[3] % f:
        raise ValueError(f"a mask of {tuple(mask.shape[2:])} px has no grid of {f} px cells; "
                         "pad it to multiples")
    unknown = F.max_pool2d((mask > 0).float(), f)                                   # (B, 1, h, w)
    return F.max_pool2d(unknown, 2 * margin + 1, 1, margin)[:, 0] == 0              # (B, h, w)


def bits_per_dim(nats, cells):
    """Nats a map of so many cells -> bits a cell; K equally likely codes have log2 K."""
    return nats / (cells * math.log(2))


def _add_at(logits, z_t, values):
    """logits (B,K,h,w), with values (B,) added at each cell's own code."""
    values = values.to(logits.dtype).to(logits.device)[:, None, None, None]         # (B, 1, 1, 1)
    return logits.scatter_add(1, z_t[:, None], values.expand(-1, 1, *z_t.shape[1:]))


class MultinomialDiffusion(UniformNoise):
    """The process of uniform_noise.py with its learnt inversion. [DDM Sec. 3.1]

    K: codes; T: steps; schedule: "cosine" or "cosine_sqrt".
    form: what the network's x̂0 is: "theta" (Eq. 22), p(z_0^i | other cells), or "mixture" (D3PM),
        p(z_0^i | all cells).  deviation D32
    residual: what is added to the network's logits at z_t's code: "none"; "onehot", 1 (Eq. 23);
        "likelihood", lambda_t, which is Bayes-exact for the mixture: together they are the default.
    last_step: "theta" for one formula at all t, or "x0hat" for Eq. 22's first line,
        p(z_0|z_1) = Cat(x̂0). With "mixture" the two agree. With form "theta" the latter makes x̂0
        mean one thing at t = 1 and another at t > 1, and the bound is loose even for the best x̂0.
        deviation D30
    aux_weight: of D3PM's auxiliary cross-entropy in `loss`, 0.001 to 0.01 in the literature.
    """

    def __init__(self, K, T, schedule="cosine", form="theta", residual="none", last_step="theta",
                 aux_weight=0.0):
        super().__init__(K, T, schedule)
        for name, value, choices in [("form", form, FORMS), ("residual", residual, RESIDUALS),
                                     ("last_step", last_step, LAST_STEPS)]:
            if value not in choices:
                raise ValueError(f"{name} {value!r}: choose from {', '.join(choices)}")
        self.form, self.residual, self.last_step = form, residual, last_step
        self.aux_weight = aux_weight

    # ------------------------------------------------ the reverse process

    def logits(self, model, z_t, t):
        """The network's answer to maps z_t at times t (B,), in float32 at least: (B,K,h,w)."""
        logits = model(z_t, t.to(z_t.device))
        B, h, w = z_t.shape
        if logits.shape != (B, self.K, h, w):
            raise ValueError(f"the denoiser gave {tuple(logits.shape)}, not logits for K = "
                             f"{self.K}: {(B, self.K, h, w)}")
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def log_x0hat(self, logits, z_t, t, temperature=1.0):
        """log x̂0, the network's distribution over z_0: (B,K,h,w). [DDM Eq. 23]  deviation D31

        temperature: below 1 sharper, as in sampling from any logits.
        """
        if self.residual == "onehot":
            logits = _add_at(logits, z_t, torch.ones(len(t)))
        elif self.residual == "likelihood":
            logits = _add_at(logits, z_t, self.lambda_t[t])
        return F.log_softmax(logits / temperature, dim=1)

    def log_x(self, log_x0hat, z_t, t):
        """log of what theta takes for z_0, a distribution that ignores the cell's z_t: (B,K,h,w).

        In the mixture sum_k x̂0_k q(z_s|z_t,z_0=k), each q has the denominator a_0t 1[k=i] + b_0t,
        so it is theta with x̂0_k divided by that: only x̂0_i loses lambda_t = log(1 + a_0t/b_0t).
        """
        if self.form == "theta":
            return log_x0hat
        return F.log_softmax(_add_at(log_x0hat, z_t, -self.lambda_t[t]), dim=1)

    def log_p(self, logits, z_t, t, s):
        """log p(z_s|Z_t) of each cell for times s < t, (B,) each: (B,K,h,w). [DDM Eq. 22]

        s = 0 gives p(z_0|Z_t), the picture to show on the way.
        """
        log_x0hat = self.log_x0hat(logits, z_t, t)
        log_p = self.log_theta(self.log_x(log_x0hat, z_t, t), z_t, t, s)
        if self.last_step == "x0hat":
            at_end = (s == 0).to(z_t.device)[:, None, None, None]                   # (B, 1, 1, 1)
            log_p = torch.where(at_end, log_x0hat, log_p)
        return log_p

    # ------------------------------------------------ the bound

    def bound_term(self, log_x0hat, z_t, z_0, t):
        """L_{t-1} of the bound in nats a cell: L_0 where t = 1, else Eq. 24's KL: (B,h,w)."""
        term = self.kl(self.log_x(log_x0hat, z_t, t), z_t, z_0, t, t - 1)
        if self.last_step == "x0hat":
            nll = -log_x0hat.gather(1, z_0[:, None])[:, 0]                          # (B, h, w)
            term = torch.where((t == 1).to(z_t.device)[:, None, None], nll, term)
        return term

    def loss(self, model, z_0, t, p, generator=None):
        """One draw of the bound to descend on: (loss, terms).

        z_0: codes (B,h,w); t, p: (B,), one time for each image and its probability, as
        `Timesteps.draw` gives them. loss: the mean over images of L_{t-1}/p_t + L_T in nats a cell,
        whose expectation is the bound; ln K for a network that knows nothing. terms: L_{t-1} in
        nats a map, (B,) without graph, for `Timesteps.observe`.

        The auxiliary term adds aux_weight times -log p(z_0|Z_t) to L_{t-1}: the cross-entropy of
        N[theta_{0|t}], not of x̂0, which is to stay blind to z_t.
        """
        z_t = self.q_sample(z_0, t, generator)
        log_x0hat = self.log_x0hat(self.logits(model, z_t, t), z_t, t)
        terms = self.bound_term(log_x0hat, z_t, z_0, t).sum((1, 2))                 # (B)
        total = terms
        if self.aux_weight:
            nll = self.nll(self.log_x(log_x0hat, z_t, t), z_t, z_0, t).sum((1, 2))  # (B)
            total = terms + self.aux_weight * nll
        weighted = total / p.to(total.dtype).to(total.device)
        return weighted.mean() / z_0[0].numel() + self.prior_kl(), terms.detach()

    @torch.no_grad()
    def vlb(self, model, z_0, generator=None, strata=None):
        """The bound on -log p(z_0) in nats a map, and its parts, (B,) float64 each. [DDM Eq. 7]

        {"L_T": KL at the end, "L_t": sum over t = 2..T, "L_0": at t = 1, "vlb": their sum}, z_t
        drawn once at each t. strata: None for all t; a number to draw one t from each of so many
        equal parts of 2..T instead, without bias. L_T and L_0 are always there.
        """
        B, h, w = z_0.shape
        generators = per_image(generator, B)
        strata = strata or self.T - 1
        L_0 = self._term_in_float64(model, z_0, torch.ones(B, dtype=torch.int64), generators)
        L_t = torch.zeros_like(L_0)
        for n in range(strata):
            (u,) = uniforms(generators, 1)                                          # (B)
            t = 2 + ((n + u) * (self.T - 1) / strata).long().clamp(max=self.T - 2)
            L_t += self._term_in_float64(model, z_0, t, generators) * (self.T - 1) / strata
        L_T = torch.full_like(L_0, h * w * self.prior_kl())
        return {"L_T": L_T, "L_t": L_t, "L_0": L_0, "vlb": L_T + L_t + L_0}

    def _term_in_float64(self, model, z_0, t, generators):
        """L_{t-1} in nats a map, (B,) float64 on the CPU."""
        z_t = self.q_sample(z_0, t, generators)
        logits = self.logits(model, z_t, t).cpu().double()                          # (B, K, h, w)
        z_t, z_0 = z_t.cpu(), z_0.cpu()
        return self.bound_term(self.log_x0hat(logits, z_t, t), z_t, z_0, t).sum((1, 2))

    # ------------------------------------------------ sampling

    def grid(self, steps=None):
        """[(T, s), ..., (t, 0)]: so many reverse steps, evenly spread; None or T is every step.

        A step from t to s < t - 1 is exact for the process: theta's numbers are those of (s, t).
        What it costs is that all cells move independently.  deviation D36
        Raises ValueError outside 1..T.
        """
        steps = self.T if steps is None else steps
        if not 1 <= steps <= self.T:
            raise ValueError(f"{steps} steps of a process of T = {self.T}: give 1 to {self.T}")
        times = [self.T * n // steps for n in range(steps, -1, -1)]
        return list(pairwise(times))

    def _step(self, model, z_t, t, s, u, temperature):
        """Maps z_s from maps z_t, drawn with uniforms u (3,B,h,w); t, s: (B,)."""
        log_x0hat = self.log_x0hat(self.logits(model, z_t, t), z_t, t, temperature)
        if self.last_step == "x0hat" and s[0] == 0:
            return draw_codes(log_x0hat, u[2])
        return self.draw(self.log_x(log_x0hat, z_t, t), z_t, t, s, u)

    def sample(self, model, shape, steps=None, generator=None, *, sampler="strided",
               temperature=1.0, device="cpu"):
        """Maps of codes from nothing: shape (B,h,w), on `device`.

        steps: 1..T, None for T. sampler: "strided" (the paper's, with skipped steps), which is
        `inpaint` with nothing known, bit for bit; or "route", see `_route`.
        Raises ValueError for an unknown sampler or wrong steps.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler {sampler!r}: choose from {', '.join(SAMPLERS)}")
        if sampler == "route":
            return self._route(model, shape, steps, per_image(generator, shape[0]), temperature,
                               device)
        nothing = torch.zeros(shape, dtype=torch.int64, device=device)
        return self.inpaint(model, nothing, nothing.bool(), steps, generator=generator,
                            temperature=temperature)

    @torch.no_grad()
    def inpaint(self, model, indices, known, steps=None, resample=1, generator=None,
                temperature=1.0):
        """indices with the cells that are not known filled in: (B,h,w) int64. [DDM Sec. 4.4]

        indices: codes (B,h,w), any where unknown; known: bool (B,h,w); steps as for `sample`. After
        each step the known cells are drawn anew from q(z_s|z_0) of the given codes, at the end they
        are these codes.

        resample: U of RePaint. In one pass (1, the paper) the unknown cells are drawn before they
        see what the known ones become, so they follow them too loosely; U - 1 times the step is
        undone by fresh noise from s to t and taken again, which brings the two together.
        deviation D35
        Raises ValueError for shapes that differ or numbers out of range.
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
        z = self.random_codes(u[0]).to(indices.device)                              # (B, h, w)
        z = torch.where(known, self.forward(indices, zero, T, u[1:]), z)
        for t, s in times:
            for repeat in range(resample if s[0] else 1):
                if repeat:
                    u = uniforms(generators, 4, h, w)                               # (4, B, h, w)
                    z = torch.where(known, self.forward(indices, zero, t, u[:2]),
                                    self.forward(z, s, t, u[2:]))
                u = uniforms(generators, 5, h, w)                                   # (5, B, h, w)
                z = torch.where(known, self.forward(indices, zero, s, u[:2]),
                                self._step(model, z, t, s, u[2:], temperature))
        return z

    @torch.no_grad()
    def _route(self, model, shape, steps, generators, temperature, device):
        """Few steps, chosen cells: the route-and-denoise view of the same model (arXiv 2302.05737).

        A cell of z_s is either clean, with probability alpha_bar_s, or noise. `draw` leaves that to
        chance; here the round(alpha_bar_s h w) cells that the network is surest of are clean and
        keep their codes, and all others are fresh noise. Surest by x of the code, which is what the
        *other* cells say of it, plus Gumbel noise that fades with 1 - alpha_bar_s. The maps are
        likelier than the data's and less diverse, the more so the less noise: no longer the law
        of the model, which the strided sampler approaches with more steps.
        """
        B, h, w = shape
        z = self.random_codes(uniforms(generators, 1, h, w)[0]).to(device)          # (B, h, w)
        clean = torch.zeros(shape, dtype=torch.bool, device=device)                 # (B, h, w)
        for now, then in self.grid(steps):
            t, alpha_bar_s = torch.full((B,), now), self.alpha_bar_t[then].item()
            log_x0hat = self.log_x0hat(self.logits(model, z, t), z, t, temperature)
            log_x = self.log_x(log_x0hat, z, t)                                     # (B, K, h, w)
            u = uniforms(generators, 3, h, w)                                       # (3, B, h, w)
            codes = torch.where(clean, z, draw_codes(log_x, u[0]))                  # (B, h, w)
            score = log_x.gather(1, codes[:, None])[:, 0]                           # (B, h, w)
            gumbel = -torch.log(-torch.log(u[1])) * ROUTE_NOISE * (1 - alpha_bar_s)
            score = score + gumbel.to(score.dtype).to(device)
            order = score.flatten(1).argsort(dim=1, descending=True, stable=True)   # (B, h·w)
            place = order.argsort(dim=1).view(shape)                                # (B, h, w)
            clean = place < round(alpha_bar_s * h * w)
            z = torch.where(clean, codes, self.random_codes(u[2]).to(device))
        return z
