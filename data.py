"""Read images, and give them to training in an order that depends on the seed alone.

    position in the run -> epoch, permuted index -> image -> crop, mask -> batches     training
    index 0, 1, 2, ...                           -> image -> centre square -> x, mask  evaluation

Image, crop and mask of a position are functions of (seed, stage, position). The batch size and the
number of workers and processes change nothing.
"""

import hashlib
import io
import math
import os
import re
import signal
import sys
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin

from distributed import ASK_TO_STOP, UserError, heed, print0
from masks import evaluation_mask, training_mask
from seeding import CROP, ORDER, SIGNS, numpy_generator
from signs import draw_scene
from weight_files import unreadable

SIGNS_LENGTH = {"train": 50_000, "val": 1_000, "test": 1_000}    # each split is its own stream
DATASETS = ("signs", "imagenet", "folder")      # the choices of --data; open_dataset opens them
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
# Folders of thumbnails and deleted files, kept by storage systems and archives; in lower case.
SYSTEM_FOLDERS = {"@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot",
                  "@__thumb", "__macosx", "$recycle.bin", "system volume information", "lost+found"}
RUN_FILES = {"config.json", "command.txt"}      # a folder with both is a run of train.py
PROBED = 1_000                      # an identity has the sizes and ends of at most so many files
BAD_IN_A_ROW = 100                  # this many files in a row that cannot be decoded stop the run
SILENCE = 20                        # seconds for an image, after which a worker hangs
# Pillow refuses PNGs with a text or an ICC profile above 1 MiB; some of ImageNet's have one.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY                      # 64 MiB


class Signs:
    """Draw street scenes, functions of (split, seed, index, size).

    Training shows four fifths of all pairs of words, val and test the others in other scenes.
    """

    def __init__(self, split, size, seed=0, limit=None):
        if size < 32:
            raise UserError(f"--size {size}: signs need at least 32 px for a word")
        self.split, self.size, self.seed = split, size, seed
        self.length = min(limit or SIGNS_LENGTH[split], SIGNS_LENGTH[split])

    def __len__(self):
        return self.length

    def image(self, index, rng=None):
        """Draw image `index`: uint8 (size,size,3). A scene is not cropped, so `rng` has no use."""
        stream = list(SIGNS_LENGTH).index(self.split)
        rng = numpy_generator(SIGNS, self.seed, stream, index)
        return draw_scene(rng, self.size, held_out=self.split != "train")

    def describe(self):
        return f"{len(self):,} drawn street scenes with signs ({self.split}, seed {self.seed})"

    def identity(self):
        return f"{self.describe()}, {self.size} px"


class ImageFiles:
    """Read the photos below a folder, sorted by file name, then folder.

    layout "imagenet": root/train/..., val/... and test/..., flat or by class. Without photos in
    test/, val is the first half of val/ by the numbers in the names, test the second (val_2500 to
    val_4999 of Tiny ImageNet's 5,000). layout "folder": the same where train/ and val/ exist, but
    val is never halved; else all files, every 20th as val, none as test. One photo is in both.
    """

    def __init__(self, root, split, size, layout="folder", limit=None):
        self.split, self.size, self.part = split, size, f"{layout} layout, {split}"
        self.warned = set()                      # files whose warning has been printed
        root = Path(root).expanduser()
        is_split = layout == "imagenet" or ((root / "train").is_dir() and (root / "val").is_dir())
        halved = layout == "imagenet" and split != "train" and not list_images(root / "test")
        self.folder = root / ("val" if halved else split) if is_split else root
        names = list_images(self.folder) if is_split or split != "test" else []
        if halved:
            names.sort(key=lambda name: [*map(int, re.findall(r"\d+", os.path.basename(name)))])
            half, middle = ("first" if split == "val" else "second"), (len(names) + 1) // 2
            names = names[:middle] if split == "val" else names[middle:]
            self.part += f": the {half} half of val/"
        if not names:
            if not root.is_dir():
                list_images(root, "--root")
            wanted = ("train/<class>/* and val/*" if layout == "imagenet" else
                      "train/, val/ and test/" if split == "test" else " ".join(EXTENSIONS))
            raise UserError(f"--root {root}: no photos for {split} there; give one with {wanted}")
        if not is_split and len(names) > 1:
            names = [name for i, name in enumerate(names) if (i % 20 == 0) == (split == "val")]
        # An array is one block that workers share; a million strings would be copied by each.
        self.names = np.array([os.fsencode(name) for name in names[:limit]])        # (n,)

    def __len__(self):
        return len(self.names)

    def path(self, index):
        return str(self.folder / os.fsdecode(self.names[index]))

    def image(self, index, rng=None):
        """Read image `index`, or the next readable one: uint8 (size,size,3), a crop with `rng`."""
        tried, errors = min(BAD_IN_A_ROW, len(self)), []
        for step in range(tried):
            path = self.path((index + step) % len(self))
            try:
                return square_crop(load_image(path, 2 * self.size), self.size, rng)
            except UserError as error:
                errors.append(error)
                if path not in self.warned:
                    print(f"warning: {error}; used the next file", file=sys.stderr, flush=True)
                self.warned.add(path)
        raise UserError(f"{self.folder}: {tried} of its {len(self):,} files in a row cannot be "
                        f"used; the first is {errors[0]}")

    def describe(self):
        return f"{len(self):,} photo{'s' * (len(self) > 1)} in {self.folder} ({self.part})"

    def identity(self):
        digest = hashlib.sha256(b"\0".join(self.names))
        for index in range(0, len(self), math.ceil(len(self) / PROBED)):
            with suppress(OSError), open(self.path(index), "rb") as file:    # not a link to nothing
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 4096))   # frames of a film have one name and size each
                digest.update(b"\0%d" % size + file.read())
        return f"{self.split} photos, {self.size} px, sha256 {digest.hexdigest()[:16]}"


def default_root(name):
    """Give the folder of a data set without --root: a path, or None."""
    return (os.environ.get("IMAGENET") or "data/imagenet") if name == "imagenet" else None


def open_dataset(name, root, split, size, limit=None):
    """Open the data set of `--data name --root root`, or its first `limit` images.

    A new data set is a name in DATASETS, a line here, and a class with these members:
        size: the side of its images in pixels. split: "train", "val" or "test"
        __len__(), image(index, rng): uint8 (size,size,3), a random crop with `rng`, else fixed
        describe(): a line for the user
        identity(): a text that no data set of other images has, wherever its files are; it
            binds runs and cached codes to their images, so it never changes its form
    """
    if name == "signs":
        return Signs(split, size, limit=limit)
    if name not in DATASETS:
        raise UserError(f"--data {name}: choose from {', '.join(DATASETS)}")
    root = root or default_root(name)
    if not root:
        raise UserError("--data folder: say where the photos are with --root DIR")
    return ImageFiles(root, split, size, layout=name, limit=limit)


def list_images(folder, flag=""):
    """List all photos below `folder`, if there is one: paths relative to it, by name, then path.

    Sorting by name gives ImageNet's val the same order flat and by class, and first images of many
    classes. Links are followed, but no directory is listed twice. Hidden files, SYSTEM_FOLDERS and
    runs of train.py below `folder` are left out, so that pictures of a run never become its data.
    Raises UserError for a folder that cannot be listed, and with a `flag` for one that is missing.
    """
    if not (flag or os.path.isdir(folder)):
        return []

    def fail(error):
        raise UserError(f"{flag} {unreadable(error.filename, error)}".strip())
    names, seen = [], set()
    for here, below, files in os.walk(folder, followlinks=True, onerror=fail):
        if os.path.realpath(here) in seen or (seen and RUN_FILES.issubset(files)):
            below.clear()
            continue
        seen.add(os.path.realpath(here))
        below[:] = sorted(name for name in below if not name.startswith(".")
                          and name.lower() not in SYSTEM_FOLDERS)
        names += [os.path.relpath(os.path.join(here, name), folder) for name in files
                  if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return sorted(names, key=lambda name: (os.path.basename(name), name))


def load_image(path, min_side=None, ground="white", to_srgb=True):
    """Read a photo: an upright Pillow RGB image, on colour `ground` where it is transparent.

    min_side: a JPEG may be decoded 2, 4 or 8 times smaller, its short side at least this long.
    to_srgb: convert colours to sRGB by the file's ICC profile, which the output will not have.
    The output's info["turn"] is the EXIF orientation, info["remarks"] lists warnings of what is
    lost. Raises UserError as `unreadable` gives it, and beyond 178 million pixels.
    """
    try:
        # Damaged EXIF and 90 to 178 million pixels give warnings, but such photos are read.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if min_side:                 # draft() keeps each side at least as long as it is told
                image.draft(None, (min(min_side, image.width), min(min_side, image.height)))
            profile = image.info.get("icc_profile") if to_srgb else None
            turn, lost = 1, ["16 bits a colour are"] * (";16" in f"{image.mode} {image.tile}")
            image.load()
            with suppress(Exception):            # a damaged EXIF block
                turn = image.getexif().get(ExifTags.Base.Orientation, 1)
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith(("I", "F")):
                image = _to_8_bits(image)
            if profile:
                with suppress(Exception):        # a damaged profile
                    image = _to_srgb(image, profile)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                if image.getextrema()[3][0] < 255:
                    lost.append(f"transparency, here on {ground}, is")
                image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
            image = image.convert("RGB")
            image.info |= {"turn": turn, "remarks": [f"{path}: {what} not kept" for what in lost]}
            return image
    except Exception as error:           # Pillow's readers raise nearly anything
        raise unreadable(path, error, "cannot be decoded", "") from None


def _to_8_bits(image):
    """Scale floats of 0 to 1, or integers of 0 to 65535 if one is above 255, to mode L.

    Pillow's own conversion would cut all values at 255. Raises ValueError for another range.
    """
    values = np.asarray(image)                                                      # (H, W)
    low, high = values.min(), values.max()
    top = 1 if image.mode == "F" else 255 if high <= 255 else 65535
    if not (low >= 0 and high <= top):           # also where a value is no number
        raise ValueError(f"mode {image.mode}, values from {low:g} to {high:g} outside 0 to {top}")
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


@lru_cache(maxsize=16)
def _srgb_transform(profile):
    """Build the transform of an ICC profile to sRGB: (mode of its input, transform or None)."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    # sRGB's profiles differ in rounding. One that moves no colour by more than 2 levels is sRGB.
    grid = 15 * np.indices((18, 18, 18), np.uint8).reshape(3, 18, -1).transpose(1, 2, 0)
    colours = Image.fromarray(grid).convert(mode)                                   # (18, 324)
    moved = np.subtract(ImageCms.applyTransform(colours, transform), colours.convert("RGB"),
                        dtype=int)
    return mode, transform if np.abs(moved).max() > 2 else None


def _to_srgb(image, profile):
    """Convert an 8-bit image by its ICC profile, unless that is sRGB's or of other channels."""
    mode, transform = _srgb_transform(profile)
    kind = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    if transform is None or not (kind == mode or (kind == "L" and mode == "RGB")):
        return image
    colours = ImageCms.applyTransform(image.convert(mode), transform)
    if image.has_transparency_data:
        colours.putalpha(image.convert("RGBA").getchannel("A"))
    return colours


def read_mask(path, invert=False):
    """Read a mask: bool (H,W), True = to be generated, and a list of warnings, one line each.

    White, 128 and above, is to be generated; with `invert` black is. Transparent parts are black.
    An ICC profile is ignored, because a mask's numbers are no colours.
    """
    grey = np.array(load_image(path, ground="black", to_srgb=False).convert("L"))   # (H, W)
    mask, remarks = (grey >= 128) ^ invert, []
    if soft := int(((grey > 0) & (grey < 255)).sum()):
        remarks.append(f"{path}: {soft:,} of {grey.size:,} pixels are neither black nor white; "
                       "128 and above count as white")
    if not 0 < mask.mean() <= 0.95:
        remarks.append(f"{path}: {mask.mean():.0%} of it is to be generated; white marks the hole, "
                       "or black with --invert-mask")
    return mask, remarks


def read_pair(photo, mask, invert=False):
    """Read a photo, uint8 (H,W,3), and its mask, fitted to it: bool (H,W), True = generate."""
    image = load_image(photo)
    hole, remarks = fit_mask(mask, image, photo, invert)
    for remark in image.info["remarks"] + remarks:
        print0(f"warning: {remark}")
    return np.array(image), hole                                         # (H, W, 3), (H, W)


def fit_mask(mask, image, photo, invert=False):
    """Read a mask in the size of `image`, the `photo` as load_image gives it: as read_mask.

    A mask of the photo's stored size gets the photo's EXIF turn. A pixel is to be generated where
    any pixel of the mask that overlaps it is. Raises UserError for another aspect ratio.
    """
    hole, remarks = read_mask(mask, invert)                                         # (h, w)
    (h, w), (W, H), turn = hole.shape, image.size, image.info["turn"]
    stored = (H, W) if turn > 4 else (W, H)                      # 5 to 8 exchange rows and columns
    if turn > 1 and (w, h) == stored == (W, H):
        remarks.append(f"{photo} is turned by its EXIF tag, {mask} is not: it would fit both ways")
    elif (w, h) == stored != (W, H):
        remarks.append(f"{mask}: {w} x {h} px as the photo is stored; turned by its EXIF tag too")
        upright = Image.fromarray(hole)
        upright.getexif()[ExifTags.Base.Orientation] = turn
        hole = np.array(ImageOps.exif_transpose(upright))                           # (H, W)
    elif (w, h) != (W, H):
        if abs(w * H - h * W) >= max(w + h, W + H):     # more than rounding sides can explain
            raise UserError(f"{mask} is {w} x {h} px, {photo} is {W} x {H}: another aspect ratio; "
                            "crop the mask as the photo was cropped")
        remarks.append(f"{mask}: {w} x {h} px, resized to the photo's {W} x {H}")
        hole = F.adaptive_max_pool2d(torch.tensor(hole)[None].float(), (H, W))[0].numpy() > 0
    return hole, remarks


def square_crop(image, size, rng=None):
    """Cut a square out of a Pillow image and resize it: uint8 (size,size,3). [AVQ Sec. 4]

    Without `rng` it is the centre square. With `rng` its place is random and its side is 0.5 to 1
    times the short side. A smaller square than `size` is enlarged.
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
    """Convert uint8 (B,3,H,W) to x, float32 in [-1,1], on the device: bytes travel faster."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    image = image.to(device, non_blocking=True).to(memory_format=memory_format)
    return image.float() / 127.5 - 1                                                # (B, 3, H, W)


class Order:
    """Map positions to indices: each epoch is a permutation, drawn from key = (seed, stage id)."""

    def __init__(self, length, key):
        self.length, self.key, self.epoch, self.order = length, key, None, None

    def __getitem__(self, position):
        epoch, place = divmod(position, self.length)
        if epoch != self.epoch:
            self.order = numpy_generator(ORDER, *self.key, epoch).permutation(self.length)
            self.epoch = epoch
        return int(self.order[place])


class TrainingItems:
    """Read a position of a run: its image (3,H,W) and mask (1,H,W), numpy uint8, and itself."""

    def __init__(self, dataset, seed, stage_id, masks, p_full=0.5, kind="thick"):
        self.dataset, self.key = dataset, (seed, stage_id)
        self.kind, self.p_full = kind, p_full if masks else 1.0     # without masks all are full
        self.order = Order(len(dataset), self.key)

    def __getitem__(self, position):
        item = _view(self.dataset, self.order[position], numpy_generator(CROP, *self.key, position))
        mask = training_mask(self.dataset.size, self.key, position, self.kind, self.p_full)
        return item | {"mask": mask[None], "position": position}


def _view(dataset, index, rng=None):
    image = dataset.image(index, rng)                                               # (H, W, 3)
    return {"image": np.ascontiguousarray(image.transpose(2, 0, 1))}                # (3, H, W)


def training_batches(items, first, last, batch_size, rank=0, world=1, workers=0, pin=False):
    """Load the batches of steps first..last-1 for one rank of `world`, which divides `batch_size`.

    In step s, rank r has the B/W positions from s·B + r·B/W on. Yields dicts of stacked tensors and
    of lists of other values.
    """
    local = batch_size // world
    starts = range(first * batch_size + rank * local, last * batch_size, batch_size)
    return _load(items.__getitem__, (range(i, i + local) for i in starts), workers, pin)


def views(dataset, batches, workers=0):
    """Load the fixed views of the images in each list of indices: yields uint8 (b,3,H,W)."""
    for batch in _load(partial(_view, dataset), batches, workers):
        yield batch["image"]


@dataclass
class Batch:
    """Hold images on the device."""
    index: list                         # positions in the run, or indices of held-out images
    x:     torch.Tensor                 # (B,3,H,W) in [-1,1]
    mask:  torch.Tensor | None = None   # (B,1,H,W) in {0,1}


def held_out_batches(dataset, n, batch_size, device, rank=0, world=1, *, masks=True, workers=0):
    """Load the first `n` images with their evaluation masks: yields every world-th Batch."""
    n = min(n, len(dataset))
    batches = [range(i, min(i + batch_size, n)) for i in range(0, n, batch_size)][rank::world]
    for index, image in zip(batches, views(dataset, batches, workers)):
        batch = Batch(list(index), pixels(image, device))
        if masks:
            mask = np.stack([evaluation_mask(dataset.size, i) for i in index])      # (B, H, W)
            batch.mask = torch.from_numpy(mask)[:, None].to(device).float()         # (B, 1, H, W)
        yield batch


def _load(read, positions, workers, pin=False):
    """Yield one dict for each list of positions, of the items that `read` gives.

    Two batches for each worker are read ahead. Items come one by one, through pipes: batches of
    torch's DataLoader need much of /dev/shm, which is small in containers, and do not tell a large
    batch from a worker that hangs. Raises UserError for a worker lost, and Leaving while it waits.
    """
    def stack(items):
        columns = {key: [item[key] for item in items] for key in items[0]}
        arrays = {key: torch.from_numpy(np.stack(column)) for key, column in columns.items()
                  if isinstance(column[0], np.ndarray)}
        return columns | ({key: x.pin_memory() for key, x in arrays.items()} if pin else arrays)

    if not workers:
        yield from (stack([read(position) for position in some]) for some in positions)
        return
    pool, patience = None, 10 * SILENCE
    try:
        pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(read,))
        batches = ([pool.submit(_read, position) for position in some] for some in positions)
        coming = deque(islice(batches, 2 * workers))
        while coming:
            items = []
            for item in coming.popleft():
                if not any(wait([item], 1).done for _ in heed(range(patience))):
                    raise TimeoutError
                items.append(item.result())
                patience = SILENCE               # more for the first, which may import torch before
            coming.extend(islice(batches, 1))
            yield stack(items)
        return
    except TimeoutError:
        problem = f"no image for {patience} s: a disk, network folder or worker hangs"
    except BrokenProcessPool:
        problem = "a worker was killed, perhaps because memory is full"
    except OSError as error:
        if pool:
            raise
        problem = f"/dev/shm is full or missing ({error.strerror})"      # it has the pool's locks
    finally:
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)
    raise UserError(f"--workers {workers}: {problem}; give --workers 0, or the container more "
                    "memory and a larger /dev/shm (--shm-size)")


def _start_worker(read):
    """Prepare a worker's process, which is to `read`."""
    # Ctrl-C and SIGTERM often reach all processes. The main one saves first, then ends its workers.
    for number in ASK_TO_STOP:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    _start_worker.read = read
    # Without this a worker would wait for ever for a main process that was killed.
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def _read(position):
    return _start_worker.read(position)
