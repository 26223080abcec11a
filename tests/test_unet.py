import copy
import dataclasses
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from unet import (
    UNET_PRESETS,
    AddTimeBlock,
    Cell,
    DDPMTrunk,
    FullAttention,
    LinearAttention,
    MultinomialTrunk,
    ScaleShiftBlock,
    UNet,
    UNetConfig,
    sinusoids,
)

# Two blocks a level, widths that grow, attention on some levels only.
SMALL = UNetConfig(width=8, mults=(1, 2, 3), attn_levels=(0, 2), heads=2, head_width=4,
                   time_width=12, norm_groups=4)
SMALL_DDPM = dataclasses.replace(SMALL, layout="ddpm", attention="full")
LAYOUTS = pytest.mark.parametrize("config", [SMALL, SMALL_DDPM], ids=["multinomial", "ddpm"])
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


def count(module):
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(("preset", "codes", "parameters"), [
    ("paper117", 1024, 117_586_568),
    ("paper117", 512, 117_454_984),
    ("ddpm117", 1024, 116_412_544),
    ("ddpm117", 512, 116_280_960),
    ("tiny", 256, 1_216_512),
])
def test_the_presets_have_their_parameter_counts(preset, codes, parameters):
    assert count(on_meta(preset, codes)) == parameters


def multiplications(model):
    """(in Conv2d alone, in all) for one 16x16 map."""
    convolutions = []

    def hook(layer, inputs, output):
        convolutions.append(output.numel() * layer.weight[0].numel())

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(hook)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 16, 16, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    return sum(convolutions), counter.get_total_flops() // 2


@pytest.mark.parametrize(("codes", "printed", "in_convolutions", "in_all"), [
    (1024, 1.06, 1_055_916_032, 1_110_867_968), (512, 1.04, 1_039_138_816, 1_094_090_752)])
def test_table_2s_operations_are_the_multiplications_of_the_plain_convolutions(
        codes, printed, in_convolutions, in_all):
    """To the table's last digit; with transposed convolutions, linear layers and attention's own
    products, 5 % more."""
    assert multiplications(on_meta("paper117", codes)) == (in_convolutions, in_all)
    assert round(in_convolutions / 1e9, 2) == printed
    assert in_all == pytest.approx(printed * 1e9, rel=0.06)


def test_the_appendixs_words_lead_to_another_network_than_its_numbers():
    """Attention at 16, 8 and 4 in DDPM's layout, of the same size, costs 2.7 times as much."""
    _, in_all = multiplications(on_meta("ddpm117", 1024))
    assert in_all == 2_876_981_248


def test_the_shapes_are_those_of_the_published_layouts():
    names = {name: {key: tuple(p.shape) for key, p in on_meta(name, 1024).state_dict().items()}
             for name in UNET_PRESETS}
    assert names["paper117"].items() >= {
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
    assert names["ddpm117"].items() >= {
        "time.2.weight": (512, 512),
        "trunk.conv_in.weight": (128, 128, 3, 3),
        "trunk.down.0.2.blocks.0.time.weight": (256, 512),
        "trunk.down.2.1.attention.qkv.weight": (1152, 384),
        "trunk.up.0.3.blocks.0.conv1.weight": (512, 896, 3, 3),
        "trunk.up.3.3.blocks.0.conv1.weight": (128, 256, 3, 3),
        "trunk.norm.weight": (128,),
    }.items()
    for absent in ["trunk.down.0.attention.qkv.bias", "trunk.downsample.3.weight",
                   "trunk.up.3.blocks.0.block1.0.weight", "trunk.middle.last.attention.gate"]:
        assert absent not in names["paper117"]
    for absent in ["trunk.down.3.0.attention.qkv.weight", "trunk.up.0.0.attention.qkv.weight",
                   "trunk.down.0.3.blocks.0.conv1.weight", "trunk.upsample.3.conv.weight"]:
        assert absent not in names["ddpm117"]


@pytest.mark.parametrize("preset", UNET_PRESETS)
def test_all_group_norms_have_the_configs_groups(preset):
    model = on_meta(preset, 64)
    groups = {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {UNET_PRESETS[preset].norm_groups}


@pytest.mark.parametrize(("h", "w"), [(16, 16), (32, 32), (8, 8), (12, 20), (4, 4)])
@LAYOUTS
def test_every_map_that_the_levels_divide_gives_logits_of_its_size(config, h, w):
    with torch.no_grad():
        logits = unet(config)(codes(2, h, w), times())
    assert logits.shape == (2, K, h, w)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 10, 16), (2, 16, 18), (16, 16), (2, 1, 16, 16)])
@LAYOUTS
def test_a_map_that_the_levels_do_not_divide_is_refused(config, shape):
    with pytest.raises(ValueError, match="multiples of 4"):
        UNet(config, K, 100)(torch.zeros(shape, dtype=torch.int64), times())


@pytest.mark.parametrize(("changes", "message"), [
    ({"layout": "unet"}, 'layout must be "multinomial" or "ddpm"'),
    ({"attention": "none"}, 'attention must be "linear" or "full"'),
    ({"attention": "full", "heads": 3}, "3 heads do not divide 8 channels"),
    ({"norm_groups": 3}, "divisible")])
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet(dataclasses.replace(SMALL, **changes), K, 100)


# ---------------------------------------------------------------- the blocks, against slow forms


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


def norm(x, layer):
    """GroupNorm by hand."""
    groups = x.reshape(len(x), layer.num_groups, -1)
    mean, var = groups.mean(2, keepdim=True), groups.var(2, unbiased=False, keepdim=True)
    x = ((groups - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
    return x * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)


def mish(x):
    return x * (1 + x.exp()).log().tanh()


def silu(x):
    return x / (1 + (-x).exp())


def affine(x, layer):
    """Linear on (B,in), as a column for every cell."""
    return (x @ layer.weight.T + layer.bias)[:, :, None, None]


def conv_norm_mish(x, sequence):
    return mish(norm(conv(x, sequence[0]), sequence[1]))


def add_time(block, x, time):
    h = conv_norm_mish(x, block.block1) + affine(time, block.time)
    shortcut = x if isinstance(block.shortcut, nn.Identity) else conv(x, block.shortcut)
    return conv_norm_mish(h, block.block2) + shortcut


def scale_shift(block, x, time):
    h = norm(conv(silu(norm(x, block.norm1)), block.conv1), block.norm2)
    scale, shift = affine(time, block.time).split(h.shape[1], dim=1)
    h = conv(silu(h * (1 + scale) + shift), block.conv2)
    return h + (x if isinstance(block.shortcut, nn.Identity) else conv(x, block.shortcut))


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
def test_a_block_of_multinomial_diffusion_is_its_formula(out):
    block = awake(AddTimeBlock(8, out, SMALL))
    agree(block, lambda x, time: add_time(block, x, time),
          torch.randn(2, 8, 5, 6), torch.randn(2, 12))


@pytest.mark.parametrize("out", [12, 8])
def test_a_block_of_improved_ddpm_is_its_formula(out):
    block = awake(ScaleShiftBlock(8, out, SMALL))
    agree(block, lambda x, time: scale_shift(block, x, time),
          torch.randn(2, 8, 5, 6), torch.randn(2, 12))


def test_linear_attention_is_the_explicit_sum_over_positions():
    block = awake(LinearAttention(8, SMALL))
    agree(block, lambda x: linear_attention(block, x), torch.randn(2, 8, 3, 5))


def test_full_attention_is_the_explicit_softmax_over_positions():
    block = awake(FullAttention(8, SMALL_DDPM))

    def slow(x):
        tokens = norm(x, block.norm).flatten(2)                             # (B, C, hw)
        qkv = block.qkv.weight @ tokens + block.qkv.bias[:, None]
        q, k, v = qkv.reshape(len(x), 3, block.heads, 4, -1).unbind(1)      # 4 = 8 / 2 heads
        columns = []
        for position in range(tokens.shape[2]):
            scores = (q[..., position, None] * k).sum(2) / math.sqrt(4)     # (B, heads, hw)
            weight = scores.exp() / scores.exp().sum(-1, keepdim=True)
            columns.append((weight[:, :, None] * v).sum(-1).flatten(1))     # (B, C)
        spent = block.proj.weight @ torch.stack(columns, 2) + block.proj.bias[:, None]
        return x + spent.reshape(x.shape)

    agree(block, slow, torch.randn(2, 8, 3, 4))


@pytest.mark.parametrize(("Attention", "config"), [
    (LinearAttention, SMALL), (FullAttention, SMALL_DDPM)], ids=["linear", "full"])
def test_attention_does_not_know_where_its_positions_are(Attention, config):
    block, x = awake(Attention(8, config)), torch.randn(2, 8, 3, 4)
    order = torch.randperm(12)
    shuffled = x.flatten(2)[:, :, order].view_as(x)
    torch.testing.assert_close(block(shuffled), block(x).flatten(2)[:, :, order].view_as(x),
                               rtol=1e-4, atol=1e-5)


def test_a_time_is_turned_into_sines_and_cosines_from_frequency_1_to_a_ten_thousandth():
    t, out = torch.tensor([0.0, 1.0, 2.5, 4000.0]), sinusoids(torch.tensor([0, 1, 2.5, 4000]), 8)
    for i in range(4):
        frequency = 10_000 ** (-i / 3)
        torch.testing.assert_close(out[:, i], (t * frequency).sin(), rtol=0, atol=1e-4)
        torch.testing.assert_close(out[:, 4 + i], (t * frequency).cos(), rtol=0, atol=1e-4)


# ---------------------------------------------------------------- the trunks


def test_the_trunk_of_multinomial_diffusion_is_its_layers_one_after_the_other():
    """And what leaves full resolution on the way down does not come back but through level 1."""
    config = dataclasses.replace(SMALL, attn_levels=(0, 1, 2))
    trunk = awake(MultinomialTrunk(config))

    def cell(h, time, cell):
        for block in cell.blocks:
            h = add_time(block, h, time)
        return linear_attention(cell.attention, h)

    def slow(h, time):
        level0 = cell(h, time, trunk.down[0])
        level1 = cell(conv(level0, trunk.downsample[0], stride=2), time, trunk.down[1])
        level2 = cell(conv(level1, trunk.downsample[1], stride=2), time, trunk.down[2])
        h = add_time(trunk.middle.first.blocks[0], level2, time)
        h = linear_attention(trunk.middle.first.attention, h)
        h = add_time(trunk.middle.last.blocks[0], h, time)
        h = cell(torch.cat([h, level2], 1), time, trunk.up[0])
        h = trunk.upsample[0](h)                                            # level 1
        h = cell(torch.cat([h, level1], 1), time, trunk.up[1])
        h = trunk.upsample[1](h)                                            # level 0
        return conv_norm_mish(h, trunk.out)

    h, time = torch.randn(1, 8, 4, 8), torch.randn(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(trunk(h, time), slow(h, time), rtol=1e-3, atol=1e-4)


def test_the_trunk_of_improved_ddpm_is_its_layers_one_after_the_other():
    config = dataclasses.replace(SMALL_DDPM, mults=(1, 2), attn_levels=(1,))
    trunk = awake(DDPMTrunk(config))

    def cell(h, time, cell):
        return cell.attention(scale_shift(cell.blocks[0], h, time))

    def slow(h, time):
        a = conv(h, trunk.conv_in)                                          # level 0
        b = cell(a, time, trunk.down[0][0])
        c = cell(b, time, trunk.down[0][1])
        d = conv(c, trunk.downsample[0], stride=2)                          # level 1
        e = cell(d, time, trunk.down[1][0])
        f = cell(e, time, trunk.down[1][1])
        h = cell(f, time, trunk.middle.first)
        h = cell(h, time, trunk.middle.last)
        h = cell(torch.cat([h, f], 1), time, trunk.up[0][0])
        h = cell(torch.cat([h, e], 1), time, trunk.up[0][1])
        h = cell(torch.cat([h, d], 1), time, trunk.up[0][2])
        h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)               # level 0
        h = conv(h, trunk.upsample[0].conv)
        h = cell(torch.cat([h, c], 1), time, trunk.up[1][0])
        h = cell(torch.cat([h, b], 1), time, trunk.up[1][1])
        h = cell(torch.cat([h, a], 1), time, trunk.up[1][2])
        return silu(norm(h, trunk.norm))

    h, time = torch.randn(1, 8, 4, 6), torch.randn(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(trunk(h, time), slow(h, time), rtol=1e-3, atol=1e-4)


@LAYOUTS
def test_a_network_is_embedding_time_trunk_and_a_last_linear_map(config):
    model, z, t = unet(config), codes(), times()
    activation = mish if config is SMALL else silu
    time = affine(sinusoids(t * 40.0, 8), model.time[0])[..., 0, 0]         # T = 100 of 4000
    time = activation(affine(activation(time), model.time[2])[..., 0, 0])   # (B, time_width)
    h = model.trunk(model.embedding.weight[z].permute(0, 3, 1, 2), time)    # (B, C, h, w)
    torch.testing.assert_close(model(z, t), conv(h, model.logits), rtol=1e-3, atol=1e-4)


def in_diffusers_names(model):
    """The trunk of a `ddpm` network, its time and its logits under UNet2DModel's keys."""
    state, lowest = {}, len(model.config.mults) - 1

    def put(name, layer):
        state.update({f"{name}.{key}": value for key, value in layer.state_dict().items()})

    def put_cell(block, j, cell):
        names = {"norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2",
                 "conv2": "conv2", "shortcut": "conv_shortcut"}
        for ours, theirs in names.items():
            put(f"{block}.resnets.{j}.{theirs}", getattr(cell.blocks[0], ours))
        if not isinstance(cell.attention, nn.Identity):
            attention = f"{block}.attentions.{j}"
            put(f"{attention}.group_norm", cell.attention.norm)
            put(f"{attention}.to_out.0", cell.attention.proj)
            for key in ("weight", "bias"):
                qkv = cell.attention.qkv.state_dict()[key].chunk(3)
                state.update({f"{attention}.to_{n}.{key}": part for n, part in zip("qkv", qkv)})

    trunk = model.trunk
    for name, layer in [("conv_in", trunk.conv_in), ("conv_norm_out", trunk.norm),
                        ("time_embedding.linear_1", model.time[0]),
                        ("time_embedding.linear_2", model.time[2])]:
        put(name, layer)
    for i in range(lowest + 1):
        for way, block in (("down", trunk.down[i]), ("up", trunk.up[i])):
            for j, cell in enumerate(block):
                put_cell(f"{way}_blocks.{i}", j, cell)
        if i < lowest:
            put(f"down_blocks.{i}.downsamplers.0.conv", trunk.downsample[i])
            put(f"up_blocks.{i}.upsamplers.0", trunk.upsample[i])
    put_cell("mid_block", 0, trunk.middle.first)
    put_cell("mid_block", 1, trunk.middle.last)
    state["conv_out.weight"] = F.pad(model.logits.weight, [1] * 4)          # 1x1 within a 3x3
    state["conv_out.bias"] = model.logits.bias
    return state


@pytest.mark.parametrize("config", [
    dataclasses.replace(SMALL_DDPM, heads=1, time_width=32),
    pytest.param(dataclasses.replace(UNET_PRESETS["ddpm117"], heads=1), marks=pytest.mark.slow)],
    ids=["small", "ddpm117"])
def test_the_trunk_of_improved_ddpm_agrees_with_diffusers(config):
    diffusers = pytest.importorskip("diffusers")
    model, lowest = unet(config).eval(), len(config.mults) - 1
    kinds = ["Attn" * (i in config.attn_levels) + "{}Block2D" for i in range(lowest + 1)]
    peer = diffusers.UNet2DModel(
        in_channels=config.width, out_channels=K, block_out_channels=config.widths,
        layers_per_block=config.num_blocks, attention_head_dim=None,
        down_block_types=[kind.format("Down") for kind in kinds],
        up_block_types=[kind.format("Up") for kind in reversed(kinds)],
        freq_shift=1, flip_sin_to_cos=False, resnet_time_scale_shift="scale_shift",
        norm_num_groups=config.norm_groups, attn_norm_num_groups=config.norm_groups).eval()
    peer.load_state_dict(in_diffusers_names(model))
    z, t = codes(2, 16, 8), torch.tensor([3, 80])
    with torch.no_grad():
        embedded = model.embedding(z).permute(0, 3, 1, 2)
        theirs = peer(embedded, t * 40).sample                              # T = 100 of 4000
        torch.testing.assert_close(model(z, t), theirs, rtol=1e-3, atol=1e-3)


@LAYOUTS
def test_cells_hold_attention_on_the_configs_levels_and_in_the_middle(config):
    trunk = UNet(config, K, 100).trunk
    attends = {name: not isinstance(m.attention, nn.Identity) for name, m in trunk.named_modules()
               if isinstance(m, Cell)}
    assert attends.pop("middle.first")
    assert not attends.pop("middle.last")
    lowest = len(config.mults) - 1
    for name, found in attends.items():
        way, index, *_ = name.split(".")
        level = int(index) if way == "down" else lowest - int(index)
        assert found == (level in config.attn_levels), name


# ---------------------------------------------------------------- the network as a whole


@LAYOUTS
def test_before_training_the_logits_are_zero_and_their_layer_gets_a_gradient(config):
    model = UNet(config, K, 100)
    logits = model(codes(), times())
    assert torch.equal(logits, torch.zeros_like(logits))
    F.cross_entropy(logits, codes()).backward()
    assert model.logits.weight.grad.abs().max() > 0


@LAYOUTS
def test_every_branch_of_a_new_network_starts_silent(config):
    """Attention adds nothing; in ddpm's layout, neither do the blocks."""
    model = UNet(config, K, 100)
    h, time = torch.randn(2, 8, 4, 4), torch.randn(2, 12)
    attended = model.trunk.middle.first
    assert torch.equal(attended.attention(torch.ones(2, 24, 4, 4)), torch.ones(2, 24, 4, 4))
    block = (model.trunk.down[0].blocks if config is SMALL else model.trunk.down[0][0].blocks)[0]
    assert torch.equal(block(h, time), h) == (config is SMALL_DDPM)


@LAYOUTS
def test_the_logits_depend_on_time(config):
    model, z = unet(config), codes()
    early, late = model(z, torch.tensor([1, 1])), model(z, torch.tensor([100, 100]))
    assert (early - late).abs().mean() > 0.05 * early.abs().mean()
    assert not torch.allclose(early, model(z, torch.tensor([2, 2])), rtol=1e-3)


def test_a_time_means_the_same_fraction_of_every_number_of_steps():
    short, z = unet(SMALL, T=100), codes()
    long = UNet(SMALL, K, 4000)
    long.load_state_dict(short.state_dict())
    t = torch.tensor([25, 100])
    torch.testing.assert_close(short(z, t), long(z, 40 * t))


@LAYOUTS
def test_every_parameter_gets_a_gradient(config):
    model = unet(config)
    logits = model(torch.arange(2 * 8 * 12).view(2, 8, 12) % K, times())
    ((logits * torch.randn_like(logits)).sum() + logits.square().sum()).backward()
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    dead = [name for name, p in model.named_parameters()
            if p.grad is None or p.grad.abs().max() <= 1e-7 * largest]
    assert not dead


@LAYOUTS
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


@LAYOUTS
def test_other_names_for_the_codes_are_other_names_for_the_logits(config):
    model, z, t = unet(config), codes(), times()
    order = torch.randperm(K)
    renamed = copy.deepcopy(model)
    with torch.no_grad():
        renamed.embedding.weight[order] = model.embedding.weight
        renamed.logits.weight[order] = model.logits.weight
        renamed.logits.bias[order] = model.logits.bias
    torch.testing.assert_close(renamed(order[z], t)[:, order], model(z, t), rtol=1e-3, atol=1e-4)


@LAYOUTS
def test_a_maps_logits_depend_on_no_other_map_of_the_batch(config):
    model, z, t = unet(config), codes(3), times(3)
    together = model(z, t)
    for i in range(3):
        torch.testing.assert_close(together[i:i + 1], model(z[i:i + 1], t[i:i + 1]),
                                   rtol=1e-3, atol=1e-4)


@LAYOUTS
def test_every_cell_sees_the_whole_map(config):
    model, z, t = unet(config), codes(1, 16, 16), times(1)
    other = z.clone()
    other[0, 0, 0] = (z[0, 0, 0] + 1) % K
    with torch.no_grad():
        change = (model(other, t) - model(z, t)).abs().amax((0, 1))         # (h, w)
    assert change.min() > 0


@LAYOUTS
def test_one_seed_gives_one_network_and_one_output(config):
    def run():
        torch.manual_seed(3)
        model = UNet(config, K, 100)
        nn.init.normal_(model.logits.weight)
        return model(torch.arange(64).view(1, 8, 8) % K, torch.tensor([7]))

    assert torch.equal(run(), run())


@LAYOUTS
def test_bf16_autocast_gives_float32_logits_near_the_float32_ones(config):
    model, z, t = unet(config), codes(), times()
    expected = model(z, t)
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(z, t)
    assert ours.dtype == torch.float32
    assert 0 < (ours - expected).norm() < 0.05 * expected.norm()
    F.cross_entropy(ours, z).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_under_autocast_full_attention_takes_its_softmax_in_float32(monkeypatch):
    """Scores about 30 in bf16 would be off by an eighth, and weights by a tenth."""
    block, calls = awake(FullAttention(8, SMALL_DDPM)), []
    nn.init.normal_(block.qkv.weight, std=3)
    fused = F.scaled_dot_product_attention

    def spy(q, k, v):
        calls.append((q, k, v, fused(q, k, v)))
        return calls[-1][-1]

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.autocast("cpu", torch.bfloat16):
        block(torch.randn(2, 8, 8, 8))
    [(q, k, v, out)] = calls
    assert {x.dtype for x in (q, k, v, out)} == {torch.bfloat16}
    scores = q.float() @ k.float().transpose(2, 3) / math.sqrt(4)
    assert scores.abs().max() > 30
    exact, rough = scores.softmax(-1) @ v.float(), scores.bfloat16().softmax(-1) @ v
    assert (out - exact).norm() < 0.004 * exact.norm() < (rough - exact).norm()


def test_under_autocast_linear_attention_takes_its_softmax_in_float32(monkeypatch):
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


def compiled_equals_eager(config, backend, tolerance):
    """On two levels with one block each, attention in the middle: compiling is what takes long."""
    small = dataclasses.replace(config, mults=(1, 2), num_blocks=1, attn_levels=())
    model, z, t = unet(small), codes(), times()

    def run():
        model.zero_grad()
        logits = model(z, t)
        F.cross_entropy(logits, z).backward()
        return [logits.detach(), *(p.grad for p in model.parameters())]

    eager = run()
    torch._dynamo.reset()
    model.compile(backend=backend, fullgraph=True)
    for a, b in zip(run(), eager):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@LAYOUTS
def test_a_compiled_network_is_one_graph_with_the_same_gradients(config):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled_equals_eager(config, "eager", 0)
    assert not [str(w.message) for w in caught]


@pytest.mark.slow
@LAYOUTS
def test_inductor_gives_the_same_gradients(config):
    compiled_equals_eager(config, "inductor", 1e-4)
