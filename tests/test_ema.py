import copy
import math

import pytest
import torch
from torch import nn

from ema import EMA
from unet import UNET_PRESETS, UNet


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
    for weight in average.weights.values():
        torch.testing.assert_close(weight, torch.full_like(weight, expected), rtol=0, atol=1e-6)


def test_the_average_shares_no_memory_with_the_model_and_loads_into_it():
    model = nn.Linear(2, 3)
    average = EMA(model, 0.9)
    start = copy.deepcopy(model.state_dict())
    set_weights(model, 1.0)
    assert all(torch.equal(average.weights[name], start[name]) for name in start)
    model.load_state_dict(average.weights)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_a_bf16_model_has_a_float32_average_that_small_steps_move():
    model = nn.Linear(2, 2).bfloat16()
    set_weights(model, 1.0)
    average = EMA(model, 0.9999)
    average.updates = 1_000_000                                             # past the warm-up
    set_weights(model, 2.0)
    for _ in range(10):
        average.update(model)
    assert average.weights["bias"].dtype == torch.float32
    expected = torch.full((2,), 2 - 0.9999 ** 10)
    torch.testing.assert_close(average.weights["bias"], expected, rtol=0, atol=1e-6)


def test_an_average_that_is_saved_and_loaded_continues_bit_for_bit(tmp_path):
    def steps(model, average, values):
        for value in values:
            set_weights(model, value)
            average.update(model)

    model, values = nn.Linear(2, 3), torch.randn(12)
    whole = EMA(model, 0.995)
    first = EMA(model, 0.995)
    steps(model, whole, values)
    steps(model, first, values[:5])
    torch.save(first.state_dict(), tmp_path / "ema.pt")
    second = EMA(model, 0.995)
    second.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    steps(model, second, values[5:])
    assert second.updates == whole.updates == 12
    for name, weight in whole.weights.items():
        assert torch.equal(second.weights[name], weight)


def test_the_average_of_another_model_is_refused():
    average = EMA(nn.Linear(2, 3), 0.9)
    with pytest.raises(ValueError, match="other parameters"):
        average.load_state_dict(EMA(nn.Linear(2, 3, bias=False), 0.9).state_dict())


@pytest.mark.parametrize("preset", UNET_PRESETS)
def test_the_average_of_a_denoiser_is_all_that_its_state_holds(preset):
    with torch.device("meta"):
        model = UNet(UNET_PRESETS[preset], 64, 100)
    assert EMA(model, 0.9).weights.keys() == model.state_dict().keys()
