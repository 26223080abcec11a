"""What decoders do to pictures: errors on known pixels, at the border, and of whole sets.

    Pictures --decode_all--> {(run, decoder): x_hat}, several decoders on the same latents
    Pictures, x_hat --pre_error, psnr_known, seam, LPIPS, CLIP--> one number a picture --+
                    --InceptionV3--> features, logits -----------------------------------+--> Tally
    Tally: a Cell for each (decoder, bin) --> means, FID, inception score: a row of report.json

AVQ reports the squared error of non-edited regions as Pre_error (Table 2) without a formula; its
range, denominator and rounding are fixed here, once. Images stay float all the way: 8-bit
truncation alone adds 5e-6, the size of what is measured. Each process measures its own share; the
tallies are merged at the end.
"""

import math
import time
from dataclasses import dataclass

import torch

from clip_score import CLIPImageEncoder, clip_score
from distributed import UserError, gather_objects, rank, wait_for
from fid import FeatureStatistics, InceptionV3, inception_score
from losses import LPIPS
from masks import area_bucket

REAL = (None, "real")                    # the key of the originals' statistics
FEATURES = 2048                          # width of InceptionV3's features
BUCKETS = ("all", *(f"{low}-{low + 10}" for low in range(0, 100, 10)))
MEASURES = ("pre_error", "psnr_known", "seam", "lpips", "clip_score")      # means over pictures
SETS = ("fid", "is_mean", "is_std")                                        # of a whole set


# -- known pixels ----------------------------------------------------------------------------------


def _unit(image):
    """(B,3,H,W) in [-1,1], any device and float type -> float64 in [0,1] on the CPU, clamped."""
    return (image.detach().cpu().double().clamp(-1, 1) + 1) / 2


def pre_error(x_hat, x, mask):
    """Mean squared error on known pixels, one value per image. [AVQ Tab. 2]  deviation D17

    x_hat, x (B,3,H,W) in [-1,1]; mask (B,1,H,W) in {0,1}, 1 = generated -> (B,) float64,
    sum((1-m)(x_hat-x)^2) / (3 sum(1-m)) with images in [0,1]; in [-1,1] it is 4 times that.
    An image without a known pixel gives NaN, which the caller leaves out of means.
    """
    known = 1 - mask.cpu().double()                                         # (B, 1, H, W)
    squared = known * (_unit(x_hat) - _unit(x)) ** 2                        # (B, 3, H, W)
    return squared.sum((1, 2, 3)) / (3 * known.sum((1, 2, 3)))              # (B,)


def psnr_known(x_hat, x, mask):
    """Peak signal-to-noise ratio of the known pixels in dB, one value per image (B,), float64.

    Arguments as pre_error's: -10 log10(pre_error), the peak being 1. An exact copy gives inf, an
    image without a known pixel NaN.
    """
    return -10 * torch.log10(pre_error(x_hat, x, mask))


def seam(x_hat, x, mask):
    """How much sharper the step across the mask's border is than in the original, per image.

    Arguments as pre_error's -> (B,) float64: over all horizontal and vertical pairs of neighbours
    with one pixel known and one not, mean |x_hat_p - x_hat_q| - mean |x_p - x_q|, images in [0,1],
    channels averaged. 0 for the original, negative = smoother than it, positive = a visible edge.
    An image without such a pair (mask empty or full) gives NaN.
    """
    mask, x_hat, x = mask.cpu().double(), _unit(x_hat), _unit(x)
    total = pairs = 0
    for axis in (2, 3):
        crosses = mask.diff(dim=axis).abs()                    # (B, 1, H-1, W) or (B, 1, H, W-1)
        step = x_hat.diff(dim=axis).abs() - x.diff(dim=axis).abs()
        total = total + (crosses * step).sum((1, 2, 3))                     # (B,)
        pairs = pairs + crosses.sum((1, 2, 3))                              # (B,)
    return total / (3 * pairs)


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


# -- several decoders on the same latents ----------------------------------------------------------


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
    fid: FID and inception score, too; clip: the folder of CLIP's image tower, or None.
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
        networks.clip = CLIPImageEncoder(clip).to(device)
    else:
        networks.notes["clip_score"] = ("not computed: it compares with references (--refs), by a "
                                        "CLIP model (--clip)")
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
        self.statistics = None                       # of features, once there are some

    def add(self, values, features=None):
        """values: {measure: (b,)}; a NaN stands for no value. features: (b,2048) or None."""
        for name, of_each in values.items():
            valid = of_each[~of_each.isnan()]
            self.totals[name] = self.totals.get(name, 0.0) + valid.sum().item()
            self.counts[name] = self.counts.get(name, 0) + len(valid)
        if features is not None:
            self.statistics = self.statistics or FeatureStatistics(features.shape[1])
            self.statistics.update(features)

    def merge(self, other):
        self.n += other.n
        for name, total in other.totals.items():
            self.totals[name] = self.totals.get(name, 0.0) + total
            self.counts[name] = self.counts.get(name, 0) + other.counts[name]
        if other.statistics is not None:
            self.statistics = self.statistics or FeatureStatistics(other.statistics.dim)
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
    """Everything measured so far: a Cell for each (decoder, bin), and the logits of whole sets.

    n: pictures in all, over all processes.
    """

    def __init__(self, n):
        self.n, self.cells, self.seconds = n, {}, {}
        self.logits = {}                     # {key: [(positions, logits (B,classes)), ...]}

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
            self.logits.setdefault(key, []).append((pictures.index, outputs[1].cpu()))
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds

    def merge(self, other):
        for place, cell in other.cells.items():
            self.cells.setdefault(place, Cell()).merge(cell)
        for key, parts in other.logits.items():
            self.logits.setdefault(key, []).extend(parts)
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
        if cell.statistics is not None:
            row["fid"] = cell.frechet(self.cell(REAL, bucket))
        if bucket == "all":
            if key in self.logits:
                index, parts = zip(*self.logits[key])
                order = torch.cat([torch.as_tensor(own) for own in index]).argsort()
                row["is_mean"], row["is_std"] = inception_score(torch.cat(parts)[order])
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
