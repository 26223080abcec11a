"""Find what is left of the error of known pixels: what the last layer costs, which holes share.

    python benchmarks/last_layer.py RUN [RUN ...] -n 100

conv_out is one 3x3 convolution for all pixels. In a hole its input does not tell the image, so what
is best there is not what is best at known pixels. Here it is fitted again by least squares to the
images, its input left as it is: to the known pixels alone, and to all. It is fitted on n images of
val and measured on n of test. Columns: pre_error at the known pixels that it sees no hole from, in
1e-5, images in [0,1], and its standard error over images.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from convert import load
from data import held_out_batches, open_dataset
from metrics import describe, pre_error
from paper_tables import markdown, with_error
from quantize import exact_float32

CPU, BATCH = torch.device("cpu"), 8


def inputs(model, batch):
    """Give what conv_out sees of each pixel, (B,HW,9·ch+1) float64, and where a hole is near."""
    z = model.first_stage.post_quant_conv(model.encode(batch.x))
    h = model.decoder.last_features(z, batch.x, batch.mask)                     # (B, ch, H, W)
    seen = F.unfold(h, 3, padding=1).transpose(1, 2).double()                   # (B, HW, 9·ch)
    near = F.max_pool2d(batch.mask, 3, 1, 1)                                    # (B, 1, H, W)
    return F.pad(seen, (0, 1), value=1), near                                   # the last: the bias


def fitted(model, dataset, n):
    """Fit conv_out by least squares: {"known pixels", "all pixels": weights (9·ch+1,3)}."""
    sums = {}
    for batch in held_out_batches(dataset, n, BATCH, CPU):
        seen, near = inputs(model, batch)
        y = batch.x.flatten(2).transpose(1, 2).double()                         # (B, HW, 3)
        for name, weight in (("known pixels", 1 - near), ("all pixels", torch.ones_like(near))):
            weighted = (seen * weight.flatten(2).transpose(1, 2)).flatten(0, 1).T
            gram, moment = sums.get(name, (0, 0))
            sums[name] = gram + weighted @ seen.flatten(0, 1), moment + weighted @ y.flatten(0, 1)
    return {name: torch.linalg.lstsq(*pair, driver="gelsd").solution for name, pair in sums.items()}


@torch.no_grad()
def measure(path, size, n):
    """Measure a run's decoder with each conv_out: {name: pre_error (n)}."""
    loaded = load(path)
    model, config = loaded.model, loaded.config
    size = size or config["size"]
    val, test = (open_dataset(config["data"], config["root"], split, size)
                 for split in ("val", "test"))
    errors, layers = {}, fitted(model, val, n)
    for batch in held_out_batches(test, n, BATCH, CPU):
        seen, near = inputs(model, batch)
        z = model.encode(batch.x)
        pictures = {"as trained": model.decode(z, image=batch.x, mask=batch.mask)}
        for name, weight in layers.items():
            x_hat = (seen @ weight).transpose(1, 2).unflatten(2, batch.x.shape[2:])
            pictures[f"fitted to {name}"] = x_hat                               # (B, 3, H, W)
        for name, x_hat in pictures.items():
            errors.setdefault(name, []).extend(pre_error(x_hat, batch.x, near).tolist())
    return errors


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs with a decoder")
    parser.add_argument("-n", type=int, default=100, help="images, to fit and to measure (100)")
    parser.add_argument("--size", type=int, help="side of the images (the run's)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    with exact_float32():
        for path in args.runs:
            errors = measure(path, args.size, args.n)
            described = [describe(zip(values, range(len(values)))) for values in errors.values()]
            rows.append([path, *(with_error(1e5 * mean, 1e5 * error)
                                 for mean, error, _ in described)])
    print(markdown(["run", *errors], rows))


if __name__ == "__main__":
    main()
