"""The paper's comparison on trained runs: `python eval.py RUN [RUN ...]`. [AVQ Tab. 2] [AVQ Tab. 3]

The full image is encoded once; every decoder then gets the same latents, and what it does to the
pixels outside the mask is measured. Runs on other first-stage weights are refused.

    held-out x, mask -> encode -> z -> vanilla: the first stage's own decoder
                                       paste: vanilla with the known pixels copied over it
                                       asym: ours, given x·(1-mask) and mask
                                       asym-nomask: ours, given nothing
      -> metrics.py -> Tally -> report.py

Writes report.md, report.json, report.png (whole pictures) and report_crops.png (cut out where fine
detail is half known). FID, inception score and CLIP score are not here, nor is inpainting itself:
the hole's latents are the image's own, as only its surroundings are judged.
"""

import argparse
import json
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from asym_decoder import AsymVQGAN
from convert import Loaded, load
from data import BadFiles, open_dataset, validation_batches
from distributed import UserError, exit_on_user_error, print0, setup, wait_for
from figures import image_grid, show_masked
from losses import LPIPS, TRUNKS
from masks import area_bucket
from metrics import pre_error, psnr_known, seam
from report import MEASURES, make_report, report_text
from run_folder import Progress, write_text
from stages import validation_batch

EXAMPLES = 6                                     # rows of the pictures


@dataclass
class Run:
    """One run of the comparison: its name in the tables, and what convert.load found there."""

    name: str
    loaded: Loaded

    @property
    def decodes(self):
        """Whether it has an asymmetric decoder, not only a first stage."""
        return isinstance(self.loaded.model, AsymVQGAN)


# -- the runs --------------------------------------------------------------------------------------


def open_runs(paths, device):
    """A Run for each path. Raises UserError where they cannot stand in one table."""
    runs = [Run(str(Path(path)), load(path, device)) for path in paths]
    first = runs[0]
    for run in runs[1:]:
        if run.name in [other.name for other in runs if other is not run]:
            raise UserError(f"{run.name} is given twice")
        if run.loaded.parent != first.loaded.parent:
            raise UserError(f"{run.name} and {first.name} stand on different first-stage weights, "
                            "so their decoders read different latents; evaluate them one by one, "
                            f"or train one on the other's: train.py --vqgan {first.name}")
        for key in ("data", "size"):
            ours, theirs = run.loaded.config[key], first.loaded.config[key]
            if ours != theirs:
                raise UserError(f"--{key} of {run.name} is {ours}, of {first.name} {theirs}; "
                                "evaluate them one by one")
        if run.decodes and first.decodes:
            run.loaded.model.first_stage = first_stage_of(runs)     # equal; one copy is kept
    return runs


def first_stage_of(runs):
    model = runs[0].loaded.model
    return model.first_stage if runs[0].decodes else model


def open_lpips(config, net, weights, device):
    """(LPIPS, its net's name, None), or (None, None, the reason why there is none).

    net, weights: the flags, else the run's own. What was asked for by name and is not to be had is
    an error (UserError); the run's own is not.
    """
    name, folder = net or config["perceptual"], weights or config["weights"]
    if name == "none":
        flag = "--lpips none" if net else "the run has --perceptual none; choose one with --lpips"
        return None, None, f"not computed: {flag}"
    try:
        return LPIPS(name, folder).to(device), name, None
    except UserError as error:
        if net:
            raise
        return None, None, f"not computed: {error}"


# -- decoding and measuring ------------------------------------------------------------------------


@contextmanager
def all_of_float32():
    """No TF32 while the block runs: CUDA's convolutions would round their factors to 10 bits."""
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


@torch.inference_mode()
def evaluate(runs, dataset, n, batch_size, device, lpips=None, examples=None):
    """What every decoder of `runs` does to the first `n` pictures: (Tally, BadFiles).

    runs: from open_runs; lpips: an LPIPS or None; examples: an Examples that chooses pictures.
    Batches are forgotten once measured, so memory does not grow with n. Raises UserError for
    outputs that are not finite and for too many files that cannot be decoded.
    """
    tally, bad = Tally(), BadFiles(len(dataset))
    progress = Progress("evaluation", 0, math.ceil(n / batch_size), batch_size)
    for step, batch in enumerate(validation_batches(dataset, n, batch_size), 1):
        for path in bad.update(batch["bad"]):
            print0(f"cannot be decoded, the next picture stands in for it: {path}")
        bad.check()
        on_device = validation_batch(batch, device)
        x, mask = on_device.x, on_device.mask                       # (B,3,H,W), (B,1,H,W)
        if step == 1:
            decode_all(runs, x[:1], mask[:1])    # the first call sets things up: not its true speed
        buckets = [area_bucket(m) for m in batch["mask"]]
        outputs = decode_all(runs, x, mask)
        for key, (x_hat, seconds) in outputs.items():
            tally.add(key, buckets, measure(x_hat, x, mask, lpips), seconds)
        if examples is not None:
            examples.offer(x, mask, outputs)
        progress.show(step, {})
    progress.close()
    return tally, bad


def decode_all(runs, x, mask):
    """{(run or None, decoder): (x_hat, seconds of decoding)} from one set of latents. [AVQ Tab. 2]

    x: (B,3,H,W) in [-1,1]; mask: (B,1,H,W). What the runs share has None for its run.
    """
    first_stage = first_stage_of(runs)
    z = first_stage.encode(x)                                                   # (B,d,h,w)
    vanilla, seconds = _timed(first_stage.decode, z)                            # (B,3,H,W)
    outputs = {(None, "vanilla"): (vanilla, seconds),
               (None, "paste"): (torch.where(mask == 1, vanilla, x), seconds)}
    for run in runs:
        if run.decodes:
            decode = run.loaded.model.decode
            outputs[run.name, "asym"] = _timed(decode, z, image=x, mask=mask)
            outputs[run.name, "asym-nomask"] = _timed(decode, z)
    return outputs


def _timed(decode, z, **condition):
    wait_for(z.device)
    start = time.perf_counter()
    x_hat = decode(z, **condition)
    wait_for(z.device)
    return x_hat, time.perf_counter() - start


def measure(x_hat, x, mask, lpips=None):
    """{measure: (B,) float64 on the CPU}; LPIPS on the whole picture, where there is a network."""
    values = {"pre_error": pre_error(x_hat, x, mask), "psnr_known": psnr_known(x_hat, x, mask),
              "seam": seam(x_hat, x, mask)}
    if lpips is not None:
        values["lpips"] = lpips(x_hat.clamp(-1, 1), x).cpu().double()
    return values


class Tally:
    """Sums over images, for each decoder and each bin of the masks' area."""

    def __init__(self):
        self.counts, self.sums, self.seconds = {}, {}, {}

    def add(self, key, buckets, values, seconds):
        """One batch of one decoder. key: as decode_all's; buckets: one for each image."""
        if not torch.isfinite(values["pre_error"]).all():
            raise UserError(f"{key[1]} of {key[0] or 'the first stage'} gives values that are not "
                            "finite; train it again from its last good checkpoint")
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds
        for i, own in enumerate(buckets):
            for bucket in ("all", own):
                self.counts[bucket, key] = self.counts.get((bucket, key), 0) + 1
                for name, per_image in values.items():
                    cell = bucket, key, name
                    self.sums[cell] = self.sums.get(cell, 0.0) + per_image[i].item()

    def row(self, key, bucket):
        """The means of one cell of the table: None where not measured or infinite."""
        n = self.counts[bucket, key]
        means = {name: self.sums.get((bucket, key, name), math.inf) / n for name in MEASURES}
        speed = n / self.seconds[key] if bucket == "all" else None
        return {"bucket": bucket, "n": n, "images_per_s": speed,
                **{name: mean if math.isfinite(mean) else None for name, mean in means.items()}}


class Examples:
    """The few pictures whose detail lies on both sides of the mask's border, chosen by x and mask.

    On Signs this finds words that are half known. What the decoders made of them has no say.
    """

    def __init__(self, count):
        self.count, self.best = count, []        # [(score, order of arrival, crop, {caption: ...})]
        self.seen = 0

    def offer(self, x, mask, outputs):
        """Keep the best of one batch. outputs: decode_all's."""
        scores, crops = half_known(x, mask)
        for i in scores.argsort(descending=True)[:self.count].tolist():
            pictures = {("", "original"): x[i], ("", "masked"): show_masked(x[i], mask[i])}
            pictures |= {key: x_hat[i] for key, (x_hat, _) in outputs.items() if key[1] != "paste"}
            pictures = {key: picture.to("cpu", copy=True) for key, picture in pictures.items()}
            self.best.append((scores[i].item(), self.seen + i, crops[i], pictures))
        self.seen += len(x)
        self.best = sorted(self.best, key=lambda entry: (-entry[0], entry[1]))[:self.count]

    def columns(self, cut):
        """{(run, decoder): [(3,H,W), ...]} in the order of the data set; cut out where `cut`."""
        columns = {}
        for _, _, (top, left, side), pictures in sorted(self.best, key=lambda entry: entry[1]):
            for key, picture in pictures.items():
                window = picture[:, top:top + side, left:left + side] if cut else picture
                columns.setdefault(key, []).append(window)
        return columns


def half_known(x, mask):
    """How much fine detail meets the mask's border (B,), and the window: [(top, left, side)].

    Detail is the squared step between neighbours. In the best window of half the picture's side,
    the score is its known detail, or thrice its hidden detail where that is less.
    """
    step_x = F.pad(x.diff(dim=3).square(), (0, 1))                              # (B,3,H,W)
    step_y = F.pad(x.diff(dim=2).square(), (0, 0, 0, 1))
    detail = (step_x + step_y).mean(1, keepdim=True)                            # (B,1,H,W)
    side = x.shape[2] // 2
    stride = max(1, side // 16)
    known = F.avg_pool2d(detail * (1 - mask), side, stride)                     # (B,1,h,w)
    hidden = F.avg_pool2d(detail * mask, side, stride)
    scores, places = torch.minimum(known, 3 * hidden).flatten(1).max(1)         # (B)
    tops, lefts = places // known.shape[3] * stride, places % known.shape[3] * stride
    return scores, [(top, left, side) for top, left in zip(tops.tolist(), lefts.tolist())]


# -- the program -----------------------------------------------------------------------------------


def evaluate_runs(paths, *, n=None, batch_size=None, device="cpu", lpips=None, weights=None,
                  root=None, out=None):
    """Evaluate, print the table, write the report and its pictures; returns report.json's contents.

    paths: run folders or stage files; device: a torch.device or its name. The others are the
    program's flags (see `python eval.py --help`); None stands for their defaults.
    Raises UserError.
    """
    device = torch.device(device)
    runs = open_runs(paths, device)
    config = runs[0].loaded.config
    dataset = open_dataset(config["data"], root or config["root"], "val", config["size"])
    n = min(n or (500 if config["data"] == "signs" else 1000), len(dataset))
    batch_size = batch_size or max(1, min(16, 2**18 // config["size"]**2))
    network, net, reason = open_lpips(config, lpips, weights, device)
    out = Path(out) if out else _default_out(paths)
    print0(f"evaluating {', '.join(run.name for run in runs)} on {n:,} of {dataset.describe()}; "
           f"the report goes to {out}")
    examples = Examples(EXAMPLES)
    with all_of_float32():
        tally, bad = evaluate(runs, dataset, n, batch_size, device, network, examples)
    notes = {"lpips": reason} if reason else {}
    unfinished = [f"{run.name} (step {run.loaded.step})" for run in runs if not run.loaded.finished]
    if unfinished:
        notes["run"] = f"training is not finished: {', '.join(unfinished)}"
    if bad.paths:
        notes["n"] = f"{len(bad.paths)} files could not be decoded; their neighbours stand in"
    report = make_report(runs, tally, n, device, net, notes)
    text = report_text(report, dataset.describe())
    print0("\n" + text)
    made = write_report(report, text, examples, out)
    print0("wrote " + ", ".join(str(path) for path in made))
    return report


def _default_out(paths):
    first = Path(paths[0])
    if len(paths) > 1:
        return (first if first.is_dir() else first.parent) / "compare"
    return first if first.is_dir() else first.parent


def write_report(report, text, examples, out):
    """Write report.json, report.md and the two pictures into `out`; their paths."""
    made = [out / name for name in ("report.md", "report.png", "report_crops.png", "report.json")]
    several = len({row["run"] for row in report["rows"]}) > 1
    for path, cut in ((made[1], False), (made[2], True)):
        columns = examples.columns(cut)
        image_grid({_caption(key, several): pictures for key, pictures in columns.items()}, path)
    write_text(made[0], f"# Known pixels\n\n{text}\n\n`{report['command']}`, commit "
               f"{report['commit']}\n\nThe pictures were chosen by the detail on both sides of the "
               "mask's border, whatever the decoders made of it; then cut out where that is.\n\n"
               "![whole pictures](report.png)\n\n![fine detail, half known](report_crops.png)\n")
    write_text(made[3], json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return made


def _caption(key, several):
    run, decoder = key
    words = {"asym": "ours, with mask", "asym-nomask": "ours, without"}
    return words.get(decoder, decoder) + (f"\n{run}" if several and run else "")


def main():
    parser = argparse.ArgumentParser(
        description="What each decoder does to known pixels: the paper's Tables 2 and 3.")
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="run folders of train.py (or their stage files), on one first stage")
    parser.add_argument("-n", type=int, metavar="N",
                        help="pictures (default: all held-out ones, at most 1000; signs: 500)")
    parser.add_argument("--batch-size", type=int, metavar="B",
                        help="pictures at once (default: 16 up to 128 px, 4 at 256, 1 at 512)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    parser.add_argument("--lpips", choices=(*TRUNKS, "none"),
                        help="network of the LPIPS column (default: the run's --perceptual)")
    parser.add_argument("--weights", metavar="DIR",
                        help="folder of LPIPS's files (default: the run's --weights)")
    parser.add_argument("--root", metavar="DIR",
                        help="folder of the pictures (default: the run's --root)")
    parser.add_argument("--out", metavar="DIR",
                        help="where the report goes (default: RUN; of several: RUN/compare)")
    args = parser.parse_args()
    for flag, value in (("-n", args.n), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: give a number from 1 on")
    evaluate_runs(args.runs, n=args.n, batch_size=args.batch_size, device=setup(args.device),
                  lpips=args.lpips, weights=args.weights, root=args.root, out=args.out)


if __name__ == "__main__":
    exit_on_user_error(main)
