"""What one step of the prior computes, the codes that it learns, and the average of its weights."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_train_autoencoder import a_run, assert_close, float64, gradients, save_and_load
from torch import nn
from train_process import SMALL, SMALL_UNET, call

import distributed
import train
import train_prior
from data import ImageFiles, Order, Signs, held_out_batches, training_batches
from diffusion import MultinomialDiffusion, frequency_nats
from recipes import RECIPES, Recipe
from seeding import image_generators, uniforms
from train_prior import EMA, CodeBatch, CodeItems, PriorStage, code_maps, start_from_codes
from unet import UNET_PRESETS, UNet, UNetConfig
from vqgan import VQGAN, VQGANConfig

CONFIG = VQGANConfig(**SMALL)
SETTINGS = {"unet": "tiny", "T": 8, "residual": "none", "ema": 0.9,
            "net": dict(SMALL_UNET)}


def prior(out="nowhere", recipe=RECIPES["prior"]["tiny"], device="cpu", **more):
    torch.manual_seed(3)
    loaded = SimpleNamespace(model=VQGAN(CONFIG).eval().requires_grad_(False), parent="hash")
    run = replace(a_run(out, prior=SETTINGS, **more), device=torch.device(device))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_prior, "trained_first_stage", lambda *_: (loaded, None))
        stage = PriorStage(run, recipe, None)
    nn.init.normal_(stage.model.logits.weight, std=0.3)              # not the start's near zeros
    stage.ema = EMA(stage.model, 0.9)
    return stage


def code_batch(low=0, high=4):
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(CONFIG.K, (4, 8, 8), generator=generator)
    generators = image_generators(0, "prior", range(low, high))
    return CodeBatch(list(range(low, high)), indices[low:high], uniforms(generators, 1)[0],
                     uniforms(generators, 2, 8, 8))


def test_a_prior_starts_from_its_codes_on_any_device(monkeypatch):
    """On the meta device, which refuses to be mixed with the CPU as a GPU does."""
    monkeypatch.setattr(train_prior, "adam", lambda *_: None)        # fused: not on meta
    stage = prior(device="meta")
    weights = [*stage.model.parameters(), *stage.first_stage.parameters()]
    assert {weight.device.type for weight in weights} == {"meta"}


# -- one step --------------------------------------------------------------------------------------


def test_a_step_descends_on_the_bound_at_the_times_of_its_images():
    stage, slow, data = prior(), prior(), code_batch()
    values = stage.step(data, gan_on=False)
    generators = image_generators(0, "prior", range(4))
    t, p = slow.timesteps.draw(uniforms(generators, 1)[0])
    z_t = slow.diffusion.q_sample(data.indices, t, generators)
    terms = slow.diffusion.terms(slow.model(z_t, t), z_t, data.indices, t).sum((1, 2))
    nats = (terms / p).sum() / 4
    nats = nats + 64 * slow.diffusion.prior_kl()
    (nats / 64).backward()
    assert values["vlb"].item() == pytest.approx(nats.item(), rel=1e-4)
    assert_close(gradients(stage.model), gradients(slow.model), 1e-3)


def test_micro_batches_add_up_and_the_history_is_of_whole_steps():
    with float64():
        whole, parts = prior(), prior()
        whole.step(code_batch(), gan_on=False)
        for low in (0, 2):
            parts.step(code_batch(low, low + 2), gan_on=False, scale=0.5)
        assert parts.timesteps.counts.sum() == 0                     # not before the step is done
    assert_close(gradients(parts.model), gradients(whole.model), 1e-6)
    whole.timesteps.update()
    parts.timesteps.update()
    assert torch.equal(parts.timesteps.counts, whole.timesteps.counts)
    torch.testing.assert_close(parts.timesteps.losses, whole.timesteps.losses)


def test_a_step_moves_model_average_and_history_and_nothing_else():
    stage = prior()
    first_stage = copy.deepcopy(stage.first_stage.state_dict())
    before = copy.deepcopy(stage.model.state_dict())
    for _ in range(3):
        stage.step(code_batch(), gan_on=False)
        stage.update(gan_on=False)
    assert all(not torch.equal(value, before[name])
               for name, value in stage.model.state_dict().items() if name != "logits.bias")
    assert (stage.ema.updates, stage.timesteps.counts.sum()) == (3, 12)
    average = stage.ema.model.state_dict()
    assert any(not torch.equal(average[name], value)
               for name, value in stage.model.state_dict().items())
    for name, value in stage.first_stage.state_dict().items():
        assert torch.equal(value, first_stage[name]), name


def test_a_step_exchanges_its_numbers_once_and_a_priors_losses_once_more(monkeypatch):
    stage, exchanges = prior(), []
    stage.batch = lambda items: code_batch()
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce",
                        lambda numbers: exchanges.append(numbers.shape))
    monkeypatch.setattr(distributed.dist, "all_gather_into_tensor", lambda joined, one: (
        exchanges.append(one.shape), joined.copy_(torch.cat([one, one]))))
    terms = train.gradients(stage, {"position": range(4)}, False, 4)
    means, leave = train.agree(terms, leave=True)
    stage.update(gan_on=False)
    assert exchanges == [(3,), (4, 2)]           # bound, norm of the gradients, vote; t and losses
    assert leave
    assert stage.timesteps.counts.sum() == 8
    assert means.keys() == {"vlb", "grad_norm"}


def test_a_prior_that_is_saved_and_loaded_continues_bit_for_bit(tmp_path):
    def steps(stage, count):
        for _ in range(count):
            stage.step(code_batch(), gan_on=False)
            stage.update(gan_on=False)

    whole, first, second = prior(), prior(), prior()
    steps(whole, 4)
    steps(first, 2)
    save_and_load(first, second, tmp_path / "state.pt")
    steps(second, 2)
    for a, b in ((whole.model.state_dict(), second.model.state_dict()),
                 (whole.ema.model.state_dict(), second.ema.model.state_dict()),
                 (whole.timesteps.state_dict(), second.timesteps.state_dict())):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_bf16_prior_learns_with_a_float32_loss_and_float32_weights():
    stage, losses = prior(precision="bf16"), []
    for _ in range(30):
        terms = stage.step(code_batch(), gan_on=False)
        stage.update(gan_on=False)
        losses.append(terms["vlb"])
    assert losses[0].dtype == torch.float32
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(p.dtype == torch.float32 for p in stage.model.parameters())


def test_a_compiled_prior_has_the_same_gradients_and_is_validated_uncompiled():
    eager, compiled = prior(), prior()
    torch.compiler.reset()
    compiled.model.compile(backend="aot_eager")
    for stage in (eager, compiled):
        stage.step(code_batch(), gan_on=False)
    assert_close(gradients(compiled.model), gradients(eager.model), 1e-3)
    data = [(code_batch(), None)]
    assert compiled.validate(data) == eager.validate(data)


# -- held-out maps ---------------------------------------------------------------------------------


def test_validation_takes_the_average_and_the_same_noise_and_gives_the_weights_back():
    stage = prior()
    whole = stage.validate([(code_batch(), None)])
    parts = [(code_batch(i, j), None) for i, j in ((0, 3), (3, 4))]
    assert stage.validate(parts)["val_vlb"] == pytest.approx(whole["val_vlb"])
    nn.init.normal_(stage.model.logits.weight)                       # the average stays
    before = copy.deepcopy(stage.model.state_dict())
    assert stage.validate([(code_batch(), None)]) == whole
    for name, value in stage.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert stage.model.training


def test_pictures_are_samples_and_always_the_same():
    stage, data = prior(), [(code_batch(), torch.zeros(4, 3, 16, 16))]
    columns, again = stage.pictures(data, 2), stage.pictures(data, 2)
    assert list(columns) == ["held out", "its codes, decoded", "new codes, 8 steps"]
    assert {image.shape for image in columns.values()} == {(2, 3, 16, 16)}
    assert all(torch.equal(columns[name], again[name]) for name in columns)
    assert not torch.equal(columns["its codes, decoded"], columns["new codes, 8 steps"])


def test_held_out_maps_are_the_images_codes_and_chance_costs_their_logarithm(tmp_path, capsys):
    stage = prior(tmp_path, recipe=Recipe(batch_size=4))
    stage.items(steps=2)
    batches = stage.held_out(4)
    assert [len(batch.indices) for batch, _ in batches] == [4, 4, 2]
    images = held_out_batches(stage.run.val_set, 10, 4, stage.run.device)
    x = torch.cat([batch.x for batch in images])
    indices = torch.cat([batch.indices for batch, _ in batches])
    assert torch.equal(indices, stage.first_stage.indices(x))
    assert torch.equal(batches[0][1], x[:4])                         # the images to be shown
    nats = {name: one.mean() for name, one in
            frequency_nats(stage.codes, indices.numpy(), 16).items()}
    assert (f"costs {256 * math.log(16):.1f} nats by equal probabilities, {nats['unigram']:.1f} by "
            f"the codes' frequencies, {nats['histogram']:.1f} by those") in capsys.readouterr().out
    assert (stage.facts["grid"], stage.facts["maps"], stage.facts["K"]) == ([16, 16], 8, 16)
    kept = np.load(tmp_path / "codes" / stage.facts["codes"])
    np.testing.assert_array_equal(kept, stage.codes)


@pytest.mark.parametrize(("steps", "limit", "expected"), [(2, 0, 8), (9, 0, 12), (9, 5, 5)])
def test_no_more_images_are_encoded_than_the_run_will_see(steps, limit, expected, tmp_path):
    stage = prior(tmp_path, recipe=Recipe(batch_size=4, max_maps=limit))
    assert len(stage.items(steps).codes) == expected


@pytest.mark.parametrize("d", [3, 20])                                # width is 8
def test_codes_that_look_alike_are_embedded_alike(d):
    torch.manual_seed(0)
    codebook = torch.randn(40, d) * torch.logspace(0, -2, d) + 5
    codebook[1] = codebook[0] + 1e-3
    unet = UNet(UNetConfig(**SMALL_UNET), 40, 10)
    start_from_codes(unet, codebook)
    found = torch.cdist(unet.embedding.weight, unet.embedding.weight)
    wanted = torch.cdist(codebook, codebook)
    agreement = torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1]
    assert agreement > 0.95
    assert found[0, 1] > 0                                            # yet not the same
    logits = unet(torch.randint(40, (2, 4, 4)), torch.tensor([1, 10]))
    assert 0 < logits.std() < 0.5                                     # x̂0 is nearly uniform


# -- the codes of the images -----------------------------------------------------------------------


def config(K=256):
    return SimpleNamespace(K=K, f=8)


def brightness(image):
    """uint8 (b,3,32,32) -> 4 x 4 codes in [0,256): the mean of each 8 x 8 square."""
    return image.float().mean(1).unfold(1, 8, 8).unfold(2, 8, 8).mean((3, 4)).long()


def expected(n):
    dataset = Signs("train", 32)
    images = [torch.from_numpy(dataset.image(i)).permute(2, 0, 1) for i in range(n)]
    return brightness(torch.stack(images)).numpy()


def test_row_i_has_the_codes_of_image_i_whatever_the_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(train_prior, "ENCODED", 4)
    maps = code_maps(brightness, Signs("train", 32), 10, config(), "parent", tmp_path)
    assert isinstance(maps, np.memmap)
    assert (maps.dtype, maps.shape) == (np.uint16, (10, 4, 4))
    np.testing.assert_array_equal(maps, expected(10))


@pytest.mark.parametrize(("K", "dtype"), [(65_536, np.uint16), (65_537, np.int32)])
def test_the_largest_code_fits_into_its_type(K, dtype, tmp_path):
    maps = code_maps(lambda image: torch.full((len(image), 4, 4), K - 1), Signs("train", 32), 3,
                     config(K), "parent", tmp_path)
    assert maps.dtype == dtype
    assert (maps == K - 1).all()


def refuse(image):
    raise AssertionError("encoded again")


def test_a_file_serves_again_for_the_same_first_stage_data_and_number_only(tmp_path):
    code_maps(brightness, Signs("train", 32), 5, config(), "parent", tmp_path)
    again = code_maps(refuse, Signs("train", 32), 5, config(), "parent", tmp_path)
    np.testing.assert_array_equal(again, expected(5))
    for dataset, n, parent in [(Signs("train", 32), 5, "other"), (Signs("val", 32), 5, "parent"),
                               (Signs("train", 32), 4, "parent"), (Signs("train", 64), 5, "parent"),
                               (Signs("train", 32, seed=1), 5, "parent")]:
        with pytest.raises(AssertionError, match="encoded again"):
            code_maps(refuse, dataset, n, config(), parent, tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 1              # half a file has another name


class Stops:
    """Encode `batches` batches; then the process is asked to stop, or dies in the next one."""

    def __init__(self, batches, dies=False):
        self.left, self.dies, self.seen = batches, dies, []

    def __call__(self, image):
        self.seen.append(len(image))
        self.left -= 1
        if self.left < 0 and self.dies:
            raise ZeroDivisionError("stands for SIGKILL")
        distributed.STOP.deadline = math.inf if self.left else 0
        return brightness(image)


@pytest.mark.parametrize("dies", [False, True])
def test_codes_that_are_encoded_are_kept_and_the_next_start_goes_on_from_them(dies, tmp_path,
                                                                              monkeypatch):
    monkeypatch.setattr(train_prior, "ENCODED", 2)
    monkeypatch.setattr(distributed.STOP, "deadline", math.inf)
    known = Signs("train", 32), 9, config(), "parent", tmp_path
    with pytest.raises((distributed.Leaving, ZeroDivisionError)) as stopped:
        code_maps(Stops(3, dies), *known)
    if not dies:
        assert str(stopped.value) == "prior: 6 of 9 images are encoded and kept"
        assert stopped.value.code == 0
    (part,) = tmp_path.iterdir()
    assert part.suffix == ".part"
    with open(part, "ab") as file:
        file.write(b"torn")                                      # a kill within a write
    distributed.STOP.deadline = math.inf
    rest = Stops(99)
    np.testing.assert_array_equal(code_maps(rest, *known), expected(9))
    assert rest.seen == [2, 1]
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


def test_photos_with_other_names_are_encoded_again(tmp_path):
    photos, kept = tmp_path / "photos", tmp_path / "codes"
    photos.mkdir()
    for number, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (32, 32), (100 * number, 0, 0)).save(photos / name)
    code_maps(brightness, ImageFiles(photos, "train", 32), 1, config(), "parent", kept)
    (photos / "a.png").rename(photos / "c.png")
    for _ in range(2):
        code_maps(brightness, ImageFiles(photos, "train", 32), 1, config(), "parent", kept)
    assert len(list(kept.iterdir())) == 2


def share(folder):
    from distributed import setup
    setup("cpu")
    train_prior.ENCODED = 4
    maps = code_maps(brightness, Signs("train", 32), 10, config(), "parent", folder)
    np.testing.assert_array_equal(maps, expected(10))


def test_two_processes_share_the_images_and_both_see_the_whole_file(tmp_path):
    assert call(share, tmp_path, ranks=2) == [0, 0]
    maps = code_maps(refuse, Signs("train", 32), 10, config(), "parent", tmp_path)
    np.testing.assert_array_equal(maps, expected(10))


def test_items_are_the_maps_in_the_order_of_images_and_leave_the_file_alone():
    maps = np.arange(12, dtype=np.uint16).reshape(3, 2, 2)
    items, order = CodeItems(maps, seed=5), Order(3, (5, 3))
    batch = next(training_batches(items, 0, 1, 6))
    assert batch["indices"].dtype == torch.int64
    assert batch["position"] == list(range(6))
    for position, indices in enumerate(batch["indices"]):
        np.testing.assert_array_equal(indices, maps[order[position]])
        generators = image_generators(5, "prior", [position])
        assert batch["u_t"][position] == uniforms(generators, 1)[0, 0]
        assert torch.equal(batch["u"][position], uniforms(generators, 2, 2, 2)[:, 0])
    batch["indices"] += 1
    assert maps.max() == 11


# -- the average -----------------------------------------------------------------------------------


def set_weights(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


@pytest.mark.parametrize("decay", [0.5, 0.995])
def test_the_average_is_its_closed_form_warm_up_included(decay):
    values = torch.randn(30, dtype=torch.float64)
    model = nn.Linear(2, 3)
    set_weights(model, values[0])
    average = EMA(model, decay)
    for value in values[1:]:
        set_weights(model, value)
        average.update(model)
    d = [min(decay, (1 + n) / (10 + n)) for n in range(29)]
    expected = math.prod(d) * values[0] + sum(
        (1 - d[n]) * math.prod(d[n + 1:]) * values[n + 1] for n in range(29))
    for weight in average.model.parameters():
        torch.testing.assert_close(weight, torch.full_like(weight, expected), rtol=0, atol=1e-6)


def test_a_bf16_model_has_a_float32_average_of_its_own_that_small_steps_move():
    model = nn.Linear(2, 2).bfloat16()
    set_weights(model, 1.0)
    average = EMA(model, 0.9999)
    average.updates = 1_000_000                                             # past the warm-up
    set_weights(model, 2.0)
    assert (average.model.bias == 1).all()
    for _ in range(10):
        average.update(model)
    assert average.model.bias.dtype == torch.float32
    expected = torch.full((2,), 2 - 0.9999 ** 10)
    torch.testing.assert_close(average.model.bias, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", UNET_PRESETS)
def test_the_average_of_a_denoiser_is_all_that_its_state_holds(preset):
    with torch.device("meta"):
        model = UNet(UNET_PRESETS[preset], 64, 100)
    moved = dict(EMA(model, 0.9).model.named_parameters())
    assert moved.keys() == model.state_dict().keys()


def test_the_diffusion_is_that_of_the_settings():
    stage = prior()
    assert isinstance(stage.diffusion, MultinomialDiffusion)
    assert (stage.diffusion.T, stage.diffusion.K) == (8, 16)
