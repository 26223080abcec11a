"""Score how similar an edited region and its reference image are: the column "CLIP score".

    image (B,3,H,W) ──bounding box of the mask──► edited region ─┐
    reference (3,h,w) ───────────────────────────────────────────┴─resize──► (B,3,S,S)
        ──patches──► tokens (B,N,width) ──transformer──► class token ──projection──► (B,D)
        ──100 x cosine of the two embeddings──► (B,)

The attributes of CLIP's image tower are named as in Hugging Face's files. S, D and the activation
come from config.json: OpenAI's towers use QuickGELU, LAION's of the same shapes GELU.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from distributed import UserError
from weight_files import as_float32, read_tensors

MEAN = (0.48145466, 0.4578275, 0.40821073)          # of CLIP's training images in [0,1], R, G, B
DEVIATION = (0.26862954, 0.26130258, 0.27577711)

# transformers' defaults, for what config.json leaves out.
DEFAULTS = {"hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072,
            "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
            "patch_size": 32, "layer_norm_eps": 1e-5}
ACTIVATIONS = {"quick_gelu": lambda h: h * torch.sigmoid(1.702 * h), "gelu": F.gelu}


@torch.no_grad()
def clip_score(encoder, image, reference, mask):
    """Compute 100 x cosine of edited region and reference: (B,). [AVQ Tab. 4] [AVQ Tab. 5]

    image: (B,3,H,W) in [-1,1], clamped. reference: B tensors (3,h,w) of any sizes in [-1,1]. mask:
    (B,1,H,W) in {0,1}, 1 = generated. The edited region is the smallest box around the mask; it and
    the whole reference are stretched to a square. Returns float64 on the CPU, NaN for an image with
    nothing generated.  deviation D28
    """
    boxes = {i: bounding_box(one[0]) for i, one in enumerate(mask.cpu()) if one.any()}
    scores = torch.full((len(image),), torch.nan, dtype=torch.float64)               # (B,)
    if boxes:
        regions = [image[i, :, rows, columns] for i, (rows, columns) in boxes.items()]
        pairs = [resized(picture[None].to(encoder.mean.device), encoder.size)
                 for picture in (*regions, *(reference[i] for i in boxes))]
        edited, wanted = encoder(torch.cat(pairs)).cpu().double().chunk(2)  # (b, D) each
        scores[list(boxes)] = 100 * F.cosine_similarity(edited, wanted)
    return scores


def bounding_box(mask):
    """Find the smallest box around the ones of a mask (H,W), not empty: slices (rows, columns)."""
    return tuple(slice(where.min().item(), where.max().item() + 1)
                 for where in (mask.any(1).nonzero(), mask.any(0).nonzero()))


def resized(images, size):
    """Stretch (B,3,H,W) in [-1,1] to `size`, bicubic, clamped, as CLIP's programs do in 8 bits."""
    return F.interpolate(images.float().clamp(-1, 1), size=(size, size), mode="bicubic",
                         antialias=True).clamp(-1, 1)                       # (B, 3, size, size)


class CLIPImageEncoder(nn.Module):
    """Embed images (B,3,H,W) in [-1,1] of any size as (B,D) float32, whose directions are compared.

    folder: has `config.json` and `model.safetensors` or `pytorch_model.bin` of a whole CLIP or its
    image tower, and `preprocessor_config.json` if mean and deviation are not OpenAI's. The network
    is frozen, and float32 also under autocast. Raises UserError for files that are missing,
    unreadable or of different models.
    """

    def __init__(self, folder):
        super().__init__()
        try:
            config, weights = _read(Path(folder))
            self.size, width, eps = (config[name] for name in
                                     ("image_size", "hidden_size", "layer_norm_eps"))
            with torch.device("meta"):  # all numbers come from the file; none is drawn at random
                model = self.vision_model = nn.Module()
                model.embeddings = nn.Module()
                model.embeddings.class_embedding = nn.Parameter(torch.empty(width))
                patch = config["patch_size"]
                model.embeddings.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False)
                tokens = 1 + (self.size // patch) ** 2
                model.embeddings.position_embedding = nn.Embedding(tokens, width)
                model.pre_layrnorm = nn.LayerNorm(width, eps)                # the files' spelling
                model.encoder = nn.Module()
                model.encoder.layers = nn.ModuleList(
                    Layer(config) for _ in range(config["num_hidden_layers"]))
                model.post_layernorm = nn.LayerNorm(width, eps)
                self.visual_projection = nn.Linear(width, config["projection_dim"], bias=False)
            self.load_state_dict(weights, assign=True)
        except (OSError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"{folder}: no config.json and weights of one CLIP model ({reason}); "
                            "see openai/clip-vit-base-patch32 on Hugging Face") from None
        # The mean and deviation, moved from [0,1] to [-1,1].
        self.register_buffer("mean", config["image_mean"] - 1, persistent=False)
        self.register_buffer("deviation", config["image_std"], persistent=False)
        self.requires_grad_(False)

    def forward(self, images):
        model, given = self.vision_model, self.vision_model.embeddings
        with torch.autocast(images.device.type, enabled=False):
            h = (resized(images, self.size) - self.mean) / self.deviation   # (B, 3, S, S)
            h = given.patch_embedding(h).flatten(2).transpose(1, 2)         # (B, N-1, width)
            first = given.class_embedding.expand(len(h), 1, -1)             # (B, 1, width)
            h = torch.cat((first, h), 1) + given.position_embedding.weight  # (B, N, width)
            h = model.pre_layrnorm(h)
            for layer in model.encoder.layers:
                h = layer(h)
            return self.visual_projection(model.post_layernorm(h[:, 0]))    # (B, D)


class Layer(nn.Module):
    """Apply one layer of the transformer: attention, then two linear maps, each added to h."""

    def __init__(self, config):
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.heads, self.activation = config["num_attention_heads"], config["hidden_act"]
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.activation}, not {' or '.join(ACTIVATIONS)}")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in
                                        ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.layer_norm1 = nn.LayerNorm(width, config["layer_norm_eps"])
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        self.layer_norm2 = nn.LayerNorm(width, config["layer_norm_eps"])

    def forward(self, h):
        n = self.layer_norm1(h)                                             # (B, N, width)
        q, k, v = (self.self_attn[name](n).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for name in ("q_proj", "k_proj", "v_proj"))              # (B, heads, N, d) each
        n = F.scaled_dot_product_attention(q, k, v)                         # (B, heads, N, d)
        h = h + self.self_attn["out_proj"](n.transpose(1, 2).flatten(2))    # (B, N, width)
        n = ACTIVATIONS[self.activation](self.mlp["fc1"](self.layer_norm2(h)))
        return h + self.mlp["fc2"](n)                                       # (B, N, width)


def _read(folder):
    """Read (config, {name: float32 tensor}) of the image tower; the caller handles all errors."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # A whole CLIP has a config for each tower, and the projection's width outside of both.
    tower = DEFAULTS | (config.get("vision_config_dict") or config.get("vision_config", config))
    tower["projection_dim"] = config.get("projection_dim", 512)
    path = folder / "preprocessor_config.json"
    given = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, value in (("image_mean", MEAN), ("image_std", DEVIATION)):
        tower[name] = 2 * torch.tensor(given.get(name, value)).view(1, 3, 1, 1)
    path = folder / "model.safetensors"
    path = path if path.exists() else folder / "pytorch_model.bin"
    # Older files also hold position_ids, 0, 1, 2, ...
    return tower, {key: as_float32(path, key, value) for key, value in read_tensors(path).items()
                   if key.startswith(("vision_model.", "visual_projection."))
                   and not key.endswith("position_ids")}
