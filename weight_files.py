"""Read weights that others wrote: public checkpoints, .safetensors, the published files.

    folder: diffusers' own, or a pipeline's vae/, movq/ or vqvae/ --+--> config.json
                                                                    +--> one file of weights
    .ckpt .pt .pth .bin --pickles.read_pickle--> contents --+
    .safetensors ----------read_safetensors-----------------+--> {key: tensor}
        --what is no first stage left out, prefix taken off--> Public.state, and what was left out
    {name: tensor} --write_safetensors--> file --read_safetensors--> {name: tensor}, mapped
    name --find_weights--> path, downloaded once, its hash checked --read_weights--> state dict

A whole Stable Diffusion checkpoint is mostly U-Net: its file is mapped, and only what is kept is
read. Keys are not renamed here (public_names.py). A published file is asked for by its name, which
stands with its address and hash in PUBLISHED_FILES.
"""

import hashlib
import json
import os
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from pathlib import Path

import torch

from distributed import UserError, print0
from pickles import check_download, read_pickle

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


# -- the .safetensors format -----------------------------------------------------------------------

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
         "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor} of the file `path` (a Path), on the CPU; only what is looked at is read.

    Raises UserError for a file that is missing, truncated or no such file.
    """
    try:
        with path.open("rb") as file:
            check_download(path, file)
        # Mapped privately: whoever writes to a tensor does not write to the file.
        data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
        start = 8 + int.from_bytes(data[:8].tolist(), "little")
        entries = json.loads(data[8:start].numpy().tobytes())
        entries.pop("__metadata__", None)
        return {name: _tensor(data[start:], **entry) for name, entry in entries.items()}
    except UserError:
        raise
    except Exception as error:                   # a damaged header can ask for anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path}: truncated or no checkpoint ({reason})") from None


def _tensor(data, dtype, shape, data_offsets):
    """One tensor out of the numbers of all of them, data (n,) uint8."""
    first, last = data_offsets
    numbers = data[first:last]
    if first < 0 or len(numbers) < last - first:
        raise ValueError(f"{last - first} bytes are asked for, {len(numbers)} are there")
    width = torch.empty(0, dtype=TYPES[dtype]).element_size()
    if numbers.data_ptr() % width:               # a view must begin where such a number may
        numbers = numbers.clone()
    return numbers.view(TYPES[dtype]).view(shape)


def write_safetensors(path, weights):
    """Write {name: tensor} in float32 to `path` (a Path), whole or not at all. Raises OSError."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, value in weights.items():
        start, end = end, end + 4 * value.numel()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                     # the tensors lie aligned
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in weights.values():
            file.write(value.detach().cpu().float().contiguous().numpy().astype("<f4", copy=False))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


# -- published files -------------------------------------------------------------------------------

_TORCHVISION = "https://download.pytorch.org/models/"
_LPIPS_HEADS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/"
_PYTORCH_FID = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
_CLIP = "https://openaipublic.azureedge.net/clip/models/"        # then each file's sha256
_CLIP_B32 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
_CLIP_B16 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
_CLIP_L14 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"

PUBLISHED_FILES = {
    # file name: (its public address, its sha256 or the first digits of it that are published)
    "vgg16-397923af.pth": (_TORCHVISION, "397923af"),
    "alexnet-owt-7be5be79.pth": (_TORCHVISION, "7be5be79"),
    "squeezenet1_1-b8a52dc0.pth": (_TORCHVISION, "b8a52dc0"),
    "vgg.pth": (_LPIPS_HEADS, "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    "alex.pth": (_LPIPS_HEADS, "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"),
    "squeeze.pth": (_LPIPS_HEADS,
                    "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76"),
    "pt_inception-2015-12-05-6726825d.pth": (_PYTORCH_FID, "6726825d"),
    "ViT-B-32.pt": (f"{_CLIP}{_CLIP_B32}/", _CLIP_B32),
    "ViT-B-16.pt": (f"{_CLIP}{_CLIP_B16}/", _CLIP_B16),
    "ViT-L-14.pt": (f"{_CLIP}{_CLIP_L14}/", _CLIP_L14),
}

MAX_WAIT = 600           # seconds that the other processes of a machine wait for a download


def find_weights(name, folder=None):
    """The path of the published file `name` (a row of PUBLISHED_FILES), downloaded if missing.

    folder: where it is or shall be; default torch hub's cache, which torchvision shares. On each
    machine only local rank 0 downloads, and the others wait for the file, MAX_WAIT seconds at most.
    A file with another hash is the user's choice: used, and said. Raises UserError that names file,
    address and folder when there is no file and no way to get it.
    """
    folder = Path(folder) if folder else Path(torch.hub.get_dir(), "checkpoints")
    address, sha256 = PUBLISHED_FILES[name]
    path = folder / name
    if not path.exists() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        _download(address + name, path, sha256)
    deadline = time.monotonic() + MAX_WAIT
    while not path.exists():  # a failing rank 0 mostly ends the others through the launcher
        if time.monotonic() > deadline:
            raise UserError(f"{name} did not come to {folder} within {MAX_WAIT // 60} minutes: "
                            f"get {address}{name} and put it there")
        time.sleep(0.5)
    _tell_if_changed(path, sha256)
    return path


def _download(address, path, sha256):
    print0(f"downloading {address} to {path.parent}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Writes to a temporary name beside `path` and renames it once the hash is right.
        torch.hub.download_url_to_file(address, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path.name} is not in {path.parent} and could not be downloaded "
                        f"({reason}): get {address} and put it there") from None


@cache  # said once, however often the file is read
def _tell_if_changed(path, sha256):
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(sha256):
        print0(f"{path} is not the published file (sha256 {digest[:8]}, not {sha256[:8]}): "
               "using it as it is")


def read_weights(name, wanted, folder=None, ignore=None):
    """The state dict in the published file `name`, with float tensors in float32, on the CPU.

    wanted: a state dict with exactly the keys and shapes that the file must have; keys that start
    with `ignore` are dropped first. Loading runs no code from the file. Raises UserError as
    `find_weights`, and for a file that is damaged or holds other keys or shapes.
    """
    path = find_weights(name, folder)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {key: tuple(value.shape) for key, value in state.items()
                  if not (ignore and key.startswith(ignore))}
    except Exception as error:  # torch.load has no error of its own for a file that it cannot read
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UserError(f"{path}: not a file of weights ({reason}); put a fresh copy of "
                        f"{PUBLISHED_FILES[name][0]}{name} there") from None
    wrong = [f"unknown key {key}" for key in shapes if key not in wanted]
    wrong += [f"no key {key}" for key in wanted if key not in shapes]
    wrong += [f"{key} is {shapes[key]}, not {tuple(value.shape)}" for key, value in wanted.items()
              if key in shapes and shapes[key] != tuple(value.shape)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{path}: {wrong[0]}{more}; expected the keys and shapes of "
                        f"{PUBLISHED_FILES[name][0]}{name}")
    return {key: state[key].float() if state[key].is_floating_point() else state[key]
            for key in wanted}
