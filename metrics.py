"""Measure decoders in one table, a row for each image: errors, seam, LPIPS, CLIP score, FID.

    z --decode_all--> {(run, decoder): x_hat}                several decoders on the same latents
    x_hat, x, mask --measure--> the table: {"index", "run", "decoder", "bucket", "pre_error", ...}
    the table --summary--> means of one decoder in one bucket --report_rows--> report.json's rows

Images stay float, as cutting them to 8 bits would add 5e-6 to pre_error.  deviation D54
"""

import hashlib
import math
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from asym_decoder import AsymVQGAN
from clip_score import CLIPImageEncoder, clip_score
from distributed import UserError, gather_objects, on_rank0, wait_for
from fid import InceptionV3, frechet_distance, inception_score, moments
from losses import LPIPS
from masks import area_bucket
from quantize import float64

DECODERS = ("vanilla", "asym", "asym-nomask", "paste", "files")
SHARED = ("vanilla", "paste")            # equal for all runs on one first stage: their run is None
REAL = "real"                            # stands for the decoder in the rows of the originals
MEASURES = ("pre_error", "psnr_known", "seam", "lpips", "clip_score")    # one value for each image
SETS = ("fid", "is_mean", "is_std")                                      # one value for a whole set
DIFFERENCES = ("pre_error", "seam", "lpips")             # those of two decoders in a report
FID_BUCKETS = ("all", "40-50")           # as in AVQ's tables; each FID takes seconds
FEWEST_FOR_FID = 2048                    # features: FID of fewer images is mostly bias (fid.py)


def _unit(image):
    """Clamp (B,3,H,W) in [-1,1], of any float type, to float64 in [0,1]."""
    return (float64(image.detach()).clamp(-1, 1) + 1) / 2


def pre_error(x_hat, x, mask):
    """Compute the mean squared error of known pixels, (B,) float64. [AVQ Tab. 2]  deviation D17

    x_hat, x (B,3,H,W) in [-1,1]; mask (B,1,H,W) in {0,1}, 1 = generated. The paper has no formula.
    Here it is sum((1-m)(x_hat-x)^2) / (3 sum(1-m)) with images in [0,1]; in [-1,1] it would be 4
    times as large. An image without a known pixel gives NaN.
    """
    known = 1 - float64(mask)                                               # (B, 1, H, W)
    squared = known * (_unit(x_hat) - _unit(x)) ** 2                        # (B, 3, H, W)
    return squared.sum((1, 2, 3)) / (3 * known.sum((1, 2, 3)))              # (B,)


def psnr_known(x_hat, x, mask):
    """Compute the peak signal-to-noise ratio of known pixels in dB, (B,); inf for exact copies."""
    return -10 * torch.log10(pre_error(x_hat, x, mask))


def seam(x_hat, x, mask):
    """Measure the wrong step across the mask's border, (B,) float64. [AVQ Sec. 4.1] [AVQ Fig. 4]

    This is the mean of |(x_hat_p - x_hat_q) - (x_p - x_q)| over all pairs of neighbours with one
    pixel known and one not, images in [0,1]: 0 for the original, NaN without such a pair. The steps
    have signs, so that blur, a lost step, and misfit, an added one, both count and cannot cancel.
    """
    mask, error = float64(mask), _unit(x_hat) - _unit(x)              # (B, 1|3, H, W)
    total = pairs = 0
    for axis in (2, 3):
        crosses = mask.diff(dim=axis).abs()                    # (B, 1, H-1, W) or (B, 1, H, W-1)
        total = total + (crosses * error.diff(dim=axis).abs()).sum((1, 2, 3))      # (B,)
        pairs = pairs + crosses.sum((1, 2, 3))                              # (B,)
    return total / (3 * pairs)


def first_stage_of(models):
    """Choose one of the models' equal first stages, preferably one with its own decoder."""
    stages = [model.first_stage for model in models]
    return next((stage for stage in stages if stage.decoder is not None), stages[0])


def decode_all(models, z, x, mask=None, without_mask=True):
    """Decode z by every decoder: {(run, decoder): (x_hat, seconds)}. [AVQ Tab. 2]

    models: {run: VQGAN or AsymVQGAN}; z (B,d,h,w): latents of x (B,3,H,W), its hole changed or not.
    Decoders: "vanilla", the first stage's own; with a mask "paste", vanilla with the known pixels
    copied over it, and "asym", ours, given x and mask; if `without_mask` "asym-nomask", ours alone.
    """
    def timed(decode, **condition):
        wait_for(z.device)
        start = time.perf_counter()
        x_hat = decode(z, **condition)
        wait_for(z.device)
        return x_hat, time.perf_counter() - start

    outputs, first_stage = {}, first_stage_of(models.values())
    if first_stage.decoder is not None:
        vanilla, seconds = timed(first_stage.decode)
        outputs[None, "vanilla"] = vanilla, seconds
        if mask is not None:
            outputs[None, "paste"] = torch.where(mask == 1, vanilla, x), seconds
    for run, model in models.items():
        if isinstance(model, AsymVQGAN):
            if mask is not None:
                outputs[run, "asym"] = timed(model.decode, image=x, mask=mask)
            if without_mask:
                outputs[run, "asym-nomask"] = timed(model.decode)
    return outputs


@dataclass
class Networks:
    """Hold the networks that columns need. Where one is None, `empty` has the reason."""
    lpips:     LPIPS | None = None
    inception: InceptionV3 | None = None
    clip:      CLIPImageEncoder | None = None
    empty:     dict = field(default_factory=dict)    # {column: "n/a: why", "not computed: why"}


def open_networks(device, weights=None, lpips="vgg", asked=False, fid=True, clip=None, refs=False):
    """Open the networks of the wanted columns, from files found in `weights` or downloaded.

    lpips: its network or "none"; asked: whether the user chose it, when a missing file raises
    UserError. clip: the folder of an image tower; refs: whether there are reference images.
    """
    networks = Networks()

    def opened(build, *columns, needed=False):
        built = []
        try:
            on_rank0(lambda: built.append(build()))      # downloads; the others then find the file
            return (built or [build()])[0].to(device)
        except UserError as error:
            if needed:
                raise
            networks.empty |= dict.fromkeys(columns, f"n/a: {error}")
    if lpips != "none":
        networks.lpips = opened(lambda: LPIPS(lpips, weights), "lpips", needed=asked)
    else:
        networks.empty["lpips"] = "not computed: " + (
            "--lpips none" if asked else "the run has --perceptual none; choose one with --lpips")
    if fid:                                          # channels_last: 1.4 times as fast on a CPU
        networks.inception = opened(
            lambda: InceptionV3(weights).to(memory_format=torch.channels_last), *SETS)
    else:
        networks.empty |= dict.fromkeys(SETS, "not computed: --no-fid")
    if not refs:
        networks.empty["clip_score"] = "not computed: it needs reference images (--refs)"
    elif clip:
        networks.clip = CLIPImageEncoder(clip).to(device)
    else:
        networks.empty["clip_score"] = "n/a: no image tower was given (--clip)"
    return networks


def measure(x_hat, batch, networks, run, decoder, seconds=0.0, protocol="full"):
    """Measure a batch: rows of the table, one for each image. [AVQ Tab. 1]

    x_hat (B,3,H,W) in about [-1,1], clamped here; batch: a Batch or PairBatch; seconds: of decoding
    it. A row lacks the measures whose network is None; NaN: the image has no value. For FID it
    holds "features" (2048,) and "logits" (1008,), and that of an original (decoder REAL) no more.
    """
    if not torch.isfinite(x_hat).all():
        raise UserError(f"{decoder} of {run or 'the first stage'} gives values that are not "
                        "finite; train it again from its last good checkpoint")
    x_hat, x, mask = x_hat.clamp(-1, 1), batch.x, batch.mask
    refs, names = getattr(batch, "refs", None), getattr(batch, "names", None)
    columns = {"index": batch.index, "file": names or batch.index, "group": batch.index}
    if mask is not None:                                                    # equal masks, one group
        holes = mask.cpu().double()                                         # (B, 1, H, W)
        columns |= {"bucket": [*map(area_bucket, holes)], "area": holes.mean((1, 2, 3)).tolist(),
                    "group": [hashlib.sha256(m.numpy().tobytes()).hexdigest()[:16] for m in holes]}
    if decoder != REAL:
        if mask is not None:
            columns |= {"pre_error": pre_error(x_hat, x, mask).tolist(),
                        "psnr_known": psnr_known(x_hat, x, mask).tolist(),
                        "seam": seam(x_hat, x, mask).tolist()}
        if networks.lpips is not None and min(x.shape[2:]) >= networks.lpips.least_side:
            columns["lpips"] = networks.lpips(x_hat, x).tolist()
        if networks.clip is not None and mask is not None and refs is not None:
            columns["clip_score"] = clip_score(networks.clip, x_hat, refs, mask).tolist()
    if networks.inception is not None:
        features, logits = networks.inception(x_hat)
        columns |= {"features": features.cpu().numpy(), "logits": logits.cpu().numpy()}
    alike = {"run": run, "decoder": decoder, "protocol": protocol, "bucket": "all",
             "seconds": seconds / len(x)}
    return [alike | dict(zip(columns, values)) for values in zip(*columns.values())]


def over_ranks(table):
    """Gather the rows of all processes, in the order of the images, on every process."""
    return sorted((row for part in gather_objects(table) for row in part),
                  key=lambda row: row["index"])


def describe(pairs):
    """Compute (mean, its standard error, median) of values that are not NaN, from (value, group).

    Values of one group, here of images with one mask, may depend on one another. With E_g the sum
    of group g's deviations from the mean, G groups and n values, the cluster-robust error is

        sqrt(G / (G-1) sum_g E_g^2) / n,

    the usual s / sqrt(n) if all groups are distinct. Where it is undefined or infinite it is None.
    """
    pairs, E = [(value, group) for value, group in pairs if not math.isnan(value)], Counter()
    values = [value for value, _ in pairs] or [math.inf]
    mean = sum(values) / len(values)
    for value, group in pairs:
        E[group] += value - mean
    G, squares = len(E), sum(e ** 2 for e in E.values())
    error = math.sqrt(G / (G - 1) * squares) / len(values) if G > 1 else math.inf
    found = mean, error, float(np.median(values))
    return tuple(value if math.isfinite(value) else None for value in found)


def summary(table, run, decoder, bucket="all", protocol="full"):
    """Average the rows of one decoder in one bucket of mask area: {column: number}.

    "<measure>_se" is a mean's standard error over images, "<measure>_median" the median, by
    `describe`. FID compares with the originals of the same bucket, in FID_BUCKETS only, and is None
    for too few images. The inception score is over all images, in the bucket "all" only.
    """
    def chosen(*key):
        return [row for row in table if (row["run"], row["decoder"], row["protocol"]) == key
                and bucket in ("all", row["bucket"])]
    rows, real = chosen(run, decoder, protocol), chosen(None, REAL, "full")
    result = {"protocol": protocol, "bucket": bucket, "n": len(rows),
              **dict.fromkeys((*SETS, "images_per_s"))}
    for name in MEASURES:
        result[name], result[f"{name}_se"], result[f"{name}_median"] = describe(
            (row.get(name, math.nan), row["group"]) for row in rows)
    if "features" in rows[0] and bucket in FID_BUCKETS and (
            min(len(rows), len(real)) >= FEWEST_FOR_FID):
        ours, theirs = (moments([row["features"] for row in images]) for images in (rows, real))
        result["fid"] = frechet_distance(*ours, *theirs)
    if bucket == "all":
        if "logits" in rows[0]:
            logits = torch.from_numpy(np.stack([row["logits"] for row in rows]))    # (N, 1008)
            result["is_mean"], result["is_std"] = inception_score(logits)
        seconds = sum(row["seconds"] for row in rows)
        result["images_per_s"] = len(rows) / seconds if seconds else None
    return result


def report_rows(table, runs, lpips_net=None):
    """Give the summary of each (run, decoder, protocol, bucket). Rows of SHARED stand in each run.

    runs: {name: {"preset", "blend"} of its decoder, or None}, in the report's order.
    """
    buckets, summaries = ["all", *sorted({row["bucket"] for row in table} - {"all"})], {}
    for *key, protocol in dict.fromkeys((row["run"], row["decoder"], row["protocol"])
                                        for row in table if row["decoder"] != REAL):
        summaries.setdefault(tuple(key), []).extend(
            summary(table, *key, bucket, protocol) for bucket in buckets)
    rows = []
    for run, sizes in runs.items():
        for decoder in DECODERS:
            ours = (sizes or {}) if decoder.startswith("asym") else {}
            rows += [{"run": run, "decoder": decoder, "blend": ours.get("blend"),
                      "size": ours.get("preset"), "lpips_net": lpips_net, **found}
                     for found in summaries.get((None if decoder in SHARED else run, decoder), ())]
    return rows


def differences(table):
    """Compare decoders image by image, from the table of over_ranks: report.json's "differences".

    A row is ours with mask minus `other`: vanilla, paste and, from the second run on, the first
    run. Its errors are those of paired differences, in which what makes an image hard cancels.
    """
    by, rows = {}, []                                                       # {key: [row, ...]}
    for row in table:
        by.setdefault((row["run"], row["decoder"], row["protocol"]), []).append(row)
    ours = [key for key in by if key[1] == "asym"]
    for *key, protocol in ours:
        for other in ([None, "vanilla"], [None, "paste"], [*ours[0][:2]]):
            pairs = list(zip(by[*key, protocol], by.get((*other, protocol), ())))
            if pairs and other != key:
                rows.append(dict(zip(("run", "decoder", "other_run", "other", "protocol", "n"),
                                     (*key, *other, protocol, len(pairs)))))
                for name in DIFFERENCES:
                    rows[-1][name], rows[-1][f"{name}_se"], _ = describe(
                        (a.get(name, math.nan) - b.get(name, math.nan), a["group"])
                        for a, b in pairs)
    return rows
