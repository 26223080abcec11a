"""Read pictures, and give them to training in an order that nothing changes.

    position in the run -> epoch, permuted index -> picture -> crop, mask -> batches     training
    index 0, 1, 2, ...                           -> picture -> centre square -> x, mask  evaluation

What a position shows is a function of (seed, stage, position), whatever the workers and batches.
"""

import atexit
import hashlib
import os
import signal
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from distributed import UserError, print0
from masks import evaluation_mask, training_mask
from seeding import CROP, ORDER, SIGNS, numpy_generator
from signs import draw_scene

SIGNS_LENGTH = {"train": 50_000, "val": 1_000}
DATASETS = ("signs", "imagenet", "folder")      # the choices of --data; open_dataset opens them
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
BAD_IN_A_ROW = 100                  # so many files that cannot be decoded stop the run


class Signs:
    """Street scenes, each a function of (split, seed, i, size); val has word pairs of its own."""

    def __init__(self, split, size, seed=0, limit=None):
        if size < 32:
            raise UserError(f"--size {size}: signs need at least 32 px for a word")
        self.split, self.size, self.seed = split, size, seed
        self.length = min(limit or SIGNS_LENGTH[split], SIGNS_LENGTH[split])

    def __len__(self):
        return self.length

    def image(self, index, rng=None):
        """Draw picture `index`: uint8 (size,size,3). It is its own crop, so `rng` is not used."""
        val = self.split == "val"
        return draw_scene(numpy_generator(SIGNS, self.seed, int(val), index), self.size, val)

    def describe(self):
        return f"{len(self):,} drawn street scenes with signs ({self.split}, seed {self.seed})"

    def identity(self):              # a text that data sets with other pictures do not share
        return f"{self.describe()}, {self.size} px"


class ImageFiles:
    """The pictures below a folder, sorted by file name, then folder.

    layout "imagenet": root/train/... and root/val/..., flat or by class. layout "folder": the same
    where both exist, else all files, every 20th held out as val; a single one is both.
    """

    def __init__(self, root, split, size, layout="folder", limit=None):
        self.split, self.size, self.layout = split, size, layout
        root, self.warned = Path(root).expanduser(), set()
        is_split = layout == "imagenet" or ((root / "train").is_dir() and (root / "val").is_dir())
        self.folder = root / split if is_split else root
        names = list_images(self.folder) if self.folder.is_dir() else []
        if not names:
            wanted = "train/<class>/* and val/*" if layout == "imagenet" else " ".join(EXTENSIONS)
            raise UserError(f"--root {root}: {self.folder} is no folder with pictures; give one "
                            f"that has {wanted}")
        if not is_split and len(names) > 1:
            names = [name for i, name in enumerate(names) if (i % 20 == 0) == (split == "val")]
        # An array is one block of memory; of a million strings every worker would get its own copy.
        self.names = np.array([os.fsencode(name) for name in names[:limit]])        # (n,)

    def __len__(self):
        return len(self.names)

    def path(self, index):
        return str(self.folder / os.fsdecode(self.names[index]))

    def image(self, index, rng=None):
        """Read picture `index`, or the next readable: uint8 (size,size,3), a crop with `rng`."""
        tried = min(BAD_IN_A_ROW, len(self))
        for step in range(tried):
            path = self.path((index + step) % len(self))
            try:
                return square_crop(decoded(path, load_image, 2 * self.size), self.size, rng)
            except UserError as error:
                if path not in self.warned:
                    print(f"warning: {error}; the next file stands in", file=sys.stderr, flush=True)
                self.warned.add(path)
        raise UserError(f"{self.folder}: {tried} of its {len(self):,} files in a row cannot be "
                        f"decoded, for example {path!r}")

    def describe(self):
        count = f"{len(self):,} photos" if len(self) > 1 else "1 photo"
        return f"{count} in {self.folder} ({self.layout} layout, {self.split})"

    def identity(self):
        names = hashlib.sha256(b"".join(self.names)).hexdigest()
        return f"{self.describe()}, {self.size} px, names {names}"


def default_root(name):
    """Where a data set's pictures are when nobody says: a path, or None."""
    return os.environ.get("IMAGENET") or "data/imagenet" if name == "imagenet" else None


def open_dataset(name, root, split, size, seed=0, limit=None):
    """Open the data set of `--data name --root root`, or its first `limit` pictures."""
    if name == "signs":
        return Signs(split, size, seed, limit)
    if name not in DATASETS:
        raise UserError(f"--data {name}: choose from {', '.join(DATASETS)}")
    root = root or default_root(name)
    if not root:
        raise UserError("--data folder: say where the pictures are with --root DIR")
    return ImageFiles(root, split, size, layout=name, limit=limit)


def list_images(folder):
    """List all pictures below `folder`: paths relative to it, sorted by name, then path.

    By name first: ImageNet's val then has one order, flat or by class, and its first images are of
    many classes. Hidden files are left out. Links are followed, but no directory is listed twice.
    """
    def fail(error):
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")
    names, seen = [], set()
    for here, below, files in os.walk(folder, followlinks=True, onerror=fail):
        if os.path.realpath(here) in seen:
            below.clear()
            continue
        seen.add(os.path.realpath(here))
        below[:] = sorted(name for name in below if not name.startswith("."))
        names += [os.path.relpath(os.path.join(here, name), folder) for name in files
                  if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return sorted(names, key=lambda name: (os.path.basename(name), name))


def load_image(path, min_side=None, ground="white"):
    """Read the picture in `path`: an upright Pillow RGB image, on `ground` where it is transparent.

    min_side: JPEGs may be decoded 2, 4 or 8 times smaller, the short side at least this long.
    Raises what Pillow raises: mostly OSError; DecompressionBombError beyond 178 million pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged EXIF, and 90 to 178 million pixels: both are read
        with Image.open(path) as image:
            if min_side:                     # draft() keeps each side as long as asked for
                image.draft(None, (min(min_side, image.width), min(min_side, image.height)))
            image.load()
            with suppress(Exception):    # a damaged EXIF block does not spoil the picture
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):   # 16 bits: Pillow's own conversion would cut at 255
                image = Image.fromarray(np.uint8(np.asarray(image).clip(0, 65535) // 257))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
            return image.convert("RGB")


def decoded(path, decode, *args):
    """decode(path, *args). Raises UserError, one line, for whatever it raises."""
    try:
        return decode(path, *args)
    except Exception as error:  # Pillow's and torch's readers raise nearly anything
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot be decoded ({reason})") from None


def read_mask(path, invert=False):
    """Read a mask: (bool (H,W), True = to be generated; a list of warnings, one line each).

    White, from 128 on, is to be generated; black is with `invert`. Transparent parts are black.
    """
    grey = np.array(decoded(path, load_image, None, "black").convert("L"))          # (H, W)
    mask, remarks = (grey >= 128) ^ invert, []
    if soft := int(((grey > 0) & (grey < 255)).sum()):
        remarks.append(f"{path}: {soft:,} of {grey.size:,} pixels are neither black nor white; "
                       "white begins at 128")
    if not mask.any() or mask.mean() > 0.95:
        share = f"{mask.mean():.0%} of it" if mask.any() else "nothing in it"
        remarks.append(f"{path}: {share} is to be generated; white means so, or black with "
                       "--invert-mask")
    return mask, remarks


def read_pair(photo, mask, invert=False):
    """Read a photo and its mask, resized to it: (uint8 (H,W,3), bool (H,W), True = generate)."""
    picture = np.array(decoded(photo, load_image))                                  # (H, W, 3)
    hole, remarks = read_mask(mask, invert)                                         # (h, w)
    (H, W), (h, w) = picture.shape[:2], hole.shape
    if (h, w) != (H, W):
        remarks.append(f"{mask}: {w} x {h} px, resized to the photo's {W} x {H}")
        hole = np.array(Image.fromarray(hole).resize((W, H), Image.Resampling.NEAREST))
    for remark in remarks:
        print0(f"warning: {remark}")
    return picture, hole                                                            # (H, W)


def square_crop(image, size, rng=None):
    """Cut a square, the centre one without `rng`, and resize it: uint8 (size,size,3).

    With `rng` its side is 0.5 to 1 times the short side, its place random. Small ones are enlarged.
    """
    (width, height), side = image.size, min(image.size)
    left, top = (width - side) // 2, (height - side) // 2
    if rng is not None:
        side = max(1, round(side * rng.uniform(0.5, 1.0)))
        left, top = rng.integers((width - side + 1, height - side + 1)).tolist()
    # Hamming follows the authors' exact area filter throughout; Box jumps below 2.  deviation D23
    kind = Image.Resampling.HAMMING if side > size else Image.Resampling.BICUBIC
    return np.array(image.resize((size, size), kind, (left, top, left + side, top + side)))


def pixels(image, device, channels_last=False):
    """uint8 (B,3,H,W) -> x float32 in [-1,1]. Bytes cross to the device; floats are made there."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    image = image.to(device, non_blocking=True).to(memory_format=layout)
    return image.float() / 127.5 - 1                                                # (B, 3, H, W)


class Order:
    """Position in the run -> index: each epoch a permutation, drawn from (seed, stage, epoch)."""

    def __init__(self, length, key):
        self.length, self.key, self.epoch, self.order = length, key, None, None

    def __getitem__(self, position):
        epoch, place = divmod(position, self.length)
        if epoch != self.epoch:
            self.order = numpy_generator(ORDER, *self.key, epoch).permutation(self.length)
            self.epoch = epoch
        return int(self.order[place])


class TrainingItems:
    """What each position of a run shows: image uint8 (3,H,W), mask uint8 (1,H,W), position."""

    def __init__(self, dataset, seed, stage_id, masks, p_full=0.5, kind="thick"):
        self.dataset, self.key = dataset, (seed, stage_id)
        self.kind, self.p_full = kind, p_full if masks else 1.0     # without masks all are full
        self.order = Order(len(dataset), self.key)

    def __getitem__(self, position):
        item = _view(self.dataset, self.order[position], numpy_generator(CROP, *self.key, position))
        mask, _ = training_mask(self.dataset.size, self.key, position, self.kind, self.p_full)
        return item | {"mask": torch.from_numpy(mask)[None], "position": position}


def _view(dataset, index, rng=None):
    image = torch.from_numpy(dataset.image(index, rng))                             # (H, W, 3)
    return {"image": image.permute(2, 0, 1).contiguous()}                           # (3, H, W)


def training_batches(items, first, last, batch_size, rank=0, world=1, workers=0, pin=False):
    """Load the batches of steps first..last-1 for one rank of `world`.

    Step s, rank r holds positions s·B + r·B/W onwards. Yields dicts with the keys of the items:
    tensors are stacked, other values listed. ValueError: `world` does not divide `batch_size`.
    """
    local, rest = divmod(batch_size, world)
    if rest:
        raise ValueError(f"a global batch of {batch_size} does not divide over {world} processes")
    starts = (step * batch_size + rank * local for step in range(first, last))
    return _load(items.__getitem__, (range(i, i + local) for i in starts), workers, pin)


def views(dataset, batches, workers=0):
    """Load the fixed views of the pictures in each list of indices: yields uint8 (b,3,H,W)."""
    for batch in _load(partial(_view, dataset), batches, workers):
        yield batch["image"]


@dataclass
class Batch:
    """Pictures on the device."""
    index: list                         # positions in the run, or numbers of held-out pictures
    x:     torch.Tensor                 # (B,3,H,W) in [-1,1]
    mask:  torch.Tensor | None = None   # (B,1,H,W) in {0,1}


def held_out(dataset, n, batch_size, device, rank=0, world=1, *, masks=True, workers=0):
    """Load the first `n` pictures with their evaluation masks, every world-th batch: Batches."""
    n = min(n, len(dataset))
    batches = [range(i, min(i + batch_size, n)) for i in range(0, n, batch_size)][rank::world]
    for index, image in zip(batches, views(dataset, batches, workers)):
        batch = Batch(list(index), pixels(image, device))
        if masks:
            mask = np.stack([evaluation_mask(dataset.size, i) for i in index])      # (B, H, W)
            batch.mask = torch.from_numpy(mask)[:, None].to(device).float()         # (B, 1, H, W)
        yield batch


def _load(read, positions, workers, pin=False):
    """Yield what `read` makes of each list of positions, as one dict, in `workers` processes."""
    # A generator of its own: a loader without takes a number from the global stream of torch.
    running = [iter(DataLoader(_Lists(read), batch_sampler=positions, collate_fn=dict,
                               num_workers=workers, pin_memory=pin, worker_init_fn=_start_worker,
                               generator=torch.Generator()))]
    # At exit, drop the iterator: its workers ignore SIGTERM, so multiprocessing would hang joining.
    atexit.register(running.clear)
    try:
        while (batch := next(running[0], None)) is not None:
            if "error" in batch:
                raise UserError(batch["error"])
            yield batch
    finally:
        atexit.unregister(running.clear)
        running.clear()


class _Lists:
    """The data set of _load, whose item is a whole batch, or the error that ended it."""

    def __init__(self, read):
        self.read = read

    def __getitems__(self, positions):
        try:
            items = [self.read(position) for position in positions]
        except UserError as error:       # as an exception it would bring the worker's traceback
            return {"error": str(error)}
        columns = {key: [item[key] for item in items] for key in items[0]}
        return {key: torch.stack(column) if torch.is_tensor(column[0]) else column
                for key, column in columns.items()}


def _start_worker(_):
    # Ctrl-C and SIGTERM often reach the whole group: the main process saves, then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
