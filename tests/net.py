"""Show that a refactoring changed nothing: compare this tree with commit fa3eb67. Temporary.

    python tests/net.py [--reference DIR] [--skip NAME ...]

The reference is made once, from the repository's history, and kept in DIR. Compared are, for 20
steps of each stage, hashes of images, masks, t and z_t, and all terms of the loss; what load_model
and load_prior give on a run of fa3eb67; and eval.py's rows on it. Hashes must be equal, numbers
must agree to 1e-5 of their size. The stages run in float64, where a sum in another order shows no
more than a true difference would; the prior runs once more in float32, for the draws.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path

COMMIT, VERSION = "fa3eb67", 2
TOLERANCE = 1e-5
FLOAT32_TERMS = 2e-3           # 20 steps of Adam in float32 amplify rounding
STAGES = ("vqgan", "refit", "decoder", "prior")
COMMON = ["--size", "32", "--batch-size", "8", "--micro-batch", "8", "--save-every", "20",
          "--workers", "0", "--disc-start", "8", "--device", "cpu", "--seed", "0"]
SIGNS = ["--data", "signs", "--codes", "24", "--refit-samples", "400", "--timesteps", "6"]
FIRST_STAGE = {"ch": 8, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "attn_levels": (),
               "z_channels": 8, "embed_dim": 8, "K": 64, "code_range": 0.3, "norm_groups": 4}

UNET = {"width": 32, "mults": (1, 2), "attn_levels": (0, 1), "heads": 2, "head_width": 16,
        "time_width": 32, "norm_groups": 8}              # of the layout that has stayed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path,
                        default=Path(tempfile.gettempdir()) / f"net-{COMMIT}-{VERSION}")
    parser.add_argument("--skip", nargs="*", default=[], metavar="NAME",
                        help="items that may differ, by the beginning of their names")
    args = parser.parse_args()
    repository = Path(__file__).resolve().parent.parent
    if not (args.reference / "results.json").exists():
        make_reference(repository, args.reference)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        compute(repository, args.reference, Path(folder))
        now = json.loads((Path(folder) / "results.json").read_text())
    failed = compare(json.loads((args.reference / "results.json").read_text()), now, args.skip)
    print(f"{time.monotonic() - start:.0f} s; " + (f"differs: {', '.join(failed)}" if failed
                                                   else "nothing differs"))
    return 1 if failed else 0


def make_reference(repository, folder):
    """What fa3eb67 computes, with its tree, photos and a run in float32, whole or not at all."""
    print(f"making the reference in {folder}, once")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + ".part"))
    archive = subprocess.run(["git", "-C", str(repository), "archive", COMMIT], check=True,
                             capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(part / "tree", filter="data")
    draw_photos(part / "photos")
    drive(part / "tree", "run", part, part)
    compute(part / "tree", part, part / "now")
    shutil.move(part / "now" / "results.json", part)
    shutil.rmtree(part / "now")
    try:
        part.rename(folder)
    except OSError:                     # somebody else was faster
        shutil.rmtree(part)


def draw_photos(folder):
    """Eight JPEG and PNG files, of several sizes and modes."""
    import numpy as np
    from PIL import Image
    folder.mkdir()
    for i in range(8):
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        photo = coarse.resize((50 + 17 * i, 140 - 9 * i), Image.Resampling.BICUBIC)
        if i == 5:
            photo.putalpha(128)
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 2 else 1
        photo.save(folder / f"photo{i}.{'png' if i % 2 else 'jpg'}", exif=exif)


def compute(tree, reference, out):
    """OUT/results.json: all that `tree` computes. {item: value}"""
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for part in ("float64", "float32", "outputs", "rows"):
        drive(tree, part, reference, out)
        results |= json.loads((out / f"{part}.json").read_text())
    (out / "results.json").write_text(json.dumps(results))


def drive(tree, part, reference, out):
    """One part in a process of its own, in `tree`."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(out / "cache")}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, str(Path(__file__).resolve()), "--drive", part,
                           str(reference), str(out)], cwd=tree, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        print(done.stdout)
        sys.exit(f"{part}: failed in {tree}")


# -- the parts, in a process whose working directory is the tree -----------------------------------


def driver(part, reference, out):
    sys.path[0] = os.getcwd()
    import torch
    torch.set_num_threads(1)
    import data
    import unet
    import vqgan
    vqgan.VQGAN_PRESETS["tiny"] = vqgan.VQGANConfig(**FIRST_STAGE)
    unet.UNET_PRESETS["tiny"] = unet.UNetConfig(**UNET)
    if hasattr(data, "SIGNS_LENGTH"):
        data.SIGNS_LENGTH["val"] = 64
    if part == "float64":
        torch.Tensor.float = torch.Tensor.double
        torch.float32 = torch.float64
        torch.set_default_dtype(torch.float64)
    results = {"run": reference_run, "float64": float64, "float32": float32, "outputs": outputs,
               "rows": rows}[part](reference, out)
    (out / f"{part}.json").write_text(json.dumps(results))


def reference_run(reference, out):
    for stage in STAGES:
        train(out / "run", [*SIGNS, "--stage", stage, "--steps", "20"])
    return {}


def float64(reference, out):
    found = {}
    for stage in STAGES:
        found |= train(out / "signs", [*SIGNS, "--stage", stage, "--steps", "20"], "signs")
    photos = ["--data", "folder", "--root", str(reference / "photos"), "--first-stage", "tiny",
              "--perceptual", "none"]
    found |= train(out / "photos", [*photos, "--stage", "vqgan", "--steps", "4"], "photos")
    photos[4:6] = ["--vqgan", str(out / "photos")]
    return found | train(out / "blend", [*photos, "--stage", "decoder", "--steps", "20",
                                         "--blend", "concat"], "photos")


def float32(reference, out):
    """The prior on the reference's first stage: its maps and draws, as they are used."""
    found = train(out / "float32", [*SIGNS, "--stage", "prior", "--vqgan", str(reference / "run"),
                                    "--steps", "20"], "float32")
    return {name: value for name, value in found.items() if "held out" not in name}


def train(folder, argv, name=None):
    """train.py with these arguments -> {"NAME STAGE inputs" | "... terms" | "... held out"}."""
    import torch

    import train as program
    program.trial = lambda *_: (1, 1.0)                  # no steps before the real ones
    program.evaluate = program.evaluate_runs = lambda *_, **__: None
    seen, stage = [], argv[argv.index("--stage") + 1]

    def call(module, *args, **kwargs):
        kind = type(module).__name__
        if module.training and kind in ("VQGAN", "AsymVQGAN", "UNet"):
            values = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
            for v in values:
                if v.is_floating_point() and v.ndim == 4 and v.shape[1] in (1, 3):
                    mask = v.shape[1] == 1
                    v = (v if mask else (v + 1) * 127.5).round().to(torch.uint8)
                    seen.append(["mask" if mask else "x", digest(v)])
                elif kind == "UNet" and v.dtype == torch.int64 and v.ndim in (1, 3):
                    seen.append(["t" if v.ndim == 1 else "z_t", digest(v)])
        return original(module, *args, **kwargs)

    sys.argv = ["train.py", *COMMON, *argv, "--out", str(folder)]
    original, torch.nn.Module.__call__ = torch.nn.Module.__call__, call
    program.main()
    torch.nn.Module.__call__ = original
    terms, held_out = {}, {}
    for line in (folder / stage / "log.jsonl").read_text().splitlines():
        for key, value in json.loads(line).items():
            part = held_out if key.startswith("val_") else terms
            part.setdefault(key, []).append(value)
    return {f"{name} {stage} inputs": seen, f"{name} {stage} terms": terms,
            f"{name} {stage} held out": held_out}


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().cpu().numpy().tobytes()).hexdigest()


def outputs(reference, out):
    """What load_model and load_prior of the reference's run give on fixed inputs."""
    import numpy as np
    import torch

    import convert
    try:
        from convert import load_prior
    except ImportError:
        from prior import load_prior
    model = convert.load_model(reference / "run")
    prior = load_prior(reference / "run")
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32))
    mask = torch.zeros(2, 1, 32, 32)
    mask[:, :, 8:20, 5:30] = 1
    codes = torch.from_numpy(rng.integers(0, 24, (2, 8, 8)))
    with torch.no_grad():
        z = model.encode(x)
        found = {"encode": z, "decode": model.decode(z),
                 "decode with a mask": model.decode(z, image=x, mask=mask),
                 "decode_indices": prior.first_stage.decode_indices(codes),
                 "logits": prior.unet(codes, torch.tensor([2, 5]))}
        indices = prior.first_stage.indices(x)
    return {f"load: {name}": value.double().flatten().tolist() for name, value in found.items()} \
        | {"load: indices": [["indices", digest(indices)]]}


def rows(reference, out):
    """eval.py's rows."""
    import eval as program
    sys.argv = ["eval.py", str(reference / "run"), "-n", "12", "--no-fid", "--device", "cpu",
                "--out", str(out / "report")]
    program.main()
    report = json.loads((out / "report" / "report.json").read_text())
    names = "n", "pre_error", "psnr_known", "seam", "lpips"
    return {f"rows: {row['decoder']} {row['bucket']}": {name: row[name] for name in names}
            for row in report["rows"]}


# -- the comparison --------------------------------------------------------------------------------


def compare(before, now, skip):
    """Print a line an item; the names of those that differ."""
    failed = []
    for name, expected in before.items():
        if any(name.startswith(word) for word in skip):
            print(f"skipped   {name}")
            continue
        limit = FLOAT32_TERMS if name.startswith("float32") else TOLERANCE
        worst, where = difference(expected, now.get(name))
        same = worst <= limit
        print(f"{'equal' if same else 'DIFFERENT':10}{name:28}"
              + ("hashes" if name.endswith((" inputs", " indices")) else f"{worst:.1e}")
              + (f"  {where}" if worst else ""))
        if not same:
            failed.append(name)
    return failed


def difference(a, b):
    """(the largest relative difference, where): of numbers, hashes, lists and dictionaries of them.

    Lists of numbers are compared by the largest among them. What only `b` has does not matter.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        parts = [(*difference(a[key], b[key]), key) if key in b else (math.inf, "missing", key)
                 for key in a]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        if all(isinstance(v, (int, float)) for v in a + b):
            scale = max([abs(v) for v in a] + [1e-6])
            worst = max((abs(v - w) for v, w in zip(a, b)), default=0)
            return worst / scale if math.isfinite(worst) else math.inf, ""
        parts = [(*difference(v, w), i) for i, (v, w) in enumerate(zip(a, b))]
    elif isinstance(a, float) and isinstance(b, float):
        return abs(a - b) / max(abs(a), 1e-6), ""
    else:
        return (0, "") if a == b else (math.inf, f"{str(a)[:20]} -> {str(b)[:20]}")
    worst, where, key = max(parts, key=lambda part: part[0], default=(0, "", ""))
    return worst, f"{key} {where}".strip() if worst else ""


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drive"]:
        driver(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        sys.exit(main())
