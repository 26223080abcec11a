"""Match pictures of any program with their originals by file name; write LaMa's evaluation set.

    --real, --pred, --masks, --refs --MatchedFolders.batches--> PairBatch, images of one size
    --pred, --unpaired              --PictureFolder.batches---> PairBatch, x alone
    python image_pairs.py PHOTOS -o SET --kind thick --size 512     SET/images, masks, manifest.json

Two files match if their paths inside their folders are equal without the extension. If no path
matches, file names alone are compared, so that a flat folder fits one with class folders. A mask of
NAME may be NAME_mask.png or LaMa's NAME_mask000.png. Only masks are resized.
"""

import argparse
import json
import os
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import EXTENSIONS, Batch, fit_mask, list_images, load_image, pixels, square_crop
from distributed import UserError, exit_on_user_error, print0, rank, world_size
from masks import MASK_KINDS, area_bucket, evaluation_mask
from run_folder import Progress, make_folder, write_text

MASK_SUFFIX = re.compile(r"_mask\d*$")
WARNINGS = 3                                     # about files that are printed, at most


@dataclass
class PairBatch(Batch):
    """Hold originals of one size and what goes with them, None where it was not given."""
    names: list | None = None                    # paths below the folder, without extension
    pred:  torch.Tensor | None = None            # (B,3,H,W) in [-1,1]
    refs:  list | None = None                    # (3,h,w) in [-1,1] each, any sizes


class MatchedFolders:
    """Match originals and what goes with them by file name, sorted by name, then path.

    real: folder of the originals; pred: of exactly one picture for each; masks and refs (references
    for the holes) may hold more files; limit: the first N. Raises UserError for an original with no
    partner or two, and for an empty folder.
    """

    def __init__(self, real, pred=None, masks=None, refs=None, *, invert_mask=False, limit=None):
        names = sorted({_stem(file) for file in _listed("--real", real)},
                       key=lambda name: (os.path.basename(name), name))
        self.real = _match("--real", real, names, real)
        self.pred = _match("--pred", pred, names, real, exact=True)
        self.masks = _match("--masks", masks, names, real)
        self.refs = _match("--refs", refs, names, real)
        self.names, self.invert_mask = names[:limit], invert_mask
        self.warned = 0                          # warnings about files so far
        self.about = (f"{len(self):,} pictures in {f'{pred} beside ' if pred else ''}{real}"
                      + (f", masks in {masks}" if masks else ""))

    def __len__(self):
        return len(self.names)

    def sizes(self):
        """Yield (file, width, height) of the originals as stored, without reading their pixels."""
        for file in self.real[:len(self)]:
            with suppress(Exception), Image.open(file) as image:              # read tells of them
                yield file, *image.size

    def read(self, index):
        """Read (real, pred, mask, ref), uint8 (C,H,W) or None. UserError: sizes that differ."""
        mask, warnings = None, []
        real, pred, ref = images = [files and load_image(files[index])
                                    for files in (self.real, self.pred, self.refs)]
        if self.masks:
            hole, warnings = fit_mask(self.masks[index], real, self.real[index], self.invert_mask)
            mask = torch.from_numpy(hole)[None]                                     # (1, H, W)
        for image in filter(None, images):
            warnings += image.info["remarks"]
        for warning in warnings[:max(0, WARNINGS - self.warned)]:
            print0(f"warning: {warning}")
        self.warned += len(warnings)
        if pred and pred.size != real.size:
            (w, h), (W, H), turned = pred.size, real.size, real.info["turn"] > 4
            cure = "turn it by its EXIF tag" if turned and w == H else "make them of one size"
            raise UserError(f"{self.pred[index]} is {w} x {h} px, {self.real[index]} is {W} x {H}; "
                            + cure)
        real, pred, ref = (image and torch.from_numpy(np.array(image)).permute(2, 0, 1)
                           for image in images)                                     # (3, H, W)
        return real, pred, mask, ref

    def batches(self, batch_size, device):
        """Yield this process's images, every world_size()-th, in PairBatches of one size each."""
        items = ((i, *self.read(i)) for i in range(rank(), len(self), world_size()))
        for _, alike in groupby(items, lambda item: item[1].shape):
            while batch := list(islice(alike, batch_size)):
                index, real, pred, mask, refs = zip(*batch)
                yield PairBatch(
                    list(index), pixels(torch.stack(real), device),
                    torch.stack(mask).to(device).float() if self.masks else None,
                    [self.names[i] for i in index],
                    pixels(torch.stack(pred), device) if self.pred else None,
                    [pixels(ref[None], device)[0] for ref in refs] if self.refs else None)


class PictureFolder(MatchedFolders):
    """List the pictures of one folder, for sets that are not paired."""

    def __init__(self, flag, folder, limit=None):
        files = _listed(flag, folder)[:limit]
        self.names, self.warned = [_stem(file) for file in files], 0
        self.real = [os.path.join(folder, file) for file in files]
        self.pred = self.masks = self.refs = None


def _stem(file):
    return os.path.splitext(file)[0]


def _listed(flag, folder):
    files = list_images(folder, flag)
    if not files:
        raise UserError(f"{flag} {folder}: no pictures in it ({' '.join(EXTENSIONS)})")
    return files


def _match(flag, folder, names, real, exact=False):
    """List the path of each name of an original; None without a folder. exact: no other files."""
    if not folder:
        return None
    files = _listed(flag, folder)
    for key in (str, os.path.basename):          # whole paths first, then file names alone
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
        raise UserError(f"{lacks} has no file for {', '.join(alone[:3])}{more}; files are matched "
                        "by name (a mask may be NAME_mask.png)")
    return [found[name] for name in names]


def write_evaluation_set(photos, out, kind="thick", size=512):
    """Write each photo's centre square and a mask for it into `out`; return the manifest.

    Photo i of the sorted list has evaluation mask i, as in eval.py. A photo that cannot be decoded
    is left out with its mask. [AVQ Tab. 1]  deviation D29
    """
    photos, out, sources = Path(photos), Path(out), _listed("PHOTOS", photos)
    if out.resolve().is_relative_to(photos.resolve()):
        raise UserError(f"-o {out}: would mix the set with the photos; choose one outside of them")
    if any(make_folder(out, "-o").iterdir()):
        raise UserError(f"-o {out}: is not empty; choose another")
    stems, files = Counter(map(_stem, sources)), []
    progress = Progress("masks", 0, len(sources), 1)
    for index, source in enumerate(sources):
        # Keep the extension where two photos differ in nothing else.
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
        raise UserError(f"{photos}: none of {len(sources):,} photos can be used, as said above")
    law = "the first of (seed, index, attempt = 0, 1, ...) that is not empty and at most half"
    manifest = {"version": 2, "kind": kind, "size": size, "seed": 0, "law": law, "files": files}
    write_text(out / "manifest.json", json.dumps(manifest, indent=0) + "\n")
    return manifest


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(
        "Write LaMa's evaluation set: the centre squares of photos, each with a random mask. Fill "
        "the holes by any program, its pictures in PRED under the same names; then measure by "
        "eval.py --pred PRED --real SET/images --masks SET/masks --table 1"))
    add = parser.add_argument
    add("photos", metavar="PHOTOS", help="a folder of photos, searched with its subfolders")
    add("-o", "--out", required=True, metavar="SET", help="for images/, masks/ and manifest.json")
    add("--kind", choices=MASK_KINDS, default="thick", help="of the masks (default: thick, AVQ's)")
    add("--size", type=int, default=512, metavar="PX", help="side of the squares (default: 512)")
    args = parser.parse_args()
    if args.size < 8:
        raise UserError(f"--size {args.size}: give at least 8")
    print0(f"writing {args.size} px squares of {args.photos} with {args.kind} masks to {args.out}")
    files = write_evaluation_set(args.photos, args.out, args.kind, args.size)["files"]
    buckets = sorted(Counter(entry["bucket"] for entry in files).items())
    print0(f"made {len(files):,} pictures with a mask each, by area: "
           + ", ".join(f"{name} %: {count}" for name, count in buckets))


if __name__ == "__main__":
    exit_on_user_error(main)
