"""How near the edited region comes to a reference picture: the column "CLIP score" of Table 4.

    image (B,3,H,W) ──bounding box of the mask──► edited region ─┐
    reference (3,h,w) ───────────────────────────────────────────┴─resize──► (B,3,224,224)
        ──patches──► tokens (B,N,width) ──transformer──► class token ──proj──► embedding (B,512)
        ──100 x cosine of the two embeddings──► (B,)

The image towers of CLIP are rebuilt here and read OpenAI's published files, or the same weights in
Hugging Face's layout. LAION's and others' towers of these shapes have another activation (GELU in
place of QuickGELU), which no file tells: they would give wrong scores here. Not here: means over
pictures (metrics.py), the text tower, where files come from (weight_files.py).
"""

import zipfile
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from distributed import UserError
from pickles import read_pickle, read_torchscript
from weight_files import PUBLISHED_FILES, find_weights, read_safetensors

SIZE = 224                                       # pixels a side that the towers see
HEAD_WIDTH = 64

Tower = namedtuple("Tower", "file patch width layers embed_dim")

CLIP_MODELS = {
    "ViT-B/32": Tower("ViT-B-32.pt", 32, 768, 12, 512),
    "ViT-B/16": Tower("ViT-B-16.pt", 16, 768, 12, 512),
    "ViT-L/14": Tower("ViT-L-14.pt", 14, 1024, 24, 768),
}

# Of the red, green and blue of CLIP's training pictures in [0,1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)

# -- the score -------------------------------------------------------------------------------------


@torch.no_grad()
def clip_score(encoder, image, reference, mask):
    """100 x cosine between edited region and reference, one value per image.

    [AVQ Tab. 4] [AVQ Tab. 5]  deviation D28

    encoder: a CLIPImageEncoder; image (B,3,H,W) in [-1,1], clamped; reference: a list of B tensors
    (3,h,w) of any sizes, or one (B,3,h,w), in [-1,1]; mask (B,1,H,W) in {0,1}, 1 = generated ->
    (B,) float64 on the CPU. The edited region is the smallest box around the mask; it and the whole
    reference are stretched to 224 x 224 (resized).
    An image with nothing generated gives NaN, which the caller leaves out of means. ValueError:
    shapes that do not belong together.
    """
    _check_shapes(image, reference, mask)
    boxes = {i: bounding_box(one[0]) for i, one in enumerate(mask.cpu()) if one.any()}
    scores = torch.full((len(image),), torch.nan, dtype=torch.float64)      # (B,)
    if boxes:
        device = encoder.proj.device
        regions = [image[i, :, rows, columns] for i, (rows, columns) in boxes.items()]
        pairs = [resized(picture[None].to(device))
                 for picture in (*regions, *(reference[i] for i in boxes))]
        edited, wanted = encoder(torch.cat(pairs)).cpu().double().chunk(2)  # (b, embed_dim) each
        scores[list(boxes)] = 100 * F.cosine_similarity(edited, wanted)
    return scores


def _check_shapes(image, reference, mask):
    B, _, H, W = image.shape if image.dim() == 4 else (0, 0, 0, 0)
    if tuple(image.shape) != (B, 3, H, W) or tuple(mask.shape) != (B, 1, H, W):
        raise ValueError(f"image {tuple(image.shape)} and mask {tuple(mask.shape)}: "
                         "expected (B,3,H,W) and (B,1,H,W)")
    shapes = [tuple(one.shape) for one in reference]
    if len(shapes) != B or any(len(shape) != 3 or shape[0] != 3 for shape in shapes):
        raise ValueError(f"references {shapes}: expected {B} of them, each (3,h,w)")


def bounding_box(mask):
    """(rows, columns), two slices: the smallest box around the ones of a mask (H,W), not empty."""
    return tuple(slice(where.min().item(), where.max().item() + 1)
                 for where in (mask.any(1).nonzero(), mask.any(0).nonzero()))


def resized(images):
    """(B,3,H,W) in [-1,1] -> (B,3,224,224): bicubic with antialiasing, as CLIP's own preprocessing.

    That one works on 8-bit pictures, which cannot leave their range; so these are clamped. Pictures
    that are not square are stretched, as in the paper; those of 224 x 224 stay as they are.
    """
    return F.interpolate(images.float().clamp(-1, 1), size=(SIZE, SIZE), mode="bicubic",
                         antialias=True).clamp(-1, 1)                       # (B, 3, 224, 224)


# -- the network -----------------------------------------------------------------------------------


class CLIPImageEncoder(nn.Module):
    """images (B,3,H,W) in [-1,1], of any size -> embeddings (B,512), of ViT-L/14 (B,768), float32.

    name: a row of CLIP_MODELS. weights: the folder of OpenAI's file (default: torch hub's cache;
    see `find_weights`), or of `model.safetensors` or `pytorch_model.bin` from Hugging Face; such a
    file itself; or a state dict with the keys of either. Reading them runs no code.

    Embeddings have the length that the network gives them; only their angle has a meaning. Frozen,
    always in eval mode, in float32 also under autocast. Raises ValueError for an unknown name,
    UserError for a missing, unreadable or foreign file and for one of another size.
    """

    def __init__(self, name="ViT-B/32", weights=None):
        super().__init__()
        if name not in CLIP_MODELS:
            raise ValueError(f"CLIP model {name!r}: expected one of {', '.join(CLIP_MODELS)}")
        with torch.device("meta"):  # all numbers come from the file; none is drawn at random
            self._build(CLIP_MODELS[name])
        source = "the state dict"
        if not isinstance(weights, dict):
            source = _find(CLIP_MODELS[name].file, weights)
            weights = _read(source, CLIP_MODELS[name].file)
        self._fill(name, image_tower(weights), source)
        # The mean and deviation, moved from [0,1] to [-1,1].
        self.register_buffer("mean", 2 * torch.tensor(MEAN).view(1, 3, 1, 1) - 1, persistent=False)
        self.register_buffer("deviation", 2 * torch.tensor(DEVIATION).view(1, 3, 1, 1),
                             persistent=False)
        self.requires_grad_(False).eval()

    def _build(self, tower):
        _, patch, width, layers, embed_dim = tower
        tokens = 1 + (SIZE // patch) ** 2
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(tokens, width))
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))

    def _fill(self, name, state, source):
        """Load `state` strictly; `source` names it in a UserError."""
        mend = f"expected the image tower of {_address(CLIP_MODELS[name].file)}"
        if not state:
            raise UserError(f"{source} holds no image tower of CLIP, neither visual.* nor "
                            f"vision_model.*; {mend}")
        shape = state["conv1.weight"].shape if "conv1.weight" in state else ()
        for other, tower in CLIP_MODELS.items():
            if other != name and tuple(shape) == (tower.width, 3, tower.patch, tower.patch):
                raise UserError(f"{source} holds {other}, not {name}: ask for {other}, or put "
                                f"{_address(CLIP_MODELS[name].file)} there")
        try:
            self.load_state_dict(state, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{source} does not fit {name} ({reason}); {mend}") from None

    def train(self, mode=True):
        """Stays in eval mode: a parent's `.train()` must not reach a frozen measure."""
        return super().train(False)

    def forward(self, images):
        with torch.autocast(images.device.type, enabled=False):
            h = (resized(images) - self.mean) / self.deviation              # (B, 3, 224, 224)
            h = self.conv1(h).flatten(2).transpose(1, 2)                    # (B, N-1, width)
            first = self.class_embedding.expand(len(h), 1, -1)              # (B, 1, width)
            h = torch.cat((first, h), 1) + self.positional_embedding        # (B, N, width)
            h = self.transformer["resblocks"](self.ln_pre(h))
            return self.ln_post(h[:, 0]) @ self.proj                        # (B, embed_dim)


class Block(nn.Module):
    """One layer of the transformer: attention, then two linear maps, each added to its input."""

    def __init__(self, width):
        super().__init__()
        self.attn = Attention(width)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width),
                                  "c_proj": nn.Linear(4 * width, width)})
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, h):
        h = h + self.attn(self.ln_1(h))                                     # (B, N, width)
        inner = self.mlp["c_fc"](self.ln_2(h))                              # (B, N, 4 width)
        inner = inner * torch.sigmoid(1.702 * inner)    # QuickGELU, an approximation of GELU
        return h + self.mlp["c_proj"](inner)                                # (B, N, width)


class Attention(nn.Module):
    """softmax(q k^T / 8) v among all tokens, in heads of 64 channels side by side."""

    def __init__(self, width):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, h):
        qkv = F.linear(h, self.in_proj_weight, self.in_proj_bias)           # (B, N, 3 width)
        q, k, v = (part.unflatten(2, (-1, HEAD_WIDTH)).transpose(1, 2)
                   for part in qkv.chunk(3, dim=2))                         # (B, heads, N, 64) each
        h = F.scaled_dot_product_attention(q, k, v)                         # (B, heads, N, 64)
        return self.out_proj(h.transpose(1, 2).flatten(2))                  # (B, N, width)


# -- files -----------------------------------------------------------------------------------------

HUGGING_FACE_FILES = ("model.safetensors", "pytorch_model.bin")

# Hugging Face's names -> OpenAI's, which are ours; a name may be in reach of several rows.
HUGGING_FACE_NAMES = (
    ("vision_model.embeddings.class_embedding",           "class_embedding"),
    ("vision_model.embeddings.patch_embedding.",          "conv1."),
    ("vision_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("vision_model.pre_layrnorm.",                        "ln_pre."),
    ("vision_model.post_layernorm.",                      "ln_post."),
    ("visual_projection.weight",                          "proj"),
    ("vision_model.encoder.layers.",                      "transformer.resblocks."),
    (".self_attn.",                                       ".attn."),
    (".layer_norm1.",                                     ".ln_1."),
    (".layer_norm2.",                                     ".ln_2."),
    (".mlp.fc1.",                                         ".mlp.c_fc."),
    (".mlp.fc2.",                                         ".mlp.c_proj."),
)


def image_tower(state):
    """{our name: float32 tensor} of the image tower in a state dict of either layout.

    OpenAI's tower is `visual.*`, Hugging Face's `vision_model.*` and `visual_projection.*`; all
    else, the text tower, is dropped. What has no counterpart keeps its name.
    """
    if any(key.startswith("vision_model.") for key in state):
        tower = _from_hugging_face(state)
    else:
        tower = {key.removeprefix("visual."): value for key, value in state.items()
                 if key.startswith("visual.")}
    # A copy, too: numbers that are mapped from a file are to outlive it.
    return {key: value.detach().to(torch.float32, copy=True) for key, value in tower.items()}


def _from_hugging_face(state):
    tower = {}
    for key, value in state.items():
        # Older files keep the numbers 0, 1, 2, ... of the positions, too.
        if key.startswith(("vision_model.", "visual_projection.")) and "position_ids" not in key:
            for theirs, ours in HUGGING_FACE_NAMES:
                key = key.replace(theirs, ours)
            tower[key] = value.T.contiguous() if key == "proj" else value
    for query in [key for key in tower if ".q_proj." in key]:       # three maps there, one here
        parts = [query.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(part in tower for part in parts):
            joined = torch.cat([tower.pop(part) for part in parts])
            tower[query.replace(".q_proj.", ".in_proj_")] = joined
    return tower


def _address(file):
    return f"{PUBLISHED_FILES[file][0]}{file}"


def _find(file, weights):
    """The path of the weights: `weights` itself, a file in that folder, or the published file."""
    if weights and Path(weights).is_file():
        return Path(weights)
    if weights and not Path(weights, file).exists():
        for name in HUGGING_FACE_FILES:
            if Path(weights, name).is_file():
                return Path(weights, name)
    return find_weights(file, weights)


def _read(path, file):
    """The state dict in `path`; `file`, the published one, is named where it cannot be read."""
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        state = read_torchscript(path) if _is_torchscript(path) else read_pickle(path)[0]
    except UserError as error:
        raise UserError(f"{error}; put a fresh copy of {_address(file)} there") from None
    if not isinstance(state, dict):
        return {}
    return {key: value for key, value in state.items()
            if isinstance(key, str) and isinstance(value, torch.Tensor)}


def _is_torchscript(path):
    """Whether it is a program with its weights, as OpenAI's files are."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False
