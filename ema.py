"""A running average of a model's weights, which is what evaluation and sampling use.

    after each step:  average <- d·average + (1 - d)·weights,  d = min(decay, (1 + n)/(10 + n))

n counts the updates before this one. The second term of the minimum is the warm-up: without it a
run of a thousand steps would, at a decay of 0.9999, still consist of nine tenths of its start. The
average is kept in float32: at that decay, bf16 would round most updates away. Not here: the choice
of decay (stages.py).
"""

import torch


class EMA:
    """The exponential moving average of a model's parameters.  deviation D40

    decay: below 1; the average spans about 1/(1 - decay) updates.
    weights: {name: float32 tensor}, on the model's device, for `model.load_state_dict`; parameters
    only, so the model must have no persistent buffers.
    """

    def __init__(self, model, decay):
        self.decay, self.updates = decay, 0
        self.weights = {name: parameter.detach().to(torch.float32, copy=True)
                        for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model):
        """Take the model's weights of this step into the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = dict(model.named_parameters())
        # One call for all tensors: hundreds of small kernels would take longer than the arithmetic.
        torch._foreach_lerp_(list(self.weights.values()),
                             [current[name].float() for name in self.weights], 1 - decay)
        self.updates += 1

    def state_dict(self):
        """What an exact continuation needs, in plain containers; the tensors are not copied."""
        return {"updates": self.updates, "weights": self.weights}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Continue from `state_dict()`. Raises ValueError for the average of another model."""
        if state["weights"].keys() != self.weights.keys():
            raise ValueError("the average in the checkpoint is of a model with other parameters")
        for name, average in self.weights.items():
            average.copy_(state["weights"][name])
        self.updates = state["updates"]
