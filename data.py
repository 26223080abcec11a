"""Pictures, and the order in which training sees them.

`Signs` draws its pictures (signs.py); `ImageFiles` reads ImageNet or any folder. Both answer
`read(index, rng)`: with an rng the training crop of the authors' code, without it the fixed centre
view. `TrainingItems` turns a *position of the image in the run* into picture, crop and mask, so
that no worker, process or batch size changes what is seen:

    position -> epoch, permuted index -> read -> image (3,H,W), mask (1,H,W), both uint8 -> batches

Files that cannot be decoded are replaced by the next in sorted order; `BadFiles` counts them and
ends a run that has too many. Not here: how masks are drawn (masks.py).
"""

import atexit
import hashlib
import os
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from distributed import UserError, print0
from listing import EXTENSIONS, list_images
from masks import evaluation_mask, training_mask
from seeding import CROP, ORDER, SIGNS, numpy_generator
from signs import draw_scene

SIGNS_LENGTH = {"train": 50_000, "val": 1_000}


# -- embedded pictures -----------------------------------------------------------------------------

class Signs:
    """Street scenes with signs: picture i is a pure function of (split, seed, i, size).

    split: "train" (50,000 pictures) or "val" (1,000, with pairs of words that train never shows);
    limit: the first N.
    """

    def __init__(self, split, size, seed=0, limit=None):
        if size < 32:
            raise UserError(f"--size {size}: signs need at least 32 px for a word")
        self.split, self.size, self.seed = split, size, seed
        self._length = min(limit or SIGNS_LENGTH[split], SIGNS_LENGTH[split])

    def __len__(self):
        return self._length

    def read(self, index, rng=None):
        """(uint8 (size,size,3), ()): the drawn picture is its own crop, so `rng` is not used."""
        held_out = self.split == "val"
        rng = numpy_generator(SIGNS, self.seed, int(held_out), index)
        return draw_scene(rng, self.size, held_out), ()

    def describe(self):
        return f"{len(self):,} drawn street scenes with signs ({self.split}, seed {self.seed})"

    def identity(self):
        """A text that data sets with other pictures do not share."""
        return f"{self.describe()}, {self.size} px"


# -- pictures from files ---------------------------------------------------------------------------

class ImageFiles:
    """The pictures below a folder, sorted by file name, then folder.

    layout "imagenet": root/train/... and root/val/..., flat or by class. layout "folder": the same
    where both exist, else all files, every 20th held out as val. limit: the first N. UserError: no
    such folder, no pictures.
    """

    def __init__(self, root, split, size, layout="folder", limit=None):
        self.split, self.size, self.layout = split, size, layout
        self.folder, names = _split_files(Path(root).expanduser(), split, layout)
        names = names[:limit]
        # One block of bytes: of a million strings every worker would come to own a copy.
        encoded = [os.fsencode(name) for name in names]
        self._names = b"".join(encoded)
        self._ends = np.cumsum([0] + [len(name) for name in encoded])               # (n+1,)

    def __len__(self):
        return len(self._ends) - 1

    def path(self, index):
        return str(self.folder / os.fsdecode(self._names[self._ends[index]:self._ends[index + 1]]))

    def read(self, index, rng=None):
        """(uint8 (size,size,3), paths that could not be decoded on the way).

        With `rng` (np.random.Generator) a random crop, else the centre square. A file that cannot
        be decoded is replaced by the next readable one. UserError: none is readable, or too many in
        a row are not.
        """
        bad = []
        for step in range(len(self)):
            path = self.path((index + step) % len(self))
            try:
                image = load_image(path, min_side=2 * self.size)
            except Exception:  # Pillow's readers raise nearly anything on broken files
                bad.append(path)
                _check_share(bad, len(self))
                continue
            return square_crop(image, self.size, rng), tuple(bad)
        raise UserError(f"{self.folder}: none of its {len(self):,} files can be decoded, "
                        f"for example {bad[0]!r}")

    def describe(self):
        count = f"{len(self):,} photos" if len(self) > 1 else "1 photo"
        return f"{count} in {self.folder} ({self.layout} layout, {self.split})"

    def identity(self):
        """As Signs', by the files' names."""
        names = hashlib.sha256(self._names).hexdigest()
        return f"{self.describe()}, {self.size} px, names {names}"


def default_root(name):
    """Where a data set's pictures are when nobody says: a path, or None."""
    return os.environ.get("IMAGENET") or "data/imagenet" if name == "imagenet" else None


def open_dataset(name, root, split, size, seed=0, limit=None):
    """The data set that `--data name --root root` means. limit: only its first N pictures.

    name: "signs", "folder" or "imagenet"; root: default_root's if None. UserError names flag and
    mend.
    """
    if name == "signs":
        return Signs(split, size, seed, limit)
    root = root or default_root(name)
    if name not in ("imagenet", "folder"):
        raise UserError(f"--data {name}: choose signs, folder or imagenet")
    if not root:
        raise UserError("--data folder: say where the pictures are with --root DIR")
    return ImageFiles(root, split, size, layout=name, limit=limit)


def _split_files(root, split, layout):
    """(folder, names below it) of one split."""
    if layout == "imagenet" and not (root / split).is_dir():
        raise UserError(f"--data imagenet: expected {root}/train/<class>/* and {root}/val/* (flat "
                        f"or by class), but {root / split} is no folder; name the right place "
                        "with --root or $IMAGENET")
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder")
    as_it_is = layout == "imagenet" or ((root / "train").is_dir() and (root / "val").is_dir())
    folder = root / split if as_it_is else root
    names = list_images(folder)
    if not names:
        raise UserError(f"{folder}: no pictures here ({' '.join(EXTENSIONS)}); check --root")
    if len(names) == 1 and not as_it_is:
        if split == "train":
            print0(f"{root}: one picture; it serves for train and val alike")
    elif not as_it_is:
        names = names[::20] if split == "val" else [n for i, n in enumerate(names) if i % 20]
    return folder, names


# -- decoding --------------------------------------------------------------------------------------

def load_image(path, min_side=None):
    """The picture in `path` as an upright Pillow RGB image; transparent parts become white.

    min_side: the decoder may shrink JPEGs by 2, 4 or 8 (`draft`) while the short side stays at
    least this long. Raises what Pillow raises: mostly OSError; DecompressionBombError beyond 178
    million pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged EXIF, and 90 to 178 million pixels: both are read
        with Image.open(path) as image:
            if min_side:
                # draft() keeps each side at least as long as asked for.
                image.draft(None, (min(min_side, image.width), min(min_side, image.height)))
            image.load()
            return _to_rgb(_upright(image))


def _upright(image):
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block does not spoil the picture
        return image
    flip = Image.Transpose
    turns = {2: flip.FLIP_LEFT_RIGHT, 3: flip.ROTATE_180, 4: flip.FLIP_TOP_BOTTOM,
             5: flip.TRANSPOSE, 6: flip.ROTATE_270, 7: flip.TRANSVERSE, 8: flip.ROTATE_90}
    return image.transpose(turns[orientation]) if orientation in turns else image


def _to_rgb(image):
    if image.mode.startswith("I"):  # 16 bits, where Pillow's own conversion would cut at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def square_crop(image, size, rng=None):
    """A square of the picture as uint8 (size,size,3).

    With `rng` its side is 0.5 to 1 times the short side and its place random, as in the authors'
    code; else it is the centre square. Smaller pictures are enlarged.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if rng is not None:
        side = max(1, round(side * rng.uniform(0.5, 1.0)))
        left, top = rng.integers((width - side + 1, height - side + 1)).tolist()
    # Hamming follows the authors' exact area filter throughout; Box jumps below 2.  deviation D23
    kind = Image.Resampling.HAMMING if side > size else Image.Resampling.BICUBIC
    square = image.resize((size, size), kind, box=(left, top, left + side, top + side))
    return np.array(square)                                                         # (size,size,3)


# -- files that cannot be decoded ------------------------------------------------------------------

class BadFiles:
    """The distinct files that could not be decoded, out of `total`; over all workers and ranks if
    fed so."""

    def __init__(self, total):
        self.total = total
        self.paths = set()

    def update(self, paths):
        """Add `paths`; returns those not seen before, sorted, to be logged once."""
        new = sorted(set(paths) - self.paths)
        self.paths.update(new)
        return new

    def check(self):
        """UserError with the list when more than 1 % and more than 10 files are bad."""
        _check_share(self.paths, self.total)


def _check_share(paths, total):
    if len(paths) > 10 and len(paths) > 0.01 * total:
        listed = ", ".join(repr(path) for path in sorted(paths))
        raise UserError(f"{len(paths):,} of {total:,} files cannot be decoded, more than 1 %; "
                        f"mend or remove them: {listed}")


class _Decoding:
    """True for each file of a data set that decodes in full."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        try:
            load_image(self.dataset.path(index))
        except Exception:  # whatever `read` would skip
            return False
        return True


def check_files(dataset, workers=0):
    """Decode every file once and return the paths that fail; nothing to do for drawn pictures."""
    if not isinstance(dataset, ImageFiles):
        return []
    bad, done, next_line = [], 0, time.monotonic() + 5
    for results in _loader(_Decoding(dataset), _ranges(0, len(dataset), 16), list, workers):
        bad += [dataset.path(done + i) for i, good in enumerate(results) if not good]
        done += len(results)
        if time.monotonic() > next_line or done == len(dataset):
            print0(f"checked {done:,} of {len(dataset):,} files, {len(bad):,} cannot be decoded")
            next_line = time.monotonic() + 5
    return bad


# -- the order of training -------------------------------------------------------------------------

class Order:
    """Position of the image in the run -> its index; each epoch is a permutation of all `length`.

    key: (seed, stage_id), from which, with the epoch, the permutation is drawn.
    """

    def __init__(self, length, key):
        self.length, self.key = length, key
        self._epoch, self._order = None, None

    def __getitem__(self, position):
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            rng = numpy_generator(ORDER, *self.key, epoch)
            self._epoch, self._order = epoch, rng.permutation(self.length)
        return int(self._order[place])


class TrainingItems:
    """Map-style data set over positions 0, 1, 2, ... of the images in a run.

    An epoch is a permutation (Order); crop and mask come from (seed, stage_id, position). Items:
    image uint8 (3,H,W), mask uint8 (1,H,W), full (bool), position, bad (paths). p_full, kind:
    training_mask's; masks=False: all masks full.
    """

    def __init__(self, dataset, seed, stage_id, masks, p_full=0.5, kind="thick"):
        self.dataset, self.key = dataset, (seed, stage_id)
        self.kind, self.p_full = kind, p_full if masks else 1.0
        self.order = Order(len(dataset), self.key)

    def __getitem__(self, position):
        crop_rng = numpy_generator(CROP, *self.key, position)
        image, bad = self.dataset.read(self.order[position], crop_rng)
        mask, full = training_mask(self.dataset.size, self.key, position, self.kind, self.p_full)
        return {"image": _planes(image), "mask": torch.from_numpy(mask)[None], "full": full,
                "position": position, "bad": bad}


def pixels(image, device, channels_last=False):
    """uint8 (B,3,H,W) -> x float32 in [-1,1]. Bytes cross to the device; floats are made there."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    image = image.to(device, non_blocking=True).to(memory_format=layout)
    return image.float() / 127.5 - 1                                                # (B, 3, H, W)


def _planes(image):
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()                    # (3,H,W)


def _collate(items):
    """Tensors stacked, other values listed, `bad` united."""
    if "error" in items[0]:
        return items[0]
    columns = {key: [item[key] for item in items] for key in items[0] if key != "bad"}
    return {key: torch.stack(column) if torch.is_tensor(column[0]) else column
            for key, column in columns.items()} | {"bad": {path for item in items
                                                           for path in item["bad"]}}


class _Errors:
    """`items`, with a user's mistake handed over as an item: a worker's exception would lose its
    one line."""

    def __init__(self, items):
        self.items = items

    def __getitems__(self, positions):
        try:
            return [self.items[position] for position in positions]
        except UserError as error:
            return [{"error": str(error)}]


def training_batches(items, first, last, batch_size, rank=0, world=1, workers=0, pin=False):
    """The batches of steps first..last-1 for one rank; step s, rank r holds positions s·B + r·B/W
    onwards.

    Yields dicts with the keys of the items: tensors are stacked, image uint8 (b,3,H,W) and mask
    uint8 (b,1,H,W), other values listed, full and position; bad is a set of paths. The workers live
    until the last batch. UserError: from `items`; ValueError: `world` does not divide `batch_size`.
    """
    local, rest = divmod(batch_size, world)
    if rest:
        raise ValueError(f"a global batch of {batch_size} does not divide over {world} processes")
    starts = (step * batch_size + rank * local for step in range(first, last))
    positions = (range(start, start + local) for start in starts)
    for batch in _loader(_Errors(items), positions, _collate, workers, pin):
        if "error" in batch:
            raise UserError(batch["error"])
        yield batch


def _loader(items, positions, collate, workers, pin=False):
    # Without a generator of its own a loader takes a number from the global stream of torch.
    running = [iter(DataLoader(items, batch_sampler=positions, collate_fn=collate,
                               num_workers=workers, pin_memory=pin, worker_init_fn=_start_worker,
                               generator=torch.Generator()))]
    # Where the program ends first: multiprocessing would wait for workers that heed no SIGTERM.
    atexit.register(running.clear)
    try:
        while (batch := next(running[0], None)) is not None:
            yield batch
    finally:
        atexit.unregister(running.clear)
        running.clear()


def _start_worker(_):
    # Ctrl-C and SIGTERM often reach the whole group: the main process saves, then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def _ranges(first, last, length):
    return (range(start, min(start + length, last)) for start in range(first, last, length))


def views(dataset, batches, workers=0):
    """The fixed views of the pictures in each list of indices: (image uint8 (b,3,H,W), bad paths).

    batches: an iterable of lists of indices. UserError: from the data set.
    """
    for batch in _loader(_Errors(_Views(dataset)), batches, _collate, workers):
        if "error" in batch:
            raise UserError(batch["error"])
        yield batch["image"], batch["bad"]


class _Views:
    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        image, bad = self.dataset.read(index)
        return {"image": _planes(image), "bad": bad}


def validation_batches(dataset, n, batch_size, rank=0, world=1):
    """The first `n` pictures in their fixed view with their evaluation masks; this rank's batches.

    Yields dicts: image uint8 (b,3,H,W), mask uint8 (b,1,H,W), index list[int], bad set of paths.
    """
    for indices in list(_ranges(0, min(n, len(dataset)), batch_size))[rank::world]:
        images, bad = zip(*(dataset.read(index) for index in indices))
        masks = [torch.from_numpy(evaluation_mask(dataset.size, index)) for index in indices]
        yield {"image": torch.stack([_planes(image) for image in images]),          # (b,3,H,W)
               "mask": torch.stack(masks)[:, None],                                 # (b,1,H,W)
               "index": list(indices), "bad": {path for paths in bad for path in paths}}
