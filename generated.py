"""Samples of one prior under several decoders: what AVQ's Tables 6 and 10 need a generator for.

    n held-out pictures --originals--> x -------+
    (seed, i) --Drawing--> codes --lookup--> z -+--> metrics.Pictures --metrics.decode_all--> x_hat

All decoders read the same codes and none is given a mask. That x and z have nothing to do with one
another is as it should be: FID compares sets. [AVQ Tab. 6] [AVQ Tab. 10]
"""

from code_report import REPORT_STEPS, prior_figures, prior_folder
from convert import chosen_steps, load_prior
from distributed import UserError, gather_objects, rank
from originals import originals
from pictures import image_rows
from sample import Drawing

SHOWN = 8                                        # samples in the picture, of each decoder


class Samples:
    """The samples of the first of some run folders, `paths`, that has a prior.

    runs: the eval.Runs whose decoders read them. Raises UserError where there is no prior, or
    none on their first stage.
    """

    def __init__(self, paths, runs, device, steps=None, batch_size=None):
        paths = list(paths)
        self.folder, self.device = prior_folder(paths), device
        if self.folder is None:
            raise UserError(f"{paths[0]} has no prior to draw samples from; train one: train.py "
                            f"--stage prior --vqgan {paths[0]} --out NEW_RUN")
        self.prior = load_prior(self.folder, device)
        if self.prior.parent not in {run.loaded.parent for run in runs}:
            raise UserError(f"the prior in {self.folder} stands on another first stage than these "
                            "decoders; give decoders that stand on the same one")
        self.drawing = Drawing(chosen_steps(steps, self.prior.diffusion.T, REPORT_STEPS),
                               batch_size=batch_size or 16)
        self.seconds, self.drawn, self.shown = 0.0, 0, {}

    def describe(self):
        return f"samples of the prior in {self.folder} ({self.drawing})"

    def pictures(self, dataset, n, bad=None):
        """This process's share of n samples, as the z of n pictures of a data set.

        bad: as for originals.
        """
        pictures = originals(dataset, n, self.drawing.batch_size, self.device, bad=bad)
        for batch, drawn in zip(pictures, self.drawing.batches(self.prior, n)):
            _, codes, seconds = drawn
            batch.z = self.prior.first_stage.quantize.lookup(codes)                 # (b, d, h, w)
            self.seconds, self.drawn = self.seconds + seconds, self.drawn + len(codes)
            yield batch

    def keep(self, pictures, outputs):
        """Keep the first samples to show. outputs: metrics.decode_all's."""
        for key, (x_hat, _) in outputs.items():
            kept = self.shown.setdefault(key, [])
            kept += x_hat[:SHOWN - len(kept)].cpu()

    def figures(self, rows):
        """report.json's "prior"; its FID is that of the first decoder of ours, if any.

        Every process must call this.
        """
        ours = [row for row in rows if row["decoder"] == "asym-nomask"] or rows
        seconds, drawn = map(sum, zip(*gather_objects((self.seconds, self.drawn))))
        return prior_figures(self.prior.facts, {
            "n": self.drawing.steps, "sampler": self.drawing.sampler,
            "seconds": seconds / drawn * min(self.drawing.batch_size, drawn),
            "fid": ours[0]["fid"]})

    def note(self):
        """What `figures` are."""
        return ("vlb_nats: of held-out maps, when training ended; seconds: of "
                f"{self.drawing.batch_size} maps at once; fid: of the first decoder of ours")

    def write(self, out):
        """Write samples.png, the same samples under each decoder; {file name: title}."""
        if rank() == 0:
            image_rows([(f"{decoder}{f', {run}' if run else ''}", images)
                        for (run, decoder), images in self.shown.items()], out / "samples.png")
        return {"samples.png": "the same samples by each decoder"}
