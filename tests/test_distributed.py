import errno
import resource
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from test_stages import SMALL_RECIPE, assert_close, batch, decoder, float64, part
from train_process import call

import distributed
import stages
from distributed import UserError


def run_main(error, capsys):
    def main():
        if isinstance(error, BaseException):
            raise error
        return error
    with pytest.raises(SystemExit) as left:
        distributed.exit_on_user_error(main)
    return left.value.code, capsys.readouterr().err


# -- one process -----------------------------------------------------------------------------------

def test_one_process_is_its_own_group():
    module, tensor = torch.nn.Linear(2, 2), torch.tensor([1.0, 2.0])
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.wrap(module, torch.device("cpu")) is module
    assert distributed.mean_over_ranks(tensor) is tensor
    assert distributed.any_rank(True, False) == (True, False)
    assert distributed.on_rank0(lambda: 5) == 5
    assert distributed.gather_objects("a") == ["a"]


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "mps" if not
                                  torch.backends.mps.is_available() else "nonsense"])
def test_a_device_that_is_not_there_is_named_with_the_mend(name):
    with pytest.raises(UserError, match=f"--device {name}.*--device cpu"):
        distributed.setup(name)


def test_auto_takes_what_is_there():
    expected = "cuda" if torch.cuda.is_available() else (
        "mps" if torch.backends.mps.is_available() else "cpu")
    assert distributed.setup("auto").type == expected


def test_a_users_mistake_is_one_line_and_status_2(capsys):
    assert run_main(UserError("--size 7: no"), capsys) == (2, "error: --size 7: no\n")


def test_a_full_disk_is_one_line_and_status_2(capsys):
    status, text = run_main(OSError(errno.ENOSPC, "No space left on device", "log.jsonl"), capsys)
    assert status == 2
    assert "log.jsonl" in text
    assert "make room" in text
    assert text.count("\n") == 1


def test_anything_else_keeps_its_traceback_and_ctrl_c_has_none(capsys):
    status, text = run_main(ZeroDivisionError("on purpose"), capsys)
    assert status == 1
    assert "Traceback" in text
    assert run_main(KeyboardInterrupt(), capsys) == (130, "")
    assert run_main(0, capsys)[0] == 0


def count_page_faults(file, keep):
    """Page faults of ten rounds of buffers like a training step's, 8 MiB each."""
    def step():
        x = torch.zeros(2**21, requires_grad=True)
        torch.nn.Sequential(*[torch.nn.SiLU()] * 6)(x).sum().backward()

    if keep:
        distributed.keep_freed_memory()
    for _ in range(10):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    file.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_for_the_next_step(tmp_path):
    for keep in (False, True):
        assert call(count_page_faults, tmp_path / str(keep), keep) == [0]
    kept, given_back = (int((tmp_path / name).read_text()) for name in ("True", "False"))
    assert kept < given_back / 3


# -- two processes ---------------------------------------------------------------------------------

def gradients_of_a_share(folder, full, sgd):
    """What each process of the test below does: steps on its share of a batch of 4."""
    with float64():
        _gradients_of_a_share(folder, full, sgd)


def _gradients_of_a_share(folder, full, sgd):
    device = distributed.setup("cpu")
    trainee = decoder(recipe=replace(SMALL_RECIPE, lambda_rule="paper"))
    trainee.discriminator.eval()
    rank, world = distributed.rank(), distributed.world_size()
    share, terms = 4 // world, {}
    step_sizes = {"generator": 0.05, "discriminator": 0.05}
    if sgd:
        trainee.optimizers = {
            name: torch.optim.SGD(optimizer.param_groups[0]["params"], lr=step_sizes[name])
            for name, optimizer in trainee.optimizers.items()}
    for _ in range(10 if sgd else 1):
        data = part(batch(full=full), rank * share, (rank + 1) * share)
        terms = stages.global_terms([stages.decoder_step(trainee, data, gan_on=True)])
        if not sgd:
            break
        stages.optimizer_step(trainee, gan_on=True)
    kept = {name: p if sgd else p.grad for name, p in trainee.model.decoder.named_parameters()}
    kept |= {f"D.{name}": p if sgd else p.grad
             for name, p in trainee.discriminator.named_parameters()}
    if rank == 0:
        torch.save({"tensors": {k: v.detach().clone() for k, v in kept.items()}, "terms": terms},
                   f"{folder}/{world}.pt")
    assert device.type == "cpu"
    distributed.close()


@pytest.mark.parametrize("sgd", [False, True], ids=["gradients", "ten-sgd-steps"])
def test_two_processes_with_half_the_batch_each_are_one_process(sgd, tmp_path):
    full = (False, False, True, True)                     # the second has no partial mask at all
    assert call(gradients_of_a_share, str(tmp_path), full, sgd) == [0]
    assert call(gradients_of_a_share, str(tmp_path), full, sgd, ranks=2) == [0, 0]
    one, two = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "2.pt")
    assert_close(two["tensors"], one["tensors"], 1e-6)
    for name, value in one["terms"].items():
        assert two["terms"][name] == pytest.approx(value, rel=1e-5), name


def talk(folder):
    distributed.setup("cpu")
    rank = distributed.rank()
    assert distributed.any_rank(rank == 1, False) == (True, False)
    assert distributed.mean_over_ranks(torch.tensor(float(rank))).item() == 0.5
    assert distributed.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert distributed.on_rank0(lambda: f"from {rank}") == "from 0"

    def fail():
        raise UserError("only rank 0 ran this")

    with pytest.raises(UserError, match="only rank 0 ran this"):
        distributed.on_rank0(fail)
    nan = distributed.mean_over_ranks(torch.tensor([float("nan") if rank else 1.0, 1.0]))
    assert nan.isfinite().tolist() == [False, True]
    distributed.close()
    assert distributed.rank() == rank                     # torchrun's word, for what is printed


def test_two_processes_agree_on_flags_values_and_mistakes(tmp_path):
    assert call(talk, str(tmp_path), ranks=2) == [0, 0]


def one_fails(folder):
    def main():
        distributed.setup("cpu")
        if distributed.rank() == 1:
            raise ValueError("rank 1 is broken")
        dist.barrier()
        return 0
    distributed.exit_on_user_error(main)


def test_a_process_that_fails_takes_the_others_with_it(tmp_path):
    start = time.monotonic()
    assert call(one_fails, str(tmp_path), ranks=2) == [1, 1]
    assert time.monotonic() - start < 30


def test_no_tf32_inside_exact_float32_and_as_before_outside():
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    with distributed.exact_float32():
        assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
    assert [backend.fp32_precision for backend in backends] == before
