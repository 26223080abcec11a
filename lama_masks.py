"""LaMa's masks as a command: one evaluation set for all inpainting programs.

    PHOTOS --list_images--> index i --load_image, square_crop--> OUT/images/NAME.png
                               +-------evaluation_draw---------> OUT/masks/NAME.png, white = hole
    settings, and of each file index, draw, area and bin ------> OUT/manifest.json

Everything is a function of the photos and the settings: the same command gives the same bytes, and
image i the mask that it has in eval.py. Not here: how masks are drawn (masks.py), and what fills
them, which may be any program; `eval.py --pred` measures it.
"""

import argparse
import json
from collections import Counter
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from data import load_image, square_crop
from distributed import UserError, exit_on_user_error
from listing import EXTENSIONS, list_images
from masks import MASK_KINDS, area_bucket, evaluation_draw
from run_folder import Progress, write_text


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
        _compare(out, _read(path), manifest)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there and holds no set of masks; choose another --out")
    else:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_text(path, _text(manifest))        # so that an interrupted set can be begun anew
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None


def _read(path):
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
    for folder, pixels in (("images", image), ("masks", mask * np.uint8(255))):
        path = out / folder / entry["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        # The least compression: 8 % larger than the default, and four times as fast.
        Image.fromarray(pixels).save(path, compress_level=1)


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
