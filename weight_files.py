"""Read the weights that other programs wrote, without running code from their files.

    .ckpt .pt .pth .bin .safetensors --read_tensors--> {key: tensor}
      --read_public--> the first stage in it
    a folder of diffusers, or a pipeline's vae/, movq/ or vqvae/ --read_public--> and its config
    an index of shards, *.index.json --read_shards--> {key: tensor}
    the name of a published file --find_weights--> path --read_weights--> state dict

Files are mapped into memory, so of Stable Diffusion only the first stage is read from the disk.
"""

import hashlib
import json
import os
import re
import time
from collections import Counter, OrderedDict, namedtuple
from contextlib import suppress
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from distributed import UserError, print0

# How a file begins that lies in the place of the real one, and what it is.
PLACEHOLDERS = {b"version https://git-lfs": "a Git LFS pointer, not the file; run git lfs pull",
                b"/annex/objects/": "a git-annex pointer, not the file; run git annex get",
                (b"<!doctype html", b"<html"): "a web page; download the file itself"}


def unreadable(path, error, problem="truncated or no checkpoint", remedy="get the file again"):
    """Make the UserError for a file that was not read, by its cause: each has a cure of its own.

    problem, remedy: what to say where the file itself is at fault. A UserError stays as it is.
    """
    if isinstance(error, UserError):
        return error
    reason = getattr(error, "strerror", None)            # Pillow's own OSErrors have none
    if isinstance(error, MemoryError):
        reason = "Cannot allocate memory"
    elif isinstance(error, FileNotFoundError) and os.path.islink(path):
        reason = f"a link to {os.path.realpath(path)}, which is not there; fetch or mount it"
    if reason:
        return UserError(f"{path}: cannot be read ({reason})")
    start = None
    with suppress(OSError), open(path, "rb") as file:
        start = file.read(100).lower()
    for beginning, found in PLACEHOLDERS.items():
        if start and start.startswith(beginning):
            return UserError(f"{path}: {found}")
    text = "the file is empty" if start == b"" else str(error).replace(f" {str(path)!r}", "")
    if " " not in text:                                  # a KeyError's text is the key alone
        text = f"{type(error).__name__}: {text}"
    return UserError(f"{path}: {problem} ({_one_line(text)})" + f"; {remedy}" * bool(remedy))


class StandIn:
    """Replace an object whose class is not imported: accept any arguments, do nothing."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


# The names that a file may contain besides torch's own weights-only list: containers, packages
# whose classes trainers leave in checkpoints, and single classes. None of them is imported.
CONTAINERS = {f"builtins.{kind.__name__}": kind for kind in (
    bool, bytes, dict, float, frozenset, int, list, range, slice, str, tuple)}
CONTAINERS |= {"collections.defaultdict": lambda *args: {}, "collections.deque": lambda *args: []}
PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "torchmetrics.", "omegaconf.",
            "easydict.", "addict.", "yacs.", "ml_collections.", "ldm.", "taming.", "diffusers.",
            "transformers.", "datetime.", "pathlib.", "uuid.", "numpy.dtypes.")
DICTS = (".AttributeDict", ".EasyDict", ".CfgNode", ".FrozenDict", "addict.addict.Dict")
CLASSES = {"argparse.Namespace", "types.SimpleNamespace", "typing.Any", "numpy.dtype",
           "torch.torch_version.TorchVersion", "numpy.ndarray",
           "numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
           "numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct"}


def read_tensors(path):
    """Read a file of safetensors or torch.save: tensors, and containers, mapped, on the CPU.

    Of a pickle, only names on torch's weights-only list are imported or called. Raises UserError
    for names that are not listed above, and for a damaged or other file.
    """
    path, known = Path(path), {}
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:] == b"{":
            return read_safetensors(path)
        if start[:2] != b"PK":
            raise unreadable(path, ValueError(f"it starts with {start[:2]}"), "no safetensors and "
                             "no checkpoint of PyTorch 1.6 or later", "convert an older one by "
                             f"torch.save(torch.load('{path.name}', weights_only=True), 'new.pt')")
        for name in sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)):
            if not (name in CONTAINERS or name in CLASSES or name.startswith(PACKAGES)):
                raise UserError(f"{path}: refused because it asks for {_one_line(name)}, which is "
                                "code, not weights")
            # A pickle fills a subclass of dict as it fills an OrderedDict.
            known[name] = OrderedDict if name.endswith(DICTS) else CONTAINERS.get(name, StandIn)
        with torch.serialization.safe_globals([(kind, name) for name, kind in known.items()]):
            # torch maps no file whose name is not UTF-8.
            return torch.load(path, map_location="cpu", weights_only=True,
                              mmap=str(path).isprintable())
    except Exception as error:               # a damaged pickle can raise anything at all
        raise unreadable(path, error) from None


def _one_line(text):
    """Shorten text from a file and escape its control characters, for the terminal."""
    return text[:200].encode("unicode_escape").decode()


# The .safetensors format: 8 bytes with the header's length, a header in JSON, the numbers.
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
         "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
         "BOOL": torch.bool}


def read_safetensors(path):
    """Read {name: tensor} from the file `path`, on the CPU, mapped. Raises UserError.

    In the place of a tensor whose type is not in TYPES is a UserError: it may not be needed.
    """
    path, tensors = Path(path), {}
    try:
        # The mapping is private: writing into a tensor does not change the file.
        data = torch.from_numpy(np.memmap(path, mode="c"))       # torch's maps no name in Latin-1
        start = 8 + int.from_bytes(data[:8].tolist(), "little")
        entries = json.loads(data[8:start].numpy().tobytes())
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= len(data) - start:
                raise ValueError(f"the numbers of {name} are not all there")
            numbers, dtype = data[start + first:start + last], TYPES.get(entry["dtype"])
            if dtype is None:
                tensors[name] = UserError(f"{path}: {name} is of type {entry['dtype']!r}, which "
                                          "is not read; convert it to F16 or F32")
                continue
            if numbers.data_ptr() % dtype.itemsize:      # a view of dtype must be aligned
                numbers = numbers.clone()
            tensors[name] = numbers.view(dtype).view(entry["shape"])
        return tensors
    except Exception as error:               # a damaged header can ask for anything
        raise unreadable(path, error) from None


def read_shards(index):
    """Read {name: tensor} from the shards beside `index`, a Path of JSON. Raises UserError."""
    try:
        places, shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"], {}
        for shard in sorted(set(places.values())):
            if Path(shard).name != shard or not index.with_name(shard).is_file():
                raise ValueError(f"no file {shard} is beside it")
            shards[shard] = read_tensors(index.with_name(shard))
        return {name: shards[shard][name] for name, shard in places.items()}
    except Exception as error:               # a damaged index can say anything
        raise unreadable(index, error) from None


def write_safetensors(path, weights):
    """Write {name: tensor} in float32 to `path` (a Path), completely or not. Raises OSError."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, value in weights.items():
        start, end = end, end + 4 * value.numel()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                     # aligns the tensors
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in weights.values():
            file.write(value.detach().cpu().float().contiguous().numpy().astype("<f4", copy=False))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def as_float32(path, name, value):
    """Copy a tensor of the file `path`, floats as float32. Raises UserError for anything else."""
    if isinstance(value, UserError):
        raise value
    if not isinstance(value, torch.Tensor):
        raise UserError(f"{path}: {name} is not a tensor; save the model's state_dict()")
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    # A copy no longer needs the mapped file.
    return value.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


AUTOENCODERS = ("AutoencoderKL", "VQModel", "AsymmetricAutoencoderKL")  # diffusers' that are read
PREFIXES = ("first_stage_model.", "vae.", "")        # that may precede encoder. and decoder.
# Keys around the weights of a trainer's checkpoint, and what DDP, torch.compile and FSDP put into
# the weights' names.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params")
INSERTED = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_forward_module)\.")
# What only training needs, and layers that the authors' decoder never uses.
UNUSED = re.compile(r"(loss|model_ema|decoder\.up_layers)\.|colorize$|.*(cluster_size|embed_avg)$")
Public = namedtuple("Public", "path state config notes")


def read_public(path):
    """Read the first stage in a file or a folder of diffusers: a Public. Raises UserError.

    path: of the file of weights. state: {key without prefix: tensor}, on the CPU, floats in
    float32. config: of diffusers' config.json beside it, or None. notes: lines for the user.
    """
    # Find the file, and diffusers' config.json beside it.
    file, notes = Path(path), []
    folder, config = diffusers_folder(file)
    if folder:
        for ending in ("safetensors", "bin", "safetensors.index.json", "bin.index.json",
                       "*.index*.json", "*.safetensors", "*.bin"):       # * of a variant: fp16
            if files := sorted(folder.glob(f"diffusion_pytorch_model.{ending}")):
                break
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none is there"
            raise UserError(f"{folder}: needs one diffusion_pytorch_model.safetensors or .bin "
                            f"beside its config.json ({names}); download it, or give one by name")
        file, = files
        if "*" in ending:
            notes.append(f"read a variant, {file.name}")
    else:
        _, config = diffusers_folder(file.parent, [""])
    weights = read_shards(file) if file.suffix == ".json" else read_tensors(file)
    weights = weights if isinstance(weights, dict) else {}
    for wrapper in WRAPPERS:
        if isinstance(weights.get(wrapper), dict):
            weights = weights[wrapper]
    weights = {INSERTED.sub("", str(key)): value for key, value in weights.items()}
    # Find the first stage by how its keys start: decoder.encoder. is the condition branch, and
    # text encoders have an encoder. inside their names.
    found = [p for p in PREFIXES
             if any(key.startswith((f"{p}encoder.", f"{p}decoder.")) for key in weights)]
    if len(found) != 1 or not all(map(str.isprintable, weights)):
        names = [f"{prefix}decoder." for prefix in found] if len(found) > 1 else [*weights][:3]
        names = _one_line(", ".join(names)) or "no keys"
        raise UserError(f"{file}: needs one first stage, whose keys start with encoder. or "
                        f"decoder.; it holds {names}: save that model's state_dict()")
    # Keep it in float32, without the weights that have no use.
    prefix, state, dropped, dtypes = found[0], {}, Counter(), set()
    for key, value in weights.items():
        name = key.removeprefix(prefix)
        unused = UNUSED.match(name) if key.startswith(prefix) else re.match("[^.]*", key)
        if unused:
            dropped[unused[0].strip(".") if "." in key else "single buffers"] += 1
            continue
        state[name] = as_float32(file, name, value)
        if state[name].dtype != value.dtype:
            dtypes.add(str(value.dtype).removeprefix("torch."))
    if dropped:
        counts = ", ".join(f"{family} ({count})" for family, count in dropped.items())
        notes.append(f"keys that are not used, left out: {counts}")
    notes += [f"{dtype} weights are read as float32" for dtype in sorted(dtypes)]
    return Public(file, state, config, notes)


def diffusers_folder(path, places=("", "vae", "movq", "vqvae")):
    """Find diffusers' autoencoder below `path`: (folder, its config.json), or (None, None).

    Raises UserError for a config.json that cannot be read or is of another class of diffusers.
    """
    for folder in (path / place for place in places):
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            if not os.path.lexists(folder / "config.json"):      # a link to nothing is told of
                continue
            raise unreadable(folder / "config.json", error, "cannot be decoded") from None
        if isinstance(config, dict) and (name := config.get("_class_name")):
            if name not in AUTOENCODERS:
                raise UserError(f"{folder / 'config.json'}: {_one_line(str(name))} is not "
                                f"supported, only {', '.join(AUTOENCODERS)}")
            return folder, config
    return None, None


_TORCHVISION = "https://download.pytorch.org/models/"
_LPIPS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/"
_PYTORCH_FID = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
PUBLISHED_FILES = {
    # file name: (its public address, its sha256 or the published first digits of it)
    "vgg16-397923af.pth": (_TORCHVISION, "397923af"),
    "alexnet-owt-7be5be79.pth": (_TORCHVISION, "7be5be79"),
    "squeezenet1_1-b8a52dc0.pth": (_TORCHVISION, "b8a52dc0"),
    "vgg.pth": (_LPIPS, "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    "alex.pth": (_LPIPS, "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"),
    "squeeze.pth": (_LPIPS, "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76"),
    "pt_inception-2015-12-05-6726825d.pth": (_PYTORCH_FID, "6726825d"),
}


@lru_cache                               # a file's hash is compared once
def find_weights(name, folder=None):
    """Find the published file `name` in `folder`, or download it there: its Path.

    name: of PUBLISHED_FILES. folder: default torch hub's cache. Local rank 0 of each machine
    downloads. A file with another hash is used, with a printed line. Raises UserError.
    """
    folder = Path(folder) if folder else Path(torch.hub.get_dir(), "checkpoints")
    path, (address, sha256) = folder / name, PUBLISHED_FILES[name]
    if not path.exists() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print0(f"downloading {address}{name} to {folder}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Writes to a temporary name beside `path` and renames it once the hash is right.
            torch.hub.download_url_to_file(address + name, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError, HTTPException) as error:
            raise UserError(f"{name} is not in {folder} and its download failed "
                            f"({_one_line(str(error))}): put {address}{name} there") from None
    while not path.exists():                 # torchrun ends this wait if local rank 0 fails
        time.sleep(0.5)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(sha256):
        print0(f"{path} is not the published file (sha256 {digest[:8]}, not {sha256[:8]}); "
               "it is used as it is")
    return path


def read_weights(name, wanted, folder=None, ignore=None):
    """Read the published file `name`: its state dict on the CPU, floats in float32.

    Apart from keys that start with `ignore`, it must have exactly the keys and shapes of the state
    dict `wanted`. Raises UserError if they differ, and as find_weights does.
    """
    path, remedy = find_weights(name, folder), f"put {PUBLISHED_FILES[name][0]}{name} there"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {key: tuple(value.shape) for key, value in state.items()
                  if not (ignore and key.startswith(ignore))}
    except Exception as error:               # a damaged file can raise anything
        raise unreadable(path, error, remedy=remedy) from None
    expected = {key: tuple(value.shape) for key, value in wanted.items()}
    for key in shapes | expected:
        found, needed = (some.get(key, "absent") for some in (shapes, expected))
        if found != needed:
            raise UserError(f"{path}: {key} is {found}, not {needed}; {remedy}")
    return {key: as_float32(path, key, state[key]) for key in wanted}
