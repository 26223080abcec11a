"""From files to models: `load_model(path)` for a run folder or one of train.py's stage files.

    RUN/decoder/last.pt ------------------> AsymDecoder --+
    its first stage, if its hash is right -> VQGAN -------+--> AsymVQGAN
    RUN/vqgan/last.pt, where the run has no decoder -------------> VQGAN

A decoder file holds the decoder only. Its first stage is the run's own, or the one that `--vqgan`
named, and must still be the very weights that the decoder was trained on: the latents of others
mean nothing to it. Loading is strict: no weight is missing, none is left over. How files are
written and read safely is in checkpoint.py.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import checkpoint
from asym_decoder import AsymDecoder, AsymVQGAN
from distributed import UserError
from vqgan import VQGAN, VQGANConfig

FIRST_STAGES = ("refit", "vqgan")       # the order in which a run's first stage is looked for


@dataclass
class Loaded:
    """A model, ready to be used, and what its file says about it."""

    model:    nn.Module      # VQGAN or AsymVQGAN; eval mode, no gradients
    stage:    str            # "vqgan", "refit" or "decoder"
    config:   dict           # the resolved settings of the run
    step:     int
    finished: bool           # whether that stage's training came to its end
    parent:   str            # checkpoint.weights_hash of the first stage


def load_model(path, device="cpu"):
    """The VQGAN or AsymVQGAN at `path`, in eval mode, without gradients.

    path: a run folder (its decoder, where it has one; else its first stage) or one of our files.
    Raises UserError: nothing there, not one of our files, or a decoder whose first stage is missing
    or has changed.
    """
    return load(path, device).model


def load(path, device="cpu"):
    """As load_model, together with what the file says: a Loaded."""
    state, source = _read(path, ("decoder", *FIRST_STAGES))
    if state["stage"] == "decoder":
        model, parent = _asymmetric(state, source), state["parent"]
    else:
        model, parent = first_stage_from(state, source), checkpoint.weights_hash(state["model"])
    return _loaded(model.to(device), state, parent)


def load_first_stage(path):
    """The first stage in a run folder or a stage file: a Loaded, its model a VQGAN.

    In eval mode, without gradients, on the CPU. A finished refit goes before the vqgan that it came
    from. Raises UserError as load_model does, and for a decoder's file.
    """
    state, source = _read(path, FIRST_STAGES)
    if state["stage"] == "decoder":
        raise UserError(f"{source} is a decoder, not a first stage; give its run folder instead")
    return _loaded(first_stage_from(state, source), state, checkpoint.weights_hash(state["model"]))


def _loaded(model, state, parent):
    model.eval().requires_grad_(False)
    finished = bool(state["extra"].get("finished"))
    return Loaded(model, state["stage"], state["config"], state["step"], finished, parent)


def first_stage_from(state, source="checkpoint"):
    """The VQGAN in a vqgan or refit file's contents. `source` names them in a UserError."""
    return _filled(source, state["model"], lambda: VQGAN(_vqgan_config(state)))


def _asymmetric(state, source):
    """The AsymVQGAN of a decoder file's contents, on the first stage that it was trained on."""
    where = state["config"]["vqgan"] or _run_of(source)
    if not Path(where).exists():
        raise UserError(f"{source} stands on the first stage {where}, which is not there; bring it "
                        "back, or start from the folder where the decoder was trained")
    first_stage = load_first_stage(where)
    if first_stage.parent != state["parent"]:
        raise UserError(f"{source} was trained on other first-stage weights than {where} holds; "
                        "bring those back, or train a decoder on these: "
                        f"train.py --stage decoder --vqgan {where} --out NEW_RUN")
    size = state["config"]["decoder"]
    weights = {name.removeprefix("decoder."): value for name, value in state["model"].items()}
    decoder = _filled(source, weights, lambda: AsymDecoder(
        first_stage.model.config, size["ch"], size["num_res_blocks"], size["blend"]))
    return AsymVQGAN(first_stage.model, decoder)


def _run_of(source):
    """The run folder of a stage file: RUN/decoder/last.pt -> RUN."""
    return source if source.is_dir() else source.parent.parent


def _vqgan_config(state):
    fields = state["config"]["first_stage"].items()
    return VQGANConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields})


def _filled(source, weights, build):
    """`build()`'s module with `weights` in it, strictly; no random number is drawn on the way."""
    try:
        with torch.device("meta"):
            module = build()
        module.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: its weights do not fit its settings; it is damaged or was made "
                        f"by another version, train it again ({reason})") from None
    return module


def _read(path, stages):
    """(contents, Path) of a stage file, or of the first of `stages` that a run folder has."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run folder or checkpoint")
    if path.is_file():
        state = checkpoint.load(path)
        if state["stage"] not in ("decoder", *FIRST_STAGES):
            raise UserError(f"{path}: a {state['stage']} file makes no pictures; "
                            "give a vqgan or decoder file")
        return state, path
    for stage in stages:
        state = checkpoint.latest(path / stage)
        if state is not None and (stage != "refit" or state["extra"].get("finished")):
            return state, path
    names = ", ".join(f"{stage}/last.pt" for stage in stages)
    raise UserError(f"{path}: none of {names} is in it; give a folder that train.py wrote to")
