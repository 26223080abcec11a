"""The published weight files that metrics and losses read: where they are, and that they are they.

    name --find_weights--> path, downloaded once, its hash checked --read_weights--> state dict

A file is asked for by its published name, which stands with its address and hash in
PUBLISHED_FILES. A column whose file is missing has no value: nothing else stands in for it. Not
here: checkpoints of first stages and decoders, ours (checkpoint.py) or others' (convert.py).
"""

import hashlib
import os
import time
from functools import cache
from http.client import HTTPException
from pathlib import Path

import torch

from distributed import UserError, print0

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
