"""prior.py: a prior comes back as it was trained, with its own first stage or not at all."""

import dataclasses
import shutil

import pytest
import torch
from tiny_runs import TINY, settings, write_decoder, write_first_stage
from train_process import SMALL_UNET

import checkpoint
from distributed import UserError
from ema import EMA
from prior import denoiser, load_prior

NET = {name: list(v) if isinstance(v, tuple) else v for name, v in SMALL_UNET.items()}
PRIOR = {"unet": "tiny", "net": NET, "T": 6, "schedule": "cosine", "form": "mixture",
         "residual": "likelihood", "ema": 0.5}


def write_prior(run, parent, finished=True, **options):
    """A prior with random weights in RUN/prior/last.pt, and another average of them; the latter."""
    torch.manual_seed(1)
    config = settings(**options) | {"prior": PRIOR}
    unet, _ = denoiser(PRIOR, TINY.K)
    ema = EMA(unet, 0.5)
    for value in ema.weights.values():
        value.normal_()
    state = {"format": 1, "stage": "prior", "config": config, "model": unet.state_dict(),
             "ema": ema.state_dict(), "optimizers": {}, "images": 16, "step": 2, "parent": parent,
             "extra": {"finished": finished, "K": TINY.K, "grid": [16, 16]}}
    checkpoint.save(run / "prior" / "last.pt", state)
    return ema.weights


def test_a_prior_comes_with_the_average_its_process_and_its_first_stage(tmp_path):
    first_stage, parent = write_first_stage(tmp_path)
    weights = write_prior(tmp_path, parent)
    for path in (tmp_path, tmp_path / "prior" / "last.pt"):
        prior = load_prior(path)
        assert prior.unet.state_dict().keys() == weights.keys()
        for name, value in prior.unet.state_dict().items():
            assert torch.equal(value, weights[name]), name
        diffusion = prior.diffusion
        assert (diffusion.K, diffusion.T, diffusion.form, diffusion.residual) == (
            TINY.K, 6, "mixture", "likelihood")
        assert (prior.grid, prior.step, prior.finished, prior.parent) == ((16, 16), 2, True, parent)
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
    assert dataclasses.asdict(unet.config)["mults"] == SMALL_UNET["mults"]
    assert unet.config.width == SMALL_UNET["width"]
