"""inpaint.py: windows, what is known and what is hidden, held-out images, the program."""

import itertools
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from tiny_runs import PRIOR, SIZE, TINY

import inpaint
from convert import load_model, load_prior
from data import Signs
from diffusion import MultinomialDiffusion
from distributed import UserError, exit_on_user_error
from inpaint import COMPLETIONS, IMAGES, RESAMPLE, ROWS, inpaint_photo
from vqgan import VQGAN

ROOT = Path(inpaint.__file__).parent
GRID = (8, 8)                                    # of the tests' prior: 16 x 16 px


def write_all(run, grid=GRID):
    """All that inpainting needs in one run folder."""
    _, parent = tiny_runs.write_first_stage(run)
    tiny_runs.write_decoder(run, parent)
    tiny_runs.write_prior(run, parent, grid)
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


def x_of(photo):
    """(1,3,H,W) in [-1,1]."""
    return torch.tensor(photo).permute(2, 0, 1)[None] / 127.5 - 1


# -- windows and codes -----------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """What `complete` is asked for, which leaves the codes as they are."""
    calls = []

    def note(prior, indices, known, generators, steps=None, resample=1):
        calls.append(SimpleNamespace(indices=indices, known=known, count=len(generators),
                                     how=(steps, resample)))
        return indices

    monkeypatch.setattr(inpaint, "complete", note)
    return calls


def corners(shape, grid, *boxes):
    """Top left corners of the windows over boxes (top, bottom, left, right) in a map."""
    unknown = torch.zeros(shape, dtype=torch.bool)
    for top, bottom, left, right in boxes:
        unknown[top:bottom, left:right] = True
    return [(rows.start, columns.start) for rows, columns in inpaint.windows(unknown, grid)]


def test_windows_of_the_grid_come_line_by_line_and_cover_the_hole_exactly_once():
    random = np.random.default_rng(0)
    for _ in range(300):
        grid = tuple(random.integers(1, 10, 2).tolist())
        unknown = torch.zeros([side + random.integers(31) for side in grid], dtype=torch.bool)
        for _ in range(random.integers(1, 4)):
            top, left = random.integers(unknown.shape)
            unknown[top:top + random.integers(1, 21), left:left + random.integers(1, 21)] = True
        places = inpaint.windows(unknown, grid)
        assert places == sorted(places, key=lambda place: (place[0].start, place[1].start))
        for rows, columns in places:
            assert unknown[rows, columns].any()                  # each one has something to draw
            assert unknown[rows, columns].shape == grid          # and is inside of the map
            assert min(rows.start, columns.start) >= 0
            unknown[rows, columns] = False
        assert not unknown.any()


def test_the_windows_of_one_hole_overlap_by_half_or_more():
    several = 0
    for top, height, length in itertools.product(range(12), range(1, 25), range(1, 10)):
        starts = corners((40, 9), (length, 9), (top, top + height, 0, 9))
        assert all(b - a <= max(1, length // 2) for (a, _), (b, _) in itertools.pairwise(starts))
        several += len(starts) > 1
    assert several > 1000


def test_a_hole_with_its_context_in_one_window_gets_just_that_one_centred():
    assert corners((40, 50), (16, 12), (20, 24, 30, 36)) == [(14, 27)]
    assert corners((40, 50), (16, 12), (0, 4, 44, 50)) == [(0, 38)]      # no context at the border
    assert corners((16, 12), (16, 12), (0, 16, 0, 12)) == [(0, 0)]
    assert corners((16, 12), (16, 12)) == []
    # A larger one is begun in the context above and left of it.
    assert corners((40, 40), (16, 16), (10, 24, 12, 16)) == [(6, 6), (12, 6)]


def test_each_window_sees_what_is_known_and_what_was_drawn_before():
    unknown, asked = torch.tensor(box(12, 20, 3, 9, 4, 17)), []
    indices, known = torch.arange(50, 290).view(1, 12, 20), ~unknown[None]
    before = indices.clone(), known.clone()

    def answer(unet, codes, given, steps, resample, generators):          # the number of the call
        asked.append((codes.clone(), given.clone()))
        assert (steps, resample) == (3, 2)
        return torch.where(given, codes, len(asked))

    prior = SimpleNamespace(grid=(4, 4), unet=None, diffusion=SimpleNamespace(inpaint=answer))
    drawn = inpaint.complete(prior, indices, known, None, 3, 2)
    assert torch.equal(indices, before[0])                       # what was given is not changed
    assert torch.equal(known, before[1])
    now, seen = indices.clone(), known.clone()
    places = inpaint.windows(unknown, (4, 4))
    assert len(places) == len(asked) > 4
    for number, ((rows, columns), (codes, given)) in enumerate(zip(places, asked), 1):
        assert torch.equal(given, seen[:, rows, columns])
        assert torch.equal(codes[given], now[:, rows, columns][given])
        now[:, rows, columns] = torch.where(given, codes, number)
        seen[:, rows, columns] = True
    assert torch.equal(drawn, now)
    assert torch.equal(drawn[known], indices[known])


def test_a_hole_becomes_the_mean_colour_of_what_is_known_in_its_image():
    x = torch.rand(3, 3, 5, 7) * 2 - 1
    mask = (torch.rand(3, 1, 5, 7) < 0.5).float()
    mask[2] = 1
    filled = inpaint.fill_with_mean(x, mask)
    for image, m, made in zip(x, mask[:, 0], filled):
        for c in range(3):
            known = image[c][m == 0]
            assert torch.equal(made[c][m == 0], known)
            mean = known.mean().item() if len(known) else 0.0
            assert made[c][m == 1].tolist() == pytest.approx([mean] * int(m.sum()), abs=1e-6)
    hidden = torch.where(mask == 1, torch.rand_like(x), x)
    assert torch.equal(inpaint.fill_with_mean(hidden, mask), filled)


# -- from hole to picture --------------------------------------------------------------------------


def test_a_picture_is_the_decoding_of_the_completed_codes_with_the_photo_beside_them(models):
    model, prior = models
    photo, hole = photo_of(16, 16), box(16, 16, 3, 11, 5, 16)
    x, mask = x_of(photo), torch.tensor(hole)[None, None].float()
    known = torch.tensor([[not hole[i:i + 2, j:j + 2].any() for j in range(0, 16, 2)]
                          for i in range(0, 16, 2)])[None]
    first_stage = model.first_stage
    indices = first_stage.indices(inpaint.fill_with_mean(x, mask))
    key = np.random.SeedSequence((403, 7, 0)).generate_state(1, np.uint64)[0]
    codes = prior.diffusion.inpaint(prior.unet, indices, known, 4, 2,
                                    [torch.Generator().manual_seed(int(key))])
    assert torch.equal(codes[known], indices[known])
    z = first_stage.quantize.lookup(codes)
    for decoder, x_hat in (("asym", model.decode(z, image=x, mask=mask)),
                           ("vanilla", first_stage.decode(z))):
        expected = (x_hat[0].permute(1, 2, 0).double().clamp(-1, 1).numpy() + 1) * 127.5
        picture = inpaint_photo(model, photo, hole, prior, decoder=decoder, seed=7, steps=4,
                                resample=2)
        assert np.abs(picture - expected).max() < 0.501      # rounded, in float32


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (17, 40), (41, 37), (90, 18), (100, 130)])
def test_any_size_comes_back_in_that_size_with_nothing_of_what_the_hole_hides(models, size):
    model, prior = models
    photo = photo_of(*size)
    top, left = size[0] // 4, size[1] // 5
    hole = box(*size, top, top + size[0] // 2 + 1, left, size[1])
    other = np.where(hole[..., None], 255 - photo, photo)
    for given in (prior, None):
        picture, again = (inpaint_photo(model, each, hole, given, steps=2)
                          for each in (photo, other))
        assert (picture.dtype, picture.shape) == (np.uint8, photo.shape)
        assert np.array_equal(again, picture)


@pytest.mark.parametrize("decoder", ["asym", "vanilla"])
def test_the_known_pixels_are_the_photos_only_where_they_are_pasted(models, decoder):
    model, prior = models
    photo, hole = photo_of(21, 30), box(21, 30, 5, 15, 8, 20)
    plain = inpaint_photo(model, photo, hole, prior, decoder=decoder, steps=2)
    pasted = inpaint_photo(model, photo, hole, prior, decoder=decoder, steps=2, composite=True)
    assert np.array_equal(pasted[~hole], photo[~hole])
    assert np.array_equal(pasted[hole], plain[hole])
    assert not np.array_equal(plain[~hole], photo[~hole])


@pytest.mark.parametrize(("size", "padded"), [((16, 20), (16, 20)), ((17, 20), (18, 20)),
                                              ((5, 3), (16, 16)), ((15, 41), (16, 42))])
def test_the_padding_is_a_mirror_to_multiples_of_f_and_to_the_grid_at_least(models, asked, size,
                                                                            padded, monkeypatch):
    """A mirrored hole is a hole, and a cell is known unless one of its pixels is in the hole."""
    model, prior = models
    photo, hole, seen = photo_of(*size), box(*size, 2, 4, 1, 3), {}
    monkeypatch.setattr(model, "decode", lambda z, **given: seen.update(given) or given["image"])
    assert np.array_equal(inpaint_photo(model, photo, hole, prior), photo)         # cut again
    rows, columns = ([*range(n), *reversed(range(n))] * 4 for n in size)
    rows, columns = rows[:padded[0]], columns[:padded[1]]
    mask = seen["mask"][0, 0].bool().numpy()
    assert torch.equal(seen["image"], x_of(photo[rows][:, columns]))
    assert np.array_equal(mask, hole[rows][:, columns])
    assert asked[0].known[0].tolist() == [[not mask[i:i + 2, j:j + 2].any()
                                           for j in range(0, padded[1], 2)]
                                          for i in range(0, padded[0], 2)]


def test_sample_i_depends_on_the_seed_and_i_alone(models):
    model, prior = models
    photo, hole = photo_of(30, 24), box(30, 24, 4, 20, 4, 20)

    def drawn(samples, seed=0):
        return [pictures["asym"].tobytes() for pictures in inpaint.inpaintings(
            model, photo, hole, prior, samples=samples, seed=seed, steps=3)]

    three = drawn(3)
    assert drawn(2) == three[:2]
    assert len({*three, *drawn(1, seed=1)}) == 4


def test_a_full_mask_is_a_sample_without_the_photo_and_an_empty_one_the_photo_itself(models):
    model, prior = models
    hole = np.ones((16, 16), bool)
    first, second = (inpaint_photo(model, photo_of(16, 16, seed), hole, prior) for seed in (0, 1))
    assert np.array_equal(first, second)
    assert not np.array_equal(inpaint_photo(model, photo_of(16, 16), hole, prior, seed=1), first)
    photo = photo_of(9, 10)                      # and with nothing to generate the photo stays
    picture = inpaint_photo(model, photo, np.zeros((9, 10)), prior)
    assert np.array_equal(picture, photo)
    assert picture is not photo


def test_without_a_prior_the_latent_is_that_of_the_photo_with_its_hole_in_one_colour(models):
    model, _ = models
    photo, hole = photo_of(16, 20), box(16, 20, 2, 9, 3, 9)
    x, mask = x_of(photo), torch.tensor(hole)[None, None].float()
    x_hat = model.decode(model.encode(inpaint.fill_with_mean(x, mask)), image=x, mask=mask)[0]
    expected = ((x_hat.permute(1, 2, 0).clamp(-1, 1) + 1) / 2 * 255).round().numpy()
    assert np.array_equal(inpaint_photo(model, photo, hole), expected)


# -- large photos ----------------------------------------------------------------------------------


def test_a_large_photo_is_its_cut_around_the_hole_inpainted_and_else_the_photo(models, monkeypatch):
    """The cut is twice as long as the hole or, if that is more, as long as a piece."""
    model, prior = models
    monkeypatch.setattr(inpaint, "MOST_CELLS", 10)
    photo = photo_of(90, 200)
    for hole, cut in ((box(90, 200, 40, 50, 100, 112), np.s_[35:55, 96:116]),
                      (box(90, 200, 40, 60, 2, 8), np.s_[30:70, 0:20]),
                      (box(90, 200, 5, 85, 30, 170), np.s_[:, :])):
        for given in (prior, None):
            picture = inpaint_photo(model, photo, hole, given, steps=2)
            part = inpaint_photo(model, photo[cut], hole[cut], given, steps=2)
            assert np.array_equal(picture[cut], part)
            changed = (picture != photo).any(2)
            assert changed[hole].all()
            changed[cut] = False
            assert not changed.any()


@pytest.mark.parametrize("given", ["prior", "no prior"])
def test_a_large_hole_is_decoded_in_pieces_that_see_those_before(models, given, monkeypatch):
    model, prior = models
    photo, hole, seen = photo_of(60, 80), box(60, 80, 5, 55, 6, 70), []
    decode, most = model.decode, 12
    monkeypatch.setattr(inpaint, "MOST_CELLS", most)

    def note(z, image, mask):
        seen.append((image, mask))
        return decode(z, image=image, mask=mask)

    monkeypatch.setattr(model, "decode", note)
    picture = inpaint_photo(model, photo, hole, prior if given == "prior" else None, steps=2)
    pieces = [(x, mask) for x, mask in seen if mask.shape[2:] == (2 * most, 2 * most)]
    assert len(pieces) > 6
    assert sum(mask.sum() for _, mask in pieces) >= hole.sum()           # mirrored ones are more
    assert pieces[0][1].mean() > 0.5 > pieces[1][1].mean()               # half of it was drawn
    assert (picture != photo).any(2)[hole].all()
    other = np.where(hole[..., None], 255 - photo, photo)                # the hole hides its pixels
    assert np.array_equal(inpaint_photo(model, other, hole, prior if given == "prior" else None,
                                        steps=2), picture)
    pasted = inpaint_photo(model, photo, hole, prior if given == "prior" else None, steps=2,
                           composite=True)
    assert np.array_equal(pasted, np.where(hole[..., None], picture, photo))


def test_no_piece_of_a_photo_of_12_megapixels_is_larger_than_512_px(models, monkeypatch):
    model, _ = models
    photo, hole, sizes = np.zeros((3000, 4000, 3), np.uint8), box(3000, 4000, 9, 300, 5, 40), []
    monkeypatch.setattr(model, "encode", lambda x: sizes.append(x.shape[2:]) or x)
    monkeypatch.setattr(model, "decode", lambda z, image, mask: image)
    assert np.array_equal(inpaint_photo(model, photo, hole), photo)
    assert max(max(size) for size in sizes) == 2 * inpaint.MOST_CELLS <= 512


@pytest.mark.parametrize("own", ["asym", "vanilla"])
def test_a_hole_drawn_in_a_smaller_copy_is_enlarged_and_encoded_with_the_photo_around_it(models,
                                                                                        own):
    model, prior = models
    model = model if own == "asym" else model.first_stage
    photo, hole = photo_of(40, 60), box(40, 60, 0, 40, 10, 50)
    small, small_hole = (np.array(Image.fromarray(array).resize((24, 16), Image.Resampling.BOX))
                         for array in (photo, hole.astype(np.float32)))
    picture = inpaint_photo(model, small, small_hole, prior, decoder=own, steps=2)
    large = np.array(Image.fromarray(picture).resize((60, 40), Image.Resampling.BICUBIC))
    z = model.encode(x_of(np.where(hole[..., None], large, photo)))
    seen = []
    decode = model.first_stage.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.first_stage, "decode", lambda z: (seen.append(z), decode(z))[1])
        inpaint_photo(model, photo, hole, prior, decoder="vanilla", steps=2)
    assert torch.equal(seen[-1], z)


@pytest.mark.parametrize(("size", "hole", "drawn"), [
    ((40, 60), (20, 24, 10, 18), (20, 30)),              # with its context in one window: as it is
    ((40, 60), (0, 40, 10, 50), (8, 12)), ((60, 40), (0, 50, 0, 30), (12, 8)),
    ((16, 60), (0, 16, 10, 50), (8, 30))])               # no smaller copy has a whole window
def test_the_smaller_copys_short_side_is_the_grids(models, asked, size, hole, drawn):
    inpaint_photo(models[0], photo_of(*size), box(*size, *hole), models[1])
    assert [call.indices.shape[1:] for call in asked] == [drawn]


def test_unless_told_a_prior_takes_all_its_steps_up_to_100(models, asked):
    model, prior = models
    photo, hole = photo_of(16, 16), box(16, 16, 2, 9, 3, 9)
    inpaint_photo(model, photo, hole, prior)
    longer = replace(prior, diffusion=MultinomialDiffusion(prior.diffusion.K, 400))
    inpaint_photo(model, photo, hole, longer)
    inpaint_photo(model, photo, hole, prior, steps=5, resample=2)
    assert [call.how for call in asked] == [(PRIOR["T"], 1), (100, 1), (5, 2)]


def test_models_that_do_not_belong_together_are_refused(models, tmp_path):
    model, prior = models
    photo, hole = photo_of(16, 16), box(16, 16, 2, 9, 3, 9)
    with pytest.raises(UserError, match=r"no decoder asym: .*--stage decoder"):
        inpaint_photo(model.first_stage, photo, hole, prior)
    alone = load_model(write_all(tmp_path / "alone"))
    alone.first_stage.decoder = None
    with pytest.raises(UserError, match="no decoder vanilla"):
        inpaint_photo(alone, photo, hole, prior, decoder="vanilla")
    with pytest.raises(ValueError, match="decoder 'ours': choose from asym, vanilla"):
        inpaint_photo(model, photo, hole, prior, decoder="ours")
    _, parent = tiny_runs.write_first_stage(tmp_path / "other", seed=5)
    tiny_runs.write_decoder(tmp_path / "other", parent)
    with pytest.raises(UserError, match="the prior has another codebook"):
        inpaint_photo(load_model(tmp_path / "other"), photo, hole, prior)
    with pytest.raises(ValueError, match=r"mask of \(16, 20\): sizes differ"):
        inpaint_photo(model, photo, box(16, 20, 2, 9, 3, 9), prior)


# -- held-out images -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """(prior, model) for images of the data set's size."""
    run = write_all(tmp_path_factory.mktemp("runs") / "held_out", (16, 16))
    return load_prior(run), load_model(run)


def test_completions_stand_beside_their_picture_and_differ_from_each_other(held_out):
    prior, _ = held_out
    signs = Signs("val", SIZE)
    with torch.inference_mode():
        groups, again = (inpaint.completion_rows(prior, signs, 1) for _ in range(2))
    assert len(groups) == 3
    for (caption, images), (_, others) in zip(groups, again, strict=True):
        assert "(1 steps, resample 5)" in caption
        assert all(torch.equal(a, b) for a, b in zip(images, others, strict=True))
        rows = torch.stack(images).unflatten(0, (IMAGES, 2 + COMPLETIONS))
        for row in rows[:, 2:]:
            assert len({picture.numpy().tobytes() for picture in row}) == COMPLETIONS
    first, second = (images[::2 + COMPLETIONS] for _, images in groups[:2])
    assert not torch.equal(first[0], second[0])                    # other pictures for each mask


def test_the_network_is_given_the_known_codes_under_the_papers_three_masks(held_out, asked):
    class WithoutTop(Signs):
        def image(self, index, rng=None):
            picture = super().image(index, rng).copy()
            picture[:5 * SIZE // 8] = 0
            return picture

    with torch.inference_mode():
        inpaint.completion_rows(held_out[0], Signs("val", SIZE), 4)
        inpaint.completion_rows(held_out[0], WithoutTop("val", SIZE), 4)
    assert torch.equal(asked[0].indices, asked[3].indices)       # what is hidden was not looked at
    known = torch.zeros(3, 16, 16, dtype=torch.bool)
    known[0, 10:], known[1, 8:, 8:], known[2, 4:12, 4:12] = True, True, True
    for call, expected in zip(asked, known):
        assert (call.count, call.how) == (IMAGES * COMPLETIONS, (4, RESAMPLE))
        assert torch.equal(call.known, expected.expand(call.count, -1, -1))


def test_inpainting_shows_both_decoders_on_the_same_codes(held_out, monkeypatch):
    (prior, model), seen = held_out, []

    def note(z, image=None, mask=None):
        seen.append((z, image, mask))
        return image if mask is not None else -z[:, :3]

    monkeypatch.setattr(prior.first_stage, "decode", note)
    monkeypatch.setattr(model, "decode", note)
    with torch.inference_mode():
        columns = inpaint.inpainting_columns(prior, model, Signs("val", SIZE, limit=4), 2)
    assert [len(images) for images in columns.values()] == [ROWS] * 4
    (z, *without), (same, image, mask) = seen
    assert without == [None, None]
    assert torch.equal(z, same)
    x, masked, vanilla, ours = (torch.stack(images) for images in columns.values())
    assert torch.equal(x[2], x[0])                                 # of four, from the start again
    assert not torch.equal(x[1], x[0])
    for shown, expected in ((image, x), (masked, x * (1 - mask)), (vanilla, -z[:, :3]), (ours, x)):
        assert torch.equal(shown, expected)


# -- the program -----------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with photo.png (30 x 26) and mask.png, half as large, white in the middle."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo_of(26, 30)).save("photo.png")
    save_mask("mask.png", box(13, 15, 4, 9, 5, 10))
    return tmp_path


HOLE = np.repeat(np.repeat(box(13, 15, 4, 9, 5, 10), 2, 0), 2, 1)


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


def test_the_program_writes_its_pictures_and_says_what_it_does(run, here, monkeypatch, capsys):
    assert call(monkeypatch, "photo.png", "mask.png", "--run", run, "-o", "made/out.png",
                "--samples", 2, "--compare") == 0
    said = capsys.readouterr().out
    assert "mask.png: 15 x 13 px, resized to the photo's 30 x 26" in said
    assert (f"photo.png: 30 x 26 px, 12.8% to be generated; codes by the prior in {run}, 6 of 6 "
            f"steps, resample 1, seed 0; pixels by {run}, decoder asym\n") in said
    assert "wrote made/out-1.png, made/out-2.png, made/out-compare.png (" in said
    assert sorted(os.listdir("made")) == ["out-1.png", "out-2.png", "out-compare.png"]
    expected = inpaint_photo(load_model(run), photo_of(26, 30), HOLE, load_prior(run))
    assert np.array_equal(pixels("made/out-1.png"), expected)
    assert not np.array_equal(pixels("made/out-2.png"), expected)
    assert call(monkeypatch, "photo.png", "mask.png", "--run", run) == 0
    assert np.array_equal(pixels("photo-inpainted.png"), expected)     # of one sample or of two


def test_a_large_photo_says_beforehand_what_is_worked_on_and_what_stays(run, here, monkeypatch,
                                                                        capsys):
    monkeypatch.setattr(inpaint, "MOST_CELLS", 10)
    monkeypatch.setattr(inpaint, "NEAR", 5)
    Image.fromarray(photo_of(90, 200)).save("large.png")
    save_mask("hole.png", box(90, 200, 40, 50, 100, 140))
    shown = []
    monkeypatch.setattr(inpaint, "image_grid", lambda columns, path: shown.append(columns))
    assert call(monkeypatch, "large.png", "hole.png", "--run", run, "--no-prior", "--compare",
                "-o", "out.png") == 0
    said = capsys.readouterr().out
    assert re.search(r"works on 80 x 20 px around the hole, in \d piece\(s\); keeps the rest", said)
    lines = [line for line in said.splitlines() if line.startswith("pieces ")]
    assert re.match(r"pieces (\d+)/\1  ", lines[-1])
    assert {images[0].shape for images in shown[0].values()} == {(3, 20, 50)}


def test_signals_end_the_program_at_once_though_torch_would_not_let_python_answer(run, here):
    """The network of this run sleeps in C for a minute, as a call of torch would."""
    program = ("import ctypes, sys, inpaint; from distributed import exit_on_user_error; "
               "sleep = lambda: print('asleep', flush=True) or ctypes.PyDLL(None).sleep(60); "
               "inpaint.inpaintings = lambda *args, **kwargs: iter(sleep, 0); "
               "exit_on_user_error(inpaint.main)")
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-c", program, "photo.png", "mask.png", "--run", str(run), "--device",
             "cpu"], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job may ignore it
        while "asleep" not in (line := process.stdout.readline()):
            assert line
        process.send_signal(number)
        assert process.wait(20) == -number


def test_a_large_hole_says_that_it_is_drawn_in_a_copy_and_counts_all_steps(run, here, monkeypatch,
                                                                           capsys):
    photo, hole = photo_of(41, 60), box(41, 60, 0, 40, 10, 50)
    Image.fromarray(photo).save("large.png")
    save_mask("hole.png", hole)
    assert call(monkeypatch, "large.png", "hole.png", "--run", run, "--steps", 4, "--resample", 3,
                "--samples", 2, "-o", "out.png") == 0
    said = capsys.readouterr().out
    assert "is large: drawn in a copy of 23 x 16 px, enlarged" in said
    calls = 2 * 2 * (4 + 3 * 2)                   # samples, windows, steps
    lines = [line for line in said.splitlines() if "denoising" in line]
    assert lines[-1].startswith(f"denoising {calls}/{calls}  ")
    expected = inpaint_photo(load_model(run), photo, hole, load_prior(run), steps=4, resample=3)
    assert np.array_equal(pixels("out-1.png"), expected)


def test_the_prior_may_come_from_another_run_on_the_same_first_stage(run, here, monkeypatch,
                                                                     capsys):
    _, parent = tiny_runs.write_first_stage(here / "decoder")
    tiny_runs.write_decoder(here / "decoder", parent)
    tiny_runs.write_prior(here / "prior", parent, GRID, vqgan=str(here / "decoder"), finished=False)
    common = "photo.png", "mask.png", "--run", here / "decoder"
    assert call(monkeypatch, *common, "--prior", here / "prior", "-o", "two.png") == 0
    said = capsys.readouterr().out
    assert f"warning: training of the prior in {here / 'prior'} is not finished (step 2)" in said
    assert call(monkeypatch, *common[:3], run, "-o", "one.png") == 0
    assert np.array_equal(pixels("one.png"), pixels("two.png"))
    assert call(monkeypatch, *common) == 2
    assert "prior/last.pt is not in it" in capsys.readouterr().err


def test_with_nothing_to_generate_the_program_needs_no_models(here, monkeypatch, capsys):
    save_mask("mask.png", np.zeros((13, 15), bool))
    assert call(monkeypatch, "photo.png", "mask.png", "--run", "nowhere") == 0
    said = capsys.readouterr().out
    assert "mask.png: 0% of it is to be generated" in said
    assert "wrote the photo unchanged to photo-inpainted.png" in said
    assert np.array_equal(pixels("photo-inpainted.png"), photo_of(26, 30))


def test_nearly_all_to_be_generated_is_doubted_and_black_means_so_if_told(run, here, monkeypatch,
                                                                           capsys):
    save_mask("mask.png", ~box(26, 30, 0, 5, 0, 7))
    assert call(monkeypatch, "photo.png", "mask.png", "--run", run, "--steps", 1) == 0
    said = capsys.readouterr().out
    assert "mask.png: 96% of it is to be generated" in said
    assert "--invert-mask" in said
    assert call(monkeypatch, "photo.png", "mask.png", "--run", run, "--steps", 1, "--invert-mask",
                "--composite", "-o", "out.png") == 0
    assert "4.5% to be generated" in capsys.readouterr().out
    same = (pixels("out.png") == photo_of(26, 30)).all(2)
    assert same[5:].all()
    assert same[:, 7:].all()
    assert not same[:5, :7].all()


@pytest.mark.parametrize(("flags", "captions"), [
    ((), ["original", "masked", "vanilla decoder", "ours"]),
    (("--composite",), ["original", "masked", "vanilla decoder, photo pasted",
                        "ours, photo pasted"]),
    (("--decoder", "vanilla"), ["original", "masked", "vanilla decoder"])])
def test_the_comparison_has_a_column_each_and_a_row_a_sample(run, here, monkeypatch, flags,
                                                             captions):
    shown = {}
    monkeypatch.setattr(inpaint, "image_grid", lambda columns, path: shown.update({path: columns}))
    assert call(monkeypatch, "photo.png", "mask.png", "--run", run, "-o", "out.png", "--samples", 2,
                "--compare", *flags) == 0
    columns = shown["out-compare.png"]
    assert list(columns) == captions
    photo, known = x_of(photo_of(26, 30))[0], torch.tensor(~HOLE)
    for row, made in enumerate(("out-1.png", "out-2.png")):
        assert torch.equal(columns["original"][row], photo)
        assert torch.equal(columns["masked"][row], photo * known)
        pasted = torch.equal(columns[captions[2]][row] * known, photo * known)
        assert pasted == ("--composite" in flags)
        assert torch.equal(columns[captions[-1]][row], x_of(pixels(made))[0])


MISTAKES = [
    (("gone.png", "mask.png"), "gone.png: cannot be read (No such file or directory)"),
    (("photo.png", "gone.png"), "gone.png: cannot be read (No such file or directory)"),
    (("text.png", "mask.png"), "text.png: cannot be decoded"),
    (("--run", "nowhere"), "nowhere: no such run folder"),
    (("--steps", "7"), "--steps: give numbers from 1 to T = 6"),
    (("--samples", "0"), "--samples and --resample are at least 1"),
    (("--resample", "0"), "--samples and --resample are at least 1, --seed"),
    (("--seed", "-1"), "--samples and --resample are at least 1, --seed at least 0"),
    (("--no-prior", "--samples", "2"), "--no-prior draws nothing: leave out --prior and"),
    (("-o", "out.jpg"), "-o out.jpg: give a name that ends with .png"),
    (("-o", "photo.png"), "photo.png is the photo or the mask; choose another -o"),
    (("-o", "./mask.png"), "./mask.png is the photo or the mask"),
    (("-o", "text.png/out.png"), "-o: text.png cannot be made a folder"),
    (("-o", "link.png", "--samples", "3"), "link-2.png is the photo or the mask"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(run, here, monkeypatch, capsys, arguments, message):
    (here / "text.png").write_text("no picture")
    os.link("photo.png", "link-2.png")
    before = {path: path.read_bytes() for path in here.iterdir()}
    given = arguments if arguments[0].endswith(".png") else ("photo.png", "mask.png", *arguments)
    where = () if "--run" in given else ("--run", run)
    assert call(monkeypatch, *given, *where) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1
    assert {path: path.read_bytes() for path in here.iterdir()} == before


def test_a_first_stage_alone_or_with_a_kl_latent_says_what_is_to_be_done(here, monkeypatch, capsys):
    _, parent = tiny_runs.write_first_stage(here / "alone")
    tiny_runs.write_prior(here / "alone", parent, GRID)
    common = "photo.png", "mask.png", "--run"
    assert call(monkeypatch, *common, "alone") == 2
    assert "no decoder asym: choose another --decoder" in capsys.readouterr().err
    assert call(monkeypatch, *common, "alone", "--decoder", "vanilla") == 0
    kl, settings = VQGAN(replace(TINY, latent="kl")), tiny_runs.settings()
    settings["first_stage"]["latent"] = "kl"
    tiny_runs.write_stage(here / "kl", "vqgan", kl.state_dict(), settings)
    capsys.readouterr()
    assert call(monkeypatch, *common, "kl", "--decoder", "vanilla") == 2
    assert "kl has a KL latent, hence no codes for a prior" in capsys.readouterr().err
    assert call(monkeypatch, *common, "kl", "--decoder", "vanilla", "--no-prior") == 0
    assert "no prior: the hole in one colour" in capsys.readouterr().out
