"""The CLIP score: the network written out, the folder it is read from, the box and the resize."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clip_score import DEVIATION, MEAN, CLIPImageEncoder, bounding_box, clip_score, resized
from distributed import UserError
from weight_files import write_safetensors

TINY = {"hidden_act": "quick_gelu", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14,
        "projection_dim": 24}                                                # 17 tokens


def random_weights(config=TINY):
    """The image tower's keys in the published files, with numbers that keep layers in range."""
    width, inner, patch = (config[name] for name in ("hidden_size", "intermediate_size",
                                                     "patch_size"))
    shapes = {"embeddings.class_embedding": (width,),
              "embeddings.patch_embedding.weight": (width, 3, patch, patch),
              "embeddings.position_embedding.weight": (17, width)}
    norms = ["pre_layrnorm", "post_layernorm"]
    for n in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{n}."
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
        for name, outs, ins in (("mlp.fc1", inner, width), ("mlp.fc2", width, inner), *(
                (f"self_attn.{part}_proj", width, width) for part in ("q", "k", "v", "out"))):
            shapes |= {f"{layer}{name}.weight": (outs, ins), f"{layer}{name}.bias": (outs,)}
    state = {f"vision_model.{key}": torch.randn(shape) / shape[-1] ** 0.5
             for key, shape in shapes.items()}
    for name in norms:
        state[f"vision_model.{name}.weight"] = 1 + torch.randn(width) / 8
        state[f"vision_model.{name}.bias"] = torch.randn(width) / 8
    state["visual_projection.weight"] = torch.randn(config["projection_dim"], width) / 8
    return state


def text_tower():
    """What else stands in the file of a whole CLIP."""
    return {"text_model.embeddings.token_embedding.weight": torch.randn(5, 2),
            "text_model.embeddings.position_ids": torch.arange(7)[None],
            "text_projection.weight": torch.randn(2, 2), "logit_scale": torch.tensor(4.6),
            "vision_model.embeddings.position_ids": torch.arange(17)[None]}


def written(folder, state, config=TINY, file="model.safetensors"):
    """`folder` with these weights and this config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if file == "model.safetensors":
        write_safetensors(folder / file, state)
    else:
        torch.save(state, folder / file)
    return folder


@pytest.fixture
def state():
    return random_weights()


@pytest.fixture
def encoder(state, tmp_path):
    return CLIPImageEncoder(written(tmp_path / "clip", state))


def pictures(*shape):
    return torch.rand(shape) * 2 - 1


def normalised(images):
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return ((images + 1) / 2 - mean) / deviation


def layer_norm(h, state, name):
    centred = h - h.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(h, state, name):
    return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def naive_attention(h, state, prefix, heads=4):
    """A weighted mean over all tokens, head by head and token by token; h (N,width)."""
    q, k, v = (linear(h, state, f"{prefix}.{name}_proj") for name in "qkv")
    d, mixed = h.shape[1] // heads, torch.zeros_like(h)
    for head in range(heads):
        own = slice(head * d, head * d + d)
        for i in range(len(h)):
            weights = [torch.exp((q[i, own] * k[j, own]).sum() / d ** 0.5) for j in range(len(h))]
            mixed[i, own] = sum(w * v[j, own] for j, w in enumerate(weights)) / sum(weights)
    return linear(mixed, state, f"{prefix}.out_proj")


@pytest.mark.parametrize("name", ["quick_gelu", "gelu"])
def test_an_embedding_is_the_tower_written_out(name, state, tmp_path):
    activation = {"quick_gelu": lambda h: h / (1 + torch.exp(-1.702 * h)),
                  "gelu": lambda h: h * (1 + torch.erf(h / 2 ** 0.5)) / 2}[name]
    image, kernel = pictures(1, 3, 56, 56), "vision_model.embeddings.patch_embedding.weight"
    x = normalised(image)[0]
    tokens = [state["vision_model.embeddings.class_embedding"]]
    tokens += [state[kernel].flatten(1) @ x[:, i:i + 14, j:j + 14].flatten()
               for i in range(0, 56, 14) for j in range(0, 56, 14)]
    h = torch.stack(tokens) + state["vision_model.embeddings.position_embedding.weight"]
    h = layer_norm(h, state, "vision_model.pre_layrnorm")
    for n in range(2):
        layer = f"vision_model.encoder.layers.{n}"
        h = h + naive_attention(layer_norm(h, state, f"{layer}.layer_norm1"), state,
                                f"{layer}.self_attn")
        inner = linear(layer_norm(h, state, f"{layer}.layer_norm2"), state, f"{layer}.mlp.fc1")
        h = h + linear(activation(inner), state, f"{layer}.mlp.fc2")
    h = layer_norm(h[0], state, "vision_model.post_layernorm")
    encoder = CLIPImageEncoder(written(tmp_path / "clip", state, TINY | {"hidden_act": name}))
    embedding = encoder(image)
    assert embedding.shape == (1, 24)
    torch.testing.assert_close(embedding[0], state["visual_projection.weight"] @ h,
                               rtol=1e-4, atol=1e-4)


def test_mean_and_deviation_are_those_of_the_preprocessor_beside_the_weights(state, tmp_path):
    own = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    plain = CLIPImageEncoder(written(tmp_path / "clip", state))
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(own))
    other, image = CLIPImageEncoder(tmp_path / "clip"), pictures(1, 3, 56, 56) * 0.2
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in own.values())
    wanted = ((image + 1) / 2 - mean) / deviation                # what the tower is to see
    shown = wanted * torch.tensor(DEVIATION).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    torch.testing.assert_close(other(image), plain(shown * 2 - 1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(other(image), plain(image), rtol=1e-3, atol=1e-3)


def test_the_encoder_is_frozen_in_float32_and_drew_no_random_number(state, tmp_path):
    written(tmp_path / "clip", state)
    before = torch.get_rng_state()
    encoder = CLIPImageEncoder(tmp_path / "clip")
    assert torch.equal(before, torch.get_rng_state())
    assert not any(value.requires_grad for value in encoder.parameters())
    image = pictures(1, 3, 40, 40)
    with torch.autocast("cpu", torch.bfloat16):
        inside = encoder(image)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, encoder(image))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_tower_is_the_files_whole_and_the_text_tower_is_dropped(file, whole, state, tmp_path):
    stored, config = state | text_tower(), TINY
    if whole:                            # a wrong projection_dim stands in the tower's own table
        config = {"vision_config": TINY | {"projection_dim": 512}, "projection_dim": 24}
    folder = written(tmp_path / "clip", stored, config, file)
    own = CLIPImageEncoder(str(folder)).state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], state[key]) for key in own)
    if file == "pytorch_model.bin":      # the first bytes tell safetensors, not the name
        write_safetensors(folder / file, stored)
        found = CLIPImageEncoder(str(folder)).state_dict()
        assert all(torch.equal(found[key], state[key]) for key in own)


def test_half_precision_files_are_read_in_float32_and_may_change_afterwards(state, tmp_path):
    stored = {key: value.half() for key, value in state.items()}
    path = written(tmp_path / "clip", stored, file="pytorch_model.bin") / "pytorch_model.bin"
    own = CLIPImageEncoder(tmp_path / "clip").state_dict()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert all(torch.equal(own[key], stored[key].float()) for key in own)


def test_a_type_that_is_not_read_is_named(state, tmp_path):
    path = written(tmp_path / "clip", state) / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F99"', 1))
    with pytest.raises(UserError, match=r"model\.safetensors: .* is of type 'F99', which is"):
        CLIPImageEncoder(tmp_path / "clip")


def test_sizes_that_config_json_leaves_out_are_those_of_vit_b_32(tmp_path):
    config = TINY | {"hidden_size": 768, "intermediate_size": 3072, "image_size": 128,
                     "patch_size": 32, "num_hidden_layers": 1, "num_attention_heads": 12}
    short = {"hidden_size": 768, "image_size": 128, "num_hidden_layers": 1, "projection_dim": 24}
    weights = random_weights(config)
    full = CLIPImageEncoder(written(tmp_path / "full", weights, config))
    image = pictures(1, 3, 128, 128)
    assert torch.equal(CLIPImageEncoder(written(tmp_path / "short", weights, short))(image),
                       full(image))


@pytest.mark.parametrize(("change", "config", "complaint"), [
    ({"vision_model.post_layernorm.bias": None}, TINY, r"post_layernorm\.bias"),
    ({"vision_model.more": torch.zeros(1)}, TINY, r"vision_model\.more"),
    ({"visual_projection.weight": torch.zeros(3, 3)}, TINY, "visual_projection"),
    ({}, TINY | {"patch_size": 28}, "patch_embedding"),
    ({}, TINY | {"hidden_act": "relu"}, "hidden_act relu, not quick_gelu or gelu"),
    ({}, TINY | {"hidden_size": "wide"}, "wide|TypeError"),
    ({}, [1, 2], "AttributeError"),
])
def test_weights_and_config_that_do_not_belong_together_are_refused_in_one_line(
        change, config, complaint, state, tmp_path):
    changed = {key: value for key, value in (state | change).items() if value is not None}
    folder = written(tmp_path / "clip", changed, config)
    with pytest.raises(UserError, match=complaint) as caught:
        CLIPImageEncoder(folder)
    assert str(caught.value).startswith(f"{folder}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("file", "content"), [
    ("config.json", None), ("config.json", b"{"), ("model.safetensors", None),
    ("model.safetensors", b"<html>"), ("model.safetensors", b"\xff" * 64)])
def test_a_missing_and_a_damaged_file_are_refused_in_one_line(file, content, state, tmp_path):
    folder = written(tmp_path / "clip", state)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=str(folder)) as caught:
        CLIPImageEncoder(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(300, 260), (90, 500), (16, 17), (1, 1)])
def test_the_resize_is_pillows_bicubic_in_floats_clamped(shape):
    image = pictures(3, *shape)
    floats = [Image.fromarray(plane.numpy(), "F").resize((224, 224), Image.Resampling.BICUBIC)
              for plane in image]
    expected = torch.from_numpy(np.stack([np.array(plane) for plane in floats]))  # (3, 224, 224)
    if shape == (90, 500):
        assert expected.abs().max() > 1.05              # without the clamp it would leave the range
    torch.testing.assert_close(resized(image[None], 224)[0], expected.clamp(-1, 1), rtol=0,
                               atol=1e-4)


def eight_bits(width, height):
    coarse = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_clips_own_resize_of_8_bit_pictures_differs_by_their_rounding_only():
    picture = eight_bits(320, 280)
    theirs = np.array(picture.resize((224, 224), Image.Resampling.BICUBIC), float)
    ours = resized(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1, 224)[0]
    difference = np.abs((ours.permute(1, 2, 0).numpy() + 1) * 127.5 - theirs)
    assert difference.max() < 1.5                       # levels of 255: rounded after rows, then
    assert difference.mean() < 0.35                     # after columns; one rounding alone: 0.25


def test_values_beyond_the_range_are_clamped_before_the_resize_and_the_right_size_stays():
    image = 1.5 * pictures(2, 3, 50, 60)
    assert torch.equal(resized(image, 56), resized(image.clamp(-1, 1), 56))
    exact = pictures(1, 3, 56, 56)
    assert torch.equal(resized(exact, 56), exact)


def test_the_bounding_box_holds_every_one_and_no_smaller_box_does():
    for mask in torch.rand(40, 9, 7) > 0.93:
        ones = [(i, j) for i in range(9) for j in range(7) if mask[i, j]]
        if ones:
            rows, columns = bounding_box(mask)
            assert rows == slice(min(i for i, _ in ones), max(i for i, _ in ones) + 1)
            assert columns == slice(min(j for _, j in ones), max(j for _, j in ones) + 1)


def test_the_score_is_100_times_the_cosine_of_box_and_reference(encoder):
    image, mask = pictures(2, 3, 40, 50), torch.zeros(2, 1, 40, 50)
    mask[0, :, 3, 35] = mask[0, :, 19, 5] = 1           # two corners of a box
    mask[1, :, 30:] = 1
    references = [pictures(3, 20, 30), pictures(3, 64, 8)]
    scores = clip_score(encoder, image, references, mask)
    assert scores.dtype == torch.float64
    assert scores.shape == (2,)
    for score, box, reference in zip(scores, (image[:1, :, 3:20, 5:36], image[1:, :, 30:]),
                                     references):
        a, b = encoder(box)[0], encoder(reference[None])[0]
        cosine = (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())
        assert score.item() == pytest.approx(100 * cosine.item(), abs=1e-3)
    outside = image.clone()
    outside[0, :, :3], outside[0, :, 20:] = 1, -1
    torch.testing.assert_close(clip_score(encoder, outside, references, mask), scores)


def test_an_image_with_nothing_generated_has_no_score(encoder):
    image, mask = pictures(3, 3, 32, 32), torch.zeros(3, 1, 32, 32)
    references = pictures(3, 3, 20, 20)
    assert clip_score(encoder, image, references, mask).isnan().all()
    mask[1, :, 5:9] = 1
    scores = clip_score(encoder, image, references, mask)
    assert scores.isnan().tolist() == [True, False, True]
    alone = clip_score(encoder, image[1:2], references[1:2], mask[1:2])
    assert scores[1].item() == pytest.approx(alone.item(), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_folder_that_transformers_wrote_gives_its_embeddings(name, whole, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = TINY | {"hidden_act": name}
    if whole:
        text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                "num_attention_heads": 4, "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}
        peer = transformers.CLIPModel(transformers.CLIPConfig(
            vision_config=config, text_config=text, projection_dim=24)).eval()
    else:
        peer = transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**config)).eval()
    for parameter in peer.parameters():                       # as drawn, activations hardly matter
        nn.init.normal_(parameter, std=0.1)
    peer.save_pretrained(tmp_path)
    x = normalised(images := pictures(2, 3, 56, 56))
    pooled = peer.vision_model(x).pooler_output
    torch.testing.assert_close(CLIPImageEncoder(tmp_path)(images), peer.visual_projection(pooled),
                               rtol=1e-4, atol=1e-4)


def test_square_pictures_are_prepared_as_by_transformers():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchvision")
    picture = np.array(eight_bits(320, 320))
    theirs = transformers.CLIPImageProcessor()(picture, return_tensors="pt")["pixel_values"]
    ours = normalised(resized(torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1, 224))
    assert (ours - theirs).abs().max() < 1.5 / 255 / min(DEVIATION)   # of 8 bits, 1.5 levels
    assert (ours - theirs).abs().mean() < 0.35 / 255 / min(DEVIATION)
