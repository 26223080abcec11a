"""VQ-DDM's prior from its settings, and from a file: `load_prior(path)`.

    settings["prior"], K --denoiser--> UNet, MultinomialDiffusion                 before training
    RUN/prior/last.pt, its first stage, if its hash is right --load_prior--> Prior

A Prior has the average of the weights, which is what samples are drawn with. Codes mean nothing
without the first stage that they are of, so it comes along, and must be the very one that the prior
was trained on. Not here: what to draw with it (diffusion.py).
"""

from dataclasses import dataclass
from pathlib import Path

import checkpoint
from convert import first_stage_of
from diffusion import MultinomialDiffusion
from distributed import UserError
from unet import UNet, UNetConfig
from vqgan import VQGAN

STEPS = 100     # that a map is drawn in, where nobody says


@dataclass
class Prior:
    """A prior, ready to be sampled from, and what its file says about it.

    `diffusion.sample(unet, (B, *grid), ...)` gives codes for `first_stage.decode_indices`.
    """

    unet:        UNet                   # the averaged weights; eval mode, no gradients
    diffusion:   MultinomialDiffusion
    first_stage: VQGAN                  # likewise, on the same device
    grid:        tuple                  # (h, w) of the maps that it was trained on
    config:      dict                   # the resolved settings of the run
    step:        int
    finished:    bool                   # whether its training came to its end
    parent:      str                    # checkpoint.weights_hash of the first stage
    facts:       dict                   # what training noted; see prior_facts

    @property
    def device(self):
        """Where the network and the first stage are."""
        return self.first_stage.quantize.embedding.weight.device


def denoiser(settings, K):
    """The network and the process that a run's settings["prior"] name, for K codes.

    -> (UNet with random weights, MultinomialDiffusion).
    """
    net = {name: tuple(value) if isinstance(value, list) else value
           for name, value in settings["net"].items()}
    T, others = settings["T"], [settings[name] for name in ("schedule", "form", "residual")]
    return UNet(UNetConfig(**net), K, T), MultinomialDiffusion(K, T, *others)


def load_prior(path, device="cpu"):
    """The Prior at `path`, a run folder or a prior's file.

    Raises UserError: nothing there, a file of another stage, or a prior whose first stage is
    missing or has changed.
    """
    path = Path(path)
    state = _read(path)
    config, extra = state["config"], state["extra"]
    first_stage = first_stage_of(state, path)
    unet, diffusion = denoiser(config["prior"], extra["K"])
    unet.load_state_dict(state["ema"]["weights"])
    return Prior(unet.to(device).eval().requires_grad_(False), diffusion,
                 first_stage.model.to(device), tuple(extra["grid"]), config, state["step"],
                 bool(extra.get("finished")), state["parent"], extra)


def prior_facts(path):
    """What training noted in the file of the prior at `path`, a run folder or that file: a dict.

    "score" is its bound on held-out maps in nats a map, "maps" how many pictures it has learnt,
    "K" and "grid" what these are made of, "parent" the hash of the first stage that made them.
    Raises UserError where there is none.
    """
    state = _read(Path(path))
    return state["extra"] | {"parent": state["parent"]}


def chosen_steps(asked, T, most=STEPS):
    """The number of steps where `asked` of T are wanted; None for `most`, or T if that is less.

    Raises UserError.
    """
    if asked is not None and not 1 <= asked <= T:
        raise UserError(f"--steps: give numbers from 1 to T = {T}, which this prior has")
    return asked or min(most, T)


def _read(path):
    """The contents of a prior's file, or of the one in a run folder."""
    if not path.exists():
        raise UserError(f"{path}: no such run folder or checkpoint")
    state = checkpoint.load(path) if path.is_file() else checkpoint.latest(path / "prior")
    if state is None:
        raise UserError(f"{path}: prior/last.pt is not in it; train one: "
                        f"train.py --stage prior --vqgan {path} --out NEW_RUN, or with the command "
                        "that made this run")
    if state["stage"] != "prior":
        raise UserError(f"{path}: a {state['stage']} file, not a prior's; give its run folder")
    return state
