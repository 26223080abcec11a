import pytest
import torch

import timesteps
from timesteps import HISTORY, UNIFORM_SHARE, Timesteps


def generators(B, seed=0):
    return [torch.Generator().manual_seed(1000 * seed + n) for n in range(B)]


def filled(T, losses, times=HISTORY):
    """Timesteps whose every t has seen its own of `losses` so many times."""
    steps = Timesteps(T)
    for _ in range(times):
        steps.observe(torch.arange(1, T + 1), torch.tensor(losses))
    steps.update()
    return steps


def test_t_is_drawn_in_1_to_t_with_its_probability():
    losses = [8.0, 1.0, 4.0, 0.0, 2.0]
    steps = filled(5, losses)
    expected = (1 - UNIFORM_SHARE) * torch.tensor(losses).double() / 15 + UNIFORM_SHARE / 5
    torch.testing.assert_close(steps.probabilities(), expected)
    t, p = steps.draw(generators(2000))
    torch.testing.assert_close(p, expected[t - 1])
    assert (t.min(), t.max()) == (1, 5)
    seen = torch.bincount(t - 1, minlength=5) / 2000
    torch.testing.assert_close(seen.double(), expected, rtol=0, atol=0.03)


def test_the_probability_is_the_root_of_the_mean_square_not_the_mean():
    steps = Timesteps(2)
    for n in range(HISTORY):
        steps.observe(torch.tensor([1, 2]), torch.tensor([2.0 * (n % 2), 1.0]))
    steps.update()
    p = (steps.probabilities() - UNIFORM_SHARE / 2) / (1 - UNIFORM_SHARE)
    assert (p[0] / p[1]).item() == pytest.approx(2 ** 0.5)


def test_t_is_uniform_until_every_t_has_its_ten_losses():
    steps = filled(3, [9.0, 1.0, 1.0], times=HISTORY - 1)
    steps.observe(torch.tensor([1, 2]), torch.tensor([9.0, 1.0]))
    steps.update()
    assert steps.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    steps.observe(torch.tensor([3]), torch.tensor([1.0]))
    steps.update()
    assert steps.probabilities()[0] > 0.8


def test_the_oldest_of_ten_losses_gives_way_also_to_several_of_one_batch():
    steps = filled(2, [1.0, 1.0])
    steps.observe(torch.tensor([1, 1, 2, 1]), torch.tensor([5.0, 6.0, 7.0, 8.0]))
    steps.update()
    assert steps.losses[0].tolist() == [5, 6, 8] + [1] * 7
    assert steps.losses[1].tolist() == [7] + [1] * 9


def test_without_importance_t_stays_uniform():
    steps = Timesteps(4, importance=False)
    for _ in range(HISTORY):
        steps.observe(torch.arange(1, 5), torch.tensor([9.0, 1.0, 1.0, 1.0]))
        steps.update()
    assert steps.probabilities().tolist() == [0.25] * 4


def test_losses_that_are_all_zero_leave_t_uniform():
    assert filled(4, [0.0] * 4).probabilities().tolist() == pytest.approx([0.25] * 4)


def test_a_loss_that_is_not_finite_is_left_out():
    steps = filled(3, [1.0, 2.0, 3.0])
    before = steps.state_dict()
    steps.observe(torch.tensor([1, 2, 3]), torch.tensor([float("nan"), float("inf"), 4.0]))
    steps.update()
    assert torch.equal(steps.losses[:2], before["losses"][:2])
    assert steps.losses[2, 0] == 4
    assert steps.probabilities().isfinite().all()


def test_a_draw_belongs_to_the_image_not_to_its_batch():
    steps = filled(50, [float(t) for t in range(50)])
    whole, _ = steps.draw(generators(6))
    assert torch.equal(torch.cat([steps.draw(generators(6)[:2])[0],
                                  steps.draw(generators(6)[2:])[0]]), whole)
    assert whole.unique().numel() > 2


def test_within_a_step_the_history_does_not_move():
    steps = filled(3, [1.0, 1.0, 1.0])
    before = steps.probabilities()
    steps.observe(torch.tensor([1]), torch.tensor([100.0]))
    assert torch.equal(steps.probabilities(), before)
    steps.update()
    assert not torch.equal(steps.probabilities(), before)


def test_processes_and_micro_batches_make_no_difference(monkeypatch):
    """Images 0..7 of one step: at once, in micro-batches, and as the shares of two processes."""
    t, losses = torch.tensor([2, 1, 2, 2, 1, 2, 2, 1]), torch.arange(8.0)

    def after(parts):
        steps = Timesteps(2)
        for part in parts:
            steps.observe(t[part], losses[part])
        return steps

    whole, micro = after([slice(0, 8)]), after([slice(0, 3), slice(3, 8)])
    ranks = [after([slice(0, 2), slice(2, 4)]), after([slice(4, 6), slice(6, 8)])]
    whole.update()
    micro.update()
    shares = [rank._observed for rank in ranks]
    monkeypatch.setattr(timesteps, "gather_objects", lambda own: shares)
    for steps in [micro, *ranks]:
        if steps is not micro:
            steps.update()
        assert torch.equal(steps.losses, whole.losses)
        assert torch.equal(steps.counts, whole.counts)


def test_a_restored_history_goes_on_with_the_same_draws(tmp_path):
    steps, other = filled(20, [float(t) for t in range(20)]), Timesteps(20)
    torch.save(steps.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in range(3):
        draws = [each.draw(generators(8, seed)) for each in (steps, other)]
        for each, (t, _) in zip((steps, other), draws):
            each.observe(t, t * 0.5)
            each.update()
        assert torch.equal(draws[0][0], draws[1][0])
        assert torch.equal(draws[0][1], draws[1][1])


def test_a_state_dict_is_a_copy():
    steps = filled(2, [1.0, 1.0])
    state = steps.state_dict()
    steps.observe(torch.tensor([1]), torch.tensor([9.0]))
    steps.update()
    assert (state["losses"] == 1).all()


def test_the_history_of_another_t_is_refused():
    with pytest.raises(ValueError, match="a history of 4 times cannot serve T = 5"):
        Timesteps(5).load_state_dict(Timesteps(4).state_dict())
