"""Several decoders on the same latents: which models stand in one table, and what they make of it.

    open_runs: runs and public checkpoints --> [Run], all reading the same latents
    Pictures --decode_all--> z, once --> vanilla: the first stage's own decoder
                                         paste: vanilla with the known pixels copied over it
                                         asym: ours, given x·(1-mask) and mask
                                         asym-nomask: ours, given nothing

The full image is encoded, or the latents are given: then some other program filled the hole. Not
here: what is measured (tally.py), the tables (paper_tables.py).
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from asym_decoder import AsymVQGAN
from convert import Loaded, load
from data import validation_batches
from distributed import UserError, rank, wait_for, world_size
from originals import report_bad
from stages import validation_batch
from tally import Pictures


@dataclass
class Run:
    """One model of the comparison: its name in the tables, and what convert.load found there."""

    name: str
    loaded: Loaded

    @property
    def decodes(self):
        """Whether it has an asymmetric decoder, not only a first stage."""
        return isinstance(self.loaded.model, AsymVQGAN)

    @property
    def first_stage(self):
        return self.loaded.model.first_stage if self.decodes else self.loaded.model


def open_runs(paths, device):
    """A Run for each path. Raises UserError where they cannot stand in one table."""
    runs = [Run(str(Path(path)), load(path, device)) for path in paths]
    first = runs[0]
    for run in runs[1:]:
        if run.name in [other.name for other in runs if other is not run]:
            raise UserError(f"{run.name} is given twice")
        if run.loaded.latents != first.loaded.latents:
            raise UserError(f"{run.name} and {first.name} stand on different first-stage weights, "
                            "so their decoders read different latents; evaluate them one by one, "
                            f"or train one on the other's: train.py --vqgan {first.name}")
        for key in ("data", "size"):
            ours, theirs = run.loaded.config.get(key), first.loaded.config.get(key)
            if None not in (ours, theirs) and ours != theirs:
                raise UserError(f"--{key} of {run.name} is {ours}, of {first.name} {theirs}; "
                                "evaluate them one by one")
    return runs


def first_stage_of(runs):
    """A first stage that makes the latents of all `runs`; one with a decoder where there is one."""
    owners = [run.first_stage for run in runs if run.first_stage.decoder is not None]
    return owners[0] if owners else runs[0].first_stage


def decode_all(runs, pictures):
    """{(run or None, decoder): (x_hat, seconds of decoding)} from one set of latents. [AVQ Tab. 2]

    What the runs share has None for its run. Without masks only what needs none is decoded.
    """
    first_stage, outputs = first_stage_of(runs), {}
    x, mask = pictures.x, pictures.mask                                 # (B,3,H,W), (B,1,H,W)
    _check_shapes(x, pictures.z, first_stage.config)
    z = first_stage.encode(x) if pictures.z is None else pictures.z     # (B,d,h,w)
    if first_stage.decoder is not None:
        outputs[None, "vanilla"] = vanilla, seconds = _timed(first_stage.decode, z)
        if mask is not None:
            outputs[None, "paste"] = torch.where(mask == 1, vanilla, x), seconds
    for run in runs:
        if run.decodes:
            decode = run.loaded.model.decode
            if mask is not None:
                outputs[run.name, "asym"] = _timed(decode, z, image=x, mask=mask)
            outputs[run.name, "asym-nomask"] = _timed(decode, z)
    return outputs


def _check_shapes(x, z, config):
    d, f, (H, W) = config.embed_dim, config.f, x.shape[2:]
    if H % f or W % f:
        raise UserError(f"a picture of {W} x {H} px: both sides must be multiples of {f} for this "
                        "first stage; crop or resize originals and masks alike")
    if z is not None and tuple(z.shape[1:]) != (d, H // f, W // f):
        raise UserError(f"a latent of {tuple(z.shape[1:])} does not fit a picture of {W} x {H} px: "
                        f"this first stage's are {(d, H // f, W // f)}")


def _timed(decode, z, **condition):
    wait_for(z.device)
    start = time.perf_counter()
    x_hat = decode(z, **condition)
    wait_for(z.device)
    return x_hat, time.perf_counter() - start


def dataset_pictures(dataset, n, batch_size, device, bad):
    """The first `n` pictures of a data set with their evaluation masks: this rank's Pictures.

    bad: a data.BadFiles, told of what cannot be decoded. Raises UserError for too many of these.
    """
    for batch in validation_batches(dataset, n, batch_size, rank(), world_size()):
        report_bad(bad, batch["bad"])
        on_device = validation_batch(batch, device)
        yield Pictures(batch["index"], on_device.x, on_device.mask)
