"""Which t a training image is noised to: uniform, or more often where the bound is large.

The terms L_t of the bound differ by orders of magnitude over t, and one image sees one t. Drawn
uniformly, the few large terms are rare; DDM's appendix draws t with probability p_t proportional to
sqrt(E[L_t²]) and weighs the loss by 1/p_t, which keeps its mean and lowers its variance:

    draw:     history -> p_t -> t (B,), p (B,)       one t an image, from the image's own generator
    observe:  t, L_t of a micro-batch                kept aside
    update:   all processes' observations -> history once a step, in the order of the images

So a draw is a function of the image's generator and of the history at the step's start, whatever
the number of processes and micro-batches; the history is in `state_dict`. Not here: the loss
(diffusion.py).
"""

import torch

from distributed import gather_objects
from seeding import uniforms

HISTORY = 10              # latest losses of each t, as in Improved DDPM
UNIFORM_SHARE = 0.001     # of p_t, so that no t is forgotten


class Timesteps:
    """t = 1..T, by importance or uniform.  deviation D34

    importance: p_t is uniform until every t has HISTORY losses; from then on UNIFORM_SHARE of it
    is, and the rest is proportional to the root mean square of the latest HISTORY losses of t.
    """

    def __init__(self, T, importance=True):
        self.T, self.importance = T, importance
        self.losses = torch.zeros(T, HISTORY, dtype=torch.float64)      # ring buffers
        self.counts = torch.zeros(T, dtype=torch.int64)                 # losses ever seen
        self._observed = []

    def probabilities(self):
        """p_t for t = 1..T: (T,) float64, index 0 is t = 1."""
        if not self.importance or (self.counts < HISTORY).any():
            return torch.full((self.T,), 1 / self.T, dtype=torch.float64)
        weights = self.losses.square().mean(1).sqrt()                               # (T)
        weights = weights.clamp(min=torch.finfo(torch.float64).tiny)    # all zero is uniform
        return (1 - UNIFORM_SHARE) * weights / weights.sum() + UNIFORM_SHARE / self.T

    def draw(self, generators):
        """t (B,) int64 in 1..T and their probabilities p (B,) float64, both on the CPU.

        generators: one for each image.
        """
        p = self.probabilities()                                                    # (T)
        cumulative = p.cumsum(0)
        (u,) = uniforms(generators, 1)                                              # (B)
        index = torch.searchsorted(cumulative, (1 - u) * cumulative[-1])            # (B)
        return index + 1, p[index]

    def observe(self, t, losses):
        """Note the losses of a micro-batch: t (B,), L_t (B,) in nats, on any device."""
        self._observed += zip(t.tolist(), losses.tolist())

    def update(self):
        """Enter what all processes observed since the last update. Every process must call this.

        A loss that is not finite is left out: one would poison all probabilities.
        """
        observed, self._observed = self._observed, []
        if not self.importance:
            return
        shares = gather_objects(observed)                    # rank by rank is image by image
        for t, loss in (pair for share in shares for pair in share):
            if abs(loss) < float("inf"):
                self.losses[t - 1, self.counts[t - 1] % HISTORY] = loss
                self.counts[t - 1] += 1

    def state_dict(self):
        """What a checkpoint must hold so that a run continues with the same draws."""
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state):
        """The inverse of state_dict. Raises ValueError for the history of another T."""
        if state["losses"].shape != self.losses.shape:
            raise ValueError(f"a history of {len(state['losses'])} times cannot serve T = {self.T}")
        self.losses.copy_(state["losses"])
        self.counts.copy_(state["counts"])
