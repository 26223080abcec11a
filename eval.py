"""The paper's tables, on trained runs or on pictures made by anything.

    python eval.py RUN [RUN ...]                   what each decoder does to known pixels
    python eval.py RUN [RUN ...] --table 6         samples of the run's prior, by each decoder
    python eval.py RUN --table ddm1                which codes are in use, before and after ReFiT
    python eval.py RUN --nearest                   samples and their nearest training pictures
    python eval.py RUN ... --latents DIR ...       known pixels, of latents that others made
    python eval.py --pred DIR --real DIR ...       pictures of Stable Diffusion, of anything
    python eval.py --pred DIR --real DIR --unpaired samples, against other pictures

    pictures (data set, folders) -> metrics.decode_all, or --pred -> metrics.py -> paper_tables.py

Writes report.md, report.json and, of runs, report.png (whole pictures) and report_crops.png (cut
out where fine detail is half known); of a run with a prior its pictures, too. [AVQ Tab. 2]
[AVQ Tab. 3]
"""

import argparse
import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from asym_decoder import AsymVQGAN
from code_report import CodeReport
from convert import Loaded, load
from data import BadFiles, Signs, open_dataset, validation_batches
from distributed import (
    UserError,
    exact_float32,
    exit_on_user_error,
    gather_objects,
    print0,
    rank,
    setup,
    world_size,
)
from examples import Examples
from generated import SHOWN, Samples
from image_pairs import MatchedFolders, PictureFolder, folder_pictures
from losses import TRUNKS
from metrics import REAL, Pictures, Tally, decode_all, open_networks, tally_batches
from nearest import show_nearest
from originals import report_bad
from paper_tables import PAPER_TABLES, make_report, report_text, rows_of
from pictures import image_grid
from run_folder import Progress, make_folder, write_text
from stages import validation_batch

EXAMPLES = 6                                     # rows of the pictures
MADE_TABLES, CLIP_TABLES, SAMPLE_TABLES = ("1", "4", "5"), ("4", "5"), ("6", "10")


@dataclass(frozen=True)
class Options:
    """What every evaluation can be told; the program's flags, which `--help` explains."""

    device:     torch.device | str = "cpu"
    batch_size: int | None         = None
    lpips:      str | None         = None    # None: the run's --perceptual, else vgg
    weights:    str | None         = None
    fid:        bool               = True
    clip:       str | None         = None    # the folder of a CLIP model
    table:      str | None         = None
    out:        str | None         = None
    steps:      int | None         = None    # of samples; None: 25, or all where those are fewer

    def networks(self, config, references):
        """The metrics.Networks of an evaluation whose runs have this config."""
        net = self.lpips or config.get("perceptual", "vgg")
        return open_networks(torch.device(self.device), self.weights or config.get("weights"), net,
                             asked=self.lpips is not None, fid=self.fid,
                             clip=self.clip if references else None)


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


def dataset_pictures(dataset, n, batch_size, device, bad):
    """The first `n` pictures of a data set with their evaluation masks: this rank's Pictures.

    bad: a data.BadFiles, told of what cannot be decoded. Raises UserError for too many of these.
    """
    for batch in validation_batches(dataset, n, batch_size, rank(), world_size()):
        report_bad(bad, batch["bad"])
        on_device = validation_batch(batch, device)
        yield Pictures(batch["index"], on_device.x, on_device.mask)


# -- on runs ---------------------------------------------------------------------------------------


def evaluate_runs(paths, options=Options(), *, n=None, data=None, root=None, size=None,
                  folders=None):
    """Evaluate, print the table, write the report and its pictures; returns report.json's contents.

    paths: run folders, stage files or public checkpoints. n, data, root, size: which pictures; None
    stands for the run's own. folders: a MatchedFolders of photos, masks and perhaps latents to be
    used instead. Raises UserError.
    """
    device = torch.device(options.device)
    runs = open_runs(paths, device)
    config = _config(runs)
    networks = options.networks(config, folders is not None and folders.refs)
    examples, bad, codes = Examples(EXAMPLES), None, None
    if folders is None:
        where, dataset = _held_out(config, data, root, size)
        asked, size = n, dataset.size
        n = _default_n(dataset, n)
        batch_size = options.batch_size or max(1, min(16, 2**18 // size**2))
        bad, about = BadFiles(len(dataset)), dataset.describe()
        masks = {"kind": "thick", "size": size, "seed": 0}
        batches = dataset_pictures(dataset, n, batch_size, device, bad)
        codes = CodeReport(runs, [Path(path) for path in paths], where, dataset)
    else:
        n, about, masks = len(folders), folders.describe(), _given(folders)
        batches = folder_pictures(folders, options.batch_size or 4, device)
    out = make_folder(Path(options.out or _default_out(paths)))
    print0(f"evaluating {', '.join(run.name for run in runs)} on {n:,} of {about}; "
           f"the report goes to {out}")

    def seen(pictures, outputs):
        examples.offer(pictures, outputs)
        if codes:
            codes.offer(pictures)

    decode = partial(decode_all, runs)
    with exact_float32(), torch.inference_mode():
        if codes and options.table == "ddm1":
            codes.count(asked, batch_size, device, networks.inception)
        tally = tally_batches(_shown(batches, n, decode), decode, n, networks, seen)
        rows = rows_of(_named(runs), tally, networks.lpips_net)
        if codes:
            codes.finish(n, rows, out, device, options.steps)
    examples.over_ranks()
    report = make_report(rows, n, device, masks, config.get("seed"),
                         networks.notes | _notes(runs, bad) | (codes.notes if codes else {}),
                         codes and codes.codebook(), codes and codes.prior)
    return _finish(report, about, options.table, out, examples, codes)


def _named(runs):
    """What paper_tables.rows_of calls runs."""
    return [(run.name, run.loaded.config.get("decoder")) for run in runs]


def _config(runs):
    """The settings of the first run that was trained here; {} where all are public."""
    return next((run.loaded.config for run in runs if "data" in run.loaded.config), {})


def _held_out(config, data, root, size):
    """({"data", "root", "size"}, that data set's held-out pictures); None: the run's own."""
    where = {"data": data or config.get("data", "imagenet"), "root": root or config.get("root"),
             "size": size or config.get("size", 256)}
    return where, open_dataset(where["data"], where["root"], "val", where["size"])


def _default_n(dataset, n):
    return min(n or (500 if isinstance(dataset, Signs) else 1000), len(dataset))


def _given(folders):
    """report.json's masks for those that were given."""
    return {"kind": "files" if folders.masks else None, "size": None, "seed": None}


def _shown(batches, n, decode=None):
    """The batches, with a progress line; the first is decoded once before, for an honest clock."""
    progress = None
    for done, pictures in enumerate(batches, 1):
        if progress is None:
            size = len(pictures.x)
            progress = Progress("evaluation", 0, math.ceil(n / size / world_size()), size)
            if decode:
                decode(pictures)
        yield pictures
        progress.show(min(done, progress.steps), {})
    if progress:
        progress.close()


def _notes(runs, bad=None):
    """What the reader of the report must know of the runs and of the files."""
    notes = {}
    unfinished = [f"{run.name} (step {run.loaded.step})" for run in runs if not run.loaded.finished]
    if unfinished:
        notes["run"] = f"training is not finished: {', '.join(unfinished)}"
    paths = set().union(*gather_objects(bad.paths if bad else set()))
    if paths:
        notes["n"] = f"{len(paths)} files could not be decoded; their neighbours stand in"
    return notes


def _default_out(paths):
    first = Path(paths[0])
    if len(paths) > 1:
        return (first if first.is_dir() else first.parent) / "compare"
    return first if first.is_dir() else first.parent


# -- on samples ------------------------------------------------------------------------------------


def evaluate_samples(paths, options=Options(), *, n=None, data=None, root=None):
    """As evaluate_runs, of samples: those of one run's prior, under every decoder, without a mask.

    FID is of n samples against the first n held-out pictures; without the network for it, only the
    picture is made. Raises UserError, also where no run has a prior on the decoders' first stage.
    """
    device = torch.device(options.device)
    runs = open_runs(paths, device)
    samples = Samples(map(Path, paths), runs, device, options.steps, options.batch_size)
    _, dataset = _held_out(samples.prior.config, data, root, None)
    networks = replace(options, lpips="none").networks(samples.prior.config, references=False)
    n = _default_n(dataset, n) if networks.inception else min(n or SHOWN, len(dataset))
    out = make_folder(Path(options.out or _default_out(paths) / "generated"))
    about = f"{n:,} {samples.describe()}, against as many of {dataset.describe()}"
    print0(f"evaluating {', '.join(run.name for run in runs)} on {about}; the report goes to {out}")
    decode, bad = partial(decode_all, runs), BadFiles(len(dataset))
    with exact_float32(), torch.inference_mode():
        tally = tally_batches(_shown(samples.pictures(dataset, n, bad), n, decode), decode, n,
                              networks, samples.keep)
    rows, masks = rows_of(_named(runs), tally), {"kind": None, "size": None, "seed": None}
    notes = {"fid": "of samples, against held-out pictures"} | networks.notes | _notes(runs, bad)
    notes |= dict.fromkeys(("lpips", "clip_score"), "not computed: a sample has no original")
    notes |= {"codebook": "not computed: these are samples", "prior": samples.note()}
    if not samples.prior.finished:
        unfinished = f"the prior is not finished (step {samples.prior.step})"
        notes["run"] = "; ".join([notes["run"], unfinished] if "run" in notes else [unfinished])
    report = make_report(rows, n, device, masks, samples.prior.config["seed"], notes,
                         prior=samples.figures(rows))
    return _finish(report, about, options.table, out, pictures=samples.write(out))


# -- on folders ------------------------------------------------------------------------------------


def evaluate_folders(folders, options=Options()):
    """As evaluate_runs, of pictures made by anything: a MatchedFolders with predictions."""
    networks, key = options.networks({}, folders.refs), (folders.name, "files")
    out = make_folder(Path(options.out or f"{folders.name.rstrip('/')}-report"))
    print0(f"measuring {folders.describe()}; the report goes to {out}")
    batches = folder_pictures(folders, options.batch_size or 8, options.device)
    with exact_float32(), torch.inference_mode():
        tally = tally_batches(_shown(batches, len(folders)), lambda p: {key: (p.pred, 0.0)},
                              len(folders), networks)
    report = make_report(rows_of([(folders.name, None)], tally, networks.lpips_net), len(folders),
                         torch.device(options.device), _given(folders), notes=networks.notes)
    return _finish(report, folders.describe(), options.table, out)


def evaluate_sets(pred, real, options=Options()):
    """FID and inception score of two PictureFolders whose files are no pairs."""
    device, key = torch.device(options.device), (pred.name, "files")
    networks = replace(options, lpips="none", fid=True).networks({}, references=False)
    about = f"{len(pred):,} pictures in {pred.name} against {len(real):,} in {real.name}"
    out = make_folder(Path(options.out or f"{pred.name.rstrip('/')}-report"))
    print0(f"measuring {about}; the report goes to {out}")
    tally = Tally(len(pred))
    with exact_float32(), torch.inference_mode():
        for owner, folder in ((REAL, real), (key, pred)):
            for pictures in _shown(folder.pictures(options.batch_size or 8, device), len(folder)):
                outputs = networks.inception and networks.inception(pictures.x)
                tally.add(owner, pictures, {}, outputs)
    rows = rows_of([(pred.name, None)], tally.over_ranks())
    masks = {"kind": None, "size": None, "seed": None}
    notes = networks.notes | dict.fromkeys(("lpips", "clip_score"), "not computed: no pairs")
    report = make_report(rows, len(pred), device, masks, notes=notes)
    return _finish(report, about, None, out)


# -- the report ------------------------------------------------------------------------------------


def _finish(report, about, number, out, examples=None, codes=None, pictures=None):
    """Print the tables and write the files; rank 0 alone does.

    codes: a CodeReport, with its own text and pictures; pictures: {file name: title} of others.
    """
    if rank() == 0:
        text = report_text(report, about, number if number != "ddm1" else None)
        if codes:
            text = f"{text}\n\n{codes.text(number == 'ddm1')}".rstrip()
        print0("\n" + text)
        made = write_report(report, text, examples, out, codes.pictures if codes else pictures)
        print0("wrote " + ", ".join(str(path) for path in made))
    return report


def write_report(report, text, examples, out, others=None):
    """Write report.md, report.json and, with examples, their two pictures into `out`; the paths.

    others: {file name: title} of pictures that are there already.
    """
    made = [out / "report.md", out / "report.json"]
    several = len({row["run"] for row in report["rows"]}) > 1
    pictures = ""
    for name, title, cut in (("report.png", "whole pictures", False),
                             ("report_crops.png", "fine detail, half known", True)):
        columns = examples.columns(cut) if examples else {}
        if columns:
            image_grid({_caption(key, several): column for key, column in columns.items()},
                       out / name)
            made.append(out / name)
            pictures += f"![{title}]({name})\n\n"
    if pictures:
        pictures = ("The pictures were chosen by the detail on both sides of the mask's border, "
                    "whatever the decoders made of it; then cut out where that is.\n\n" + pictures)
    for name, title in (others or {}).items():
        made.append(out / name)
        pictures += f"![{title}]({name})\n\n"
    title = "Known pixels" if report["masks"]["kind"] else "Pictures"
    write_text(made[0], f"# {title}\n\n{text}\n\n`{report['command']}`, commit "
               f"{report['commit']}\n\n{pictures}")
    write_text(made[1], json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return made


def _caption(key, several):
    run, decoder = key
    words = {"asym": "ours, with mask", "asym-nomask": "ours, without"}
    return words.get(decoder, decoder) + (f"\n{run}" if several and run else "")


# -- the program -----------------------------------------------------------------------------------


def main():
    args = _parser().parse_args()
    _check(args)
    options = Options(setup(args.device), args.batch_size, args.lpips, args.weights, args.fid,
                      args.clip, args.table, args.out, args.steps)
    if args.unpaired:
        pred = PictureFolder("--pred", args.pred, args.n)
        evaluate_sets(pred, PictureFolder("--real", args.real), options)
        return
    folders = None
    if args.real:
        factor = 1.0 if args.scaling_factor is None else args.scaling_factor
        folders = MatchedFolders(args.real, args.pred, args.masks, args.refs, args.latents,
                                 scaling_factor=factor, invert_mask=args.invert_mask, limit=args.n)
    if args.pred:
        evaluate_folders(folders, options)
    elif args.nearest:
        show_nearest(Path(args.runs[0]), options.device, net=options.lpips, weights=options.weights,
                     steps=options.steps, n=args.n, root=args.root, out=options.out,
                     batch_size=options.batch_size)
    elif args.table in SAMPLE_TABLES:
        evaluate_samples(args.runs, options, n=args.n, data=args.data, root=args.root)
    else:
        evaluate_runs(args.runs, options, n=args.n, data=args.data, root=args.root, size=args.size,
                      folders=folders)


def _check(args):
    """Raise UserError for flags that contradict one another or lack one another."""
    if bool(args.runs) == bool(args.pred):
        raise UserError("give either runs, as in eval.py RUN, or pictures, as in eval.py --pred "
                        "DIR --real DIR")
    for flag, value in (("-n", args.n), ("--batch-size", args.batch_size), ("--size", args.size),
                        ("--steps", args.steps)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: give a number from 1 on")
    for flag in ("pred", "masks", "refs", "latents"):
        if getattr(args, flag) and not args.real:
            raise UserError(f"--{flag} needs --real DIR, the original pictures")
    if args.latents and not args.runs:
        raise UserError("--latents needs a decoder: eval.py RUN --latents DIR --real DIR")
    if args.latents and args.scaling_factor is None:
        raise UserError("--latents needs --scaling-factor: 0.18215 for Stable Diffusion's, 0.13025 "
                        "for SDXL's, 1 for latents as the first stage encodes them")
    if args.refs and not args.masks:
        raise UserError("--refs needs --masks DIR: the CLIP score is of the edited region")
    if args.unpaired and (not args.pred or args.masks or args.refs or args.table or args.lpips
                          or not args.fid):
        raise UserError("--unpaired is for FID and inception score of two sets alone: eval.py "
                        "--pred DIR --real DIR --unpaired")
    about_runs = "--nearest" if args.nearest else f"--table {args.table}"
    if (args.nearest or args.table in (*SAMPLE_TABLES, "ddm1")) and (args.pred or args.real):
        raise UserError(f"{about_runs} is about a run and its own data set: eval.py RUN "
                        f"{about_runs}")
    if args.nearest and (len(args.runs) > 1 or args.table):
        raise UserError("--nearest is about one run, and no table: eval.py RUN --nearest")
    if args.size and (args.nearest or args.table in SAMPLE_TABLES):
        raise UserError(f"--size: {about_runs} has pictures of the prior's own size; leave it out")
    if args.data and args.nearest:
        raise UserError("--data: --nearest is about the run's own pictures; leave it out")
    if args.nearest and args.lpips == "none":
        raise UserError("--nearest measures by LPIPS: choose another --lpips than none")
    if args.table in MADE_TABLES and not (args.pred or args.latents):
        raise UserError(f"--table {args.table} is about pictures that a generator made: give them "
                        "with --pred DIR --real DIR, or its latents with RUN --latents DIR "
                        "--real DIR")
    if args.table and args.real and not args.masks:
        raise UserError(f"--table {args.table} needs --masks DIR")
    if args.table in CLIP_TABLES and not args.refs:
        raise UserError(f"--table {args.table} has a CLIP score: give the reference pictures with "
                        "--refs DIR")


def _parser():
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="The paper's tables: what decoders do to known pixels, and FID, inception "
                    "score, LPIPS and CLIP score of pictures made by anything.")
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN",
        help="run folders of train.py, their stage files, or public checkpoints, on one first "
             "stage")
    add("--pred", metavar="DIR", help="pictures made by anything, instead of runs")
    add("--real", metavar="DIR", help="the originals, matched by file name")
    add("--masks", metavar="DIR", help="masks of the same names; white = generated")
    add("--refs", metavar="DIR", help="what the holes were to look like, for the CLIP score")
    add("--latents", metavar="DIR",
        help="latents (.npy, .pt) of the same names, for the runs to decode")
    add("--scaling-factor", type=float, metavar="S",
        help="latents are divided by S first: 0.18215 for Stable Diffusion's, 0.13025 for SDXL's, "
             "1 for a decoder's own (no default)")
    add("--invert-mask", action="store_true", help="the masks are black where generated")
    add("--unpaired", action="store_true",
        help="PRED and REAL are sets of other pictures: FID and inception score alone")
    add("--table", choices=(*PAPER_TABLES, "ddm1"),
        help="print this table, too: AVQ's by number; of these, 6 and 10 are about samples, which "
             "are measured instead; ddm1: DDM's Table 1, codes in use, of both splits")
    add("--nearest", action="store_true",
        help="show samples and the ten training pictures nearest to each by LPIPS, instead")
    add("--steps", type=int, metavar="S",
        help="reverse steps of samples (default: 25, or all where the prior has fewer)")
    add("--data", choices=("signs", "imagenet", "folder"),
        help="held-out pictures for the runs (default: the run's --data; else imagenet)")
    add("--root", metavar="DIR", help="folder of these pictures (default: the run's --root)")
    add("--size", type=int, metavar="PX", help="their size (default: the run's --size; else 256)")
    add("-n", type=int, metavar="N",
        help="pictures (default: all given ones; of a run's held-out ones at most 1000, signs 500; "
             "--table ddm1 looks at all, --nearest at those that the prior has learnt)")
    add("--batch-size", type=int, metavar="B",
        help="pictures at once (default: 16 up to 128 px, 4 at 256, 1 at 512; of folders 8, of "
             "folders with runs 4)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    add("--lpips", choices=(*TRUNKS, "none"),
        help="network of the LPIPS column (default: the run's --perceptual; else vgg)")
    add("--no-fid", dest="fid", action="store_false",
        help="leave out FID and inception score, the slowest columns without a GPU")
    add("--clip", metavar="DIR",
        help="folder of a CLIP model from Hugging Face, say openai/clip-vit-base-patch32; without "
             "it no CLIP score is computed")
    add("--weights", metavar="DIR",
        help="folder of the networks' files (default: the run's --weights, else torch hub's cache)")
    add("--out", metavar="DIR",
        help="where the report goes (default: RUN; of several: RUN/compare; of pictures: "
             "PRED-report; of samples: generated/ in it)")
    return parser


if __name__ == "__main__":
    exit_on_user_error(main)
