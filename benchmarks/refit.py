"""Compare ways of seeding ReFiT's clusters, its two halves, or priors with and without it.

    python benchmarks/refit.py [--rows 20000 100000] [--threads 1]      seeds: time and inertia
    python benchmarks/refit.py --run RUN -o FOLDER                      codebooks: codes in use, L1
    python benchmarks/refit.py --priors RUN RUN -o FOLDER               priors: completions

**Seeds.** The features have low rank and noise, in as many clusters as there are codes. For each
seed, k-means++ computes the distance of every feature, here by one matrix-vector product, the
fastest form we know. AFK-MC² computes 200 distances. The ways of seeding run in turns and medians
are compared. Lloyd's algorithm then starts from the seeds of the first round. Times are CPU seconds
of all threads together, so that a busy machine adds little to them.

**Codebooks.** Those of RUN's first stage: as it is, rebuilt only, fine-tuned only, both, and with
half as many codes. train.py's stage refit trains each in a folder of FOLDER; finished ones are not
trained again. "Fine-tuned only" is the same stage with the old codebook in the place of the rebuilt
one. The quantisation error is the mean over cells of |z_e - z_q|²; L1 is of images in [-1,1].
refit.png has held-out pictures before and after. [DDM Fig. 3] [DDM Fig. 4]

**Priors.** Their codebooks differ, so nats are not comparable, but pictures are: the hole of each
held-out picture, filled by each prior and decoded by its own first stage. The codes of the whole
picture, decoded by the same first stage, are what no prior can beat. A prior without ReFiT is made
by train.py --stage prior --vqgan RUN/vqgan/last.pt --out RUN2. FID, where Inception's file is at
hand: sample.py -o FOLDER/, then eval.py --table 6. [DDM Tab. 2]
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
import train_autoencoder
from convert import chosen_steps, load_first_stage, load_prior
from data import held_out_batches, open_dataset
from diffusion import known_cells
from inpaint import RESAMPLE, complete, fill_with_mean
from metrics import describe, open_networks
from paper_tables import markdown
from pictures import image_grid, show_masked
from quantize import code_statistics, exact_float32
from refit import afkmc2_seeds, install_codebook, kmeans
from seeding import COMPLETION, keyed_generators

CPU, BATCH, SHOWN = torch.device("cpu"), 16, 6          # images at once; rows of the pictures


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="compare the codebooks of its first stage")
    parser.add_argument("--priors", nargs="+", metavar="RUN", help="compare their priors")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/refit"),
                        help="folder of the pictures and of what --run trains (runs/refit)")
    parser.add_argument("-n", type=int, default=500, help="held-out pictures")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="which (val)")
    parser.add_argument("--steps", type=int, help="of fine-tuning or of drawing (the programs')")
    parser.add_argument("--samples", type=int, help="features to cluster, P (train.py's)")
    parser.add_argument("--lpips", default="none", help="vgg, alex or squeeze, beside L1 (none)")
    parser.add_argument("--weights", help="folder of the networks' files")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 100_000],
                        help="features, P")
    parser.add_argument("--width", type=int, default=256, help="of a feature, d")
    parser.add_argument("--codes", type=int, default=1024, help="K")
    parser.add_argument("--passes", type=int, default=10, help="of Lloyd's algorithm")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each seeding")
    return parser.parse_args(argv)


def plain_seeds(features, K, generator):
    """Draw the seeds of k-means++ by its definition: indices (K,) of features (n,d)."""
    square = features.square().sum(1)                                       # (n)
    chosen = torch.randint(len(features), (1,), generator=generator).tolist()
    nearest = torch.full_like(square, torch.inf)                            # (n), d(x,C)²
    for level in torch.rand(K - 1, dtype=torch.float64, generator=generator):
        seed = features[chosen[-1]]                                         # (d)
        distance = torch.addmv(square, features, seed, alpha=-2) + square[chosen[-1]]
        nearest = torch.minimum(nearest, distance.clamp_min(0))             # (n)
        cdf = nearest.double().cumsum(0)                                    # (n)
        chosen.append(torch.searchsorted(cdf, level * cdf[-1]).item())
    return torch.tensor(chosen)


def data(rows, width, codes):
    """Draw features (n,d) of rank 32, in clusters, with noise."""
    generator = torch.Generator().manual_seed(0)
    rank = min(32, width)
    centres = torch.randn(codes, rank, generator=generator)
    inner = centres[torch.randint(codes, (rows,), generator=generator)]
    inner += 0.5 * torch.randn(rows, rank, generator=generator)
    features = inner @ torch.randn(rank, width, generator=generator) / rank**0.5
    return features + 0.1 * torch.randn(rows, width, generator=generator)


def timed(function, *arguments):
    """Call a function: (its result, CPU seconds)."""
    start = time.process_time()
    result = function(*arguments)
    return result, time.process_time() - start


def compare(args, rows):
    """Yield the table's lines for `rows` features."""
    features = data(rows, args.width, args.codes)
    seedings = {
        "AFK-MC²": lambda g: afkmc2_seeds(features, args.codes, generator=g),
        "k-means++": lambda g: plain_seeds(features, args.codes, g),
        "uniform": lambda g: torch.randperm(rows, generator=g)[:args.codes],
    }
    runs = [{name: timed(seeding, torch.Generator().manual_seed(number))
             for name, seeding in seedings.items()} for number in range(args.rounds)]
    for name in seedings:
        seconds = statistics.median(run[name][1] for run in runs)
        start = features[runs[0][name][0]]
        (_, inertia), moving = timed(kmeans, features, start, args.passes, 0.0)
        yield (f"| {rows:,} x {args.width} | {name} | {seconds:.2f} s | {inertia[0]:.4g} | "
               f"{len(inertia) - 1} | {moving / len(inertia):.3f} s | {inertia[-1]:.4g} |")


# -- codebooks -------------------------------------------------------------------------------------


def train_codebooks(args, first, config):
    """Train ReFiT and its controls by train.py: {name: VQGAN}. first: the run's VQGAN."""
    def trained(name, codes):
        flags = {"stage": "refit", "vqgan": args.run / "vqgan" / "last.pt", "codes": codes,
                 "out": args.out / name, "device": "cpu", "steps": args.steps,
                 "refit-samples": args.samples}
        flags |= {key: config.get(key) for key in ("data", "root", "size", "seed", "perceptual",
                                                   "weights", "precision")}
        sys.argv = ["train.py", *(f"--{key}={v}" for key, v in flags.items() if v is not None)]
        train.main()
        return load_first_stage(args.out / name).model

    def rebuilt(model):          # fine-tuning leaves the rebuilt codes as they are
        bare = copy.deepcopy(first)
        install_codebook(bare, model.quantize.embedding.weight)
        return bare

    def keep(run, model):        # in place of train_autoencoder.rebuild
        return model.quantize.embedding.weight.detach().clone(), {}

    K = first.config.K
    both, half = trained("both", K), trained("both-half", K // 2)
    rebuild, train_autoencoder.rebuild = train_autoencoder.rebuild, keep
    try:
        tuned = trained("fine-tuned", K)
    finally:
        train_autoencoder.rebuild = rebuild
    return {"as it is": first, "rebuilt only": rebuilt(both), "fine-tuned only": tuned,
            "both (ReFiT)": both, "K/2, rebuilt only": rebuilt(half), "K/2, both": half}


@torch.no_grad()
def codebooks(args):
    """Print what rebuilding and fine-tuning do, alone and together. [DDM Sec. 3.2]"""
    loaded = load_first_stage(args.run / "vqgan" / "last.pt")
    first, config = loaded.model, loaded.config
    with torch.enable_grad():
        models = train_codebooks(args, first, config)
    dataset, shown = open_dataset(config["data"], config["root"], args.split, config["size"]), {}
    counts = {name: torch.zeros(model.config.K, dtype=int) for name, model in models.items()}
    error, L1 = {name: [] for name in models}, {name: [] for name in models}
    for batch in held_out_batches(dataset, args.n, BATCH, CPU, masks=False):
        z_e = first.moments(batch.x)                                        # (B, d, h, w)
        shown.setdefault("original", batch.x[:SHOWN])
        for name, model in models.items():
            z_q, indices, _ = model.quantize(z_e)                           # (B, d, h, w)
            x_hat = model.decode(z_q)                                       # (B, 3, H, W)
            counts[name] += indices.flatten().bincount(minlength=model.config.K)
            error[name].append((z_e - z_q).square().sum(1).mean((1, 2)))    # (B)
            L1[name].append((x_hat - batch.x).abs().mean((1, 2, 3)))        # (B)
            shown.setdefault(name, x_hat[:SHOWN])
    rows, base = [], torch.cat(L1["as it is"])
    for name, model in models.items():
        own = torch.cat(L1[name])                                           # (n)
        rows.append([name, f"{model.config.K:,}", f"{(counts[name] > 0).sum():,}",
                     f"{code_statistics(counts[name])['perplexity']:.1f}",
                     *map(plus_minus, (torch.cat(error[name]), own, own - base))])
    print(f"\n{len(base):,} held-out pictures of {dataset.describe()}, {config['size']} px\n")
    print(markdown(["codebook", "K", "codes in use", "perplexity", "quantisation error", "L1",
                    "L1 - as it is, paired"], rows))
    image_grid({name: list(images) for name, images in shown.items()}, args.out / "refit.png")


def plus_minus(values):
    """Write the mean of values (n,) over pictures and its standard error."""
    mean, error, _ = describe(zip(values.tolist(), range(len(values))))
    return f"{mean:.4f}" + ("" if error is None else f" ± {error:.4f}")


# -- priors ----------------------------------------------------------------------------------------


@torch.no_grad()
def priors(args):
    """Print how far completions by each prior are from the pictures, in their holes."""
    opened = {name: load_prior(name) for name in args.priors}
    config = opened[args.priors[0]].config
    networks = open_networks(CPU, args.weights, args.lpips, args.lpips != "none", fid=False)
    dataset = open_dataset(config["data"], config["root"], args.split, config["size"])
    found, shown = {}, None                      # {(prior, codes): [(B, measures) of each batch]}
    for batch in held_out_batches(dataset, args.n, BATCH, CPU):
        x, mask = batch.x, batch.mask
        images = {"original": x, "masked": show_masked(x, mask)}
        for name, prior in opened.items():
            first = prior.first_stage
            drawn = complete(
                prior, first.indices(fill_with_mean(x, mask)), known_cells(mask, first.config.f),
                keyed_generators((COMPLETION, 0, i) for i in batch.index),
                chosen_steps(args.steps, prior.diffusion.T), RESAMPLE)      # (B, h, w)
            for codes, indices in (("the picture's codes", first.indices(x)), ("drawn", drawn)):
                x_hat = first.decode_indices(indices).clamp(-1, 1)          # (B, 3, H, W)
                filled = images[f"{name}\n{codes}"] = torch.where(mask == 1, x_hat, x)
                L1 = (filled - x).abs().sum((1, 2, 3)) / (3 * mask.sum((1, 2, 3)))
                values = [L1, networks.lpips(filled, x)] if networks.lpips else [L1]
                found.setdefault((name, codes), []).append(torch.stack(values, 1))
        shown = shown or {caption: list(each[:SHOWN]) for caption, each in images.items()}

    found = {key: torch.cat(parts) for key, parts in found.items()}         # (n, measures)
    for name in opened:                          # what the prior costs, whatever its decoder
        found[name, "difference"] = found[name, "drawn"] - found[name, "the picture's codes"]
    rows = []
    for (name, codes), values in found.items():
        paired = values - found[args.priors[0], codes]
        rows.append([f"{name}: {codes}", *map(plus_minus, [*values.T, *paired.T])])
    measures = ["L1", f"LPIPS ({args.lpips})"][:values.shape[1]]
    print(f"{len(values):,} holes of {dataset.describe()}, {config['size']} px\n")
    print(markdown(["codes of the hole", *measures, *(f"{m} - first prior's" for m in measures)],
                   sorted(rows)))
    image_grid(shown, args.out / "priors.png")


def main(argv=None):
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    if args.run or args.priors:
        with exact_float32():
            return codebooks(args) if args.run else priors(args)
    print(f"torch {torch.__version__}, CPU threads: {args.threads} "
          f"({torch.backends.cpu.get_cpu_capability()}), K = {args.codes}, "
          f"median of {args.rounds} interleaved seedings\n")
    print("| features | seeding | time | inertia | passes | time per pass | inertia after them |")
    print("|---" * 7 + "|")
    for rows in args.rows:
        for line in compare(args, rows):
            print(line, flush=True)


if __name__ == "__main__":
    main()
