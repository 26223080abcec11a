"""How many of its codes a first stage uses, before and after ReFiT. [DDM Tab. 1]

    x --encoder--> z_e --the nearest of each codebook--> counts (K) --> usage, perplexity

ReFiT keeps the encoder, so one pass over the pictures counts both codebooks. What ReFiT counted of
all held-out pictures when it began is in its file, and the codes of the training pictures that the
prior has learnt are in RUN/codes; whoever has these need not count again. How a row is printed is
in paper_tables.py.
"""

from pathlib import Path

import numpy as np
import torch

import run_folder
from convert import load_first_stage, run_of
from distributed import UserError, gather_objects
from metrics import Networks, tally_batches
from originals import originals
from quantize import code_statistics, count_codes

BEFORE, AFTER, FIRST_STAGE = "before ReFiT", "after ReFiT", "the first stage's"


def codebook_row(name, config, size, statistics, usage_train=None, rfid=None):
    """A row of paper_tables.codebook_table. config: the first stage's; size: of the pictures, px;
    statistics: quantize.code_statistics of held-out pictures, or None."""
    side, known = size // config.f, statistics or {}
    return {"name": name, "latent": f"{side}x{side}", "K": known.get("K", config.K),
            "usage_train": usage_train, "usage_val": known.get("usage"),
            "perplexity_val": known.get("perplexity"), "rfid": rfid}


# -- what is known already -------------------------------------------------------------------------


def refit_of(run):
    """(contents of the refit file that holds a eval.Run's first stage, its run folder), or None.

    The file is that of the run, or of the one that its --vqgan names.
    """
    for path in filter(None, (run.name, run.loaded.config.get("vqgan"))):
        home = run_of(Path(path))
        state = run_folder.latest(home / "refit")
        if state is not None and run_folder.weights_hash(state["model"]) == run.loaded.parent:
            return state, home
    return None


def remembered(run, where, images):
    """{BEFORE, AFTER: code_statistics} of all held-out pictures, from ReFiT's file; or None.

    where: {"data", "root", "size"} of the pictures that are asked for; images: how many these are.
    """
    state, _ = refit_of(run) or (None, None)
    if state is None or "val" not in state["extra"]:
        return None
    config, facts = state["config"], state["extra"]["val"]
    if {key: config[key] for key in where} != where or config["images"]["val"] != images:
        return None
    return {BEFORE: facts["before"], AFTER: facts["after"]}


def learnt_usage(run_folder, facts):
    """The usage of the training codes that a prior has learnt, a fraction; None if they are gone.

    facts: convert.prior_facts'. They are the one file of their shape in RUN/codes.
    """
    shape = (facts.get("maps"), *facts["grid"])
    kept = [np.load(path, mmap_mode="r") for path in (run_folder / "codes").glob("train-*.npy")]
    kept = [codes for codes in kept if codes.shape == shape]
    if len(kept) != 1:
        return None
    parts = (torch.from_numpy(kept[0][i:i + 4096].astype(np.int64))
             for i in range(0, len(kept[0]), 4096))
    return code_statistics(count_codes(parts, facts["K"]))["usage"]


# -- counting --------------------------------------------------------------------------------------


class CodeCounter:
    """How often each code occurs in the pictures that are offered, for each of some codebooks.

    first_stages: {name: VQGAN}, of one encoder.
    """

    def __init__(self, first_stages):
        self.first_stages = first_stages
        self.counts = {name: torch.zeros(model.config.K, dtype=torch.int64)
                       for name, model in first_stages.items()}

    def offer(self, x):
        """Count the codes of x (B,3,H,W) in [-1,1]; {name: indices (B,h,w)}."""
        z_e = next(iter(self.first_stages.values())).moments(x)                     # (B, d, h, w)
        indices = {name: model.quantize(z_e)[1] for name, model in self.first_stages.items()}
        for name, of_each in indices.items():
            self.counts[name] += count_codes([of_each], len(self.counts[name]))
        return indices

    def reconstruct(self, pictures):
        """Count, and decode: what metrics.tally_batches calls a decoder's pictures."""
        indices = self.offer(pictures.x)
        return {(name, "vanilla"): (model.decode_indices(indices[name]), 0.0)
                for name, model in self.first_stages.items()}

    def statistics(self):
        """{name: quantize.code_statistics}, over all processes."""
        return {name: code_statistics(sum(gather_objects(counts)))
                for name, counts in self.counts.items()}


def first_stages_of(run, device):
    """({name: VQGAN}, what there is to say): a run's first stage and what ReFiT made it of."""
    found = refit_of(run)
    if found is None:
        return {FIRST_STAGE: run.first_stage}, None
    state, home = found
    source = state["config"]["vqgan"] or home / "vqgan" / "last.pt"
    try:
        before = load_first_stage(source)
    except UserError as error:
        return {AFTER: run.first_stage}, str(error)
    if before.parent != state["parent"]:
        return {AFTER: run.first_stage}, f"{source} is not what this ReFiT began with"
    return {BEFORE: before.model.to(device), AFTER: run.first_stage}, None


def count_splits(run, train_set, val_set, n, batch_size, device, inception=None, workers=0):
    """(paper_tables.codebook_table's rows, a remark): DDM's Table 1 for a run, counted.

    n: pictures of each split (None: all); inception: for the FID of what the codes of the held-out
    pictures decode to, against these pictures. [DDM Tab. 1]
    """
    first_stages, remark = first_stages_of(run, device)
    train, val = CodeCounter(first_stages), CodeCounter(first_stages)
    for pictures in originals(train_set, min(n or len(train_set), len(train_set)), batch_size,
                              device, "codes, train", workers):
        train.offer(pictures.x)
    held_out = min(n or len(val_set), len(val_set))
    batches = originals(val_set, held_out, batch_size, device, "codes, val", workers)
    rfid = dict.fromkeys(first_stages)
    if inception is None or any(model.decoder is None for model in first_stages.values()):
        for pictures in batches:
            val.offer(pictures.x)
    else:
        tally = tally_batches(batches, val.reconstruct, held_out, Networks(inception=inception))
        rfid = {name: tally.row((name, "vanilla"), "all")["fid"] for name in first_stages}
    usage, statistics = train.statistics(), val.statistics()
    return [codebook_row(name, model.config, val_set.size, statistics[name], usage[name]["usage"],
                         rfid[name]) for name, model in first_stages.items()], remark
