import math

import pytest
import torch

from metrics import pre_error, psnr_known, seam


def example(batch=3, size=6):
    x_hat, x = torch.rand(2, batch, 3, size, size) * 2 - 1
    mask = (torch.rand(batch, 1, size, size) < 0.5).float()
    return x_hat, x, mask


def unit(value):
    return (min(max(value, -1.0), 1.0) + 1) / 2


def pre_error_by_loops(x_hat, x, mask):
    total = count = 0
    for i in range(mask.shape[1]):
        for j in range(mask.shape[2]):
            if mask[0, i, j] == 0:
                for c in range(3):
                    total += (unit(float(x_hat[c, i, j])) - unit(float(x[c, i, j]))) ** 2
                    count += 1
    return total / count


def seam_by_loops(x_hat, x, mask):
    height, width = mask.shape[1:]
    ours, original = [], []
    for i in range(height):
        for j in range(width):
            for k, n in ((i + 1, j), (i, j + 1)):
                if k < height and n < width and mask[0, i, j] != mask[0, k, n]:
                    for c in range(3):
                        for image, steps in ((x_hat, ours), (x, original)):
                            steps.append(abs(unit(float(image[c, i, j]))
                                             - unit(float(image[c, k, n]))))
    return sum(ours) / len(ours) - sum(original) / len(original)


def test_pre_error_equals_loops_over_known_pixels():
    x_hat, x, mask = example()
    expected = [pre_error_by_loops(*image) for image in zip(x_hat * 1.5, x, mask)]
    assert pre_error(x_hat * 1.5, x, mask).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_shift_of_a_tenth_in_0_1_is_an_error_of_a_hundredth_and_20_db():
    x = torch.zeros(1, 3, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :3] = 1
    assert pre_error(x + 0.2, x, mask).item() == pytest.approx(0.01, rel=1e-6)
    assert psnr_known(x + 0.2, x, mask).item() == pytest.approx(20, rel=1e-6)


def test_what_happens_in_the_hole_does_not_count():
    x_hat, x, mask = example()
    elsewhere = torch.where(mask == 1, torch.zeros_like(x), x_hat)
    assert torch.equal(pre_error(x_hat, x, mask), pre_error(elsewhere, x, mask))


def test_the_prediction_is_clamped_before_it_is_compared():
    x, mask = torch.ones(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    assert pre_error(x * 7, x, mask).item() == 0


def test_an_exact_copy_has_infinite_psnr():
    _, x, mask = example()
    assert psnr_known(x, x, mask).tolist() == [math.inf] * 3


def test_an_image_without_known_pixels_is_nan_and_leaves_its_neighbours_alone():
    x_hat, x, mask = example()
    mask[1] = 1
    for metric in (pre_error, psnr_known, seam):
        value = metric(x_hat, x, mask)
        assert value.isnan().tolist() == [False, True, False]


def test_errors_as_small_as_the_papers_keep_their_digits_at_full_size():
    x = torch.rand(1, 3, 256, 256) * 1.9 - 0.95
    mask = torch.zeros(1, 1, 256, 256)
    x_hat = x + 2 * math.sqrt(2.1e-5) * torch.randn(1, 3, 256, 256).sign()
    assert pre_error(x_hat, x, mask).item() == pytest.approx(2.1e-5, rel=1e-4)


def test_seam_equals_loops_over_pairs_across_the_border():
    x_hat, x, mask = example()
    expected = [seam_by_loops(*image) for image in zip(x_hat * 1.5, x, mask)]
    assert seam(x_hat * 1.5, x, mask).tolist() == pytest.approx(expected, rel=1e-12)


def test_seam_of_the_original_is_zero():
    _, x, mask = example()
    assert seam(x, x, mask).tolist() == [0, 0, 0]


def test_seam_is_negative_for_a_smoothed_border_and_positive_for_a_patch_of_another_brightness():
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    smooth = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert seam(smooth, x, mask).item() < -0.05
    flat = torch.zeros_like(x)
    assert seam(flat + 0.4 * mask, flat, mask).item() == pytest.approx(0.2, rel=1e-6)


def test_half_precision_inputs_are_measured_in_float64():
    x_hat, x, mask = example()
    x_hat, x = x_hat.bfloat16(), x.bfloat16()
    for metric in (pre_error, psnr_known, seam):
        assert metric(x_hat, x, mask.bfloat16()).dtype == torch.float64
        assert torch.equal(metric(x_hat, x, mask), metric(x_hat.float(), x.float(), mask))
