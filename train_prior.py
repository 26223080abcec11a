"""Train VQ-DDM's prior: the diffusion model of a frozen first stage's codes.

    images --frozen encoder--> codes (n,h,w), kept in RUN/codes             code_maps
    position in the run -> epoch, permuted index -> a map (h,w)             CodeItems
    z_0, t --noise--> z_t --UNet--> logits --> one draw of the bound        PriorStage.step
    weights --> their running average, with which samples are drawn         EMA

The first stage is frozen, so an image has the same codes in each epoch. They are computed once,
because encoding at each step would cost more than the prior's own step.
"""

import copy
import hashlib
import io
import math
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import distributed
from convert import denoiser
from data import Order, pixels, views
from diffusion import Timesteps, frequency_nats, held_out_bound
from distributed import gather_objects, heed, on_rank0, print0, rank, world_size, wrap
from recipes import adam
from run_folder import Progress
from seeding import STAGE_IDS, image_generators, uniforms
from train_autoencoder import trained_first_stage

VALIDATION_MAPS = 256
PICTURE_STEPS = 25             # reverse steps of the samples drawn while training
ENCODED = 64                   # images encoded at once, fixed because rounding may depend on it


@dataclass
class CodeBatch:
    """Hold one micro-batch of maps on the device."""
    index:   list              # positions in the run, or indices of held-out images
    indices: torch.Tensor      # (B,h,w) int64, z_0
    u_t:     torch.Tensor = None       # (B,) uniforms of the training's t, on the CPU
    u:       torch.Tensor = None       # (2,B,h,w) those of its noise


class PriorStage:
    """Train the denoiser of a frozen first stage's codes. [DDM Sec. 4.1] [DDM Fig. 2]

    It has the same methods as train_autoencoder.Autoencoder.
    """

    reads_files = False            # an item is a part of an array, so no workers are needed

    def __init__(self, run, recipe, state):
        # Load the first stage, then build the denoiser of its K codes.
        first_stage, where = trained_first_stage(run, "prior")
        self.run, self.name, self.recipe, self.facts = run, "prior", recipe, {}
        self.parent, self.config = first_stage.parent, {"vqgan": where}
        self.first_stage = first_stage.model
        self.model, self.diffusion = denoiser(run.settings["prior"], self.first_stage.config.K)
        if recipe.code_start:
            start_from_codes(self.model, self.first_stage.quantize.embedding.weight)
        run.place(self.first_stage)
        run.place(self.model).train()
        # Make what the training loop uses: DDP, Adam, the choice of t, the average.
        self.ddp_model = wrap(self.model, run.device)
        self.parallel = [self.ddp_model]
        self.optimizers = {"generator": adam([(self.model.parameters(), 1.0)], recipe, run.device)}
        self.timesteps = Timesteps(self.diffusion.T)
        self.ema = EMA(self.model, run.settings["prior"]["ema"])

    def items(self, steps):
        """Encode as many training images as `steps` steps show, and order them: CodeItems."""
        n = min(len(self.run.train_set), steps * self.recipe.batch_size,
                self.recipe.max_maps or math.inf)
        print0(f"\nprior: learns the codes of {n:,} images, kept in {self.run.out / 'codes'}")
        config = self.first_stage.config
        self.codes = code_maps(self.encode, self.run.train_set, n, config, self.parent,
                               self.run.out / "codes", self.run.workers)    # (n, h, w)
        self.facts |= {"K": config.K, "grid": list(self.codes.shape[1:]), "maps": n,
                       "codes": Path(self.codes.filename).name}
        return CodeItems(self.codes, self.run.settings["seed"])

    @torch.no_grad()
    def encode(self, image):
        """Encode uint8 (b,3,H,W): codes (b,h,w). On CUDA by TF32 convolutions, unlike eval.py."""
        return self.first_stage.indices(pixels(image, self.run.device, self.run.channels_last))

    def batch(self, items):
        """Bring a training loader's dict to the device."""
        device = self.run.device
        wide = device if device.type == "cuda" else "cpu"                   # MPS has no float64
        return CodeBatch(items["position"], items["indices"].to(device, non_blocking=True),
                         items["u_t"], items["u"].to(wide, non_blocking=True).transpose(0, 1))

    def step(self, batch, gan_on, scale=1.0):
        """Add one micro-batch's gradients to .grad: one draw of the bound. [DDM Eq. 7]

        Each map has one t, drawn by importance. Returns {"vlb": the bound in nats a map, as this
        draw estimates it}, detached. gan_on: without meaning for a prior.
        """
        t, p = self.timesteps.draw(batch.u_t)                               # (B), (B)
        with self.run.autocast():        # of the network; the diffusion computes in float32
            loss, terms = self.diffusion.loss(self.ddp_model, batch.indices, t, p, batch.u)
        (loss * scale).backward()
        self.timesteps.observe(t, terms)
        return {"vlb": loss.detach() * batch.indices[0].numel()}

    def update(self, gan_on):
        """Take one step of Adam, clear the gradients, and update the average of the weights."""
        self.optimizers["generator"].step()
        self.optimizers["generator"].zero_grad(set_to_none=True)
        self.timesteps.update()
        self.ema.update(self.model)

    @torch.no_grad()
    def held_out(self, size):
        """Encode the first held-out images: [(CodeBatch, x of the first batch, else None)].

        Also prints what models without a network cost on them.
        """
        run, n = self.run, min(VALIDATION_MAPS, len(self.run.val_set))
        ranges = [range(i, min(i + size, n)) for i in range(0, n, size)]
        batches = [(CodeBatch(list(index), self.encode(image)),
                    None if index[0] else pixels(image, run.device))
                   for index, image in heed(zip(ranges, views(run.val_set, ranges)))]
        maps = torch.cat([batch.indices for batch, _ in batches]).cpu().numpy()     # (n, h, w)
        K = self.first_stage.config.K
        nats = {name: one.mean() for name, one in frequency_nats(self.codes, maps, K).items()}
        print0(f"prior: a held-out map costs {maps[0].size * math.log(K):.1f} nats by equal "
               f"probabilities, {nats['unigram']:.1f} by the codes' frequencies, "
               f"{nats['histogram']:.1f} by those at each cell")
        return batches

    @torch.no_grad()
    def validate(self, batches):
        """Measure {"val_vlb"}: the bound in nats a map at few t, the noise always the same.

        It is cheap and noisy; eval.py reports sample.measure_bound, over all t.
        """
        nats = [held_out_bound(self.diffusion, self.ema.model, batch.indices, batch.index[0], True)
                for batch, _ in heed(batches)]
        return {"val_vlb": torch.cat(nats).mean().item()}

    @torch.no_grad()
    def pictures(self, batches, count):
        """Draw {caption: `count` images (3,H,W)}, the columns of samples/step_N.png."""
        (batch, x), decode = batches[0], self.first_stage.decode_indices
        codes, steps = batch.indices[:count], min(PICTURE_STEPS, self.diffusion.T)
        generators = [torch.Generator().manual_seed(i) for i in range(len(codes))]
        drawn = self.diffusion.sample(self.ema.model, codes.shape, steps, generators,
                                      device=self.run.device)               # (B, h, w)
        return {"held out": x[:count], "its codes, decoded": decode(codes),
                f"new codes, {steps} steps": decode(drawn)}

    def state_dict(self):
        return {"model": self.model.state_dict(), "ema": self.ema.state_dict(),
                "extra": self.facts | {"timesteps": self.timesteps.state_dict()}}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.timesteps.load_state_dict(state["extra"]["timesteps"])


@torch.no_grad()
def start_from_codes(unet, codebook):
    """Initialise embedding and last layer from the codebook (K,d).  deviation D48

    A code's coordinates are those on the codebook's principal axes, as many as there are columns,
    scaled to variance 1. The embedding is 0.1 times its random start plus the coordinates. The last
    layer is 0.1 times the coordinates, so that x̂0 is still nearly uniform. Similar codes then start
    with similar weights, and what is learnt of one code holds for its neighbours.
    """
    centred = codebook - codebook.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh                # (n, d)
    places = centred @ axes.T                                               # (K, n), coordinates
    places = places / places.std()
    embedding, logits = unet.embedding.weight, unet.logits.weight           # (K, C), (K, C', 1, 1)
    into, out = (min(places.shape[1], weight.shape[1]) for weight in (embedding, logits))
    embedding.mul_(0.1)
    embedding[:, :into] += places[:, :into]
    logits[:, :out, 0, 0] += 0.1 * places[:, :out]


def code_maps(encode, dataset, n, config, parent, folder, workers=0):
    """Encode the first n images: (n,h,w) uint16, or int32 for K > 65,536.  deviation D47

    encode: image uint8 (b,3,H,W), a fixed view, -> indices (b,h,w), by the first stage of `config`
    whose sha256 is `parent`. folder: of the memory-mapped file, which has another name until it is
    complete. All processes must call this. They share the images, in batches of ENCODED always.
    Raises Leaving when asked to stop. What is encoded is kept, also after a kill.
    """
    key = hashlib.sha256(f"{parent}|{dataset.identity()}|{n}".encode()).hexdigest()[:16]
    path = Path(folder) / f"{dataset.split}-{key}.npy"
    part, side = path.with_suffix(".part"), dataset.size // config.f
    dtype = np.dtype(np.uint16 if config.K <= 2**16 else np.int32)
    if on_rank0(path.exists):
        return np.load(path, mmap_mode="r")

    def begin():
        """Cut a file that was begun back to its whole batches, which are kept, and count them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab+") as file:
            end, head = file.tell(), io.BytesIO()
            np.lib.format.write_array_header_1_0(
                head, {"descr": dtype.str, "fortran_order": False, "shape": (n, side, side)})
            length = ENCODED * side**2 * dtype.itemsize                     # of a batch, in bytes
            kept = max(0, end - head.tell()) // length
            file.truncate(kept and head.tell() + kept * length)
            file.write(b"" if kept else head.getvalue())
        return kept

    # Encode this process's batches, and write those of all in the order of the images.
    starts = range(0, n, ENCODED)[on_rank0(begin):]
    mine = (range(start, min(start + ENCODED, n)) for start in starts[rank()::world_size()])
    images, progress = views(dataset, mine, workers), Progress("encoding", starts.start, n, 1)
    with closing(images), closing(progress), \
            open(part if rank() == 0 else os.devnull, "ab") as file:
        for start in starts[::world_size()]:             # one batch on each process
            image = next(images, None)
            codes = None if image is None else encode(image).cpu().numpy().astype(dtype)
            shares = gather_objects((codes, distributed.asked()))
            file.write(b"".join(codes.tobytes() for codes, _ in shares if codes is not None))
            kept = min(n, start + ENCODED * world_size())
            progress.show(kept, {})
            if any(stop for _, stop in shares):
                raise distributed.Leaving(f"prior: {kept:,} of {n:,} images are encoded and kept")
    on_rank0(lambda: os.replace(part, path))
    return np.load(path, mmap_mode="r")


class CodeItems:
    """Give the map of a position of the run: indices int64 (h,w), position, uniforms u_t and u.

    codes: (n,h,w), any integers. The order is that of data.TrainingItems. Of the uniforms t () and
    noise (2,h,w) are made; they are drawn while a GPU is busy with the step before.
    """

    def __init__(self, codes, seed):
        self.codes, self.seed = codes, seed
        self.order = Order(len(codes), (seed, STAGE_IDS["prior"]))

    def __getitem__(self, position):
        indices = self.codes[self.order[position]].astype(np.int64)         # (h, w)
        generators = image_generators(self.seed, "prior", [position])
        u_t, u = uniforms(generators, 1)[0, 0], uniforms(generators, 2, *indices.shape)[:, 0]
        return {"indices": indices, "position": position, "u_t": u_t.numpy(), "u": u.numpy()}


class EMA:
    """Average a model's weights: average <- d·average + (1 - d)·weights.  deviation D40

    d = min(decay, (1 + n)/(10 + n)) after n updates. The second term is a warm-up. Without it, at a
    decay of 0.9999, the start would be nine tenths of the average after a thousand steps. The
    average is float32, because bf16 would round most updates away. `model` has it as its weights.
    """

    def __init__(self, model, decay):
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model):
        """Move the average towards the model's weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = [parameter.float() for parameter in model.parameters()]
        torch._foreach_lerp_(list(self.model.parameters()), now, 1 - decay)   # few kernels for all
        self.updates += 1

    def state_dict(self):
        return {"updates": self.updates, "weights": self.model.state_dict()}

    def load_state_dict(self, state):
        self.updates = state["updates"]
        self.model.load_state_dict(state["weights"])
