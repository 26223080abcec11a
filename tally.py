"""What is measured of every picture, and the sums over pictures, decoders and bins of mask area.

    Pictures, {decoder: x_hat} --metrics, LPIPS, CLIP--> one number a picture --+
                               --InceptionV3--> features, logits ---------------+--> Tally
    Tally: a Cell for each (decoder, bin) --> means, FID, inception score: a row of report.json

Batches are forgotten once measured and statistics have a fixed size, so memory does not grow with
the number of pictures. Each process measures its own share; the tallies are merged at the end. Not
here: where pictures come from (compare.py, image_pairs.py), how rows are printed (paper_tables.py).
"""

import math
from dataclasses import dataclass

import torch

from clip_score import CLIPImageEncoder, clip_score
from distributed import UserError, gather_objects, rank
from fid import FeatureStatistics, InceptionScore, InceptionV3
from losses import LPIPS
from masks import area_bucket
from metrics import pre_error, psnr_known, seam

REAL = (None, "real")                    # the key of the originals' statistics
FEATURES = 2048                          # width of InceptionV3's features
BUCKETS = ("all", *(f"{low}-{low + 10}" for low in range(0, 100, 10)))
MEASURES = ("pre_error", "psnr_known", "seam", "lpips", "clip_score")      # means over pictures
SETS = ("fid", "is_mean", "is_std")                                        # of a whole set


@dataclass
class Pictures:
    """One batch of originals on the device, and what goes with them."""

    index: list                          # positions among all pictures that are measured
    x:     torch.Tensor                  # (B,3,H,W) in [-1,1]
    mask:  torch.Tensor | None = None    # (B,1,H,W) in {0,1}, 1 = to be generated
    refs:  list | None = None            # (3,h,w) in [-1,1], what the holes were to look like
    pred:  torch.Tensor | None = None    # (B,3,H,W) in [-1,1], pictures made elsewhere
    z:     torch.Tensor | None = None    # (B,d,h,w), latents made elsewhere

    def buckets(self):
        """The bin of each mask's area; "all" without masks."""
        if self.mask is None:
            return ["all"] * len(self.x)
        return [area_bucket(mask) for mask in self.mask.cpu()]


# -- the networks ----------------------------------------------------------------------------------


@dataclass
class Networks:
    """The networks that columns need; None where one is not used, and then `notes` may say why."""

    lpips:     LPIPS | None = None
    inception: InceptionV3 | None = None
    clip:      CLIPImageEncoder | None = None
    lpips_net: str | None = None
    notes:     dict = None               # {column: why it is empty}


def open_networks(device, weights=None, lpips="vgg", asked=False, fid=True, clip=None):
    """The Networks for the columns that are wanted, their files found or downloaded.

    weights: the folder of the files (weights.find_weights); lpips: its net's name, or "none";
    asked: whether the user named it, so that a missing file is a UserError and not an empty column;
    fid: FID and inception score, too; clip: an image tower's name, or None without references.
    """
    networks = Networks(notes={})

    def opened(build, *columns):
        network, reason = _attempt(build) if rank() == 0 else (None, None)
        reason = gather_objects(reason)[0]       # the others need not wait for what cannot come
        if network is None and reason is None:
            network, reason = _attempt(build)
        if reason is not None:
            networks.notes |= dict.fromkeys(columns, f"n/a: {reason}")
        return None if reason is not None else network.to(device)

    if lpips == "none":
        networks.notes["lpips"] = "not computed: " + (
            "--lpips none" if asked else "the run has --perceptual none; choose one with --lpips")
    elif asked:
        networks.lpips = LPIPS(lpips, weights).to(device)
    else:
        networks.lpips = opened(lambda: LPIPS(lpips, weights), "lpips")
    networks.lpips_net = lpips if networks.lpips else None
    if fid:
        # On a CPU this layout is 1.4 times as fast.
        networks.inception = opened(
            lambda: InceptionV3(weights).to(memory_format=torch.channels_last), *SETS)
    else:
        networks.notes |= dict.fromkeys(SETS, "not computed: --no-fid")
    if clip:
        networks.clip = opened(lambda: CLIPImageEncoder(clip, weights), "clip_score")
    else:
        networks.notes["clip_score"] = "not computed: it compares with references (--refs)"
    return networks


def _attempt(build):
    """(build(), None), or (None, why a file is missing)."""
    try:
        return build(), None
    except UserError as error:
        return None, str(error)


def measure(x_hat, pictures, networks):
    """{measure: (B,) float64 on the CPU} of one decoder's pictures, x_hat (B,3,H,W) in [-1,1].

    NaN where a picture has no value: known pixels where there are none, the seam of a full mask.
    LPIPS is taken of the whole picture, as in the paper.
    """
    x, mask, values = pictures.x, pictures.mask, {}
    if mask is not None:
        values = {"pre_error": pre_error(x_hat, x, mask), "psnr_known": psnr_known(x_hat, x, mask),
                  "seam": seam(x_hat, x, mask)}
    if networks.lpips is not None:
        values["lpips"] = networks.lpips(x_hat.clamp(-1, 1), x).cpu().double()
    if networks.clip is not None and mask is not None and pictures.refs is not None:
        values["clip_score"] = clip_score(networks.clip, x_hat.clamp(-1, 1), pictures.refs, mask)
    return values


# -- the sums --------------------------------------------------------------------------------------


class Cell:
    """Sums over the pictures of one decoder in one bin of mask area."""

    def __init__(self):
        self.n, self.totals, self.counts = 0, {}, {}
        self.statistics = FeatureStatistics(FEATURES)

    def add(self, values, features=None):
        """values: {measure: (b,)}; a NaN stands for no value. features: (b,2048) or None."""
        for name, of_each in values.items():
            valid = of_each[~of_each.isnan()]
            self.totals[name] = self.totals.get(name, 0.0) + valid.sum().item()
            self.counts[name] = self.counts.get(name, 0) + len(valid)
        if features is not None:
            self.statistics.update(features)

    def merge(self, other):
        self.n += other.n
        for name, total in other.totals.items():
            self.totals[name] = self.totals.get(name, 0.0) + total
            self.counts[name] = self.counts.get(name, 0) + other.counts[name]
        if other.statistics.n:
            self.statistics.merge(other.statistics)

    def mean(self, name):
        """The mean of a measure; None where there is none, or where it is infinite."""
        if not self.counts.get(name):
            return None
        mean = self.totals[name] / self.counts[name]
        return mean if math.isfinite(mean) else None

    def frechet(self, real):
        """FID against the originals' cell; None for fewer than two pictures."""
        if min(self.statistics.n, real.statistics.n) < 2:
            return None
        return self.statistics.frechet(real.statistics)


class Tally:
    """Everything measured so far: a Cell for each (decoder, bin), and sums over whole sets.

    n: pictures in all, over all processes; the inception score's splits need it beforehand.
    """

    def __init__(self, n):
        self.n, self.cells, self.scores, self.seconds = n, {}, {}, {}

    def add(self, key, pictures, values, outputs=None, seconds=0.0):
        """One batch of one decoder. [AVQ Tab. 1]

        key: (run, decoder); values: measure's; outputs: InceptionV3's (features, logits), or None;
        seconds: of decoding.
        """
        buckets = pictures.buckets()
        for bucket in set(buckets):
            rows = torch.tensor([i for i, own in enumerate(buckets) if own == bucket])
            cell = self.cells.setdefault((key, bucket), Cell())
            cell.n += len(rows)
            cell.add({name: of_each[rows] for name, of_each in values.items()},
                     None if outputs is None else outputs[0].cpu()[rows])
        if outputs is not None and key != REAL:
            self._score(key).update(pictures.index, outputs[1])
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds

    def _score(self, key):
        return self.scores.setdefault(key, InceptionScore(self.n, min(10, self.n)))

    def merge(self, other):
        for place, cell in other.cells.items():
            self.cells.setdefault(place, Cell()).merge(cell)
        for key, score in other.scores.items():
            self._score(key).merge(score)
        for key, seconds in other.seconds.items():
            self.seconds[key] = self.seconds.get(key, 0.0) + seconds

    def over_ranks(self):
        """The tally of all processes, the same on each."""
        tallies = gather_objects(self)
        if len(tallies) == 1:
            return self
        merged = Tally(self.n)
        for tally in tallies:
            merged.merge(tally)
        return merged

    def buckets(self, key):
        """The bins in which a decoder has pictures, "all" first."""
        return [name for name in BUCKETS if name == "all" or (key, name) in self.cells]

    def cell(self, key, bucket):
        """One Cell; that of "all" is the sum of the bins."""
        if bucket != "all":
            return self.cells[key, bucket]
        whole = Cell()
        for (owner, _), cell in self.cells.items():
            if owner == key:
                whole.merge(cell)
        return whole

    def row(self, key, bucket):
        """{column: number, or None where there is none} of one decoder in one bin."""
        cell, row = self.cell(key, bucket), dict.fromkeys(SETS)
        row |= {"bucket": bucket, "n": cell.n, "images_per_s": None}
        row |= {name: cell.mean(name) for name in MEASURES}
        if cell.statistics.n:
            row["fid"] = cell.frechet(self.cell(REAL, bucket))
        if bucket == "all":
            if key in self.scores:
                row["is_mean"], row["is_std"] = self.scores[key].result()
            if self.seconds.get(key):
                row["images_per_s"] = cell.n / self.seconds[key]
        return row


def tally_batches(batches, decode, n, networks, seen=None):
    """Measure every decoder on every batch: a Tally over all processes.

    batches: an iterable of Pictures, this process's share of n; decode: Pictures -> {(run,
    decoder): (x_hat, seconds)}; seen: called with (pictures, outputs) of each batch, for whoever
    wants to show some. Raises UserError for pictures that are not finite.
    """
    tally = Tally(n)
    for pictures in batches:
        outputs = decode(pictures)
        if networks.inception is not None:
            tally.add(REAL, pictures, {}, networks.inception(pictures.x))
        for key, (x_hat, seconds) in outputs.items():
            if not torch.isfinite(x_hat).all():
                raise UserError(f"{key[1]} of {key[0] or 'the first stage'} gives values that are "
                                "not finite; train it again from its last good checkpoint")
            sets = networks.inception and networks.inception(x_hat.clamp(-1, 1))
            tally.add(key, pictures, measure(x_hat, pictures, networks), sets, seconds)
        if seen is not None:
            seen(pictures, outputs)
    return tally.over_ranks()
