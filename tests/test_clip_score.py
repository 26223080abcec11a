"""The CLIP score: the network written out, both layouts of its files, the region and the resize."""

import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import clip_score as module
from clip_score import (
    CLIP_MODELS,
    DEVIATION,
    MEAN,
    Attention,
    Block,
    CLIPImageEncoder,
    Tower,
    bounding_box,
    clip_score,
    image_tower,
    resized,
)
from distributed import UserError
from weight_files import PUBLISHED_FILES

TINY = Tower("ViT-B-32.pt", patch=56, width=128, layers=2, embed_dim=24)      # 17 tokens, 2 heads


@pytest.fixture(autouse=True)
def _a_tiny_model_in_the_table(monkeypatch):
    monkeypatch.setitem(CLIP_MODELS, "tiny", TINY)


def shapes(tower):
    """{key: shape} of the image tower in OpenAI's file."""
    width, tokens = tower.width, 1 + (224 // tower.patch) ** 2
    found = {"class_embedding": (width,), "positional_embedding": (tokens, width),
             "conv1.weight": (width, 3, tower.patch, tower.patch), "proj": (width, tower.embed_dim)}
    blocks = [f"transformer.resblocks.{n}." for n in range(tower.layers)]
    for name in ("ln_pre", "ln_post", *(f"{block}ln_{i}" for block in blocks for i in (1, 2))):
        found |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, outs, ins in (("attn.in_proj_", 3, 1), ("attn.out_proj.", 1, 1),
                            ("mlp.c_fc.", 4, 1), ("mlp.c_proj.", 1, 4)):
        for block in blocks:
            found[f"{block}{name}weight"] = (outs * width, ins * width)
            found[f"{block}{name}bias"] = (outs * width,)
    return {f"visual.{key}": shape for key, shape in found.items()}


def random_weights(tower=TINY):
    """OpenAI's image tower with random numbers, of sizes that keep every layer in its range."""
    state = {}
    for key, shape in shapes(tower).items():
        value = torch.randn(shape) / (shape[0] if key == "visual.proj" else shape[-1]) ** 0.5
        state[key] = value + 1 if ".ln_" in key and key.endswith("weight") else value
    state["visual.conv1.weight"] /= tower.patch ** 0.5
    return state | {key: 10 * state[key] for key in state if key.endswith("_embedding")}


def meta_weights(name):
    return {key: torch.empty(shape, device="meta")
            for key, shape in shapes(CLIP_MODELS[name]).items()}


def hugging_face(state):
    """The same numbers by Hugging Face's names, key by key."""
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[1] == "transformer":
            block, rest = f"vision_model.encoder.layers.{parts[3]}", ".".join(parts[4:])
            if rest.startswith("attn.in_proj_"):
                for name, part in zip("qkv", value.chunk(3)):
                    renamed[f"{block}.self_attn.{name}_proj.{rest[13:]}"] = part
                continue
            layer, kind = rest.rsplit(".", 1)
            theirs = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1",
                      "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
            renamed[f"{block}.{theirs[layer]}.{kind}"] = value
        elif parts[1] == "proj":
            renamed["visual_projection.weight"] = value.T.contiguous()
        else:
            theirs = {"class_embedding": "embeddings.class_embedding",
                      "positional_embedding": "embeddings.position_embedding.weight",
                      "conv1.weight": "embeddings.patch_embedding.weight",
                      "ln_pre.weight": "pre_layrnorm.weight", "ln_pre.bias": "pre_layrnorm.bias",
                      "ln_post.weight": "post_layernorm.weight",
                      "ln_post.bias": "post_layernorm.bias"}
            renamed[f"vision_model.{theirs['.'.join(parts[1:])]}"] = value
    return renamed


def text_tower():
    """Of both layouts, and what else stands in their files."""
    return {"transformer.resblocks.0.attn.in_proj_weight": torch.randn(6, 2),
            "token_embedding.weight": torch.randn(5, 2), "positional_embedding": torch.randn(7, 2),
            "text_model.embeddings.token_embedding.weight": torch.randn(5, 2),
            "text_model.embeddings.position_ids": torch.arange(7)[None],
            "text_projection.weight": torch.randn(2, 2), "logit_scale": torch.tensor(4.6),
            "input_resolution": torch.tensor(224)}


def pictures(*shape):
    return torch.rand(shape) * 2 - 1


def normalised(images):
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return ((images + 1) / 2 - mean) / deviation


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize(("name", "parameters"), [
    ("ViT-B/32", 87_849_216), ("ViT-B/16", 86_192_640), ("ViT-L/14", 303_966_208)])
def test_the_published_sizes_have_openais_keys_and_numbers_of_parameters(name, parameters):
    encoder = CLIPImageEncoder(name, meta_weights(name))
    assert sum(value.numel() for value in encoder.parameters()) == parameters
    assert {f"visual.{key}" for key in encoder.state_dict()} == set(shapes(CLIP_MODELS[name]))


def test_attention_is_a_weighted_mean_over_all_tokens_head_by_head():
    attention = Attention(128)
    for value in attention.parameters():
        nn.init.normal_(value, std=0.1)
    h = torch.randn(1, 5, 128)
    slow = torch.zeros(5, 128)
    for head in range(2):
        q, k, v = (h[0] @ attention.in_proj_weight[start:start + 64].T
                   + attention.in_proj_bias[start:start + 64]
                   for start in (64 * head, 128 + 64 * head, 256 + 64 * head))
        for i in range(5):
            weights = [torch.exp((q[i] * k[j]).sum() / 8) for j in range(5)]
            slow[i, 64 * head:64 * head + 64] = (
                sum(weight * v[j] for j, weight in enumerate(weights)) / sum(weights))
    expected = slow @ attention.out_proj.weight.T + attention.out_proj.bias
    torch.testing.assert_close(attention(h)[0], expected, rtol=1e-4, atol=1e-5)


def layer_norm(h, state, name):
    centred = h - h.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]


def naive_block(h, state, prefix):
    """One layer by formulas; attention by PyTorch's own layer, whose names OpenAI's are."""
    width = h.shape[2]
    attention = nn.MultiheadAttention(width, width // 64, batch_first=True)
    attention.load_state_dict({key.removeprefix(f"{prefix}attn."): value for key, value
                               in state.items() if key.startswith(f"{prefix}attn.")})
    n = layer_norm(h, state, f"{prefix}ln_1")
    h = h + attention(n, n, n)[0]
    n = layer_norm(h, state, f"{prefix}ln_2")
    n = n @ state[f"{prefix}mlp.c_fc.weight"].T + state[f"{prefix}mlp.c_fc.bias"]
    n = n / (1 + torch.exp(-1.702 * n))
    return h + n @ state[f"{prefix}mlp.c_proj.weight"].T + state[f"{prefix}mlp.c_proj.bias"]


def test_a_layer_is_the_formulas_written_out():
    state = {key.removeprefix("visual.transformer.resblocks.0."): value
             for key, value in random_weights().items() if ".resblocks.0." in key}
    block, h = Block(128), torch.randn(3, 7, 128)
    block.load_state_dict(state)
    torch.testing.assert_close(block(h), naive_block(h, state, ""), rtol=1e-4, atol=1e-4)


def test_an_embedding_is_the_tower_written_out():
    state, images = random_weights(), pictures(2, 3, 224, 224)
    x = normalised(images)
    kernel = state["visual.conv1.weight"].flatten(1)                        # (128, 3·56·56)
    tokens = [state["visual.class_embedding"].expand(2, -1)]
    for i in range(4):
        for j in range(4):
            patch = x[:, :, 56 * i:56 * i + 56, 56 * j:56 * j + 56]
            tokens.append(patch.flatten(1) @ kernel.T)
    h = torch.stack(tokens, 1) + state["visual.positional_embedding"]       # (2, 17, 128)
    h = layer_norm(h, state, "visual.ln_pre")
    for n in range(2):
        h = naive_block(h, state, f"visual.transformer.resblocks.{n}.")
    expected = layer_norm(h[:, 0], state, "visual.ln_post") @ state["visual.proj"]
    embedding = CLIPImageEncoder("tiny", state)(images)
    assert embedding.shape == (2, 24)
    torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-4)


def test_the_encoder_is_frozen_in_eval_mode_and_drew_no_random_number():
    state, before = random_weights(), torch.get_rng_state()
    encoder = nn.Sequential(CLIPImageEncoder("tiny", state)).train()[0]
    assert torch.equal(before, torch.get_rng_state())
    assert not any(value.requires_grad for value in encoder.parameters())
    assert not any(layer.training for layer in encoder.modules())


def test_the_encoder_stays_in_float32_under_autocast():
    encoder, images = CLIPImageEncoder("tiny", random_weights()), pictures(1, 3, 40, 40)
    with torch.autocast("cpu", torch.bfloat16):
        inside = encoder(images)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, encoder(images))


def test_an_unknown_model_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"expected one of ViT-B/32, ViT-B/16, ViT-L/14"):
        CLIPImageEncoder("RN50")


# ---------------------------------------------------------------- the resize


@pytest.mark.parametrize("shape", [(300, 260), (90, 500), (16, 17), (1, 1)])
def test_the_resize_is_pillows_bicubic_in_floats_clamped(shape):
    image = pictures(3, *shape)
    floats = [Image.fromarray(plane.numpy(), "F").resize((224, 224), Image.Resampling.BICUBIC)
              for plane in image]
    expected = torch.from_numpy(np.stack([np.array(plane) for plane in floats]))  # (3, 224, 224)
    if shape == (90, 500):
        assert expected.abs().max() > 1.05              # without the clamp it would leave the range
    torch.testing.assert_close(resized(image[None])[0], expected.clamp(-1, 1), rtol=0, atol=1e-4)


def test_clips_own_resize_of_8_bit_pictures_differs_by_their_rounding_only():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    picture = coarse.resize((320, 280), Image.Resampling.BICUBIC)
    theirs = np.array(picture.resize((224, 224), Image.Resampling.BICUBIC), float)
    ours = resized(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1)[0]
    difference = np.abs((ours.permute(1, 2, 0).numpy() + 1) * 127.5 - theirs)
    assert difference.max() < 1.5                       # levels of 255: rounded after rows, then
    assert difference.mean() < 0.35                     # after columns; one rounding alone: 0.25


def test_values_beyond_the_range_are_clamped_before_the_resize_and_224_px_stay_as_they_are():
    image = 1.5 * pictures(2, 3, 50, 60)
    assert torch.equal(resized(image), resized(image.clamp(-1, 1)))
    exact = pictures(1, 3, 224, 224)
    assert torch.equal(resized(exact), exact)


# ---------------------------------------------------------------- the score


def random_mask(shape, boxes):
    mask = torch.zeros(len(boxes), 1, *shape)
    for one, (top, left, bottom, right) in zip(mask, boxes):
        one[0, top:bottom, left:right] = (torch.rand(bottom - top, right - left) > 0.7).float()
        one[0, top, right - 1] = one[0, bottom - 1, left] = 1
    return mask


def test_the_bounding_box_holds_every_one_and_no_smaller_box_does():
    for mask in torch.rand(40, 9, 7) > 0.93:
        ones = [(i, j) for i in range(9) for j in range(7) if mask[i, j]]
        if ones:
            rows, columns = bounding_box(mask)
            assert rows == slice(min(i for i, _ in ones), max(i for i, _ in ones) + 1)
            assert columns == slice(min(j for _, j in ones), max(j for _, j in ones) + 1)


def test_the_score_is_100_times_the_cosine_of_box_and_reference():
    encoder, image = CLIPImageEncoder("tiny", random_weights()), pictures(2, 3, 40, 50)
    mask = random_mask((40, 50), [(3, 5, 20, 36), (30, 0, 40, 50)])
    references = [pictures(3, 20, 30), pictures(3, 64, 8)]
    scores = clip_score(encoder, image, references, mask)
    assert scores.dtype == torch.float64
    assert scores.shape == (2,)
    for score, box, reference in zip(scores, (image[:1, :, 3:20, 5:36], image[1:, :, 30:]),
                                     references):
        a, b = encoder(box)[0], encoder(reference[None])[0]
        cosine = (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())
        assert score.item() == pytest.approx(100 * cosine.item(), abs=1e-3)


def test_pixels_outside_the_box_do_not_count_and_known_ones_inside_do():
    encoder, image = CLIPImageEncoder("tiny", random_weights()), pictures(1, 3, 40, 50)
    mask, references = torch.zeros(1, 1, 40, 50), pictures(1, 3, 30, 30)
    mask[..., 10, 8] = mask[..., 29, 40] = 1                         # two corners of a box
    score = clip_score(encoder, image, references, mask)
    outside = image.clone()
    outside[..., :10, :], outside[..., 41:] = 1, -1
    assert torch.equal(clip_score(encoder, outside, references, mask), score)
    inside = image.clone()
    inside[..., 12:28, 10:39] = 1
    assert (clip_score(encoder, inside, references, mask) - score).abs() > 0.1


def test_the_same_picture_scores_100_and_a_longer_embedding_changes_nothing():
    state, image = random_weights(), pictures(2, 3, 32, 48)
    mask = torch.zeros(2, 1, 32, 48)
    mask[..., 4:20, 8:40] = 1
    scores = clip_score(CLIPImageEncoder("tiny", state), image, image[..., 4:20, 8:40], mask)
    assert scores.tolist() == pytest.approx([100, 100], abs=1e-4)
    others = pictures(2, 3, 30, 30)
    before = clip_score(CLIPImageEncoder("tiny", state), image, others, mask)
    state["visual.proj"] = 3 * state["visual.proj"]
    after = clip_score(CLIPImageEncoder("tiny", state), image, others, mask)
    assert after.tolist() == pytest.approx(before.tolist(), abs=1e-4)
    assert (before < 99).all()


def test_an_image_with_nothing_generated_has_no_score():
    encoder, image = CLIPImageEncoder("tiny", random_weights()), pictures(3, 3, 32, 32)
    mask, references = torch.zeros(3, 1, 32, 32), pictures(3, 3, 20, 20)
    assert clip_score(encoder, image, references, mask).isnan().all()
    mask[1, :, 5:9] = 1
    scores = clip_score(encoder, image, references, mask)
    assert scores.isnan().tolist() == [True, False, True]
    alone = clip_score(encoder, image[1:2], references[1:2], mask[1:2])
    assert scores[1].item() == pytest.approx(alone.item(), abs=1e-4)


@pytest.mark.parametrize(("image", "references", "mask"), [
    ((3, 32, 32), [(3, 9, 9)], (1, 1, 32, 32)),
    ((1, 4, 32, 32), [(3, 9, 9)], (1, 1, 32, 32)),
    ((1, 3, 32, 32), [(3, 9, 9)], (1, 3, 32, 32)),
    ((1, 3, 32, 32), [(3, 9, 9)], (1, 1, 16, 16)),
    ((2, 3, 32, 32), [(3, 9, 9)], (2, 1, 32, 32)),
    ((1, 3, 32, 32), [(1, 9, 9)], (1, 1, 32, 32)),
    ((1, 3, 32, 32), [(9, 9)], (1, 1, 32, 32))])
def test_shapes_that_do_not_belong_together_are_refused(image, references, mask):
    encoder = CLIPImageEncoder("tiny", random_weights())
    with pytest.raises(ValueError, match="expected"):
        clip_score(encoder, torch.zeros(image), [torch.zeros(one) for one in references],
                   torch.ones(mask))


# ---------------------------------------------------------------- files


def script(state):
    """A TorchScript program whose parameters have these names, as OpenAI's files are."""
    class Node(nn.Module):
        def forward(self, x):
            return x

    root = Node()
    for key, value in state.items():
        *path, name = key.split(".")
        node = root
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, Node())
            node = getattr(node, part)
        node.register_buffer(name, value)
    return torch.jit.script(root)


def safetensors(state):
    """The bytes of a file of safetensors, its header padded to whole words as the library does."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    header, numbers = {"__metadata__": {"format": "pt"}}, b""
    for key, value in state.items():
        data = value.contiguous().numpy().tobytes()
        header[key] = {"dtype": names[value.dtype], "shape": list(value.shape),
                       "data_offsets": [len(numbers), len(numbers) + len(data)]}
        numbers += data
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + numbers


def write(path, state):
    """`state` in the format that the file's name tells."""
    if path.name == "ViT-B-32.pt":
        torch.jit.save(script(state), str(path))
    elif path.suffix == ".safetensors":
        path.write_bytes(safetensors(state))
    else:
        torch.save(state, path)
    return path


def same(encoder, state, tolerance=0):
    """Whether the encoder holds the numbers of a state dict with OpenAI's names, in float32."""
    own = encoder.state_dict()
    assert {f"visual.{key}" for key in own} == set(state)
    for key, value in own.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, state[f"visual.{key}"], rtol=tolerance, atol=tolerance)


def test_both_layouts_are_the_same_network_and_the_text_tower_is_dropped():
    state = random_weights()
    same(CLIPImageEncoder("tiny", state | text_tower()), state)
    old = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    same(CLIPImageEncoder("tiny", hugging_face(state) | text_tower() | old), state)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("file", ["ViT-B-32.pt", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_files_of_both_publishers_are_read_from_their_folder_or_by_their_path(
        file, dtype, tmp_path, capsys):
    state = random_weights()
    stored = state if file.endswith(".pt") else hugging_face(state)
    stored = {key: value.to(dtype) for key, value in stored.items()} | text_tower()
    path = write(tmp_path / file, stored)
    tolerance = 0 if dtype == torch.float32 else 2e-3
    same(CLIPImageEncoder("tiny", tmp_path), state, tolerance)
    same(CLIPImageEncoder("tiny", path), state, tolerance)
    assert ("is not the published file" in capsys.readouterr().out) == file.endswith(".pt")


def test_a_plain_state_dict_by_openais_names_is_read_too(tmp_path):
    state = random_weights()
    torch.save(state, tmp_path / "resaved.pt")
    same(CLIPImageEncoder("tiny", tmp_path / "resaved.pt"), state)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("file", ["ViT-B-32.pt", "model.safetensors", "pytorch_model.bin"])
def test_a_file_may_change_once_it_is_read(file, tmp_path):
    state = random_weights()
    path = write(tmp_path / file, state)
    encoder = CLIPImageEncoder("tiny", path)
    path.write_bytes(b"\0" * path.stat().st_size)
    same(encoder, state)


@pytest.mark.parametrize("layout", [dict, hugging_face])
def test_a_missing_a_foreign_and_a_misshapen_key_are_refused_by_name(layout):
    for key in ("visual.ln_pre.bias", "visual.transformer.resblocks.1.attn.in_proj_weight"):
        state = random_weights()
        del state[key]
        with pytest.raises(UserError, match=key.removeprefix("visual.")):
            CLIPImageEncoder("tiny", layout(state))
    state = layout(random_weights())
    extra = "visual.more" if layout is dict else "vision_model.more"
    with pytest.raises(UserError, match=f"more.*{PUBLISHED_FILES[TINY.file][0]}{TINY.file}"):
        CLIPImageEncoder("tiny", state | {extra: torch.zeros(1)})
    key = "visual.proj" if layout is dict else "visual_projection.weight"
    with pytest.raises(UserError, match="proj"):
        CLIPImageEncoder("tiny", state | {key: torch.zeros(3, 3)})


def test_half_of_an_attention_layer_is_refused_by_name():
    state = hugging_face(random_weights())
    del state["vision_model.encoder.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(UserError, match="in_proj_weight"):
        CLIPImageEncoder("tiny", state)


def test_a_file_of_another_size_is_refused_with_its_name():
    with pytest.raises(UserError, match=r"holds ViT-B/16, not ViT-B/32: ask for ViT-B/16"):
        CLIPImageEncoder("ViT-B/32", meta_weights("ViT-B/16"))


@pytest.mark.parametrize("content", [
    text_tower(), {}, [1, 2], {"visual": {"conv1.weight": torch.zeros(1)}}, {1: torch.zeros(1)}])
def test_a_file_without_an_image_tower_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "some.bin")
    with pytest.raises(UserError, match=r"some\.bin holds no image tower of CLIP") as caught:
        CLIPImageEncoder("tiny", tmp_path / "some.bin")
    assert f"{PUBLISHED_FILES[TINY.file][0]}{TINY.file}" in str(caught.value)


@pytest.mark.parametrize("file", ["ViT-B-32.pt", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"<html>", b"no weights at all", b"\xff" * 64])
def test_a_damaged_file_is_refused_with_the_address_of_a_fresh_one(file, content, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file}.*put a fresh copy of") as caught:
        CLIPImageEncoder("tiny", tmp_path)
    assert f"{PUBLISHED_FILES[TINY.file][0]}{TINY.file}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_of_safetensors_is_refused(tmp_path):
    data = safetensors(hugging_face(random_weights()))
    for end in (4, 100, len(data) - 4):
        (tmp_path / "model.safetensors").write_bytes(data[:end])
        with pytest.raises(UserError, match="truncated or no checkpoint"):
            CLIPImageEncoder("tiny", tmp_path)


def test_a_missing_file_offline_names_file_address_and_folder(tmp_path, monkeypatch):
    def refuse(address, *args, **kwargs):
        raise OSError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError, match=f"ViT-B-32.pt is not in {tmp_path}.*get https://openai"):
        CLIPImageEncoder("ViT-B/32", tmp_path)


def test_openais_addresses_hold_the_hash_of_their_files():
    for tower in (CLIP_MODELS[name] for name in ("ViT-B/32", "ViT-B/16", "ViT-L/14")):
        address, sha256 = PUBLISHED_FILES[tower.file]
        assert address.endswith(f"/{sha256}/")
        assert len(sha256) == 64


# ---------------------------------------------------------------- transformers


def peer(tower, state):
    """Hugging Face's model of this size with these weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=tower.width, intermediate_size=4 * tower.width, image_size=224,
        patch_size=tower.patch, num_hidden_layers=tower.layers,
        num_attention_heads=tower.width // 64, projection_dim=tower.embed_dim)
    assert config.hidden_act == "quick_gelu"
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    if state is not None:
        missing, unknown = model.load_state_dict(hugging_face(state), strict=False)
        assert not unknown
        assert all(key.endswith("position_ids") for key in missing)
    return model


@torch.no_grad()
def test_embeddings_equal_transformers_with_the_same_weights():
    state, images = random_weights(), pictures(2, 3, 224, 224)
    theirs = peer(TINY, state)(normalised(images)).image_embeds
    torch.testing.assert_close(CLIPImageEncoder("tiny", state)(images), theirs, rtol=0, atol=1e-4)


@torch.no_grad()
def test_vit_b_32_reads_transformers_own_state_dict_and_equals_it():
    model, images = peer(CLIP_MODELS["ViT-B/32"], None), pictures(1, 3, 224, 224)
    encoder = CLIPImageEncoder("ViT-B/32", model.state_dict())
    assert sum(value.numel() for value in model.parameters()) == 87_849_216
    theirs = model(normalised(images)).image_embeds
    torch.testing.assert_close(encoder(images), theirs, rtol=0, atol=1e-4)


def test_square_pictures_are_prepared_as_by_transformers():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchvision")
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    picture = np.array(coarse.resize((320, 320), Image.Resampling.BICUBIC))
    theirs = transformers.CLIPImageProcessor()(picture, return_tensors="pt")["pixel_values"]
    encoder = CLIPImageEncoder("tiny", random_weights())
    image = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    ours = (resized(image) - encoder.mean) / encoder.deviation
    assert (ours - theirs).abs().max() < 1.5 / 255 / min(DEVIATION)   # of 8 bits, 1.5 levels
    assert (ours - theirs).abs().mean() < 0.35 / 255 / min(DEVIATION)


def test_safetensors_are_read_as_by_the_library(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    state = {key: value.half() for key, value in hugging_face(random_weights()).items()}
    library.save_file(state | {"vision_model.brain": torch.randn(3).bfloat16()},
                      tmp_path / "model.safetensors")
    ours, theirs = (image_tower(read(tmp_path / "model.safetensors"))
                    for read in (module.read_safetensors, library.load_file))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
