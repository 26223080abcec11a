"""Run folders with random weights, as train.py would leave them, small enough for tests."""

import dataclasses

import torch

import run_folder
from asym_decoder import AsymDecoder
from convert import denoiser
from train_prior import EMA
from vqgan import VQGAN, VQGANConfig

TINY = VQGANConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_levels=(), z_channels=4,
                   embed_dim=4, K=8, norm_groups=4)
SIZE = 32
PRIOR = {"unet": "tiny", "T": 6, "residual": "none", "ema": 0.5,
         "net": {"width": 8, "mults": [1, 2], "num_blocks": 1, "attn_levels": [1], "head_width": 4,
                 "time_width": 8, "norm_groups": 4}}


def settings(vqgan=None, blend="add", **others):
    fields = {name: list(v) if isinstance(v, tuple) else v
              for name, v in dataclasses.asdict(TINY).items()}
    return {"data": "signs", "root": None, "size": SIZE, "seed": 0, "perceptual": "none",
            "weights": None, "vqgan": vqgan, "first_stage": fields,
            "decoder": {"preset": "tiny", "ch": 8, "num_res_blocks": 1, "blend": blend}, **others}


def write_stage(run, stage, weights, config, parent=None, finished=True, extra=None):
    state = {"format": 1, "stage": stage, "config": config, "model": weights, "ema": None,
             "optimizers": {}, "images": 16, "step": 2, "parent": parent,
             "extra": {"finished": finished} | (extra or {})}
    run_folder.save(run / stage / "last.pt", state)


def write_first_stage(run, seed=0, stage="vqgan", finished=True):
    """A VQGAN with random weights in RUN/STAGE/last.pt; its hash."""
    torch.manual_seed(seed)
    model = VQGAN(TINY)
    write_stage(run, stage, model.state_dict(), settings(), finished=finished)
    return model, run_folder.weights_hash(model.state_dict())


def write_decoder(run, parent, seed=1, **options):
    """An AsymDecoder with random weights in RUN/decoder/last.pt. options: those of `settings`."""
    torch.manual_seed(seed)
    config = settings(**options)
    decoder = AsymDecoder(TINY, 8, 1, config["decoder"]["blend"])
    weights = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    write_stage(run, "decoder", weights, config, parent)
    return decoder


def write_run(run, **options):
    """A first stage and a decoder on it in one run folder."""
    _, parent = write_first_stage(run)
    return write_decoder(run, parent, **options)


def write_prior(run, parent, grid=(16, 16), seed=2, finished=True, **options):
    """A UNet with random weights in RUN/prior/last.pt; what it draws depends on what it sees.

    options: those of `settings`.
    """
    torch.manual_seed(seed)
    unet, _ = denoiser(PRIOR, TINY.K)
    for parameter in unet.parameters():
        if not parameter.any():                  # layers that start at zero would be silent
            torch.nn.init.normal_(parameter, std=0.5)
    state = {"format": 1, "stage": "prior", "config": settings(**options) | {"prior": PRIOR},
             "model": unet.state_dict(), "ema": EMA(unet, 0.5).state_dict(), "optimizers": {},
             "images": 16, "step": 2, "parent": parent,
             "extra": {"finished": finished, "K": TINY.K, "grid": list(grid)}}
    run_folder.save(run / "prior" / "last.pt", state)
