"""Match pictures made by anything with their originals, by file name; write LaMa's evaluation set.

    --real, --pred, --masks, --refs --MatchedFolders.batches--> PairBatch, images of one size
    --pred, --unpaired              --PictureFolder.batches---> PairBatch, x alone
    python image_pairs.py PHOTOS -o SET --kind thick --size 512     SET/images, masks, manifest.json

Matching resizes and leaves out nothing: what does not fit is an error. Files belong together when
their paths below their folders agree but for the extension or, where none does, their names: a flat
folder fits one with classes. NAME_mask.png and NAME_mask000.png, LaMa's, stand for NAME.
"""

import argparse
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import EXTENSIONS, Batch, list_images, load_image, pixels, read_mask, square_crop
from distributed import UserError, exit_on_user_error, print0, rank, world_size
from masks import MASK_KINDS, area_bucket, evaluation_mask
from run_folder import Progress, make_folder, write_text

MASK_SUFFIX = re.compile(r"_mask\d*$")
WARNINGS = 3                                     # about masks, that are printed


@dataclass
class PairBatch(Batch):
    """Originals of one size, and what goes with them; None where it was not given."""
    names: list | None = None                    # paths below the folder, without extension
    pred:  torch.Tensor | None = None            # (B,3,H,W) in [-1,1]
    refs:  list | None = None                    # (3,h,w) in [-1,1] each, any sizes


class MatchedFolders:
    """Originals and what goes with them, matched by file name; sorted by name, then path.

    real: folder of the originals; pred: of exactly one picture for each; masks, refs (what the
    holes were to look like) may hold more; limit: the first N. UserError: none, no partner, two.
    """

    def __init__(self, real, pred=None, masks=None, refs=None, *, invert_mask=False, limit=None):
        files = _listed("--real", real)
        names = sorted({_stem(file) for file in files},
                       key=lambda name: (os.path.basename(name), name))
        self.real = _match("--real", real, files, names, real)
        self.pred = pred and _match("--pred", pred, _listed("--pred", pred), names, real, True)
        self.masks = masks and _match("--masks", masks, _listed("--masks", masks), names, real)
        self.refs = refs and _match("--refs", refs, _listed("--refs", refs), names, real)
        self.names, self.invert_mask = names[:limit], invert_mask
        self.about, self.warned = f"{pred} beside {real}" if pred else str(real), 0
        if masks:
            self.about += f", masks in {masks}"

    def __len__(self):
        return len(self.names)

    def describe(self):
        return f"{len(self):,} pictures in {self.about}"

    def read(self, index):
        """(real, pred, mask, ref): uint8 (C,H,W), or None. Raises UserError: sizes that differ."""
        name, mask = self.names[index], None
        real, pred, ref = (_photo(files[name]) if files else None
                           for files in (self.real, self.pred, self.refs))
        if self.masks:
            hole, warnings = read_mask(self.masks[name], self.invert_mask)
            mask = torch.from_numpy(hole)[None]                                     # (1, H, W)
            for warning in warnings[:max(0, WARNINGS - self.warned)]:
                print0(f"warning: {warning}")
            self.warned += len(warnings)
        for files, picture in ((self.pred, pred), (self.masks, mask)):
            if files and picture.shape[1:] != real.shape[1:]:
                (h, w), (H, W) = picture.shape[1:], real.shape[1:]
                raise UserError(f"{files[name]} is {w} x {h} px, {self.real[name]} is {W} x {H}; "
                                "make them of one size")
        return real, pred, mask, ref

    def batches(self, batch_size, device):
        """Yield this process's share as PairBatches."""
        for index, items in _batches(self.read, len(self), batch_size, lambda item: item[0].shape):
            real, pred, mask, refs = zip(*items)
            yield PairBatch(
                index, pixels(torch.stack(real), device),
                torch.stack(mask).to(device).float() if self.masks else None,
                [self.names[i] for i in index],
                pixels(torch.stack(pred), device) if self.pred else None,
                [pixels(ref[None], device)[0] for ref in refs] if self.refs else None)


class PictureFolder:
    """The pictures of one folder, for sets that are not paired."""

    def __init__(self, flag, folder, limit=None):
        self.name, self.files = str(folder), _listed(flag, folder)[:limit]

    def __len__(self):
        return len(self.files)

    def read(self, index):
        return _photo(os.path.join(self.name, self.files[index]))

    def batches(self, batch_size, device):
        for index, items in _batches(self.read, len(self), batch_size, lambda item: item.shape):
            names = [_stem(self.files[i]) for i in index]
            yield PairBatch(index, pixels(torch.stack(items), device), names=names)


def _batches(read, n, batch_size, shape):
    """Read this process's items, every world_size()-th: lists of indices and items of one shape."""
    items = ((i, read(i)) for i in range(rank(), n, world_size()))
    for _, alike in groupby(items, lambda pair: shape(pair[1])):
        while batch := list(islice(alike, batch_size)):
            yield [i for i, _ in batch], [item for _, item in batch]


def _photo(path):
    return torch.from_numpy(np.array(load_image(path))).permute(2, 0, 1)            # (3, H, W)


def _stem(file):
    return os.path.splitext(file)[0]


def _listed(flag, folder):
    files = list_images(folder) if Path(folder).is_dir() else []
    if not files:
        raise UserError(f"{flag} {folder}: no folder with pictures ({' '.join(EXTENSIONS)})")
    return files


def _match(flag, folder, files, names, real, exact=False):
    """{name: path} for the names of all originals. exact: there must be no other files."""
    for key in (str, os.path.basename):          # whole paths, or else file names alone
        owners = {key(name): name for name in names}
        found, others = {}, []
        for file in files:
            stem = key(_stem(file))
            name = owners.get(stem) or owners.get(MASK_SUFFIX.sub("", stem))
            if name is None:
                others.append(file)
            elif name in found:
                raise UserError(f"{flag} {folder}: {os.path.relpath(found[name], folder)} and "
                                f"{file} both stand for {name}; keep one of them")
            else:
                found[name] = os.path.join(folder, file)
        if found or len({os.path.basename(name) for name in names}) < len(names):
            break
    missing = [name for name in names if name not in found]
    if missing or (exact and others):
        alone, lacks = (missing, f"{flag} {folder}") if missing else (others, f"--real {real}")
        more = f" and {len(alone) - 3:,} more" if len(alone) > 3 else ""
        raise UserError(f"{lacks} has nothing for {', '.join(alone[:3])}{more}; files are matched "
                        "by name (a mask may be NAME_mask.png)")
    return found


def write_evaluation_set(photos, out, kind="thick", size=512):
    """Write centre squares of all photos and a mask for each into `out`; return the manifest.

    Image i of the sorted list has evaluation mask i, as in eval.py; a photo that cannot be decoded
    is left out with its mask. [AVQ Tab. 1]  deviation D29
    """
    photos, out, sources, files = Path(photos), Path(out), _listed("PHOTOS", photos), []
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"-o {out}: is not empty; choose another")
    if out.resolve().is_relative_to(photos.resolve()):
        raise UserError(f"-o {out}: would mix the set with the photos; choose one outside of them")
    make_folder(out, "-o")
    stems, progress = Counter(map(_stem, sources)), Progress("masks", 0, len(sources), 1)
    for index, source in enumerate(sources):
        # Two photos whose names differ by the extension alone keep it.
        alone = stems[_stem(source)] == 1 and _stem(source) not in sources
        name = Path(f"{_stem(source) if alone else source}.png").as_posix()
        try:
            image = square_crop(load_image(photos / source, 2 * size), size)
        except UserError as error:
            print0(f"left out: {error}")
            continue
        mask = evaluation_mask(size, index, kind)                                   # (size, size)
        for folder, picture in (("images", image), ("masks", mask * np.uint8(255))):
            path = out / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path, compress_level=1)
        files.append({"name": name, "source": source, "index": index, "area": float(mask.mean()),
                      "bucket": area_bucket(mask)})
        progress.show(index + 1, {})
    progress.close()
    if not files:
        raise UserError(f"{photos}: none of {len(sources):,} photos can be decoded")
    manifest = {"version": 1, "kind": kind, "size": size, "seed": 0, "files": files}
    write_text(out / "manifest.json", json.dumps(manifest, indent=0) + "\n")
    return manifest


def main():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Make LaMa's evaluation set: squares of photos, with random"
        " masks. After filling: eval.py --pred DIR --real SET/images --masks SET/masks")
    add = parser.add_argument
    add("photos", metavar="PHOTOS", help="folder of photos, searched recursively")
    add("-o", "--out", required=True, metavar="SET", help="where images/, masks/ and a manifest go")
    add("--kind", choices=MASK_KINDS, default="thick", help="of masks (default: thick, AVQ's)")
    add("--size", type=int, default=512, metavar="PX", help="side (default: 512, AVQ's)")
    args = parser.parse_args()
    if args.size < 8:
        raise UserError(f"--size {args.size}: the least is 8")
    print0(f"writing {args.size} px squares of {args.photos} with {args.kind} masks to {args.out}")
    files = write_evaluation_set(args.photos, args.out, args.kind, args.size)["files"]
    buckets = sorted(Counter(entry["bucket"] for entry in files).items())
    print0(f"made {len(files):,} pictures with a mask each, by area: "
           + ", ".join(f"{name} %: {count}" for name, count in buckets))


if __name__ == "__main__":
    exit_on_user_error(main)
