import copy
import math

import pytest
import torch
from test_stages import batch, code_batch, decoder, part, prior, refit, vqgan

import budget
import run_folder
import stages
from distributed import UserError


def one_image():
    return part(batch(), 0, 1)


@pytest.mark.parametrize(("build", "step"), [
    (vqgan, stages.vqgan_step), (refit, stages.refit_step), (decoder, stages.decoder_step)])
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


def test_a_priors_trial_leaves_no_trace():
    trainee = prior()
    before, noise = copy.deepcopy(trainee.model.state_dict()), torch.get_rng_state()
    size, seconds = budget.trial(trainee, stages.prior_step, code_batch(0, 1))
    assert size > 0
    assert seconds > 0
    for name, value in trainee.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in trainee.model.parameters())
    assert torch.equal(torch.get_rng_state(), noise)
    trainee.timesteps.update()
    assert trainee.timesteps.counts.sum() == 0                  # nothing it saw is remembered
    assert trainee.ema.updates == 0


def test_a_trial_measures_the_branch_even_where_the_image_would_be_under_a_full_mask():
    seen = []

    def step(trainee, data, gan_on):
        seen.append(data)
        return stages.decoder_step(trainee, data, gan_on)

    budget.trial(decoder(), step, part(batch(full=(True,) * 4), 0, 1))
    for data in seen:
        assert data.rows.tolist() == [0]
        assert data.mask.mean() == 0.5


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


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_free_memory_is_what_is_available_or_what_the_containers_limit_leaves(tmp_path):
    group, kib = "sys/fs/cgroup/", 1024
    write(tmp_path, {"proc/meminfo": "MemTotal: 90 kB\nMemFree: 5 kB\nMemAvailable:    70 kB\n",
                     "proc/self/cgroup": "0::/a/b\n", group + "a/b/memory.max": "max\n"})
    assert budget._free_on_host(tmp_path) == 70 * kib
    write(tmp_path, {group + "a/memory.max": f"{50 * kib}\n",
                     group + "a/memory.current": f"{30 * kib}\n",
                     group + "a/memory.stat": f"anon 7\ninactive_file {10 * kib}\nfile 3\n"})
    assert budget._free_on_host(tmp_path) == 30 * kib          # files in the cache can go
    write(tmp_path, {group + "a/memory.max": f"{500 * kib}\n"})
    assert budget._free_on_host(tmp_path) == 70 * kib


def test_where_the_system_does_not_tell_half_of_the_memory_is_taken_for_free(tmp_path):
    physical = budget.os.sysconf("SC_PHYS_PAGES") * budget.os.sysconf("SC_PAGE_SIZE")
    assert budget._free_on_host(tmp_path) == physical // 2


def test_the_largest_divisor_that_fits_is_taken():
    assert budget.fitting_micro_batch(12, 100, 10_000) == 12
    assert budget.fitting_micro_batch(12, 100, 700) == 4         # 5.6 images fit
    assert budget.fitting_micro_batch(12, 100, 10) == 1
    assert budget.fitting_micro_batch(12, 100, -math.inf) == 1


@pytest.mark.parametrize(("asked", "near"), [(5, "4 or 6"), (7, "6 or 12|4 or 6"), (20, "6 or 12")])
def test_what_does_not_divide_names_the_nearest_that_do(asked, near):
    with pytest.raises(UserError, match=f"--micro-batch {asked} .*: ({near})"):
        budget.local_batch(24, 2, asked)


def test_a_batch_that_does_not_divide_over_the_processes_names_its_neighbours():
    assert budget.local_batch(12, 4) == budget.local_batch(12, 4, 1) == 3
    with pytest.raises(UserError, match=r"--batch-size 10 .* 4 processes.*: 8 or 12"):
        budget.local_batch(10, 4)
    with pytest.raises(UserError, match=r": 4$"):
        budget.local_batch(3, 4)


@pytest.mark.parametrize(("seconds", "text"), [
    (42, "42 s"), (450, "7.5 min"), (3 * 3600, "3.0 h"), (12 * 86400, "12.0 days")])
def test_durations_read_well(seconds, text):
    assert run_folder.duration(seconds) == text
