"""inpaint.py: what is known stays, what is hidden is never looked at, the same seed gives the same
bytes; and the program, whole and misused."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import (
    PRIOR,
    TINY,
    settings,
    write_decoder,
    write_first_stage,
    write_prior,
    write_stage,
)

import inpaint
from convert import load_model, load_prior
from diffusion import MultinomialDiffusion
from distributed import UserError, exit_on_user_error
from inpaint import (
    canvas_to_draw_on,
    complete,
    decode,
    fill_with_mean,
    inpaint_photo,
    latents,
    prepare,
    read_pair,
    windows,
)
from vqgan import VQGAN

ROOT = Path(__file__).resolve().parent.parent
GRID = (8, 8)                                    # of the tests' prior: 16 x 16 px


def write_all(run, **options):
    """All that inpainting needs in one run folder."""
    _, parent = write_first_stage(run)
    write_decoder(run, parent)
    write_prior(run, parent, GRID, **options)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def models(run):
    return load_model(run), load_prior(run)


def photo_of(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def box(height, width, top, bottom, left, right):
    hole = np.zeros((height, width), bool)
    hole[top:bottom, left:right] = True
    return hole


# -- from hole to picture --------------------------------------------------------------------------


def test_a_picture_is_the_decoding_of_the_completed_codes_with_the_photo_beside_them(models):
    model, prior = models
    photo, hole = photo_of(16, 16), box(16, 16, 3, 11, 5, 16)
    picture = inpaint_photo(model, photo, hole, prior, seed=7, steps=4, resample=2)
    x = torch.tensor(photo).permute(2, 0, 1)[None] / 127.5 - 1
    mask = torch.tensor(hole)[None, None].float()
    known = torch.tensor([[not hole[i:i + 2, j:j + 2].any() for j in range(0, 16, 2)]
                          for i in range(0, 16, 2)])[None]
    first_stage = model.first_stage
    indices = first_stage.indices(fill_with_mean(x, mask))
    key = np.random.SeedSequence((403, 7, 0)).generate_state(1, np.uint64)[0]
    codes = prior.diffusion.inpaint(prior.unet, indices, known, 4, 2,
                                    [torch.Generator().manual_seed(int(key))])
    assert torch.equal(codes[known], indices[known])
    z = first_stage.quantize.lookup(codes)
    x_hat = model.decode(z, image=x, mask=mask)[0].permute(1, 2, 0).numpy()
    expected = np.round((np.clip(x_hat, -1, 1).astype(float) + 1) * 127.5)
    assert np.abs(picture - expected).max() <= 1    # float32 may round a half otherwise
    assert (picture == expected).mean() > 0.99


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 16), (17, 40), (40, 33), (90, 18)])
@pytest.mark.parametrize("tile", [False, True])
def test_any_size_comes_back_in_that_size_with_nothing_of_what_the_hole_hides(models, size, tile):
    model, prior = models
    photo = photo_of(*size)
    top, left = size[0] // 4, size[1] // 5
    hole = box(*size, top, top + size[0] // 2 + 1, left, size[1])
    other = np.where(hole[..., None], 255 - photo, photo)
    for given in (prior, None):
        picture = inpaint_photo(model, photo, hole, given, steps=2, tile=tile)
        assert picture.dtype == np.uint8
        assert picture.shape == photo.shape
        assert np.array_equal(inpaint_photo(model, other, hole, given, steps=2, tile=tile), picture)


@pytest.mark.parametrize("decoder", ["asym", "vanilla", "paste"])
def test_the_known_pixels_are_the_photos_only_where_they_are_pasted(models, decoder):
    model, prior = models
    photo, hole = photo_of(21, 30), box(21, 30, 5, 15, 8, 20)
    plain = inpaint_photo(model, photo, hole, prior, decoder=decoder, steps=2)
    pasted = inpaint_photo(model, photo, hole, prior, decoder=decoder, steps=2, composite=True)
    assert np.array_equal(pasted[~hole], photo[~hole])
    assert np.array_equal(pasted[hole], plain[hole])
    assert np.array_equal(plain[~hole], photo[~hole]) == (decoder == "paste")


def test_the_decoders_are_the_models_two_and_nothing_else(models):
    model, _ = models
    canvas = prepare(photo_of(16, 20), box(16, 20, 2, 9, 3, 9), 2)
    z = model.encode(canvas.x)

    def rounded(x_hat):
        return np.round((x_hat[0].permute(1, 2, 0).clamp(-1, 1).numpy() + 1) / 2 * 255)

    assert np.array_equal(decode(model, z, canvas), rounded(
        model.decode(z, image=canvas.x, mask=canvas.mask)))
    vanilla = decode(model, z, canvas, "vanilla")
    assert np.array_equal(vanilla, rounded(model.first_stage.decode(z)))
    assert np.array_equal(decode(model.first_stage, z, canvas, "vanilla"), vanilla)


def test_sample_i_depends_on_the_seed_and_i_alone(models):
    model, prior = models
    canvas = prepare(photo_of(30, 24), box(30, 24, 4, 20, 4, 20), 2, GRID)

    def drawn(samples, seed=0):
        return list(latents(model, canvas, prior, samples=samples, seed=seed, steps=3))

    three = drawn(3)
    assert all(torch.equal(a, b) for a, b in zip(drawn(2), three))
    assert not torch.equal(three[0], three[1])
    assert not torch.equal(drawn(1, seed=1)[0], three[0])
    assert not torch.equal(drawn(1, seed=1)[0], three[1])


def test_a_full_mask_is_a_sample_in_which_no_pixel_of_the_photo_counts(models):
    model, prior = models
    hole = np.ones((16, 16), bool)
    first, second = (inpaint_photo(model, photo_of(16, 16, seed), hole, prior) for seed in (0, 1))
    assert np.array_equal(first, second)
    assert not np.array_equal(inpaint_photo(model, photo_of(16, 16), hole, prior, seed=1), first)


def test_with_nothing_to_generate_the_photo_stays_as_it_is(models):
    photo = photo_of(9, 10)
    picture = inpaint_photo(models[0], photo, np.zeros((9, 10)), models[1])
    assert np.array_equal(picture, photo)
    assert picture is not photo


def test_without_a_prior_the_latent_is_that_of_the_photo_with_its_hole_in_one_colour(models):
    model, _ = models
    canvas = prepare(photo_of(16, 20), box(16, 20, 2, 9, 3, 9), 2)
    (z,) = latents(model, canvas)
    assert torch.equal(z, model.encode(fill_with_mean(canvas.x, canvas.mask)))


def test_where_one_window_is_enough_or_tiles_are_asked_for_the_prior_draws_at_full_size():
    large = prepare(photo_of(40, 60), box(40, 60, 0, 40, 10, 50), 2, GRID)
    small = prepare(photo_of(40, 60), box(40, 60, 20, 24, 10, 18), 2, GRID)
    assert canvas_to_draw_on(small, 2, GRID) is small
    assert canvas_to_draw_on(large, 2, GRID, tile=True) is large
    assert canvas_to_draw_on(large, 2, GRID).hole.shape == (16, 24)
    assert len(windows(~large.known[0], GRID)) > 4


def test_a_hole_drawn_in_a_smaller_copy_is_enlarged_and_encoded_with_the_photo_around_it(models):
    model, prior = models
    photo, hole = photo_of(40, 60), box(40, 60, 0, 40, 10, 50)
    canvas = prepare(photo, hole, 2, GRID)
    drawn = canvas_to_draw_on(canvas, 2, GRID)
    (z,) = latents(model, canvas, prior, drawn, steps=2)
    (small,) = latents(model, drawn, prior, steps=2)
    picture = decode(model, small, drawn)
    large = np.array(Image.fromarray(picture).resize((60, 40), Image.Resampling.BICUBIC))
    filled = np.where(hole[..., None], large, photo)
    x = torch.tensor(filled).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.equal(z, model.encode(x))


def test_tiles_are_drawn_on_the_codes_of_the_whole_photo(models):
    model, prior = models
    canvas = prepare(photo_of(40, 60), box(40, 60, 0, 40, 10, 50), 2, GRID)
    (z,) = latents(model, canvas, prior, canvas, steps=2, seed=3)
    indices = model.first_stage.indices(fill_with_mean(canvas.x, canvas.mask))
    key = np.random.SeedSequence((403, 3, 0)).generate_state(1, np.uint64)[0]
    codes = complete(prior, indices, canvas.known, [torch.Generator().manual_seed(int(key))], 2)
    assert torch.equal(z, model.first_stage.quantize.lookup(codes))


def test_a_margin_around_the_hole_is_drawn_anew(models, monkeypatch):
    model, prior = models
    photo, hole, unknown = photo_of(16, 16), box(16, 16, 6, 10, 6, 10), []

    def note(prior, indices, known, *_):
        unknown.append((~known).sum().item())
        return indices

    monkeypatch.setattr(inpaint, "complete", note)
    for margin in (0, 1, 9):
        inpaint_photo(model, photo, hole, prior, margin=margin)
    assert unknown == [4, 16, 64]                    # 2 x 2 cells of 8 x 8, then with neighbours


def test_unless_told_a_prior_takes_all_its_steps_up_to_100(models, monkeypatch):
    model, prior = models
    canvas, asked = prepare(photo_of(16, 16), box(16, 16, 2, 9, 3, 9), 2, GRID), []

    def note(prior, indices, known, generators, steps, resample, temperature):
        asked.append((steps, resample, temperature))
        return indices

    monkeypatch.setattr(inpaint, "complete", note)
    list(latents(model, canvas, prior))
    longer = replace(prior, diffusion=MultinomialDiffusion(prior.diffusion.K, 400))
    list(latents(model, canvas, longer))
    list(latents(model, canvas, prior, steps=5, resample=2, temperature=0.5))
    assert asked == [(PRIOR["T"], 1, 1.0), (100, 1, 1.0), (5, 2, 0.5)]


def test_models_that_do_not_belong_together_are_refused(models, tmp_path):
    model, prior = models
    photo, hole = photo_of(16, 16), box(16, 16, 2, 9, 3, 9)
    with pytest.raises(UserError, match=r"no asymmetric decoder: .*--stage decoder"):
        inpaint_photo(model.first_stage, photo, hole, prior)
    alone = load_model(write_all(tmp_path / "alone"))
    alone.first_stage.decoder = None
    for decoder in ("vanilla", "paste"):
        with pytest.raises(UserError, match=f"no --decoder {decoder}"):
            inpaint_photo(alone, photo, hole, prior, decoder=decoder)
    _, parent = write_first_stage(tmp_path / "other", seed=5)
    write_decoder(tmp_path / "other", parent)
    with pytest.raises(UserError, match="the prior is of other codes"):
        inpaint_photo(load_model(tmp_path / "other"), photo, hole, prior)
    with pytest.raises(ValueError, match=r"a mask of \(16, 16\), not \(16, 20\)"):
        inpaint_photo(model, photo, box(16, 20, 2, 9, 3, 9), prior)


# -- the program -----------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with photo.png (30 x 26) and mask.png, half as large, white in the middle."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo_of(26, 30)).save("photo.png")
    save_mask("mask.png", box(13, 15, 4, 9, 5, 10))
    return tmp_path


def save_mask(path, hole):
    Image.fromarray(hole.astype(np.uint8) * 255).save(path)


def pixels(path):
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.array(image)


def call(monkeypatch, *arguments):
    """The command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["inpaint.py", *map(str, arguments), "--device", "cpu"])
    with pytest.raises(SystemExit) as left:
        exit_on_user_error(inpaint.main)
    return left.value.code or 0


def test_the_program_writes_its_pictures_and_says_what_it_does(run, here):
    command = [sys.executable, str(ROOT / "inpaint.py"), "photo.png", "mask.png", "--run", str(run),
               "-o", "made/out.png", "--samples", "2", "--compare", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:2] == [
        "mask.png: 15 x 13 px, resized to the photo's 30 x 26, to the nearest pixel",
        f"photo.png: 30 x 26 px, 12.8% to be generated; pixels by {run}, decoder asym"]
    assert lines[2] == (f"codes by the prior in {run}: 25 of 15 x 13, one window of 8 x 8; "
                        "6 of 6 steps, resample 1, temperature 1, seed 0")
    assert lines[-1].startswith("wrote made/out-1.png, made/out-2.png, made/out-compare.png (")
    assert sorted(path.name for path in (here / "made").iterdir()) == [
        "out-1.png", "out-2.png", "out-compare.png"]
    hole = np.repeat(np.repeat(box(13, 15, 4, 9, 5, 10), 2, 0), 2, 1)
    expected = inpaint_photo(load_model(run), photo_of(26, 30), hole, load_prior(run))
    assert np.array_equal(pixels("made/out-1.png"), expected)
    assert not np.array_equal(pixels("made/out-2.png"), expected)


@pytest.mark.parametrize("size", [(26, 30), (13, 15), (9, 41), (5, 3), (61, 31)])    # no ties
def test_a_mask_of_another_size_is_resized_to_the_nearest_pixel(here, capsys, size):
    hole = np.random.default_rng(0).random(size) < 0.5
    save_mask("mask.png", hole)
    photo, resized = read_pair("photo.png", "mask.png")
    rows, columns = ((np.arange(n) * 2 + 1) * m // (2 * n) for n, m in zip((26, 30), size))
    assert np.array_equal(resized, hole[rows][:, columns])
    assert np.array_equal(photo, photo_of(26, 30))
    assert ("resized to the photo's 30 x 26" in capsys.readouterr().out) == (size != (26, 30))


def test_the_program_says_where_the_prior_draws(run, here, monkeypatch, capsys):
    photo = photo_of(41, 60)
    Image.fromarray(photo).save("large.png")
    save_mask("hole.png", box(41, 60, 0, 40, 10, 50))
    common = "large.png", "hole.png", "--run", run, "--steps", 2
    assert call(monkeypatch, *common) == 0
    assert call(monkeypatch, *common, "--tile", "-o", "tiled.png") == 0
    resized, tiled = capsys.readouterr().out.split("wrote ")[:2]
    assert "41 px are padded to 60 x 42, mirrored, and cut afterwards" in resized
    assert ("too large for one window of the prior: drawn in a copy of 23 x 16 px and enlarged "
            "(--tile draws it at full size)\n23 x 16 px are padded to 24 x 16") in resized
    assert "12 x 8, " in resized
    assert "copy" not in tiled
    assert "of 30 x 21, " in tiled
    assert " windows of 8 x 8, one after the other; 2 of 6 steps" in tiled
    hole = box(41, 60, 0, 40, 10, 50)
    for path, tile in (("large-inpainted.png", False), ("tiled.png", True)):
        expected = inpaint_photo(load_model(run), photo, hole, load_prior(run), steps=2, tile=tile)
        assert np.array_equal(pixels(path), expected)


def test_the_last_line_of_progress_is_that_of_the_last_step(run, here, monkeypatch, capsys):
    save_mask("mask.png", box(26, 30, 0, 26, 0, 29))
    assert call(monkeypatch, "photo.png", "mask.png", "--run", run, "--steps", 4, "--resample", 3,
                "--samples", 2, "--tile") == 0
    canvas = prepare(photo_of(26, 30), box(26, 30, 0, 26, 0, 29), 2, GRID)
    calls = 2 * len(windows(~canvas.known[0], GRID)) * (4 + 3 * 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "denoising" in line]
    assert lines[-1].startswith(f"denoising {calls}/{calls}  ")


def test_another_number_of_samples_gives_the_same_ones(run, here, monkeypatch):
    common = "photo.png", "mask.png", "--run", run, "--seed", 4
    assert call(monkeypatch, *common, "-o", "one.png") == 0
    assert call(monkeypatch, *common, "-o", "two.png", "--samples", 2) == 0
    assert (here / "one.png").read_bytes() == (here / "two-1.png").read_bytes()
    assert (here / "one.png").read_bytes() != (here / "two-2.png").read_bytes()


def test_the_prior_may_come_from_another_run_on_the_same_first_stage(run, here, monkeypatch,
                                                                     capsys):
    _, parent = write_first_stage(here / "decoder")
    write_decoder(here / "decoder", parent)
    write_prior(here / "prior", parent, GRID, vqgan=str(here / "decoder"), finished=False)
    common = "photo.png", "mask.png", "--run", here / "decoder"
    assert call(monkeypatch, *common, "--prior", here / "prior", "-o", "two.png") == 0
    said = capsys.readouterr().out
    assert f"warning: the prior in {here / 'prior'} is not trained to its end (step 2)" in said
    assert call(monkeypatch, *common[:3], run, "-o", "one.png") == 0
    assert np.array_equal(pixels("one.png"), pixels("two.png"))
    capsys.readouterr()
    assert call(monkeypatch, *common) == 2
    said = capsys.readouterr().err
    assert "train.py --stage prior --vqgan" in said
    assert "name one in another run by --prior; or see by --no-prior" in said


def test_with_nothing_to_generate_the_program_needs_no_models(here, monkeypatch, capsys):
    save_mask("mask.png", np.zeros((13, 15), bool))
    assert call(monkeypatch, "photo.png", "mask.png", "--run", "nowhere") == 0
    said = capsys.readouterr().out
    assert "warning: mask.png: nothing in it is to be generated" in said
    assert "the photo is written as it is" in said
    assert np.array_equal(pixels("photo-inpainted.png"), photo_of(26, 30))


def test_nearly_all_to_be_generated_is_doubted_and_black_means_so_if_told(run, here, monkeypatch,
                                                                           capsys):
    save_mask("mask.png", ~box(26, 30, 0, 5, 0, 7))
    assert call(monkeypatch, "photo.png", "mask.png", "--run", run, "--steps", 1) == 0
    said = capsys.readouterr().out
    assert "warning: mask.png: 96% of it is to be generated" in said
    assert "black does with --invert-mask" in said
    assert call(monkeypatch, "photo.png", "mask.png", "--run", run, "--steps", 1, "--invert-mask",
                "--composite", "-o", "out.png") == 0
    assert "4.5% to be generated" in capsys.readouterr().out
    same = (pixels("out.png") == photo_of(26, 30)).all(2)
    assert same[5:].all()
    assert same[:, 7:].all()
    assert not same[:5, :7].all()


@pytest.mark.parametrize(("flags", "captions"), [
    ((), ["original", "masked", "vanilla decoder", "ours"]),
    (("--composite",), ["original", "masked", "vanilla decoder", "ours, photo pasted"]),
    (("--decoder", "vanilla"), ["original", "masked", "vanilla decoder"]),
    (("--decoder", "paste"), ["original", "masked", "vanilla decoder", "vanilla, photo pasted"])])
def test_the_comparison_has_a_column_each_and_a_row_a_sample(run, here, monkeypatch, flags,
                                                             captions):
    shown = {}

    def note(columns, path):
        shown[path.name] = columns

    monkeypatch.setattr(inpaint, "image_grid", note)
    assert call(monkeypatch, "photo.png", "mask.png", "--run", run, "-o", "out.png", "--samples", 2,
                "--compare", *flags) == 0
    columns = shown["out-compare.png"]
    assert list(columns) == captions
    photo = torch.tensor(photo_of(26, 30)).permute(2, 0, 1) / 127.5 - 1
    hole = torch.tensor(np.repeat(np.repeat(box(13, 15, 4, 9, 5, 10), 2, 0), 2, 1))
    for row, made in enumerate(("out-1.png", "out-2.png")):
        assert torch.equal(columns["original"][row], photo)
        assert torch.equal(columns["masked"][row], photo * ~hole)
        vanilla = columns["vanilla decoder"][row]
        assert not torch.equal(vanilla * ~hole, photo * ~hole)
        picture = torch.tensor(pixels(made)).permute(2, 0, 1) / 127.5 - 1
        assert torch.equal(columns[captions[-1]][row], picture)


def test_the_comparison_does_without_a_decoder_that_is_not_there(run, here, monkeypatch, capsys):
    model = load_model(run)
    model.first_stage.decoder = None
    monkeypatch.setattr(inpaint, "_open_models", lambda args, device: (model, load_prior(run)))
    assert call(monkeypatch, "photo.png", "mask.png", "--run", run, "--compare") == 0
    assert "came without its own decoder, so the comparison has none" in capsys.readouterr().out
    assert (here / "photo-inpainted-compare.png").exists()


MISTAKES = [
    (("gone.png", "mask.png"), "gone.png: no such file"),
    (("photo.png", "gone.png"), "gone.png: no such file"),
    (("text.png", "mask.png"), "text.png: cannot be decoded"),
    (("--run", "nowhere"), "nowhere: no such run folder"),
    (("--steps", "7"), "--steps: give numbers from 1 to T = 6, which this prior has"),
    (("--steps", "0"), "--steps 0: the least is 1"),
    (("--samples", "0"), "--samples 0: the least is 1"),
    (("--resample", "0"), "--resample 0: the least is 1"),
    (("--seed", "-1"), "--seed -1: the least is 0"),
    (("--temperature", "0"), "--temperature 0.0: must be positive"),
    (("--no-prior", "--samples", "2"), "--samples is for the prior, and --no-prior does without"),
    (("--no-prior", "--tile"), "--tile is for the prior"),
    (("-o", "out.jpg"), "-o out.jpg: pictures are PNG files"),
    (("-o", "photo.png"), "photo.png would be written over photo.png; choose another -o"),
    (("-o", "./mask.png"), "mask.png would be written over mask.png"),
    (("-o", "text.png/out.png"), "text.png/out.png: cannot be written"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(run, here, monkeypatch, capsys, arguments, message):
    (here / "text.png").write_text("no picture")
    before = {path: path.read_bytes() for path in here.iterdir()}
    given = arguments if arguments[0].endswith(".png") else ("photo.png", "mask.png", *arguments)
    where = () if "--run" in given else ("--run", run)
    assert call(monkeypatch, *given, *where) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1
    assert {path: path.read_bytes() for path in here.iterdir()} == before


def test_a_copy_of_the_photo_under_another_name_is_not_written_over(run, here, monkeypatch, capsys):
    os.link("photo.png", "link-2.png")
    assert call(monkeypatch, "photo.png", "mask.png", "--run", run, "-o", "link.png",
                "--samples", 3) == 2
    assert "link-2.png would be written over photo.png" in capsys.readouterr().err


def test_a_first_stage_alone_or_with_a_kl_latent_says_what_is_to_be_done(here, monkeypatch, capsys):
    _, parent = write_first_stage(here / "alone")
    write_prior(here / "alone", parent, GRID)
    common = "photo.png", "mask.png", "--run"
    assert call(monkeypatch, *common, "alone") == 2
    assert "alone has no asymmetric decoder: train one" in capsys.readouterr().err
    assert call(monkeypatch, *common, "alone", "--decoder", "vanilla") == 0
    fields = settings()["first_stage"] | {"latent": "kl"}
    kl = VQGAN(replace(TINY, latent="kl"))
    write_stage(here / "kl", "vqgan", kl.state_dict(), settings() | {"first_stage": fields})
    capsys.readouterr()
    assert call(monkeypatch, *common, "kl", "--decoder", "vanilla") == 2
    assert "kl has a KL latent, no codes that a prior could draw" in capsys.readouterr().err
    assert call(monkeypatch, *common, "kl", "--decoder", "vanilla", "--no-prior") == 0
    assert "no prior: the codes are those of the photo" in capsys.readouterr().out


def test_a_photo_too_large_for_the_device_is_a_line_with_the_mend(run, here, monkeypatch, capsys):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")

    monkeypatch.setattr(inpaint, "_make", fail)
    assert call(monkeypatch, "photo.png", "mask.png", "--run", run) == 2
    assert "photo.png: 30 x 26 px are too many" in capsys.readouterr().err
