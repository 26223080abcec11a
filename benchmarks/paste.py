"""Compare decoding known pixels with pasting them, over the first stage's decoder and over ours.

    python benchmarks/paste.py --run RUN --split test -n 128

eval.py pastes over the first stage's own decoder, as AVQ's Fig. 4 does. Our decoder without a mask
is a better one, so pasting over it is the harder rival. Columns: the seam and the L1 of the hole,
images in [-1,1], in both of eval.py's protocols; ours with a mask minus the row, image by image.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from convert import load
from data import held_out_batches, open_dataset
from eval import shift_hole
from metrics import describe, seam
from paper_tables import markdown, with_error
from quantize import exact_float32

CPU, BATCH = torch.device("cpu"), 16
OURS = "ours, with mask"


def rows_of(batch, model):
    """Give {(decoder, protocol): (seam (B,), L1 of the hole (B,))} of a batch."""
    found, x, mask = {}, batch.x, batch.mask
    for protocol, seen in (("full", x), ("shifted", shift_hole(x, mask, batch.index))):
        z = model.encode(seen)                                              # (B, d, h, w)
        pictures = {OURS: model.decode(z, image=x, mask=mask)}
        for name, x_hat in (("the first stage's own decoder, pasted", model.first_stage.decode(z)),
                            ("ours without mask, pasted", model.decode(z))):
            pictures[name] = torch.where(mask == 1, x_hat, x)
        for name, x_hat in pictures.items():
            error = (mask * (x_hat.clamp(-1, 1) - x).abs()).sum((1, 2, 3))
            found[name, protocol] = seam(x_hat, x, mask), error / (3 * mask.sum((1, 2, 3)))
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a run with a decoder")
    parser.add_argument("-n", type=int, default=128, help="held-out images")
    parser.add_argument("--split", default="val", choices=("val", "test"))
    args = parser.parse_args(argv)
    run, values = load(args.run), {}
    dataset = open_dataset(run.config["data"], run.config["root"], args.split, run.config["size"])
    with exact_float32(), torch.inference_mode():
        for batch in held_out_batches(dataset, min(args.n, len(dataset)), BATCH, CPU):
            for key, pair in rows_of(batch, run.model).items():
                values.setdefault(key, []).append(torch.stack([part.double() for part in pair]))
    values = {key: torch.cat(parts, 1) for key, parts in values.items()}    # (2, n) each
    lines = []
    for (name, protocol), pair in values.items():
        line = [name, protocol]
        for ours, theirs in zip(values[OURS, protocol], pair):
            line.append(with_error(*describe(zip(theirs.tolist(), range(len(theirs))))[:2]))
            less = (ours - theirs).tolist()
            line.append("" if name == OURS else
                        with_error(*describe(zip(less, range(len(less))))[:2], sign="+"))
        lines.append(line)
    print(markdown(["picture", "latents", "seam", "ours minus it", "L1 of the hole",
                    "ours minus it"], lines))


if __name__ == "__main__":
    main()
