"""The code maps that the prior learns: each picture encoded once, and the order of the maps.

    pictures --views, encode--> indices (n,h,w) --> RUN/codes/SPLIT-KEY.npy         code_maps
    position in the run -> epoch, permuted row -> a map (h,w)                        CodeItems

The first stage is frozen, so a picture's codes are the same at every look: encoding it again in
each epoch would cost more than the prior's own step. Not here: what a step with these maps is
(stages.py).
"""

import hashlib
import os
import time
from pathlib import Path

import numpy as np
import torch

from data import Order, views
from distributed import gather_objects, on_rank0, print0, rank, world_size

BATCH = 64              # pictures encoded at once; another number might round otherwise


def code_maps(encode, dataset, n, K, parent, folder, workers=0):
    """The codes of the first n pictures in their fixed view: (n,h,w) uint16, int32 for K > 65,536.

    deviation D47
    encode: image uint8 (b,3,H,W) -> indices (b,h,w), with the first stage whose hash is `parent`.
    folder: where the file is kept that they are memory-mapped from. It is made once for a first
    stage, a data set and n, as a whole or not at all.
    Every process must call this: they share the pictures, in whole batches, so that their number
    changes no bit. UserError: from the data set.
    """
    key = f"{parent}|{dataset.identity()}|{n}"
    name = f"{dataset.split}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    path, dtype = Path(folder) / name, np.uint16 if K <= 2**16 else np.int32
    if not on_rank0(path.exists):
        rounds = _encoded(encode, dataset, n, dtype, workers)
        if rank() == 0:
            _write(path, n, dtype, rounds)
        else:
            for _ in rounds:
                pass
        on_rank0(lambda: None)               # nobody looks for the file before it has its name
    return np.load(path, mmap_mode="r")


def _encoded(encode, dataset, n, dtype, workers):
    """Yields every process's next batch of codes (b,h,w), in the order of the pictures, as a list.

    The same list on each process; the last one may be short.
    """
    starts = range(0, n, BATCH)
    mine = (range(start, min(start + BATCH, n)) for start in starts[rank()::world_size()])
    pictures = views(dataset, mine, workers)
    next_line = time.monotonic() + 10
    for start in starts[::world_size()]:
        image, _ = next(pictures, (None, None))
        codes = None if image is None else encode(image).cpu().numpy().astype(dtype)
        shares = gather_objects(codes)
        if time.monotonic() > next_line:
            print0(f"encoding: {start:,} of {n:,} pictures")
            next_line = time.monotonic() + 10
        yield [codes for codes in shares if codes is not None]


def _write(path, n, dtype, rounds):
    """The codes of all rounds into a .npy file, which has its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            for codes in (codes for shares in rounds for codes in shares):
                if file.tell() == 0:
                    np.lib.format.write_array_header_1_0(file, {
                        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                        "fortran_order": False, "shape": (n, *codes.shape[1:])})
                file.write(codes.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class CodeItems:
    """Map-style data set over positions 0, 1, 2, ... of the maps in a run, as data.TrainingItems.

    codes: (n,h,w), any integers. Items: indices int64 (h,w), position.
    """

    def __init__(self, codes, seed, stage_id):
        self.codes, self.order = codes, Order(len(codes), (seed, stage_id))

    def __getitem__(self, position):
        indices = self.codes[self.order[position]].astype(np.int64)                 # (h, w)
        return {"indices": torch.from_numpy(indices), "position": position}
