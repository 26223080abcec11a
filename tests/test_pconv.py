import pytest
import torch
from torch import nn

from pconv import PartialConv2d

SHAPES = [(3, 1, 1), (4, 2, 1), (3, 2, 0), (1, 1, 0)]      # kernel, stride, padding


def slow(layer, x, valid):
    """Convolve window by window, in float64."""
    k, s, p = layer.kernel_size[0], layer.stride[0], layer.padding[0]
    x = nn.functional.pad(x.double(), (p, p, p, p))
    valid = nn.functional.pad(valid.double(), (p, p, p, p))
    rows, columns = (x.shape[2] - k) // s + 1, (x.shape[3] - k) // s + 1
    y = torch.zeros(x.shape[0], layer.out_channels, rows, columns, dtype=torch.float64)
    out = torch.zeros(x.shape[0], 1, rows, columns, dtype=torch.float64)
    for b in range(x.shape[0]):
        for i in range(rows):
            for j in range(columns):
                window = (b, slice(None), slice(i * s, i * s + k), slice(j * s, j * s + k))
                count = int(valid[window].sum())
                if count:
                    seen = (layer.weight.double() * x[window] * valid[window]).sum((1, 2, 3))
                    y[b, :, i, j] = seen * k * k / count
                    if layer.bias is not None:
                        y[b, :, i, j] += layer.bias.double()
                    out[b, 0, i, j] = 1
    return y, out


def published(layer, x, valid):
    """Compute the published layer's output for a mask that is given for every channel."""
    valid = valid.expand_as(x)
    kernel = torch.ones(layer.out_channels, layer.in_channels, *layer.kernel_size)
    count = nn.functional.conv2d(valid, kernel, None, layer.stride, layer.padding)
    updated = count.clamp(0, 1)
    ratio = kernel[0].numel() / (count + 1e-8) * updated
    bias = layer.bias.view(1, -1, 1, 1)
    raw = nn.functional.conv2d(x * valid, layer.weight, layer.bias, layer.stride, layer.padding)
    return ((raw - bias) * ratio + bias) * updated, updated


def example(size=9, known=0.4):
    x = torch.randn(2, 3, size, size + 2)
    return x, (torch.rand(2, 1, size, size + 2) < known).float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_window_equals_the_explicit_loop(shape, bias):
    layer = PartialConv2d(3, 5, *shape, bias=bias)
    x, valid = example()
    valid[:, :, :5, :5] = 0
    y, valid_out = layer(x, valid)
    y_slow, valid_slow = slow(layer, x, valid)
    assert torch.equal(valid_out.double(), valid_slow)
    assert 0 < valid_slow.mean() < 1
    torch.testing.assert_close(y.double(), y_slow, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_equal_in_all_channels_gives_the_published_numbers(shape):
    layer = PartialConv2d(3, 5, *shape)
    x, valid = example(size=16)
    y, valid_out = layer(x, valid)
    y_published, updated = published(layer, x, valid)
    assert torch.equal(valid_out, updated[:, :1])
    torch.testing.assert_close(y, y_published, rtol=1e-5, atol=2e-6)


def test_the_padding_is_missing_where_all_is_valid_so_a_corner_window_of_4_counts_9_fourths():
    layer = PartialConv2d(3, 5, 3, padding=1)
    plain = nn.Conv2d(3, 5, 3)
    plain.load_state_dict(layer.state_dict(), strict=True)
    x, _ = example()
    y, valid_out = layer(x, torch.ones_like(x[:, :1]))
    torch.testing.assert_close(y[..., 1:-1, 1:-1], plain(x))
    assert valid_out.all()
    layer = PartialConv2d(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(layer.weight)
    y, _ = layer(torch.ones(1, 1, 5, 5), torch.ones(1, 1, 5, 5))
    torch.testing.assert_close(y, torch.full_like(y, 9))    # 4 * 9/4 in the corner


def test_a_window_without_a_valid_pixel_gives_exactly_zero_and_no_bias():
    layer = PartialConv2d(3, 5, 3, padding=1)
    nn.init.constant_(layer.bias, 7)
    x, _ = example()
    y, valid_out = layer(x, torch.zeros_like(x[:, :1]))
    assert not y.any()
    assert not valid_out.any()


def test_hidden_pixels_do_not_reach_the_output():
    layer = PartialConv2d(3, 5, 4, stride=2, padding=1)
    x, valid = example()
    assert torch.equal(layer(x, valid)[0], layer(x + 100 * (1 - valid), valid)[0])


def test_a_call_leaves_no_trace_in_the_next_one():
    layer = PartialConv2d(3, 5, 3, padding=1)
    x, valid = example()
    first = layer(x, valid)[0]
    layer(x, torch.ones_like(valid))
    assert torch.equal(layer(x, valid)[0], first)


def test_valid_regions_grow_layer_by_layer_and_stay_binary():
    layer = PartialConv2d(1, 1, 3, padding=1)
    valid = torch.zeros(1, 1, 9, 9)
    valid[0, 0, 4, 4] = 1
    x = torch.ones(1, 1, 9, 9)
    for radius in (1, 2, 3):
        x, valid = layer(x, valid)
        expected = torch.zeros(1, 1, 9, 9)
        expected[..., 4 - radius:5 + radius, 4 - radius:5 + radius] = 1
        assert torch.equal(valid, expected)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_bf16_counts_exactly_and_rounds_like_a_plain_bf16_convolution(shape):
    layer = PartialConv2d(3, 5, *shape)
    x, valid = example(size=32)
    exact, exact_valid = layer(x, valid)
    with torch.autocast("cpu", torch.bfloat16):
        y, valid_out = layer(x.bfloat16(), valid)
    assert y.dtype == torch.bfloat16
    assert torch.equal(valid_out, exact_valid)
    assert (y.float() - exact).abs().max() < 0.02 * exact.abs().max()
    assert not y[valid_out.expand_as(y) == 0].any()
    layer = PartialConv2d(1, 1, *shape, bias=False).bfloat16()
    nn.init.ones_(layer.weight)
    y, valid_out = layer(torch.ones_like(valid).bfloat16(), valid)
    expected = shape[0] ** 2 * valid_out                    # count * window / count, whole again
    assert ((y.float() - expected).abs() <= expected * 2 ** -8).all()


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_gradients_are_those_of_the_explicit_loop_and_of_finite_differences(shape):
    layer = PartialConv2d(2, 3, *shape).double()
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    valid = (torch.rand(1, 1, 6, 6) < 0.4).double()
    valid[..., :3, :3] = 0
    inputs = [x, layer.weight, layer.bias]
    weights = torch.randn_like(slow(layer, x, valid)[0])
    ours = torch.autograd.grad((layer(x, valid)[0] * weights).sum(), inputs)
    theirs = torch.autograd.grad((slow(layer, x, valid)[0] * weights).sum(), inputs)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)   # the ratio is float32
    assert not ours[0][valid.expand_as(x) == 0].any()
    assert torch.autograd.gradcheck(lambda *_: layer(x, valid)[0], inputs)


def test_it_compiles_without_a_graph_break_and_keeps_its_numbers():
    layer = PartialConv2d(3, 5, 3, padding=1)
    x, valid = example()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, valid)[0], layer(x, valid)[0])


def test_an_empty_batch_passes_and_leaves_zeros_as_gradients():
    layer = PartialConv2d(3, 5, 4, stride=2, padding=1)
    y, valid_out = layer(torch.zeros(0, 3, 8, 8), torch.zeros(0, 1, 8, 8))
    y.sum().backward()
    assert y.shape == (0, 5, 4, 4)
    assert valid_out.shape == (0, 1, 4, 4)
    for parameter in layer.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
