"""What a decoder does to the pixels it was given: errors on known pixels and at the mask's border.

AVQ reports the squared error of non-edited regions as Pre_error (Table 2) without a formula; its
range, denominator and rounding are fixed here, once:

    x_hat, x (B,3,H,W) in [-1,1] -> clamped, (x + 1) / 2, float64 on the CPU -> one number an image

Images stay float all the way: 8-bit truncation alone adds 5e-6, the size of what is measured.
Not here: means over images and other ranges (eval.py), LPIPS (losses.py), FID and its kin.
"""

import torch


def _unit(image):
    """(B,3,H,W) in [-1,1], any device and float type -> float64 in [0,1] on the CPU, clamped."""
    return (image.detach().cpu().double().clamp(-1, 1) + 1) / 2


def pre_error(x_hat, x, mask):
    """Mean squared error on known pixels, one value per image. [AVQ Tab. 2]  deviation D17

    x_hat, x (B,3,H,W) in [-1,1]; mask (B,1,H,W) in {0,1}, 1 = generated -> (B,) float64,
    sum((1-m)(x_hat-x)^2) / (3 sum(1-m)) with images in [0,1]; in [-1,1] it is 4 times that.
    An image without a known pixel gives NaN, which the caller leaves out of means.
    """
    known = 1 - mask.cpu().double()                                         # (B, 1, H, W)
    squared = known * (_unit(x_hat) - _unit(x)) ** 2                        # (B, 3, H, W)
    return squared.sum((1, 2, 3)) / (3 * known.sum((1, 2, 3)))              # (B,)


def psnr_known(x_hat, x, mask):
    """Peak signal-to-noise ratio of the known pixels in dB, one value per image (B,), float64.

    Arguments as pre_error's: -10 log10(pre_error), the peak being 1. An exact copy gives inf, an
    image without a known pixel NaN.
    """
    return -10 * torch.log10(pre_error(x_hat, x, mask))


def seam(x_hat, x, mask):
    """How much sharper the step across the mask's border is than in the original, per image.

    Arguments as pre_error's -> (B,) float64: over all horizontal and vertical pairs of neighbours
    with one pixel known and one not, mean |x_hat_p - x_hat_q| - mean |x_p - x_q|, images in [0,1],
    channels averaged. 0 for the original, negative = smoother than it, positive = a visible edge.
    An image without such a pair (mask empty or full) gives NaN.
    """
    mask, x_hat, x = mask.cpu().double(), _unit(x_hat), _unit(x)
    total = pairs = 0
    for axis in (2, 3):
        crosses = mask.diff(dim=axis).abs()                    # (B, 1, H-1, W) or (B, 1, H, W-1)
        step = x_hat.diff(dim=axis).abs() - x.diff(dim=axis).abs()
        total = total + (crosses * step).sum((1, 2, 3))                     # (B,)
        pairs = pairs + crosses.sum((1, 2, 3))                              # (B,)
    return total / (3 * pairs)
