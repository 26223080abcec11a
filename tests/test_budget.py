import copy

import pytest
import torch
from test_stages import batch, decoder, part, vqgan

import budget
import stages
from distributed import UserError


def one_image():
    return part(batch(), 0, 1)


@pytest.mark.parametrize(("build", "step"), [(vqgan, stages.vqgan_step),
                                             (decoder, stages.decoder_step)])
def test_a_trial_leaves_no_trace(build, step):
    trainee = build()
    networks = trainee.model, trainee.discriminator
    before = copy.deepcopy([network.state_dict() for network in networks])
    noise = torch.get_rng_state()
    size, seconds = budget.trial(trainee, step, one_image())
    assert size > 0
    assert seconds > 0
    for network, kept in zip(networks, before):
        for name, value in network.state_dict().items():
            assert torch.equal(value, kept[name]), name
        assert all(p.grad is None for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), noise)
    assert not any(optimizer.state for optimizer in trainee.optimizers.values())


def test_a_bigger_image_takes_more_and_weights_do_not_count():
    small, _ = budget.trial(vqgan(), stages.vqgan_step, part(batch(size=32), 0, 1))
    large, _ = budget.trial(vqgan(), stages.vqgan_step, part(batch(size=64), 0, 1))
    assert 3 < large / small < 5


def test_room_is_left_for_gradients_and_adams_averages():
    trainee = vqgan()
    networks = trainee.model, trainee.discriminator
    weights = 4 * sum(p.numel() for network in networks for p in network.parameters())
    original = budget._free
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "_free", lambda device: 10**12)
        assert budget.free_memory(trainee) == 10**12 - 3 * weights
        stages.vqgan_step(trainee, batch(), gan_on=True)
        stages.optimizer_step(trainee, gan_on=True)
        assert budget.free_memory(trainee) == 10**12 - weights
    assert original(torch.device("cpu")) > 2**20


def test_the_largest_divisor_that_fits_is_taken():
    assert budget.micro_batch(12, None, 100, 10_000) == 12
    assert budget.micro_batch(12, None, 100, 700) == 4         # 5.6 images fit
    assert budget.micro_batch(12, None, 100, 10) == 1
    assert budget.micro_batch(12, None, 100, -5) == 1
    assert budget.micro_batch(12, 6, 100, 10) == 6


@pytest.mark.parametrize(("asked", "near"), [(5, "4 or 6"), (7, "6 or 12|4 or 6"), (20, "6 or 12")])
def test_what_does_not_divide_names_the_nearest_that_do(asked, near):
    with pytest.raises(UserError, match=f"--micro-batch {asked} .*: ({near})"):
        budget.micro_batch(12, asked, 1, 1000)


def test_a_batch_that_does_not_divide_over_the_processes_names_its_neighbours():
    assert budget.local_batch(12, 4) == 3
    with pytest.raises(UserError, match=r"--batch-size 10 .* 4 processes.*: 8 or 12"):
        budget.local_batch(10, 4)
    with pytest.raises(UserError, match=r": 4$"):
        budget.local_batch(3, 4)


@pytest.mark.parametrize(("seconds", "text"), [
    (42, "42 s"), (450, "7.5 min"), (3 * 3600, "3.0 h"), (12 * 86400, "12.0 days")])
def test_durations_read_well(seconds, text):
    assert budget.duration(seconds) == text
