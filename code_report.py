"""What a report says of a run's codes and of their prior, and the pictures that the prior makes.

    ReFiT's file, or codebook.CodeCounter over the pictures that are measured --> "codebook"
    RUN/prior: its bound, 16 samples, completions --> "prior", samples.png, completions.png

Of a first stage without codes there is nothing to say, of a run without a prior only the first
line. Not here: decoders on the same latents, which are the report's rows (eval.py).
"""

from asym_decoder import AsymVQGAN
from codebook import FIRST_STAGE, CodeCounter, codebook_row, count_splits, learnt_usage, remembered
from convert import chosen_steps, load_prior, prior_facts
from data import open_dataset
from distributed import UserError, on_rank0
from inpaint import COMPLETIONS, RESAMPLE, completion_rows, inpainting_columns
from metrics import first_stage_of
from paper_tables import (
    CODEBOOK_KEYS,
    STEP_KEYS,
    codebook_table,
    ddm_table_1,
    prior_table,
    steps_table,
)
from pictures import image_grid, image_rows
from sample import Drawing, decoder_name, measure, open_decoder

SAMPLES, REPORT_STEPS = 16, 25               # of the report's pictures
WORKERS = 2                                  # that decode where a whole split is counted


def prior_folder(paths):
    """The first of some paths that is a run folder with a prior, or None."""
    return next((path for path in paths
                 if any((path / "prior" / name).exists() for name in ("last.pt", "previous.pt"))),
                None)


class CodeReport:
    """What the report of some eval.Runs says of the codes that they share.

    where: {"data", "root", "size"} of the held-out pictures, `dataset`; paths: of the runs.
    codebooks: paper_tables.codebook_table's rows, the last is in use; prior: report.json's;
    notes, too; pictures: {file name: title} of those that were written.
    """

    def __init__(self, runs, paths, where, dataset):
        self.run, self.first_stage = runs[0], first_stage_of(runs)
        self.where, self.dataset, self.folder = where, dataset, prior_folder(paths)
        self.facts = prior_facts(self.folder) if self.folder else None
        self.codebooks, self.prior, self.notes, self.pictures = [], None, {}, {}
        self.has_codes = self.first_stage.config.latent == "vq"
        self.known = self.has_codes and remembered(self.run, where, len(dataset))
        self.counter = None if self.known or not self.has_codes else CodeCounter(
            {FIRST_STAGE: self.first_stage})

    def offer(self, pictures):
        """Count the codes of one batch, where nobody has counted those of all."""
        if self.counter is not None:
            self.counter.offer(pictures.x)

    def finish(self, n, rows, out, device, steps=None):
        """Fill in the codebooks and the prior, and write the pictures into `out`.

        n, rows: of the report. Every process must call this.
        """
        if not self.has_codes:
            self.notes["codebook"] = "not computed: a KL latent has no codes"
            return
        self._codebooks(n, rows)
        if self.folder:
            self.prior, note, self.pictures = on_rank0(
                lambda: _draw(self.folder, self.dataset, steps, device, out))
            self.notes["prior"] = note

    def _codebooks(self, n, rows):
        if self.codebooks:                               # counted before, by `count`
            return
        known = self.known or self.counter.statistics()
        held_out = (f"all {len(self.dataset):,} pictures, as ReFiT counted them"
                    if self.known else f"{n:,} pictures")
        ours = self.folder and self.facts["parent"] == self.run.loaded.parent
        learnt = learnt_usage(self.folder, self.facts) if ours else None
        train = ("not counted, --table ddm1 does" if learnt is None
                 else f"the {self.facts['maps']:,} pictures that the prior has learnt")
        self.notes["codebook"] = f"held out: {held_out}; train: {train}"
        config, size = self.first_stage.config, self.dataset.size
        self.codebooks = [codebook_row(name, config, size, statistics)
                          for name, statistics in known.items()]
        rfid = [row["fid"] for row in rows
                if row["decoder"] == "vanilla" and row["bucket"] == "all"]
        self.codebooks[-1] |= {"usage_train": learnt, "rfid": rfid[0] if rfid else None}

    def count(self, n, batch_size, device, inception):
        """DDM's Table 1 in full: count both splits, or the first n pictures of each."""
        if not self.has_codes:
            raise UserError("--table ddm1: a KL latent has no codes to count; give a run with a VQ "
                            "first stage")
        train_set = open_dataset(self.where["data"], self.where["root"], "train",
                                 self.where["size"])
        self.counter = None
        self.codebooks, remark = count_splits(self.run, train_set, self.dataset, n, batch_size,
                                              device, inception, WORKERS)
        looked_at = [min(n or len(split), len(split)) for split in (self.dataset, train_set)]
        self.notes["codebook"] = (f"held out: {looked_at[0]:,} pictures; train: {looked_at[1]:,}"
                                  + (f"; before ReFiT: n/a, {remark}" if remark else ""))

    def codebook(self):
        """report.json's "codebook": of the codes that the decoders read."""
        return {key: self.codebooks[-1][key] for key in CODEBOOK_KEYS} if self.codebooks else None

    def text(self, as_printed=False):
        """Markdown; as_printed: with the rows of DDM's Table 1 below."""
        if not self.codebooks:
            return ""
        parts = [f"Codes in use ({self.notes['codebook']}):", codebook_table(self.codebooks)]
        if as_printed:
            parts.append(ddm_table_1())
        if self.prior:
            if self.prior["uniform_nats"]:
                parts += ["What a held-out map of them costs, as training measured it last:",
                          prior_table(self.prior, self.codebooks[-1]["K"])]
            parts += ["Drawing such maps:", steps_table(self.prior["steps"], SAMPLES)]
        elif "prior" in self.notes:
            parts.append(f"prior: {self.notes['prior']}")
        return "\n\n".join(parts)


def _draw(folder, dataset, steps, device, out):
    """(report.json's "prior" or None, its note, {file name: title} of the pictures)."""
    try:
        prior = load_prior(folder, device)
        model = open_decoder(folder, prior)
        drawing = Drawing(chosen_steps(steps, prior.diffusion.T, REPORT_STEPS), batch_size=SAMPLES)
    except UserError as error:
        return None, f"n/a: {error}", {}
    if not prior.finished:
        return None, f"not computed: its training is not finished (step {prior.step})", {}
    side = prior.grid[0] * prior.first_stage.config.f
    if dataset.size != side:
        return None, f"not computed: it makes pictures of {side} px, not of {dataset.size}", {}
    row, samples = measure(prior, model, drawing, SAMPLES)
    caption = f"{SAMPLES} samples ({drawing}), decoded by {decoder_name(model)}"
    image_rows([(caption, list(samples))], out / "samples.png", across=8)
    image_rows(completion_rows(prior, dataset, drawing.steps), out / "completions.png",
               across=2 + COMPLETIONS)
    pictures = {"samples.png": f"{SAMPLES} samples", "completions.png": "completions"}
    if isinstance(model, AsymVQGAN):
        image_grid(inpainting_columns(prior, model, dataset, drawing.steps), out / "inpainting.png")
        pictures["inpainting.png"] = f"full inpainting ({drawing}, resample {RESAMPLE})"
    note = (f"vlb_nats: of held-out maps, when training ended; seconds: of {SAMPLES} maps at once; "
            "fid: sample.py --fid-n measures it")
    return prior_figures(prior.facts, row), note, pictures


def prior_figures(facts, row):
    """report.json's "prior". facts: convert.prior_facts'; row: sample.measure's or the like."""
    return {"vlb_nats": facts.get("score"), "uniform_nats": facts.get("uniform_nats"),
            "histogram_nats": facts.get("histogram_nats"),
            "steps": [{key: row[key] for key in STEP_KEYS}]}
