"""Public checkpoints: from a file or folder, as it was downloaded, to its first stage's state dict.

    folder: diffusers' own, or a pipeline's vae/, movq/ or vqvae/ --+--> config.json
                                                                    +--> one file of weights
    .ckpt .pt .pth .bin --pickles.read_pickle--> contents --+
    .safetensors --------tensor_file.read_safetensors-------+--> {key: tensor}
        --what is no first stage left out, prefix taken off--> Public.state, and what was left out

A whole Stable Diffusion checkpoint is mostly U-Net: its file is mapped, and only what is kept is
read. Keys are not renamed here, and what has a first stage's prefix is kept, known or not: which
names belong to a model is for layouts.py to say. Not here: our own files (checkpoint.py).
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from distributed import UserError
from pickles import read_pickle
from tensor_file import read_safetensors

PREFIXES = ("first_stage_model.", "vae.", "")        # what encoder. and decoder. may stand behind
PIPELINE_FOLDERS = ("vae", "movq", "vqvae")
WEIGHTS = "diffusion_pytorch_model"                  # diffusers' name, then .bin or .safetensors

LOOKS_LIKE = (                                       # the first that occurs in a key says it
    ("lora", "a LoRA"),
    ("diffusion_model", "a U-Net"),
    ("down_blocks.", "a U-Net"),
    ("model_ema.", "EMA weights without their model"),
    ("text_model.", "a text encoder"),
    ("transformer.", "a transformer"),
    ("loss.", "a training loss"),
)


@dataclass
class Public:
    """The first stage in a public checkpoint, by the names it has there."""

    path:      Path          # of the file of weights
    state:     dict          # {key: tensor}, prefix taken off; on the CPU, floats in float32
    config:    dict | None   # diffusers' config.json beside it
    dropped:   dict          # {"model.diffusion_model.": 686, ...}: how many keys were left out
    stand_ins: list          # dotted names of classes in the file that were not imported
    notes:     list          # what else the user should know, one line each


def read_public(path):
    """The first stage at `path`: a Public.

    path: a file, or a folder of diffusers (an autoencoder's or a whole pipeline's).
    Left out are the other parts of a larger model, and taming's loss, model_ema and colorize.
    Raises UserError, one line: nothing there; no checkpoint, or one that would run code (as
    pickles.read_pickle does); no first stage in it, or two; values that are no tensors.
    """
    file, config = _locate(Path(path))
    weights, stand_ins = _read(file)
    prefix = _prefix_of_first_stage(file, weights)
    state, dropped = {}, Counter()
    for key, value in weights.items():
        name = key.removeprefix(prefix)
        left_out = name.startswith(("loss.", "model_ema.")) or name == "colorize"
        if left_out or not key.startswith(prefix):
            dropped[_family(key)] += 1
        else:
            state[name] = value
    _check_tensors(file, state)
    own = {name: _own(value) for name, value in state.items()}
    return Public(file, own, config, dict(dropped), stand_ins, _notes(file, state))


def _own(tensor):
    """A copy that needs the file no more."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _notes(file, state):
    is_variant = file.stem.startswith(f"{WEIGHTS}.")
    notes = [f"read a variant, {file.name}"] if is_variant else []
    changed = {str(value.dtype).removeprefix("torch.") for value in state.values()
               if value.is_floating_point() and value.dtype != torch.float32}
    return notes + [f"{dtype} weights are read as float32" for dtype in sorted(changed)]


def _family(key):
    """The part of a larger model that a key belongs to; a U-Net's has two names."""
    parts = key.split(".")
    if len(parts) == 1:
        return "single buffers"                      # betas and the like
    return ".".join(parts[:2 if parts[0] == "model" else 1]) + "."


def _prefix_of_first_stage(file, weights):
    # At the start of a key only: decoder.encoder. is the condition branch, and text encoders have
    # an encoder. inside.
    found = [prefix for prefix in PREFIXES
             if any(key.startswith((f"{prefix}encoder.", f"{prefix}decoder.")) for key in weights)]
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(f"{prefix}decoder." for prefix in found)
        raise UserError(f"{file}: more than one first stage ({names}); "
                        "give a checkpoint with one of them")
    looks = [words for mark, words in LOOKS_LIKE if any(mark in key for key in weights)]
    kind = f"; it looks like {looks[0]}" if looks else ""
    names = ", ".join([*list(weights)[:3], "..."]) if weights else "there is none"
    raise UserError(f"{file}: holds no first stage: no key starts with encoder. or decoder. "
                    f"({names}){kind}")


def _check_tensors(file, state):
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        names = ", ".join(f"{name} is of type {type(state[name]).__name__}" for name in others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UserError(f"{file}: not only tensors in its state dict: {names}{more}")


# -- where the weights are -------------------------------------------------------------------------


def _locate(path):
    """(the file of weights, diffusers' config.json beside it or None)."""
    if path.is_file():
        return path, _config_in(path.parent)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    for folder in (path, *(path / name for name in PIPELINE_FOLDERS)):
        config = _config_in(folder)
        if config is not None:
            return _weights_in(folder), config
    raise UserError(f"{path}: no config.json of diffusers in it, nor in its "
                    f"{', '.join(PIPELINE_FOLDERS)}; give a folder with one, or a checkpoint file")


def _config_in(folder):
    """The contents of `folder`'s config.json where diffusers wrote it, else None."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None
    return config if isinstance(config, dict) and "_class_name" in config else None


def _weights_in(folder):
    """The whole weights, safetensors first; or a variant such as .fp16, if it is the only one."""
    for ending in ("safetensors", "bin"):
        if (folder / f"{WEIGHTS}.{ending}").is_file():
            return folder / f"{WEIGHTS}.{ending}"
    for ending in ("safetensors", "bin"):
        variants = sorted(folder.glob(f"{WEIGHTS}.*.{ending}"))
        if len(variants) > 1:
            names = ", ".join(variant.name for variant in variants)
            raise UserError(f"{folder}: give one of its variants: {names}")
        if variants:
            return variants[0]
    raise UserError(f"{folder}: no {WEIGHTS}.safetensors or .bin beside its config.json; "
                    "download the weights, too")


def _read(file):
    """({key: value}, stand-ins) of a file, without what a trainer wraps around a state dict."""
    if file.suffix == ".safetensors":
        return read_safetensors(file), []
    contents, stand_ins = read_pickle(file)
    for wrapper in ("state_dict", "model"):
        if isinstance(contents, dict) and isinstance(contents.get(wrapper), dict):
            contents = contents[wrapper]
            break
    if not isinstance(contents, dict):
        raise UserError(f"{file}: holds an object of type {type(contents).__name__}, "
                        "not a state dict; save its state_dict() instead")
    if not all(isinstance(key, str) and key.isprintable() for key in contents):
        raise UserError(f"{file}: holds a dictionary whose keys are no names, not a state dict")
    return contents, stand_ins
