"""Samples and the training pictures nearest to them: has the prior learnt these by heart?

    samples (S,3,H,W) --features--> once ----------+
    training pictures (b,3,H,W) --features--> -----+--between--> LPIPS (S,b) --Nearest--> ten best

The training pictures stream by and only their distances' ten best are kept, so memory does not grow
with their number. [DDM Fig. 12]
"""

from pathlib import Path

import torch

from code_report import REPORT_STEPS
from convert import chosen_steps, load_prior, run_of
from data import open_dataset, pixels
from distributed import exact_float32, gather_objects, print0, rank
from losses import LPIPS
from originals import originals
from paper_tables import aligned
from pictures import image_rows
from run_folder import make_folder
from sample import Drawing, open_decoder

SAMPLES, COUNT = 8, 10   # rows of the picture, neighbours in each


class AllPairs(LPIPS):
    """LPIPS of all pairs of two batches; each picture goes through the network once."""

    def features_of(self, x):
        """What `between` compares of x (B,3,H,W) in [-1,1]: a list of (B,C^k,H^k,W^k)."""
        with torch.autocast(x.device.type, enabled=False):
            return self._phi(x)

    def between(self, a, b):
        """LPIPS of each of A pictures with each of B, from their features_of: (A,B)."""
        rows = []
        for i in range(len(a[0])):
            row = 0
            for k, (phi_a, phi_b) in enumerate(zip(a, b)):
                head = getattr(self, f"lin{k}")
                row = row + head((phi_a[i] - phi_b) ** 2).mean((1, 2, 3))           # (B)
            rows.append(row)
        return torch.stack(rows)                                                    # (A, B)


class Nearest:
    """The `count` nearest of each of `queries` among all that were offered.

    best: for each query [(distance, index)], the nearest first; equal ones by their index.
    """

    def __init__(self, queries, count=COUNT):
        self.count, self.best = count, [[] for _ in range(queries)]

    def offer(self, distances, indices):
        """distances (queries,b) of the pictures `indices`."""
        for best, row in zip(self.best, distances.tolist()):
            best += zip(row, indices)
        self._keep_best()

    def over_ranks(self):
        """Keep the best of all processes."""
        self.best = [[pair for best in shares for pair in best]
                     for shares in zip(*gather_objects(self.best))]
        self._keep_best()

    def _keep_best(self):
        self.best = [sorted(best)[:self.count] for best in self.best]


@torch.no_grad()
def nearest_pictures(lpips, samples, dataset, n, batch_size, device):
    """For each of samples (S,3,H,W), [(LPIPS, index)] of the nearest of a data set's first n.

    lpips: an AllPairs on `device`. Raises UserError as originals.
    """
    nearest, ours = Nearest(len(samples)), lpips.features_of(samples.clamp(-1, 1))
    for pictures in originals(dataset, n, batch_size, device, "nearest"):
        nearest.offer(lpips.between(ours, lpips.features_of(pictures.x)), pictures.index)
    nearest.over_ranks()
    return nearest.best


def nearest_table(nearest):
    """Markdown of nearest_pictures' answer: how near, and which pictures."""
    lines = [["sample", "LPIPS of the nearest", "of the last", "which, by their numbers"]]
    for number, best in enumerate(nearest):
        lines.append([str(number), f"{best[0][0]:.4f}", f"{best[-1][0]:.4f}",
                      ", ".join(str(index) for _, index in best)])
    return aligned(lines)


def write_nearest(nearest, samples, dataset, path):
    """A PNG with a row for each sample: itself, then its neighbours, the nearest first."""
    if rank():
        return
    groups = []
    for number, (sample, best) in enumerate(zip(samples, nearest)):
        found = torch.stack([torch.from_numpy(dataset.image(index)) for _, index in best])
        found = pixels(found.permute(0, 3, 1, 2), "cpu")                            # (10, 3, H, W)
        groups.append((f"sample {number}, and the nearest training pictures: LPIPS "
                       f"{best[0][0]:.3f} to {best[-1][0]:.3f}", [sample.cpu(), *found]))
    image_rows(groups, path)


def show_nearest(folder, device, *, net=None, weights=None, steps=None, n=None, root=None,
                 batch_size=None, out=None):
    """Samples of the prior in `folder` with the training pictures nearest to them: a PNG.

    net, weights: LPIPS' and the folder of its files; None is what the run was trained with, else
    vgg. steps: of the samples; n: training pictures, the first ones; None is those that the prior
    has learnt. out: folder of nearest.png, None is the run's. Raises UserError, also where LPIPS
    has no file: no other distance stands in for it.
    """
    prior = load_prior(folder, device)
    out = make_folder(Path(out or run_of(folder))) / "nearest.png"
    if not prior.finished:
        print0(f"the prior in {folder} is not finished (step {prior.step})")
    config = prior.config
    trained_with = "vgg" if config["perceptual"] == "none" else config["perceptual"]
    lpips = AllPairs(net or trained_with, weights or config["weights"]).to(device)
    dataset = open_dataset(config["data"], root or config["root"], "train", config["size"])
    n = min(n or prior.facts.get("maps") or len(dataset), len(dataset))
    drawing = Drawing(chosen_steps(steps, prior.diffusion.T, REPORT_STEPS))
    print0(f"{SAMPLES} samples of {folder} ({drawing}) and the nearest of {n:,} of "
           f"{dataset.describe()}, by LPIPS ({lpips.net}); the picture goes to {out}")
    with exact_float32(), torch.inference_mode():
        codes = drawing.codes(prior, range(SAMPLES))                                # (S, h, w)
        z = prior.first_stage.quantize.lookup(codes)                                # (S, d, h, w)
        samples = open_decoder(folder, prior).decode(z)                             # (S, 3, H, W)
        nearest = nearest_pictures(lpips, samples, dataset, n, batch_size or 16, device)
    write_nearest(nearest, samples, dataset, out)
    print0(f"\n{nearest_table(nearest)}\n\nwrote {out}")
    return nearest
