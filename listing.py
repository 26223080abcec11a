"""Which pictures a folder holds: listed once, in one order, and remembered.

    folder --list_images--> paths relative to it, sorted by name --> the user's cache folder

Walking ImageNet's 1.3 million files takes minutes on a network disk, so a list is kept for as long
as no directory changes. Not here: which of them are held out, and reading them (data.py).
"""

import hashlib
import json
import os
import time
from pathlib import Path

from distributed import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


def list_images(folder):
    """Paths of all pictures below `folder`, relative to it, sorted by name, then path; hidden files
    are left out.

    By name first: ImageNet's val then has one order, flat or by class, and its first images are of
    many classes. A list is kept in the user's cache folder and holds while no directory below
    `folder` changes.
    """
    folder = Path(folder).resolve()
    cache = _cache_file(folder)
    names = _cached_list(cache, folder)
    if names is not None:
        return names
    directories, names = _walk(folder)
    names.sort(key=lambda name: (os.path.basename(name), name))
    # A directory touched this instant may change again within its clock's tick: not worth trusting.
    if cache and max(directories.values()) < time.time_ns() - 2_000_000_000:
        _write_cache(cache, {"folder": str(folder), "directories": directories, "names": names})
    return names


def _walk(folder):
    """({directory: mtime in ns}, names) with links followed, each directory once."""
    def fail(error):
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")

    directories, names, seen = {}, [], set()
    for here, below, files in os.walk(folder, followlinks=True, onerror=fail):
        state = os.stat(here)
        if (state.st_dev, state.st_ino) in seen:
            below.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        relative = os.path.relpath(here, folder)
        directories[relative] = state.st_mtime_ns
        names += [os.path.normpath(os.path.join(relative, name)) for name in files
                  if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return directories, names


def _cache_file(folder):
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home folder
        return None
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]
    return base / "asymmetric-vqgan" / f"files-{name}.json"


def _cached_list(cache, folder):
    try:
        kept = json.loads(cache.read_text())
        fresh = all(os.stat(folder / name).st_mtime_ns == mtime
                    for name, mtime in kept["directories"].items())
        return kept["names"] if fresh and kept["folder"] == str(folder) else None
    except (AttributeError, OSError, ValueError, KeyError, TypeError):
        return None  # no cache, or not one of ours: list anew


def _write_cache(cache, content):
    part = cache.with_suffix(f".{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content))
        part.replace(cache)
    except OSError:
        pass  # a folder that cannot be written costs time, nothing else
