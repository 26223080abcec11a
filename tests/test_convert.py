import pytest
import torch
from tiny_runs import (
    SIZE,
    settings,
    write_decoder,
    write_first_stage,
    write_run,
    write_stage,
)

import checkpoint
from asym_decoder import AsymVQGAN
from convert import load, load_first_stage, load_model
from distributed import UserError
from vqgan import VQGAN


def _picture():
    return torch.rand(1, 3, SIZE, SIZE) * 2 - 1


@pytest.mark.parametrize("blend", ["add", "concat"])
def test_a_run_folder_gives_the_decoder_and_the_first_stage_that_were_saved(tmp_path, blend):
    first_stage, parent = write_first_stage(tmp_path)
    decoder = write_decoder(tmp_path, parent, blend=blend)
    model = load_model(tmp_path)
    x, mask = _picture(), torch.zeros(1, 1, SIZE, SIZE)
    mask[..., :9] = 1
    expected = AsymVQGAN(first_stage, decoder).eval()
    with torch.no_grad():
        z = expected.encode(x)
        assert torch.equal(model.encode(x), z)
        assert torch.equal(model.decode(z, image=x, mask=mask),
                           expected.decode(z, image=x, mask=mask))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_a_run_without_a_decoder_gives_its_first_stage(tmp_path):
    saved, parent = write_first_stage(tmp_path)
    loaded = load(tmp_path)
    assert isinstance(loaded.model, VQGAN)
    assert loaded.parent == parent
    assert loaded.finished
    x = _picture()
    assert torch.equal(loaded.model(x)[0], saved.eval()(x)[0])


def test_one_stage_file_is_enough(tmp_path):
    write_run(tmp_path)
    assert isinstance(load_model(tmp_path / "vqgan" / "last.pt"), VQGAN)
    assert isinstance(load_model(tmp_path / "decoder" / "last.pt"), AsymVQGAN)


def test_a_refit_counts_only_when_it_is_finished(tmp_path):
    _, plain = write_first_stage(tmp_path, seed=0)
    _, refit = write_first_stage(tmp_path, seed=1, stage="refit", finished=False)
    assert load_first_stage(tmp_path).parent == plain
    write_first_stage(tmp_path, seed=1, stage="refit", finished=True)
    assert load_first_stage(tmp_path).parent == refit
    assert refit != plain


@pytest.mark.parametrize("where", ["", "vqgan/last.pt"])
def test_a_decoder_finds_the_first_stage_of_another_run(tmp_path, where):
    _, parent = write_first_stage(tmp_path / "a")
    write_decoder(tmp_path / "b", parent, vqgan=str(tmp_path / "a" / where))
    assert isinstance(load_model(tmp_path / "b"), AsymVQGAN)


def test_a_decoder_on_changed_first_stage_weights_is_refused_with_the_mend(tmp_path):
    write_run(tmp_path)
    write_first_stage(tmp_path, seed=7)
    with pytest.raises(UserError, match=r"other first-stage weights.*--stage decoder --vqgan"):
        load_model(tmp_path)


def test_a_missing_first_stage_is_named(tmp_path):
    write_decoder(tmp_path / "b", "0" * 64, vqgan=str(tmp_path / "gone"))
    with pytest.raises(UserError, match="gone, which is not there"):
        load_model(tmp_path / "b")


def test_a_truncated_last_file_falls_back_to_the_one_before(tmp_path, capsys):
    _, before = write_first_stage(tmp_path, seed=0)
    write_first_stage(tmp_path, seed=1)
    last = tmp_path / "vqgan" / "last.pt"
    last.write_bytes(last.read_bytes()[:500])
    assert load_first_stage(tmp_path).parent == before
    assert "previous.pt" in capsys.readouterr().out


def test_loading_is_strict(tmp_path):
    model, _ = write_first_stage(tmp_path / "a")
    weights = model.state_dict()
    for name, changed in {"missing": {k: v for k, v in weights.items() if k != "quant_conv.bias"},
                          "left-over": weights | {"extra": torch.zeros(1)}}.items():
        write_stage(tmp_path / name, "vqgan", changed, settings())
        with pytest.raises(UserError, match=r"do not fit its settings.*(quant_conv.bias|extra)"):
            load_model(tmp_path / name)


def test_loading_draws_no_random_number(tmp_path):
    write_run(tmp_path)
    before = torch.get_rng_state()
    load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_mistaken_paths_are_one_line_each(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "photo.pt").write_bytes(b"no checkpoint")
    write_stage(tmp_path, "prior", {}, settings())
    mistakes = {"gone": "no such run folder", "empty": "none of decoder/last.pt",
                "photo.pt": "photo.pt", "prior/last.pt": "a prior file makes no pictures"}
    for path, reason in mistakes.items():
        with pytest.raises(UserError, match=reason) as caught:
            load_model(tmp_path / path)
        assert "\n" not in str(caught.value)


def test_a_decoder_is_no_first_stage(tmp_path):
    write_run(tmp_path)
    with pytest.raises(UserError, match="is a decoder"):
        load_first_stage(tmp_path / "decoder" / "last.pt")
    assert load_first_stage(tmp_path).parent == checkpoint.load(
        tmp_path / "decoder" / "last.pt")["parent"]
