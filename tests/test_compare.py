"""Several decoders on one set of latents."""

import pytest
import torch
from tiny_runs import SIZE, write_decoder, write_first_stage, write_run

from compare import decode_all, first_stage_of, open_runs
from distributed import UserError, exact_float32
from tally import Pictures

CPU = torch.device("cpu")


@pytest.fixture
def two_runs(tmp_path):
    """An add and a concat decoder on one first stage, as for Table 3."""
    write_run(tmp_path / "add")
    _, parent = write_first_stage(tmp_path / "add")
    write_decoder(tmp_path / "concat", parent, blend="concat", vqgan=str(tmp_path / "add"))
    return [tmp_path / "add", tmp_path / "concat"]


def _pictures(**others):
    x, mask = torch.rand(2, 3, SIZE, SIZE) * 2 - 1, torch.zeros(2, 1, SIZE, SIZE)
    mask[:, :, 10:] = 1
    return Pictures([0, 1], x, mask, **others)


def test_every_decoder_gets_the_latents_of_the_full_image(two_runs):
    runs, pictures = open_runs(two_runs, CPU), _pictures()
    x, mask = pictures.x, pictures.mask
    with torch.no_grad():
        outputs = {key: x_hat for key, (x_hat, _) in decode_all(runs, pictures).items()}
        model = runs[1].loaded.model
        z = model.encode(x)
        assert torch.equal(outputs[None, "vanilla"], model.first_stage.decode(z))
        assert torch.equal(outputs[runs[1].name, "asym"], model.decode(z, image=x, mask=mask))
        assert torch.equal(outputs[runs[1].name, "asym-nomask"], model.decode(z))
    assert torch.equal(outputs[None, "paste"][:, :, :10], x[:, :, :10])
    assert torch.equal(outputs[None, "paste"][:, :, 10:], outputs[None, "vanilla"][:, :, 10:])


def test_given_latents_take_the_place_of_the_pictures_own(two_runs):
    runs, z = open_runs(two_runs, CPU), torch.randn(2, 4, SIZE // 2, SIZE // 2)
    pictures = _pictures(z=z)
    with torch.no_grad():
        outputs = {key: x_hat for key, (x_hat, _) in decode_all(runs, pictures).items()}
        model = runs[0].loaded.model
        assert torch.equal(outputs[None, "vanilla"], model.first_stage.decode(z))
        expected = model.decode(z, image=pictures.x, mask=pictures.mask)
    assert torch.equal(outputs[runs[0].name, "asym"], expected)


@pytest.mark.parametrize("shape", [(3, SIZE // 2, SIZE // 2), (4, SIZE // 4, SIZE // 4),
                                   (4, SIZE // 2, SIZE)])
def test_latents_of_another_first_stage_or_picture_are_refused(two_runs, shape):
    runs = open_runs(two_runs, CPU)
    with pytest.raises(UserError, match=r"does not fit a picture of 32 x 32 px: .* \(4, 16, 16\)"):
        decode_all(runs, _pictures(z=torch.randn(2, *shape)))


def test_a_picture_whose_sides_the_first_stage_does_not_divide_is_refused(two_runs):
    with pytest.raises(UserError, match="30 x 33 px: both sides must be multiples of 2"):
        decode_all(open_runs(two_runs, CPU), Pictures([0], torch.zeros(1, 3, 33, 30)))


def test_without_masks_only_what_needs_none_is_decoded(two_runs):
    runs, pictures = open_runs(two_runs, CPU), Pictures([0], torch.rand(1, 3, SIZE, SIZE))
    with torch.no_grad():
        keys = set(decode_all(runs, pictures))
    assert keys == {(None, "vanilla"), *((run.name, "asym-nomask") for run in runs)}


def test_a_first_stage_without_a_decoder_of_its_own_has_no_vanilla_rows(two_runs):
    runs, pictures = open_runs(two_runs, CPU), _pictures()
    for run in runs:
        run.first_stage.decoder = None
    with torch.no_grad():
        assert {decoder for _, decoder in decode_all(runs, pictures)} == {"asym", "asym-nomask"}


def test_the_vanilla_decoder_comes_from_whichever_run_has_one(two_runs):
    runs = open_runs(two_runs, CPU)
    runs[0].first_stage.decoder = None
    assert first_stage_of(runs) is runs[1].first_stage


def test_runs_that_cannot_share_a_table_are_refused(two_runs, tmp_path):
    _, parent = write_first_stage(tmp_path / "other", seed=5)
    write_decoder(tmp_path / "other", parent)
    _, parent = write_first_stage(two_runs[0])
    write_decoder(tmp_path / "large", parent, vqgan=str(two_runs[0]), size=64)
    run = two_runs[0]
    for other, reason in ((tmp_path / "other", "different first-stage weights"),
                          (tmp_path / "large", "--size of .*large is 64"), (run, "given twice"),
                          (tmp_path / "gone", "no such run folder")):
        with pytest.raises(UserError, match=reason):
            open_runs([run, other], CPU)


def test_no_tf32_inside_and_as_before_outside():
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    with exact_float32():
        assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
    assert [backend.fp32_precision for backend in backends] == before
