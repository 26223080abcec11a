"""Pictures matched by file name, made by anything; and LaMa's masks for a folder of photos.

    --real, --pred, --masks, --refs, --latents --MatchedFolders--> Item --> metrics.Pictures
    python image_pairs.py PHOTOS -o SET --kind thick --size 512   writes images/, masks/ of LaMa's

Nothing is resized, cropped, replaced or left out, because each would change the figures: what does
not fit is an error that names the file. Sets without originals of their own, as for FID between
any two, come from PictureFolder.

How names match. Files belong together when their paths below their folders agree but for the
extension: a/x.png and a/x.JPEG. Where no path of a folder agrees, file names alone count, so that a
flat folder fits one with classes. NAME_mask.png and NAME_mask000.png stand for NAME: LaMa calls its
masks so, and its predictions after them. In a folder with such masks nothing else is a mask, so the
photos may lie beside them.
"""
import argparse
import json
import math
import os
import re
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image, ImageOps

from data import EXTENSIONS, list_images, load_image, pixels, square_crop
from distributed import UserError, exit_on_user_error, print0, rank, world_size
from masks import MASK_KINDS, area_bucket, evaluation_draw
from metrics import Pictures
from run_folder import Progress, write_text

LATENTS = (".npy", ".pt")
MASK_SUFFIX = re.compile(r"_mask\d*$")
THREADS = min(8, os.cpu_count() or 1)            # decoding; Pillow lets go of Python's lock for it


@dataclass
class Item:
    """One original and what goes with it; None where no such folder was given."""

    name:    str                                 # path below the folder, without extension
    real:    torch.Tensor                        # uint8 (3,H,W)
    pred:    torch.Tensor | None = None          # uint8 (3,H,W)
    mask:    torch.Tensor | None = None          # uint8 (1,H,W) in {0,1}, 1 = to be generated
    ref:     torch.Tensor | None = None          # uint8 (3,h,w), any size
    z:       torch.Tensor | None = None          # float32 (d,h,w)
    remarks: dict = field(default_factory=dict)  # {kind: what the user should know of the mask}

    def sizes(self):
        """What has to agree for items to be stacked."""
        return self.real.shape, None if self.z is None else self.z.shape


# -- matching --------------------------------------------------------------------------------------


class MatchedFolders:
    """Originals and what goes with them, matched by file name; sorted by name, then path.

    real: the folder of the originals. pred: pictures made elsewhere, exactly one for each original.
    masks: white (from 128 on) = to be generated, black with `invert_mask`. refs: what the holes
    were to look like. latents: .npy or .pt files of (d,h,w) or (1,d,h,w), divided by
    `scaling_factor`. These three may hold more than is needed. limit: the first N. UserError: a
    folder that is missing or empty, files that lack a partner, two files for one name.
    """

    def __init__(self, real, pred=None, masks=None, refs=None, latents=None, *, scaling_factor=1.0,
                 invert_mask=False, limit=None):
        if not 0 < scaling_factor < math.inf:
            raise UserError(f"--scaling-factor {scaling_factor}: give a number above 0")
        self.scaling_factor, self.invert_mask = scaling_factor, invert_mask
        self.real = _originals(real, masks)
        names = sorted(self.real, key=lambda name: (os.path.basename(name), name))
        match = partial(_match, names, real)
        self.pred = pred and match("--pred", pred, _photos("--pred", pred, masks), exact=True)
        self.masks = masks and match("--masks", masks, _mask_files(masks, (real, pred), names))
        self.refs = refs and match("--refs", refs, _photos("--refs", refs, masks))
        self.latents = latents and match("--latents", latents, _latent_files(latents))
        self.name, self.names, self._said = str(pred or real), names[:limit], set()
        self._places = f"{pred} beside {real}" if pred else str(real)
        for word, folder in (("masks", masks), ("references", refs), ("latents", latents)):
            self._places += f", {word} in {folder}" if folder else ""

    def __len__(self):
        return len(self.names)

    def describe(self):
        count = f"{len(self):,} pictures" if len(self) > 1 else "1 picture"
        inverted = " (black = generated)" if self.masks and self.invert_mask else ""
        return f"{count} in {self._places}{inverted}"

    def read(self, index):
        """The Item `index`. UserError: a file that cannot be decoded, or sizes that differ."""
        name = self.names[index]
        item = Item(name, _read_picture(self.real[name]))
        if self.pred:
            item.pred = _read_picture(self.pred[name])
            _check_size(self.pred[name], item.pred, self.real[name], item.real)
        if self.masks:
            item.mask, item.remarks = read_mask(self.masks[name], self.invert_mask)
            _check_size(self.masks[name], item.mask, self.real[name], item.real)
        if self.refs:
            item.ref = _read_picture(self.refs[name])
        if self.latents:
            item.z = _read_latent(self.latents[name]) / self.scaling_factor
        return item

    def remark(self, item):
        """Print what the user should know of an item's mask; each kind of remark once."""
        for kind, text in item.remarks.items():
            if kind not in self._said:
                self._said.add(kind)
                print0(text)


def _originals(real, masks):
    """{name: path} of all originals."""
    files = _photos("--real", real, masks)
    return _assign("--real", real, files, {_stem(file): _stem(file) for file in files})[0]


def _photos(flag, folder, masks=None):
    """The pictures of a folder, relative to it, without the masks that lie beside their photos."""
    files = _listed(flag, folder, list_images, EXTENSIONS)
    if not masks or not _is_same(folder, masks):
        return files
    names = {_stem(file) for file in files}
    return [file for file in files
            if not MASK_SUFFIX.search(_stem(file)) or _without_suffix(_stem(file)) not in names]


def _mask_files(folder, others, names):
    """The masks in a folder: where it is one of `others`, or has any NAME_mask, those alone."""
    photos = set(names) | {os.path.basename(name) for name in names}
    files = _listed("--masks", folder, list_images, EXTENSIONS)
    named = [file for file in files if MASK_SUFFIX.search(_stem(file))
             and not {_stem(file), os.path.basename(_stem(file))} & photos]
    beside_photos = any(other and _is_same(folder, other) for other in others)
    return named if named or beside_photos else files


def _latent_files(folder):
    def below(folder):
        paths = (path.relative_to(folder) for path in Path(folder).rglob("*"))
        return sorted(str(path) for path in paths
                      if path.suffix in LATENTS and not path.name.startswith("."))
    return _listed("--latents", folder, below, LATENTS)


def _listed(flag, folder, files_below, extensions):
    if not Path(folder).is_dir():
        raise UserError(f"{flag} {folder}: no such folder; name one that exists")
    files = files_below(folder)
    if not files:
        raise UserError(f"{flag} {folder}: no file here is one of {' '.join(extensions)}; name "
                        "another folder")
    return files


def _match(names, real, flag, folder, files, exact=False):
    """{name: path} for all names of the originals. exact: there must be no other files."""
    found, others = _assign(flag, folder, files, {name: name for name in names})
    short = {os.path.basename(name): name for name in names}
    if not found and len(short) == len(names):
        found, others = _assign(flag, folder, files, short, os.path.basename)
    missing = [name for name in names if name not in found]
    if missing or (exact and others):
        wrong = [f"nothing for {_some(missing)} of --real {real}"] * bool(missing)
        wrong += [f"--real {real} has nothing for {_some(others)}"] * bool(exact and others)
        mend = " or NAME_mask.png for NAME.png" if flag == "--masks" else ""
        raise UserError(f"{flag} {folder}: {'; '.join(wrong)}; files are matched by name, so both "
                        f"folders need the same names{mend}")
    return found


def _assign(flag, folder, files, owners, shorten=str):
    """({name: path}, files without an owner). UserError: two files for one name.

    owners: {key: name}; shorten: makes a key of a path without its extension.
    """
    found, others = {}, []
    for file in files:
        key = shorten(_stem(file))
        name = owners.get(key) or owners.get(_without_suffix(key))
        if name is None:
            others.append(file)
        elif name in found:
            raise UserError(f"{flag} {folder}: {found[name]} and {file} both stand for {name}; "
                            "keep one of them")
        else:
            found[name] = file
    return {name: os.path.join(folder, file) for name, file in found.items()}, others


def _stem(file):
    return os.path.splitext(file)[0]


def _without_suffix(name):
    return MASK_SUFFIX.sub("", name)


def _is_same(folder, other):
    return Path(folder).resolve() == Path(other).resolve()


def _some(names):
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


# -- reading ---------------------------------------------------------------------------------------


def decoded(path, decode):
    """decode(path). UserError: whatever it raises, in one line."""
    try:
        return decode(path)
    except Exception as error:  # Pillow's and torch's readers raise nearly anything
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot be decoded ({reason}); put a whole file in its "
                        "place") from None


def _read_picture(path):
    picture = np.array(decoded(path, load_image))                                   # (H, W, 3)
    return torch.from_numpy(picture).permute(2, 0, 1).contiguous()                  # (3, H, W)


def read_mask(path, invert):
    """(uint8 (1,H,W), 1 = to be generated; remarks as in Item). UserError: cannot be decoded.

    White, from 128 on, is to be generated; black is with `invert`.
    """
    grey, transparent = decoded(path, _luminance)                                   # (H, W)
    mask, remarks = (grey >= 128) ^ invert, {}
    if transparent:
        remarks["alpha"] = f"{path}: has transparent parts; in all masks they count as black"
    if soft := int(((grey > 0) & (grey < 255)).sum()):
        remarks["soft"] = (f"{path}: {soft:,} of {grey.size:,} pixels are neither black nor white; "
                           "in all masks, white begins at 128")
    area = int(mask.sum())
    if area == 0 or 100 * area > 95 * mask.size:
        share = f"{area / mask.size:.0%} of it" if area else "nothing in it"
        remarks["polarity"] = (f"{path}: {share} is to be generated (its values are {grey.min()} "
                               f"to {grey.max()} of 255); white means to be generated, black does "
                               "with --invert-mask")
    return torch.from_numpy(mask.astype(np.uint8))[None], remarks                   # (1, H, W)


def _luminance(path):
    """(uint8 (H,W), whether some of it is transparent): upright, composed on black, as grey."""
    with Image.open(path) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, where Pillow's own conversion would cut at 255
            return (np.asarray(image).clip(0, 65535) // 257).astype(np.uint8), False
        transparent = False
        if image.has_transparency_data:
            image = image.convert("RGBA")
            transparent = image.getextrema()[3][0] < 255
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        return np.array(image.convert("L")), transparent


def _read_latent(path):
    """float32 (d,h,w)."""
    def decode(path):
        if path.endswith(".npy"):
            return torch.from_numpy(np.load(path, allow_pickle=False))
        return torch.load(path, map_location="cpu", weights_only=True)

    z = decoded(path, decode)
    if not isinstance(z, torch.Tensor):
        raise UserError(f"{path}: holds a {type(z).__name__}; save one latent, its tensor alone")
    if z.ndim not in (3, 4) or (z.ndim == 4 and len(z) != 1) or not z.is_floating_point():
        raise UserError(f"{path}: holds {z.dtype} of shape {tuple(z.shape)}; save one latent, "
                        "floats of (d,h,w) or (1,d,h,w)")
    if not z.isfinite().all():
        raise UserError(f"{path}: holds values that are not finite; make this latent again")
    return z.detach().float().reshape(z.shape[-3:])                                 # (d, h, w)


def _check_size(path, picture, real_path, real):
    if picture.shape[1:] != real.shape[1:]:
        (height, width), (real_height, real_width) = picture.shape[1:], real.shape[1:]
        raise UserError(f"{path} is {width} x {height} px, {real_path} is {real_width} x "
                        f"{real_height}; resize to the same size: nothing is resized here, because "
                        "it would change the figures")


# -- streaming -------------------------------------------------------------------------------------


def item_batches(folders, batch_size, rank=0, world=1):
    """This rank's items, every `world`-th, as lists of (index, Item) in their order.

    A list has at most `batch_size` items of one size. However many there are in all, no more than
    a few batches are in memory. UserError: as MatchedFolders.read.
    """
    ahead = _read_ahead(folders.read, range(rank, len(folders), world), batch_size)
    for batch in _batches(ahead, batch_size, Item.sizes):
        for _, item in batch:
            folders.remark(item)
        yield batch


class PictureFolder:
    """The pictures of one folder, for sets that are not paired. UserError as MatchedFolders."""

    def __init__(self, flag, folder, limit=None):
        self.name = str(folder)
        self.files = _photos(flag, folder)[:limit]

    def __len__(self):
        return len(self.files)

    def read(self, index):
        """uint8 (3,H,W). UserError: a file that cannot be decoded."""
        return _read_picture(os.path.join(self.name, self.files[index]))

    def pictures(self, batch_size, device):
        """This process's share as metrics.Pictures, shared out and batched as by item_batches."""
        ahead = _read_ahead(self.read, range(rank(), len(self), world_size()), batch_size)
        for batch in _batches(ahead, batch_size, lambda picture: picture.shape):
            indices, pictures = zip(*batch)
            yield Pictures(list(indices), pixels(torch.stack(pictures), device))


def _read_ahead(read, indices, count):
    """(index, read(index)) in order; threads decode the next ones while these are in use."""
    # load_image hides warnings while it decodes. Threads that do so at the same time can leave them
    # hidden, so what was before is restored once all are done.
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        pending = deque()
        for index in indices:
            pending.append((index, pool.submit(read, index)))
            if len(pending) >= max(count, THREADS):
                yield _next(pending)
        while pending:
            yield _next(pending)


def _next(pending):
    index, future = pending.popleft()
    return index, future.result()


def _batches(things, batch_size, sizes):
    """Lists of at most `batch_size` neighbours (index, thing) whose sizes(thing) agree."""
    for _, alike in groupby(things, lambda pair: sizes(pair[1])):
        while batch := list(islice(alike, batch_size)):
            yield batch


def folder_pictures(folders, batch_size, device):
    """This process's share of a MatchedFolders as metrics.Pictures. UserError: as item_batches."""
    for batch in item_batches(folders, batch_size, rank(), world_size()):
        items = [item for _, item in batch]
        pictures = Pictures([index for index, _ in batch], pixels(_stack(items, "real"), device))
        if folders.pred:
            pictures.pred = pixels(_stack(items, "pred"), device)                   # (B, 3, H, W)
        if folders.masks:
            pictures.mask = _stack(items, "mask").to(device).float()                # (B, 1, H, W)
        if folders.refs:
            pictures.refs = [pixels(item.ref, device) for item in items]
        if folders.latents:
            pictures.z = _stack(items, "z").to(device)                              # (B, d, h, w)
        yield pictures


def _stack(items, name):
    return torch.stack([getattr(item, name) for item in items])

# -- LaMa's evaluation set -------------------------------------------------------------------------


def write_evaluation_set(photos, out, kind="thick", size=512, n=None, seed=0):
    """Write the set of the first `n` pictures below `photos` into `out`; the manifest's contents.

    [AVQ Tab. 1]  deviation D29

    n: None for all. A picture that cannot be decoded is left out, and its index with it: the others
    keep their masks. An entry of `files` has source, name (of image and mask), index, draw, dropped
    (draws before it: empty, or over half the picture), area and bucket; or source, index and error.
    Raises UserError where `out` holds another set or anything else, and where no picture can be
    decoded.
    """
    photos, out = Path(photos).expanduser().resolve(), Path(out).expanduser().resolve()
    sources = _sources(photos, out)
    files = [{"source": source, "name": name, "index": index}
             for index, (source, name) in enumerate(zip(sources, output_names(sources)))][:n]
    manifest = {"version": 1, "settings": {"photos": str(photos), "kind": kind, "size": size,
                                           "n": n, "seed": seed}, "files": files}
    _begin(out, manifest)
    progress = Progress("masks", 0, len(files), 1)
    for done, entry in enumerate(files, 1):
        _write_pair(photos, out, entry, manifest["settings"])
        progress.show(done, {})
    progress.close()
    if all("error" in entry for entry in files):
        raise UserError(f"{photos}: none of {len(files):,} pictures can be decoded, for example "
                        f"{files[0]['source']!r} ({files[0]['error']})")
    write_text(out / "manifest.json", _text(manifest))
    return manifest


def _sources(photos, out):
    """The pictures below `photos`, in eval.py's order."""
    if not photos.is_dir():
        raise UserError(f"{photos}: no such folder; give the folder of the pictures")
    for folder in (out / "images", out / "masks"):
        if photos.is_relative_to(folder) or folder.is_relative_to(photos):
            raise UserError(f"--out {out}: would mix the set with the pictures in {photos}; choose "
                            "an --out outside of it")
    sources = [PurePath(name).as_posix() for name in list_images(photos)]
    if not sources:
        raise UserError(f"{photos}: no pictures here ({' '.join(EXTENSIONS)})")
    return sources


def output_names(sources):
    """Each source's name below images/ and masks/: its own folders, and .png for its extension.

    The extension stays, as in `a.jpg.png`, where two names would differ by nothing else, whether or
    not the file system tells capital letters from small ones.
    """
    stems = [str(PurePath(source).with_suffix("")) for source in sources]
    often = Counter(stem.casefold() for stem in stems)
    whole = {source.casefold() for source in sources}
    return [f"{stem}.png" if often[stem.casefold()] == 1 and stem.casefold() not in whole
            else f"{source}.png" for source, stem in zip(sources, stems)]


def _begin(out, manifest):
    """Make `out`, or check that this very set was begun there, so that nothing else is lost."""
    path = out / "manifest.json"
    if path.exists():
        _compare(out, _read_manifest(path), manifest)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there and holds no set of masks; choose another --out")
    else:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_text(path, _text(manifest))        # so that an interrupted set can be begun anew
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None


def _read_manifest(path):
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": dict(manifest["settings"]),
                "files": [entry["source"] for entry in manifest["files"]]}
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{path}: not a manifest of masks; choose another --out") from None


def _compare(out, before, now):
    keys = [key for key in now["settings"] if before["settings"].get(key) != now["settings"][key]]
    changed = [f"{key} was {before['settings'].get(key)}, is {now['settings'][key]}"
               for key in keys]
    if not changed and before["files"] != [entry["source"] for entry in now["files"]]:
        changed = ["the pictures are not the same ones"]
    if changed:
        raise UserError(f"--out {out}: holds a set with other settings: {'; '.join(changed)}; "
                        "choose another --out")


def _write_pair(photos, out, entry, settings):
    """Write one image and its mask, and into `entry` what is to be known of them."""
    size, index = settings["size"], entry["index"]
    try:
        # Decoded as in ImageFiles, so that the pixels are those that eval.py sees.
        image = square_crop(load_image(photos / entry["source"], min_side=2 * size), size)
    except Exception as error:  # Pillow's readers raise nearly anything on broken files
        del entry["name"]
        entry["error"] = " ".join(f"{type(error).__name__}: {error}".split())
        return
    mask, draw = evaluation_draw(size, index, settings["kind"], settings["seed"])
    entry |= {"draw": draw, "dropped": list(range(index, draw)), "area": float(mask.mean()),
              "bucket": area_bucket(mask)}
    for folder, picture in (("images", image), ("masks", mask * np.uint8(255))):
        path = out / folder / entry["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        # The least compression: 8 % larger than the default, and four times as fast.
        Image.fromarray(picture).save(path, compress_level=1)


def _text(manifest):
    """JSON, with one line for each file."""
    head = json.dumps({key: manifest[key] for key in ("version", "settings")})
    files = ",\n".join(json.dumps(entry) for entry in manifest["files"])
    return f'{head[:-1]},\n"files": [\n{files}\n]}}\n'


# -- the program -----------------------------------------------------------------------------------

EPILOG = """\
Fill the white parts of the masks with any program, keep the file names, then
  python eval.py --pred DIR --real OUT/images --masks OUT/masks
prints FID, LPIPS and the error on known pixels, for all masks and for each tenth of area, such as
40-50 %, the hard ones of the paper's Table 1. No mask generates more than half of its picture.
PHOTOS is searched recursively; for ImageNet give its val folder.
"""


def main():
    args = _parser().parse_args()
    for flag, value, least in (("--size", args.size, 8), ("-n", args.n, 1),
                               ("--seed", args.seed, 0)):
        if value is not None and value < least:
            raise UserError(f"{flag} {value}: the least is {least}")
    print(f"writing {args.size} x {args.size} px pictures of {args.photos} with {args.kind} masks, "
          f"seed {args.seed}, to {args.out}", flush=True)
    manifest = write_evaluation_set(args.photos, args.out, args.kind, args.size, args.n, args.seed)
    print(summary(manifest))
    print(f"made {Path(args.out, 'images')}, {Path(args.out, 'masks')} and "
          f"{Path(args.out, 'manifest.json')}")


def summary(manifest):
    """What was made, what was dropped, and what was left out, in a few lines."""
    made = [entry for entry in manifest["files"] if "error" not in entry]
    dropped = sum(len(entry["dropped"]) for entry in made)
    buckets = Counter(entry["bucket"] for entry in made)
    shares = ", ".join(f"{name} %: {buckets[name]}" for name in sorted(buckets))
    lines = [f"{len(made):,} pictures with a mask each; by area: {shares}",
             f"{dropped:,} draws dropped: empty, or over half of the picture"]
    lines += [f"left out, cannot be decoded: {entry['source']!r} ({entry['error']})"
              for entry in manifest["files"] if "error" in entry]
    return "\n".join(lines)


def _parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Make an evaluation set for inpainting from any photos: centre squares, and a "
                    "random mask of LaMa's for each.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("photos", metavar="PHOTOS", help="folder of the pictures")
    add("-o", "--out", required=True, metavar="OUT",
        help="where images/, masks/ and manifest.json go")
    add("--kind", choices=MASK_KINDS, default="thick",
        help="LaMa's kinds of masks (default: thick, the paper's)")
    add("--size", type=int, default=512, metavar="PX",
        help="side of pictures and masks (default: 512, the paper's)")
    add("-n", type=int, metavar="N", help="only the first N pictures (default: all)")
    add("--seed", type=int, default=0, metavar="S",
        help="another set of masks (default: 0, that of eval.py)")
    return parser


if __name__ == "__main__":
    exit_on_user_error(main)
