"""Every tag, such as [AVQ Eq. 4], stands on code that the programs run."""

import importlib.util
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_clip_score import random_weights as clip_weights
from test_clip_score import written
from test_fid import random_weights as inception_weights
from test_losses import random_weights as lpips_weights
from test_losses import write_files
from test_papers import MODULES, tags_of
from tiny_runs import PRIOR, TINY

import convert
import data
import eval
import fid
import image_pairs
import inpaint
import sample
import train
from unet import UNET_PRESETS, UNetConfig
from vqgan import VQGAN_PRESETS, VQGANConfig


def entered_by(work):
    """Run `work`: {(path, qualified name)} of all Python functions that it calls, in any thread."""
    codes = set()

    def note(frame, event, argument):
        if event == "call":
            codes.add(frame.f_code)

    sys.setprofile(note)
    threading.setprofile(note)           # and in the threads that begin from now on
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return {(Path(code.co_filename), code.co_qualname) for code in codes}


def not_entered(path, entered):
    """List the tagged places of a file that no function of `entered` belongs to: "file.py:Name".

    A function counts when it is entered, a class when one of its methods is. A constant and the
    file itself run no code of their own: any function of the file will do.
    """
    names = {name for file, name in entered if file == path}
    missing = set()
    for _, place in tags_of(path):
        name = place.partition(":")[2]
        runs = names if not name or name.isupper() else {
            entry for entry in names if entry == name or entry.startswith(f"{name}.")}
        if not runs:
            missing.add(place)
    return sorted(missing)


def run_programs(folder):
    """Run each stage, sampling, inpainting and each kind of evaluation, at the smallest sizes."""
    def call(program, *words):
        sys.argv = [f"{program.__name__}.py", *map(str, words)]
        assert not program.main()

    def write(place, pixels):
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        return path

    # The networks' files, and photos, masks, references.
    weights, clip = folder / "weights", written(folder / "clip", clip_weights())
    weights.mkdir()
    write_files(weights, "squeeze", lpips_weights("squeeze"))
    torch.save(inception_weights(), weights / fid.FILE)
    rng = np.random.default_rng(0)
    for i in range(4):
        photo = write(f"photos/{i}.png", rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        write(f"real/{i}.png", rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        mask = np.zeros((32, 32), np.uint8)
        mask[8:24, 4:20] = 255
        mask = write(f"masks/{i}.png", mask)
    wide = write("wide.png", rng.integers(0, 256, (32, 64, 3), dtype=np.uint8))
    hole = write("hole.png", np.full((32, 64), 255, np.uint8))

    # Train: VQ with all stages and the report, a second decoder on it; KL on photos.
    vq, concat, kl = (folder / name for name in ("vq", "concat", "kl"))
    common = ("--size", 32, "--steps", 2, "--batch-size", 2, "--disc-start", 0, "--workers", 0,
              "--device", "cpu", "--perceptual", "squeeze", "--weights", weights)
    call(train, *common, "--codes", 8, "--refit-samples", 64, "--timesteps", 6, "--out", vq)
    call(train, *common, "--stage", "decoder", "--vqgan", vq, "--blend", "concat", "--out", concat)
    call(train, *common, "--data", "folder", "--root", folder / "photos", "--first-stage", "kl-f8",
         "--preset", "tiny", "--out", kl)

    # Use: samples as a picture and as files, a small hole and one larger than the prior's map.
    device = ("--device", "cpu")
    call(sample, "--run", vq, "-n", 2, "--steps", "1,2", *device, "-o", folder / "samples.png")
    call(sample, "--run", vq, "-n", 4, "--steps", 2, *device, "-o", f"{folder}/pred/")
    for pair in ((photo, mask), (wide, hole)):
        call(inpaint, *pair, "--run", vq, "--steps", 2, "--resample", 2, "--compare", *device,
             "-o", folder / "filled.png")
    call(convert, vq, "--layers")
    call(convert, concat, "-o", folder / "model.pt")
    call(convert, kl / "vqgan" / "last.pt", "--to-diffusers", folder / "diffusers")
    call(convert, folder / "diffusers")

    # Measure: runs on one first stage, their codes, pairs of files, sets, LaMa's protocol.
    common = ("--weights", weights, "-n", 2, *device)
    call(eval, vq, concat, *common, "--no-fid", "--table", 3)
    call(eval, vq, *common, "--no-fid", "--table", "ddm1")
    for i in range(4):
        (folder / "pred" / f"0000{i}.png").rename(folder / "pred" / f"{i}.png")
    pred = ("--pred", folder / "pred", *common)
    pairs = ("--real", folder / "real", "--masks", folder / "masks", "--refs", folder / "photos")
    call(eval, *pred, *pairs, "--lpips", "squeeze", "--clip", clip, "--no-fid", "--table", 4)
    call(eval, *pred, "--unpaired", "--data", "signs", "--table", 6)
    call(image_pairs, folder / "photos", "-o", folder / "set", "--size", 32)


@pytest.fixture(scope="module")
def entered(tmp_path_factory):
    """What the programs enter, with presets that are small everywhere."""
    small = {name: vars(TINY) | {"latent": latent} for name, latent in (("tiny", "vq"),
                                                                        ("kl-f8", "kl"))}
    with pytest.MonkeyPatch.context() as patch:
        for name, fields in small.items():
            patch.setitem(VQGAN_PRESETS, name, VQGANConfig(**fields))
        patch.setitem(UNET_PRESETS, "tiny", UNetConfig(**PRIOR["net"]))
        patch.setitem(data.SIGNS_LENGTH, "val", 4)
        patch.setattr(train, "curves", lambda *_: None)      # matplotlib: half of the whole time
        patch.setattr(sys, "argv", [])
        return entered_by(lambda: run_programs(tmp_path_factory.mktemp("programs")))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_every_tag_stands_on_code_that_the_programs_run(path, entered):
    missing = not_entered(path, entered)
    assert not missing, f"no program enters {missing}: put their tags on the code that runs"


def test_a_tag_on_code_that_nothing_runs_is_found(tmp_path):
    path = tmp_path / "example.py"
    path.write_text('''
A = 1          # [AVQ Tab. 1]


def runs():
    """[AVQ Eq. 1]"""
    return [n for n in range(A)]


def idle():
    """[AVQ Eq. 2]"""
    return 0


class Used:
    """[AVQ Eq. 3]"""

    def runs(self):
        """[AVQ Eq. 4]"""
        return runs()

    def idle(self):
        """[AVQ Eq. 5]"""
        return 0


class UsedAlone:
    """[AVQ Eq. 6]"""

    def idle(self):
        return 0
''')
    spec = importlib.util.spec_from_file_location("example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert not_entered(path, entered_by(lambda: None)) == [
        "example.py:A", "example.py:Used", "example.py:Used.idle", "example.py:Used.runs",
        "example.py:UsedAlone", "example.py:idle", "example.py:runs"]
    assert not_entered(path, entered_by(example.Used().runs)) == [
        "example.py:Used.idle", "example.py:UsedAlone", "example.py:idle"]
