"""Each stage's step, validation and pictures on fake CUDA tensors: a device mismatch fails here."""

import pytest
import torch
from conftest import ROOT
from torch import nn

import train_autoencoder
import train_prior
from metrics import pre_error, psnr_known, seam
from unet import UNetConfig
from vqgan import GroupNorm

UNET = UNetConfig(width=8, mults=(1, 2), num_blocks=1, attn_levels=(1,), heads=2, head_width=4,
                  time_width=8, norm_groups=4)
CASES = {"vqgan-vq": ("vqgan", "vq", {}), "vqgan-kl": ("vqgan", "kl", {}),
         "refit": ("refit", "vq", {}), "decoder-add": ("decoder", "kl", {}),
         "decoder-concat": ("decoder", "vq", {"blend": "concat", "precision": "fp32"}),
         "prior": ("prior", "vq", {"unet": UNET})}


@pytest.fixture
def fake(monkeypatch):
    """benchmarks/fake_cuda.py, if it works here."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import fake_cuda
    for module in (train_autoencoder, train_prior):      # which gpu.stage_of replaces
        for name in ("trained_first_stage", "load_first_stage"):
            monkeypatch.setattr(module, name, getattr(module, name, None), raising=False)
    try:
        with fake_cuda.fake_cuda():
            assert torch.zeros(2, device=fake_cuda.DEVICE)[0].device.type == "cuda"
    except Exception as error:
        pytest.skip(f"this PyTorch has no fake CUDA tensors: {error}")
    return fake_cuda


@pytest.mark.parametrize("case", CASES)
def test_a_stage_keeps_its_tensors_on_the_gpu(fake, case):
    name, latent, options = CASES[case]
    with fake.fake_cuda() as counts:
        config = fake.gpu.small(latent)
        stage = fake.build(name, config, **{"precision": "bf16", "preset": "tiny"} | options)
        for work in (fake.training_step, fake.validation, fake.sampling):
            counts.clear()
            work(stage, 2, 32)
            assert counts.operations > 50


def test_a_tensor_that_was_left_on_the_cpu_is_found(fake):
    with fake.fake_cuda():
        stage = fake.build("decoder", fake.gpu.small("kl"), preset="tiny")
        stage.model.decoder.norm_out._parameters["weight"] = nn.Parameter(torch.ones(32))
        with pytest.raises(RuntimeError, match="device"):
            fake.training_step(stage, 2, 32)


def test_operations_bytes_and_waits_are_counted_and_views_are_free(fake):
    with fake.fake_cuda() as counts:
        a = torch.zeros(10, 10, device=fake.DEVICE)
        counts.clear()
        (a + 1).view(100)[:4].detach()
        assert (counts.operations, counts.bytes, counts.waits) == (1, 800, 0)
        torch.ones(10).to(fake.DEVICE, non_blocking=True)
        assert counts.waits == 0
        a[0].tolist(), a[0, 0].item(), torch.ones(10).to(fake.DEVICE), a.cpu()
        assert counts.waits == 4


def test_group_norms_stay_in_bf16_under_cudas_autocast(fake):
    with fake.fake_cuda(), torch.autocast("cuda", torch.bfloat16):
        x = torch.zeros(2, 8, 4, 4, device=fake.DEVICE, dtype=torch.bfloat16)
        for norm, dtype in ((GroupNorm(2, 8), torch.bfloat16), (nn.GroupNorm(2, 8), torch.float32)):
            assert norm.to(fake.DEVICE)(x).dtype == dtype
        assert GroupNorm(2, 8).to(fake.DEVICE)(x.float()).dtype == torch.float32


def test_errors_of_known_pixels_are_computed_on_the_gpu(fake):
    with fake.fake_cuda() as counts:
        x, mask = torch.zeros(2, 3, 8, 8, device=fake.DEVICE), torch.zeros(2, 1, 8, 8)
        mask = mask.to(fake.DEVICE)
        for measure in (pre_error, psnr_known, seam):
            counts.clear()
            assert measure(x, x, mask).device == fake.DEVICE
            assert counts.waits == 0
