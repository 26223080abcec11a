"""prior.py: a prior comes back as it was trained, with its own first stage or not at all."""

import dataclasses
import shutil

import pytest
import torch
from tiny_runs import PRIOR, TINY, write_decoder, write_first_stage, write_prior

import checkpoint
from distributed import UserError
from prior import chosen_steps, denoiser, load_prior, prior_facts


def test_a_prior_comes_with_the_average_its_process_and_its_first_stage(tmp_path):
    first_stage, parent = write_first_stage(tmp_path)
    write_prior(tmp_path, parent)
    file = tmp_path / "prior" / "last.pt"
    state = checkpoint.load(file)
    weights = {name: torch.randn_like(value) for name, value in state["model"].items()}
    state["ema"]["weights"] = weights
    state["config"]["prior"] |= {"form": "mixture", "residual": "likelihood"}
    checkpoint.save(file, state)
    for path in (tmp_path, file):
        prior = load_prior(path)
        assert prior.unet.state_dict().keys() == weights.keys()
        for name, value in prior.unet.state_dict().items():
            assert torch.equal(value, weights[name]), name
        diffusion = prior.diffusion
        assert (diffusion.K, diffusion.T, diffusion.form, diffusion.residual) == (
            TINY.K, 6, "mixture", "likelihood")
        assert (prior.grid, prior.step, prior.finished, prior.parent) == ((16, 16), 2, True, parent)
        assert prior.facts == state["extra"]
        for module in (prior.unet, prior.first_stage):
            assert not module.training
            assert not any(p.requires_grad for p in module.parameters())
        indices = diffusion.sample(prior.unet, (2, *prior.grid), 3, torch.Generator())
        assert prior.first_stage.decode_indices(indices).shape == (2, 3, 32, 32)
        x = torch.rand(1, 3, 32, 32)
        assert torch.equal(prior.first_stage.indices(x), first_stage.eval().indices(x))


def test_a_finished_refit_goes_before_the_vqgan_and_a_given_first_stage_is_found(tmp_path):
    write_first_stage(tmp_path / "one")
    _, parent = write_first_stage(tmp_path / "one", seed=7, stage="refit")
    write_prior(tmp_path / "two", parent, vqgan=str(tmp_path / "one"), finished=False)
    prior = load_prior(tmp_path / "two")
    assert prior.parent == parent
    assert not prior.finished
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(UserError, match=r"stands on the first stage .*one, which is not there"):
        load_prior(tmp_path / "two")


def test_another_first_stage_is_refused_with_the_mend(tmp_path):
    _, parent = write_first_stage(tmp_path)
    write_prior(tmp_path, parent)
    write_first_stage(tmp_path, seed=7)
    with pytest.raises(UserError, match=r"other first-stage weights .*--stage prior --vqgan"):
        load_prior(tmp_path)


def test_a_run_without_a_prior_says_how_to_train_one(tmp_path):
    _, parent = write_first_stage(tmp_path)
    write_decoder(tmp_path, parent)
    with pytest.raises(UserError, match=r"prior/last.pt is not in it.*--stage prior"):
        load_prior(tmp_path)
    with pytest.raises(UserError, match="a decoder file, not a prior's"):
        load_prior(tmp_path / "decoder" / "last.pt")
    with pytest.raises(UserError, match="no such run folder"):
        load_prior(tmp_path / "nowhere")


def test_settings_name_the_network_and_the_process():
    unet, diffusion = denoiser(PRIOR | {"T": 9}, 5)
    assert (unet.K, unet.T, diffusion.K, diffusion.T) == (5, 9, 5, 9)
    assert dataclasses.asdict(unet.config)["mults"] == tuple(PRIOR["net"]["mults"])
    assert unet.config.width == PRIOR["net"]["width"]


def test_what_training_noted_is_read_without_the_first_stage(tmp_path):
    write_prior(tmp_path, "0" * 64)
    facts = prior_facts(tmp_path)
    assert facts == prior_facts(tmp_path / "prior" / "last.pt")
    assert (facts["K"], facts["grid"], facts["finished"]) == (TINY.K, [16, 16], True)


def test_steps_are_a_hundred_or_all_unless_asked_for():
    assert [chosen_steps(None, 50), chosen_steps(None, 4000), chosen_steps(7, 4000)] == [50, 100, 7]
    assert chosen_steps(None, 4000, most=25) == 25
    for asked in (0, 51):
        with pytest.raises(UserError, match="from 1 to T = 50"):
            chosen_steps(asked, 50)
