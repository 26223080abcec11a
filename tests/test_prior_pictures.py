import pytest
import torch
from tiny_runs import SIZE, write_decoder, write_first_stage, write_prior

import inpaint as program
from convert import load_model, load_prior
from data import Signs
from diffusion import known_cells
from inpaint import (
    COMPLETIONS,
    PICTURES,
    RESAMPLE,
    ROWS,
    completion_rows,
    inpainting_columns,
    paper_masks,
)


@pytest.fixture
def run(tmp_path):
    _, parent = write_first_stage(tmp_path)
    write_decoder(tmp_path, parent)
    write_prior(tmp_path, parent)
    return tmp_path


def test_the_three_masks_hide_what_the_paper_hides():
    masks = {name: torch.tensor(mask)[None, None] for name, mask in paper_masks(256).items()}
    known = [known_cells(mask, 16)[0] for mask in masks.values()]
    assert [cells.sum().item() for cells in known] == [96, 64, 64]
    assert known[0][10:].all()
    assert known[1][8:, 8:].all()
    assert known[2][4:12, 4:12].all()


def test_completions_stand_beside_their_picture_and_differ_from_each_other(run):
    prior, signs = load_prior(run), Signs("val", SIZE)
    with torch.inference_mode():
        groups = completion_rows(prior, signs, 1)
        again = completion_rows(prior, signs, 1)
    assert len(groups) == 3
    for (caption, images), (_, others), mask in zip(groups, again, paper_masks(SIZE).values()):
        assert "(1 steps, resample 5)" in caption
        assert len(images) == PICTURES * (2 + COMPLETIONS)
        assert all(torch.equal(a, b) for a, b in zip(images, others, strict=True))
        for i in range(PICTURES):
            x, masked, *completed = images[i * (2 + COMPLETIONS):(i + 1) * (2 + COMPLETIONS)]
            assert torch.equal(masked, x * (1 - torch.tensor(mask).float()))
            assert len({picture.numpy().tobytes() for picture in completed}) == COMPLETIONS
    first, second = (images[::2 + COMPLETIONS] for _, images in groups[:2])
    assert not torch.equal(first[0], second[0])                    # other pictures for each mask


def test_the_network_is_given_the_known_codes_of_the_masked_picture(run, monkeypatch):
    prior, calls = load_prior(run), []

    def spy(prior, indices, known, generators, steps, resample):
        calls.append((indices, known, len(generators), steps, resample))
        return indices

    monkeypatch.setattr(program, "complete", spy)
    signs, hidden = Signs("val", SIZE), Signs("val", SIZE)
    monkeypatch.setattr(hidden, "read", lambda index: (_without_top(signs, index), ()))
    with torch.inference_mode():
        completion_rows(prior, signs, 4)
        completion_rows(prior, hidden, 4)
    indices, known, count, steps, resample = calls[0]
    assert (count, steps, resample) == (PICTURES * COMPLETIONS, 4, RESAMPLE)
    mask = torch.tensor(paper_masks(SIZE)["the upper 62.5 % hidden"])[None, None]
    assert torch.equal(known, known_cells(mask, 2).expand(PICTURES * COMPLETIONS, -1, -1))
    assert torch.equal(indices, calls[3][0])       # what is hidden was never looked at


def _without_top(signs, index):
    picture = signs.read(index)[0].copy()
    picture[:5 * SIZE // 8] = 0
    return picture


def test_inpainting_shows_both_decoders_on_the_same_codes(run):
    prior, model, seen = load_prior(run), load_model(run), {}

    def note(name, decode):
        def noting(z, **condition):
            seen[name] = z, condition
            return decode(z, **condition)
        return noting

    prior.first_stage.decode = note("vanilla", prior.first_stage.decode)
    model.decode = note("ours", model.decode)
    signs = Signs("val", SIZE, limit=4)
    with torch.inference_mode():
        columns = inpainting_columns(prior, model, signs, 2)
    assert [len(images) for images in columns.values()] == [ROWS] * 4
    x, masked, vanilla, ours = (torch.stack(images) for images in columns.values())
    assert torch.equal(x[2], x[0])                                 # of four, from the start again
    assert not torch.equal(x[1], x[0])
    assert torch.equal(seen["vanilla"][0], seen["ours"][0])
    assert seen["vanilla"][1] == {}
    mask = seen["ours"][1]["mask"]
    assert torch.equal(masked, x * (1 - mask))
    assert torch.equal(seen["ours"][1]["image"], x)
    assert not torch.equal(vanilla, ours)
