"""begin.py: what a stage stands on. What comes of it is in test_train.py."""

import math

import pytest
import torch
from test_stages import prior, refit
from tiny_runs import settings, write_first_stage, write_stage
from train_process import SMALL_UNET

import begin
from begin import Run
from codes import CodeItems
from data import Signs
from distributed import UserError
from unet import UNet, UNetConfig
from vqgan import VQGAN


def run(out, **options):
    config = settings(**options) | {"precision": "fp32", "checkpointing": False}
    data = Signs("train", 32, limit=12), Signs("val", 32, limit=10)
    return Run(config, out, torch.device("cpu"), False, 0, None, 2, math.inf, [], *data)


# -- the first stage under the others --------------------------------------------------------------


def test_a_finished_refit_goes_before_the_given_first_stage_and_that_before_the_runs(tmp_path):
    own, given, rebuilt = tmp_path / "own", tmp_path / "given", tmp_path / "rebuilt"
    hashes = {}
    for seed, folder in enumerate((own, given, rebuilt)):
        hashes[folder] = write_first_stage(folder, seed)[1]
    hashes["refit"] = write_first_stage(rebuilt, 9, stage="refit")[1]

    def found(folder, **options):
        first_stage, where = begin._first_stage(run(folder, **options), "decoder")
        return first_stage.parent, where

    assert found(own) == (hashes[own], None)
    assert found(own, vqgan=str(given)) == (hashes[given], str(given))
    assert found(rebuilt) == (hashes["refit"], None)
    assert found(rebuilt, vqgan=str(given)) == (hashes["refit"], None)


def test_a_refit_that_is_not_finished_is_not_stood_on_and_that_is_said(tmp_path, capsys):
    _, parent = write_first_stage(tmp_path)
    write_first_stage(tmp_path, 9, stage="refit", finished=False)
    assert begin._first_stage(run(tmp_path), "prior")[0].parent == parent
    assert "prior: warning: the refit in" in capsys.readouterr().out


def test_a_refit_without_a_first_stage_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"vqgan/last.pt: no such run folder or checkpoint"):
        begin.begin_refit(run(tmp_path), None)


# -- refit's players -------------------------------------------------------------------------------


def test_the_discriminator_of_the_run_goes_on_where_its_size_is_the_same(tmp_path, capsys):
    kept = refit().discriminator
    torch.nn.init.normal_(kept.main[0].weight)
    model = VQGAN(begin.VQGANConfig(**settings()["first_stage"]))
    state = {"discriminator": kept.state_dict()}
    write_stage(tmp_path, "vqgan", model.state_dict(), settings())
    for path, goes_on in ((tmp_path, False), (tmp_path / "vqgan" / "last.pt", False)):
        trainee = refit()
        begin._continue_discriminator(trainee, path)
        assert torch.equal(trainee.discriminator.main[0].weight, kept.main[0].weight) == goes_on
    assert capsys.readouterr().out.count("it starts anew") == 2
    write_stage(tmp_path, "vqgan", model.state_dict(), settings(), extra=state)
    for path in (tmp_path, tmp_path / "vqgan" / "last.pt"):
        trainee = refit()
        begin._continue_discriminator(trainee, path)
        assert torch.equal(trainee.discriminator.main[0].weight, kept.main[0].weight)


def test_usage_is_counted_over_all_held_out_pictures_with_both_codebooks(tmp_path, monkeypatch):
    monkeypatch.setattr(begin, "ENCODED", 4)                          # of 10
    model, _ = write_first_stage(tmp_path)
    model.eval()
    codebook = torch.cat([model.quantize.embedding.weight, torch.full((3, 4), 100.0)])
    usage = begin._usage(run(tmp_path), model, codebook)
    x = torch.cat(list(begin._pictures(run(tmp_path), Signs("val", 32), [range(10)])))
    codes = model.indices(x).unique()
    assert usage["before"]["usage"] == len(codes) / 8
    assert usage["after"]["usage"] == len(codes) / 11
    assert usage["after"]["perplexity"] == pytest.approx(usage["before"]["perplexity"])


# -- what a prior starts from ----------------------------------------------------------------------


@pytest.mark.parametrize("d", [3, 20])                                # width is 8
def test_codes_that_look_alike_are_embedded_alike(d):
    torch.manual_seed(0)
    codebook = torch.randn(40, d) * torch.logspace(0, -2, d) + 5
    codebook[1] = codebook[0] + 1e-3
    unet = UNet(UNetConfig(**SMALL_UNET), 40, 10)
    begin.start_from_codes(unet, codebook)
    found = torch.cdist(unet.embedding.weight, unet.embedding.weight)
    wanted = torch.cdist(codebook, codebook)
    agreement = torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1]
    assert agreement > 0.95
    assert found[0, 1] > 0                                            # yet not the same
    logits = unet(torch.randint(40, (2, 4, 4)), torch.tensor([1, 10]))
    assert 0 < logits.std() < 0.5                                     # x̂0 is nearly uniform


def test_held_out_maps_are_the_pictures_codes_and_chance_costs_their_logarithm(tmp_path):
    trainee = prior()
    maps = torch.randint(16, (6, 16, 16)).numpy()
    here = run(tmp_path)
    batches = begin.held_out_codes(here, trainee, CodeItems(maps, 0, 3), 4)
    assert [len(batch.indices) for batch in batches] == [4, 4, 2]
    for batch in batches:
        assert torch.equal(batch.indices, trainee.first_stage.indices(batch.x))
    assert trainee.facts["uniform_nats"] == pytest.approx(256 * math.log(16))
    assert (trainee.facts["grid"], trainee.facts["maps"]) == ([16, 16], 6)
    assert trainee.facts["histogram_nats"] > 0


def test_no_more_pictures_are_encoded_than_the_run_will_look_at(tmp_path):
    trainee = prior()
    trainee.parent = "parent"
    for steps, batch_size, limit, expected in ((2, 4, 0, 8), (9, 4, 0, 12), (9, 4, 5, 5)):
        trainee.recipe = begin.Recipe(batch_size=batch_size, max_maps=limit)
        assert len(begin.code_items(run(tmp_path), trainee, steps).codes) == expected
