import copy
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convert import count_prior
from unet import (
    UNET_PRESETS,
    Block,
    Level,
    LinearAttention,
    Trunk,
    UNet,
    UNetConfig,
    sinusoids,
)

# Two blocks a level, widths that grow, attention on some levels only.
SMALL = UNetConfig(width=8, mults=(1, 2, 3), attn_levels=(0, 2), heads=2, head_width=4,
                   time_width=12, norm_groups=4)
SKIPPING = dataclasses.replace(SMALL, top_skip=True)
BOTH = pytest.mark.parametrize("config", [SMALL, SKIPPING], ids=["paper", "top_skip"])
K = 16


def codes(B=2, h=8, w=12):
    return torch.randint(K, (B, h, w))


def times(B=2):
    return torch.randint(1, 101, (B,))


@torch.no_grad()
def awake(module):
    """The module with random parameters: no branch is silent, no norm trivial."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return module


def unet(config, T=100):
    return awake(UNet(config, K, T))


def on_meta(preset, codes):
    with torch.device("meta"):
        return UNet(UNET_PRESETS[preset], codes, 4000)


# -- sizes -----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("preset", "codes", "parameters"), [
    ("paper117", 1024, 117_586_568), ("paper117", 512, 117_454_984), ("tiny", 128, 1_220_259)])
def test_the_presets_have_their_parameter_counts(preset, codes, parameters):
    assert sum(p.numel() for p in on_meta(preset, codes).parameters()) == parameters


@pytest.mark.parametrize("preset", UNET_PRESETS)
def test_every_group_norm_of_a_preset_has_the_groups_of_its_config(preset):
    groups = [m.num_groups for m in on_meta(preset, 16).modules() if isinstance(m, nn.GroupNorm)]
    assert groups
    assert set(groups) == {UNET_PRESETS[preset].norm_groups}


@pytest.mark.parametrize(("codes", "printed", "in_convolutions", "in_all"), [
    (1024, 1.06, 1_055_916_032, 1_110_867_968), (512, 1.04, 1_039_138_816, 1_094_090_752)])
def test_table_2s_operations_are_the_multiplications_of_the_plain_convolutions(
        codes, printed, in_convolutions, in_all):
    """To the table's last digit, for one 16x16 map; with transposed convolutions, linear layers and
    attention's own products, 5 % more."""
    counted = count_prior(on_meta("paper117", codes), (16, 16))
    assert counted == (in_convolutions, in_all)
    assert round(in_convolutions / 1e9, 2) == printed
    assert in_all == pytest.approx(printed * 1e9, rel=0.06)


def test_the_shapes_are_those_of_multinomial_diffusions_network():
    shapes = {key: tuple(p.shape) for key, p in on_meta("paper117", 1024).state_dict().items()}
    assert shapes.items() >= {
        "embedding.weight": (1024, 128),
        "time.0.weight": (512, 128),
        "time.2.weight": (128, 512),
        "trunk.down.0.blocks.0.block1.0.weight": (128, 128, 3, 3),
        "trunk.down.1.blocks.0.shortcut.weight": (256, 128, 1, 1),
        "trunk.down.3.attention.qkv.weight": (384, 1024, 1, 1),
        "trunk.downsample.2.weight": (512, 512, 3, 3),
        "trunk.middle.first.attention.gate": (),
        "trunk.up.0.blocks.0.block1.0.weight": (512, 2048, 3, 3),
        "trunk.up.2.blocks.0.block1.0.weight": (128, 512, 3, 3),
        "trunk.upsample.2.weight": (128, 128, 4, 4),
        "trunk.out.0.weight": (128, 128, 3, 3),
        "logits.weight": (1024, 128, 1, 1),
    }.items()
    for absent in ["trunk.down.0.attention.qkv.bias", "trunk.downsample.3.weight",
                   "trunk.up.3.blocks.0.block1.0.weight", "trunk.middle.last.attention.gate",
                   "trunk.top.blocks.0.block1.0.weight"]:
        assert absent not in shapes


@pytest.mark.parametrize(("h", "w"), [(16, 16), (32, 32), (8, 8), (12, 20), (4, 4)])
@BOTH
def test_every_map_that_the_levels_divide_gives_logits_of_its_size(config, h, w):
    with torch.no_grad():
        logits = unet(config)(codes(2, h, w), times())
    assert logits.shape == (2, K, h, w)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 10, 16), (2, 16, 18), (16, 16), (2, 1, 16, 16)])
def test_a_map_that_the_levels_do_not_divide_is_refused(shape):
    with pytest.raises(ValueError, match="multiples of 4"):
        UNet(SMALL, K, 100)(torch.zeros(shape, dtype=torch.int64), times())


# -- the parts, against slow forms -----------------------------------------------------------------

def agree(module, slow, *inputs):
    """Value, and gradient of every parameter and input, of a module and of its slow form."""
    inputs = [x.requires_grad_() for x in inputs]
    ours, theirs = module(*inputs), slow(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(ours)
    names, leaves = zip(*module.named_parameters(), *((f"input {i}", x)
                                                      for i, x in enumerate(inputs)))
    for name, a, b in zip(names, torch.autograd.grad((ours * direction).sum(), leaves),
                          torch.autograd.grad((theirs * direction).sum(), leaves)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def conv(x, layer, stride=1):
    """A convolution as a sum over its taps."""
    k = layer.weight.shape[-1]
    x = F.pad(x, [k // 2] * 4)
    rows, columns = x.shape[2] - k + 1, x.shape[3] - k + 1
    out = sum(torch.einsum("oc,bchw->bohw", layer.weight[:, :, i, j],
                           x[:, :, i:i + rows:stride, j:j + columns:stride])
              for i in range(k) for j in range(k))
    return out if layer.bias is None else out + layer.bias.view(-1, 1, 1)


def mish(x):
    return x * (1 + x.exp()).log().tanh()


def affine(x, layer):
    """Linear on (B,in), as a column for every cell."""
    return (x @ layer.weight.T + layer.bias)[:, :, None, None]


def conv_norm_mish(x, sequence):
    x, layer = conv(x, sequence[0]), sequence[1]
    groups = x.reshape(len(x), layer.num_groups, -1)
    mean, var = groups.mean(2, keepdim=True), groups.var(2, unbiased=False, keepdim=True)
    x = ((groups - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
    return mish(x * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1))


def add_time(block, x, time):
    h = conv_norm_mish(x, block.block1) + affine(time, block.time)
    shortcut = x if isinstance(block.shortcut, nn.Identity) else conv(x, block.shortcut)
    return conv_norm_mish(h, block.block2) + shortcut


def linear_attention(block, x):
    """Position by position, head by head; the gate and the projection last."""
    B, _, h, w = x.shape
    q, k, v = conv(x, block.qkv).reshape(B, 3, block.heads, -1, h, w).unbind(1)
    k = (k - k.amax((-2, -1), keepdim=True)).exp()                          # no overflow
    weight = k / k.sum((-2, -1), keepdim=True)                              # over all positions
    rows = []
    for head in range(block.heads):
        for channel in range(v.shape[2]):
            total = 0
            for feature in range(k.shape[2]):
                gathered = (weight[:, head, feature] * v[:, head, channel]).sum((-2, -1))
                total = total + gathered[:, None, None] * q[:, head, feature]
            rows.append(total)
    return x + block.gate * conv(torch.stack(rows, 1), block.proj)


@pytest.mark.parametrize("out", [12, 8])
def test_a_block_is_its_formula(out):
    block = awake(Block(8, out, SMALL))
    agree(block, lambda x, time: add_time(block, x, time),
          torch.randn(2, 8, 5, 6), torch.randn(2, 12))


def test_linear_attention_is_the_explicit_sum_over_positions():
    block = awake(LinearAttention(8, SMALL))
    agree(block, lambda x: linear_attention(block, x), torch.randn(2, 8, 3, 5))


def test_a_time_is_turned_into_sines_and_cosines_from_frequency_1_to_a_ten_thousandth():
    t, out = torch.tensor([0.0, 1.0, 2.5, 4000.0]), sinusoids(torch.tensor([0, 1, 2.5, 4000]), 8)
    for i in range(4):
        frequency = 10_000 ** (-i / 3)
        torch.testing.assert_close(out[:, i], (t * frequency).sin(), rtol=0, atol=1e-4)
        torch.testing.assert_close(out[:, 4 + i], (t * frequency).cos(), rtol=0, atol=1e-4)


@BOTH
def test_the_trunk_is_its_layers_one_after_the_other(config):
    """Without top_skip, full resolution on the way down comes back through level 1 only."""
    trunk = awake(Trunk(dataclasses.replace(config, attn_levels=(0, 1, 2))))

    def level(h, time, level):
        for block in level.blocks:
            h = add_time(block, h, time)
        return linear_attention(level.attention, h)

    def slow(h, time):
        level0 = level(h, time, trunk.down[0])
        level1 = level(conv(level0, trunk.downsample[0], stride=2), time, trunk.down[1])
        level2 = level(conv(level1, trunk.downsample[1], stride=2), time, trunk.down[2])
        h = add_time(trunk.middle.first.blocks[0], level2, time)
        h = linear_attention(trunk.middle.first.attention, h)
        h = add_time(trunk.middle.last.blocks[0], h, time)
        h = level(torch.cat([h, level2], 1), time, trunk.up[0])
        h = trunk.upsample[0](h)                                            # level 1
        h = level(torch.cat([h, level1], 1), time, trunk.up[1])
        h = trunk.upsample[1](h)                                            # level 0
        if config.top_skip:
            h = level(torch.cat([h, level0], 1), time, trunk.top)
        return conv_norm_mish(h, trunk.out)

    h, time = torch.randn(1, 8, 4, 8), torch.randn(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(trunk(h, time), slow(h, time), rtol=1e-3, atol=1e-4)


@BOTH
def test_levels_hold_attention_where_the_config_says_and_the_middle_has_it(config):
    trunk = UNet(config, K, 100).trunk
    attends = {name: not isinstance(m.attention, nn.Identity) for name, m in trunk.named_modules()
               if isinstance(m, Level)}
    assert attends.pop("middle.first")
    assert not attends.pop("middle.last")
    assert attends.pop("top", True)
    assert attends == {"down.0": True, "down.1": False, "down.2": True,
                       "up.0": True, "up.1": False}


# -- the network as a whole ------------------------------------------------------------------------

def test_a_network_is_embedding_time_trunk_and_a_last_linear_map():
    model, z, t = unet(SMALL), codes(), times()
    time = affine(sinusoids(t * 40.0, 8), model.time[0])[..., 0, 0]         # T = 100 of 4000
    time = mish(affine(mish(time), model.time[2])[..., 0, 0])               # (B, time_width)
    h = model.trunk(model.embedding.weight[z].permute(0, 3, 1, 2), time)    # (B, C, h, w)
    torch.testing.assert_close(model(z, t), conv(h, model.logits), rtol=1e-3, atol=1e-4)


def test_before_training_the_logits_are_zero_and_their_layer_gets_a_gradient():
    model = UNet(SMALL, K, 100)
    logits = model(codes(), times())
    assert torch.equal(logits, torch.zeros_like(logits))
    F.cross_entropy(logits, codes()).backward()
    assert model.logits.weight.grad.abs().max() > 0
    ones = torch.ones(2, 24, 4, 4)
    assert torch.equal(model.trunk.middle.first.attention(ones), ones), "attention starts silent"


def test_a_time_means_the_same_fraction_of_every_number_of_steps():
    short, z = unet(SMALL, T=100), codes()
    long = UNet(SMALL, K, 4000)
    long.load_state_dict(short.state_dict())
    t = torch.tensor([25, 100])
    torch.testing.assert_close(short(z, t), long(z, 40 * t))


@BOTH
def test_every_parameter_gets_a_gradient(config):
    model = unet(config)
    logits = model(torch.arange(2 * 8 * 12).view(2, 8, 12) % K, times())
    ((logits * torch.randn_like(logits)).sum() + logits.square().sum()).backward()
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    dead = [name for name, p in model.named_parameters()
            if p.grad is None or p.grad.abs().max() <= 1e-7 * largest]
    assert not dead


@BOTH
def test_a_silent_network_wakes_up_within_a_few_steps(config):
    """The zeros at the start are no trap: after three steps everything moves."""
    model = UNet(config, K, 100)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    z, t = torch.arange(2 * 8 * 12).view(2, 8, 12) % K, times()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(z, t), z).backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still


@BOTH
def test_bf16_autocast_gives_float32_logits_near_the_float32_ones(config):
    model, z, t = unet(config), codes(), times()
    expected = model(z, t)
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(z, t)
    assert ours.dtype == torch.float32
    assert 0 < (ours - expected).norm() < 0.05 * expected.norm()
    F.cross_entropy(ours, z).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_under_autocast_attention_takes_its_softmax_in_float32(monkeypatch):
    block, dtypes = LinearAttention(8, SMALL), []
    softmax = torch.Tensor.softmax

    def spy(x, *args, **kwargs):
        out = softmax(x, *args, **kwargs)
        dtypes.append((x.dtype, out.dtype))
        return out

    monkeypatch.setattr(torch.Tensor, "softmax", spy)
    with torch.autocast("cpu", torch.bfloat16):
        block(torch.randn(2, 8, 4, 4))
    assert dtypes == [(torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(("backend", "tolerance"), [
    ("eager", 0), pytest.param("inductor", 1e-4, marks=pytest.mark.slow)])
def test_a_compiled_network_is_one_graph_with_the_same_gradients(backend, tolerance):
    """On two levels with one block each, attention in the middle: compiling is what takes long."""
    small = dataclasses.replace(SKIPPING, mults=(1, 2), num_blocks=1, attn_levels=())
    model, z, t = unet(small), codes(), times()

    def run():
        model.zero_grad()
        logits = model(z, t)
        F.cross_entropy(logits, z).backward()
        return [logits.detach(), *(p.grad for p in model.parameters())]

    eager = run()
    torch.compiler.reset()
    model.compile(backend=backend, fullgraph=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Guards may run slower")       # Python 3.13.0
        for a, b in zip(run(), eager):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert backend != "eager" or not [str(w.message) for w in caught]
