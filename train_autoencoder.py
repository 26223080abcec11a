"""Train the networks that draw images: first stage, ReFiT's decoder, asymmetric decoder.

    vqgan     x --VQGAN--> x_hat                                     everything trains
    refit     x --frozen encoder, rebuilt codes, decoder--> x_hat    the decoder trains
    decoder   x, mask --frozen first stage, AsymDecoder--> x_hat     the asymmetric decoder trains

All three train against a discriminator, so they share one step.
"""

from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn

import losses
import run_folder
from asym_decoder import AsymDecoder, AsymVQGAN
from convert import load, load_first_stage
from data import Batch, TrainingItems, held_out_batches, pixels, views
from distributed import UserError, gather_objects, heed, on_rank0, print0, rank, world_size, wrap
from metrics import pre_error
from quantize import code_statistics, nearest_code
from recipes import adam
from refit import install_codebook, rebuild_codebook, sample_features
from seeding import STAGE_IDS, image_generators, stage_seed
from vqgan import VQGAN, VQGANConfig

VALIDATION_IMAGES = 64
PINNED_IMAGES = 64             # that a pinned start takes its deviations from


class Autoencoder:
    """Hold an image network and its discriminator, and train both in one step. [AVQ App. A]

    groups: the trained parameters, for recipes.adam. parent: the frozen first stage's hash or None.
    config, facts: more entries of the checkpoint's `config` and `extra`.
    """

    masks = False                  # whether training draws masks; else every mask is full
    reads_files = True             # whether worker processes load the items

    def __init__(self, run, name, recipe, model, groups, parent=None, config=None, facts=None):
        self.run, self.name, self.recipe, self.parent = run, name, recipe, parent
        self.config, self.facts = config or {}, facts or {}
        device, net, weights = run.device, run.settings["perceptual"], run.settings["weights"]
        # Put both networks on the device.
        self.model = run.place(model).train()            # no layer of it differs in eval mode
        self.model.decoder.checkpointing = run.settings["checkpointing"]
        discriminator = losses.PatchDiscriminator(ndf=recipe.ndf, n_layers=recipe.disc_layers)
        if device.type == "cuda":                        # PyTorch has none for CPU  deviation D19
            discriminator = nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
        self.discriminator = run.place(discriminator)
        # Wrap them for several processes, and make what trains them.
        self.ddp_model = wrap(self.model, device)
        self.ddp_discriminator = wrap(self.discriminator, device)
        self.parallel = [self.ddp_model, self.ddp_discriminator]
        self.optimizers = {
            "generator": adam(groups, recipe, device),
            "discriminator": adam([(self.discriminator.parameters(), recipe.disc_factor)],
                                  recipe, device)}
        self.perceptual = losses.LPIPS(net, weights).to(device) if net != "none" else None

    def items(self, steps):
        """List the training images by position in the run, with crop and mask."""
        r, seed = self.recipe, self.run.settings["seed"]
        return TrainingItems(self.run.train_set, seed, STAGE_IDS[self.name], self.masks, r.p_full,
                             r.mask_kind)

    def batch(self, items):
        """Bring a training loader's dict to the device."""
        x = pixels(items["image"], self.run.device, self.run.channels_last)         # (B, 3, H, W)
        mask = items["mask"].to(self.run.device, non_blocking=True).float()         # (B, 1, H, W)
        return Batch(items["position"], x, mask)

    def generators(self, batch):
        """Make one generator per image for a KL latent's noise; a VQ latent needs none."""
        if self.model.config.latent == "kl":
            return image_generators(self.run.settings["seed"], self.name, batch.index)
        return None

    def reconstruct(self, batch):
        """Encode and decode: x_hat (B,3,H,W), and the latent loss or None."""
        h, latent_loss = self.ddp_model(batch.x, generator=self.generators(batch))
        return self.model.decoder.conv_out(h).float(), latent_loss

    def step(self, batch, gan_on, scale=1.0):
        """Add one micro-batch's gradients to .grad; return the losses by name, detached.

        gan_on: whether the discriminator has started. scale: the micro-batch's share of the step.
        The network runs once, and both players train on its x_hat.  deviation D12
        """
        r, elements = self.recipe, batch.x[0].numel()                       # 3HW
        # Reconstruct, and compare with the original.
        with self.run.autocast():
            x_hat, latent_loss = self.reconstruct(batch)                    # (B, 3, H, W)
        terms = {"pixel": losses.pixel_loss(x_hat, batch.x, r.pixel)}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(x_hat, batch.x).mean()
        loss = rec = sum(terms.values())                   # [AVQ Eq. 6]; Eq. 2's lambda is 1
        if latent_loss is not None:
            # VQ: 1 · (codebook term + beta · commitment term), [AVQ Eq. 2] but for D4 and D22.
            # KL: 1e-6 · Eq. 10, [AVQ Eq. 11] but for its weight of 1. LDM's 1e-6 stands beside a
            # rec that is summed over 3HW elements. Ours is their mean.  deviation D21
            summed = elements if self.model.config.latent == "kl" else 1
            loss = rec + r.latent_weight / summed * latent_loss
            terms["latent"] = latent_loss
        # Train the generator.
        if gan_on:
            with losses.frozen(self.discriminator):
                logits = self.discriminator(x_hat)                          # (B, 1, h, w)
                gan = losses.generator_gan_loss(logits, r.gan)              # [AVQ Eq. 7]
            # [AVQ Eq. 9] divides the pixel loss's gradient, the other rules that of rec.
            divided = terms["pixel"] if r.lambda_rule == "paper" else rec
            last = self.model.decoder.conv_out.weight
            lam = losses.adaptive_weight(divided, gan, last, r.lambda_rule, elements)
            loss = loss + lam * gan                                         # [AVQ Eq. 8]
            terms |= {"gan": gan, "lambda": lam}
        (loss * scale).backward()
        # Train the discriminator, on each kind of images alone: BatchNorm would mix statistics.
        if gan_on:
            real, fake = self.ddp_discriminator(batch.x), self.ddp_discriminator(x_hat.detach())
            disc = losses.discriminator_loss(real, fake, r.gan)             # [AVQ Eq. 7]
            (disc * scale).backward()
            terms |= {"disc": disc, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return {name: value.detach() for name, value in terms.items()}

    def update(self, gan_on):
        """Move the weights by their gradients, then clear the gradients."""
        for name, optimizer in self.optimizers.items():
            if name == "generator" or gan_on:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def held_out(self, size):
        """List the first held-out images in batches, with their evaluation masks."""
        return list(held_out_batches(self.run.val_set, VALIDATION_IMAGES, size, self.run.device))

    @torch.no_grad()
    def validate(self, batches):
        """Measure {"val_...": mean over held-out images}, by a KL latent's mode, never in bf16."""
        sums, count = {}, 0
        for batch in heed(batches):
            values, x_hat = self.measures(batch)
            if self.perceptual is not None:
                values["val_perceptual"] = self.perceptual(x_hat, batch.x).mean()
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(batch.x)
            count += len(batch.x)
        return {name: total / count for name, total in sums.items()}

    def measures(self, batch):
        """Measure {"val_...": mean over the batch}; return it with x_hat, for LPIPS."""
        x_hat = self.model.decode(self.model.encode(batch.x))               # (B, 3, H, W)
        return {"val_pixel": losses.pixel_loss(x_hat, batch.x)}, x_hat

    @torch.no_grad()
    def pictures(self, batches, count):
        """Draw {caption: `count` images (3,H,W)}, the columns of samples/step_N.png."""
        batch = batches[0]
        return self.columns(Batch(batch.index[:count], batch.x[:count], batch.mask[:count]))

    def columns(self, batch):
        x_hat = self.model.decode(self.model.encode(batch.x))               # (B, 3, H, W)
        return {"original": batch.x, "reconstruction": x_hat}

    def state_dict(self):
        """Collect what a checkpoint holds of the stage: taming's or the authors' weight names."""
        weights = {name: value for name, value in self.model.state_dict().items()
                   if not name.startswith("first_stage.")}
        return {"model": weights, "ema": None,
                "extra": self.facts | {"discriminator": self.discriminator.state_dict()}}

    def load_state_dict(self, state):
        below = {name: value for name, value in self.model.state_dict().items()
                 if name.startswith("first_stage.")}
        self.model.load_state_dict(below | state["model"])
        self.discriminator.load_state_dict(state["extra"]["discriminator"])


class FirstStage(Autoencoder):
    """Train encoder, latent and decoder together. [AVQ Sec. 3.1]

    state: the stage's checkpoint, or None at its start. Only the two stages below read it.
    """

    def __init__(self, run, recipe, state):
        model = VQGAN(VQGANConfig(**run.settings["first_stage"]))
        super().__init__(run, "vqgan", recipe, model, [(model.parameters(), 1.0)])


class Refit(Autoencoder):
    """Rebuild the codebook, then fine-tune only the decoder. [DDM Sec. 3.2] [DDM Sec. 4.1]"""

    def __init__(self, run, recipe, state):
        given, source = run.settings["vqgan"], Path(run.settings["vqgan"] or run.out)
        loaded = load_first_stage(given) if given else load(run.out, stages=["vqgan"])
        warn_unless_finished("refit", loaded, source)
        model = run.place(loaded.model)
        if state is None:
            codebook, facts = rebuild(run, model)
        else:                                    # resumed with the codes that it began with
            codebook, facts = state["model"]["quantize.embedding.weight"], state["extra"]
        install_codebook(model, codebook)
        trained = [p for p in model.parameters() if p.requires_grad]
        super().__init__(run, "refit", recipe, model, [(trained, 1.0)], loaded.parent,
                         {"first_stage": asdict(model.config)}, facts)
        if state is None:
            self.continue_discriminator(source)

    def continue_discriminator(self, source):
        """Start from the run's discriminator, which is trained on these images.  deviation D45"""
        state = None
        with suppress(UserError):                # of a public checkpoint
            state = (run_folder.latest(source / "vqgan") if source.is_dir()
                     else run_folder.load(source))
        kept = state["extra"].get("discriminator", {}) if state else {}
        new = self.discriminator.state_dict()
        if {k: v.shape for k, v in kept.items()} == {k: v.shape for k, v in new.items()}:
            self.discriminator.load_state_dict(kept)
        else:
            print0(f"refit: {source} has no discriminator of this size; it starts at random")


class DecoderStage(Autoencoder):
    """Train an asymmetric decoder on a frozen first stage. [AVQ Sec. 3.2] [AVQ Fig. 3]

    The encoder sees the full image, and only the condition branch sees the masked one. If the
    recipe says so and the sizes fit, the trunk starts from the first stage's decoder and learns
    at `trunk_factor` times the rate. The branch starts at random. A pinned start is AsymDecoder's
    pass_trunk and pin_statistics, and rates of its own.  deviations D10 D56
    """

    masks = True

    def __init__(self, run, recipe, state):
        loaded, where = trained_first_stage(run, "decoder")
        size, first_stage = run.settings["decoder"], loaded.model
        decoder = AsymDecoder.from_preset(first_stage.config, size["preset"], size["blend"])
        trunk_factor = 1.0
        if recipe.start_trunk and decoder.load_trunk(first_stage.decoder):
            trunk_factor = recipe.trunk_factor
        model = AsymVQGAN(first_stage, decoder).to(run.device)
        # At known pixels the last blend puts feature 0 in place of the trunk's features, so these
        # pixels pass only the branch's first layer, the last norm and conv_out. The trunk's
        # features are about ten times as large as feature 0 at its start, and Adam moves a weight
        # by about its rate in a step, so a pinned start has larger rates here.  deviation D56
        pinned = recipe.start == "pinned"
        last = [*decoder.norm_out.parameters(), *decoder.conv_out.parameters()]
        first = list(decoder.encoder.layers[0].parameters())
        known = {id(p) for p in last + first}
        trunk, branch = ([p for p in part.values() if id(p) not in known]
                         for part in decoder.split_parameters())
        groups = [(trunk, trunk_factor), (last, 1.0 if pinned else trunk_factor),
                  (first, recipe.known_factor if pinned else 1.0), (branch, 1.0)]
        if pinned and state is None:
            decoder.pass_trunk()
            on_rank0(partial(pin_statistics, run, model))      # wrap sends its weights to all ranks
        super().__init__(run, "decoder", recipe, model, groups, loaded.parent, {"vqgan": where})

    def reconstruct(self, batch):
        h = self.ddp_model(batch.x, batch.mask, self.generators(batch))     # (B, ch, H, W)
        return self.model.decoder.conv_out(h).float(), None

    def measures(self, batch):
        z = self.model.encode(batch.x)                                      # (B, d, h, w)
        x_hat = self.model.decode(z)                                        # (B, 3, H, W)
        with_mask = self.model.decode(z, image=batch.x, mask=batch.mask)    # (B, 3, H, W)
        return {"val_pixel": losses.pixel_loss(x_hat, batch.x),
                "val_pixel_masked": losses.pixel_loss(with_mask, batch.x),
                "val_pre_error": pre_error(with_mask, batch.x, batch.mask).mean()}, x_hat

    def columns(self, batch):
        z = self.model.encode(batch.x)                                      # (B, d, h, w)
        return {"original": batch.x, "masked": batch.x * (1 - batch.mask),
                "vanilla": self.model.first_stage.decode(z),
                "ours, with mask": self.model.decode(z, image=batch.x, mask=batch.mask),
                "ours, without": self.model.decode(z)}


@torch.no_grad()
def pin_statistics(run, model):
    """Pin the last GroupNorm's statistics by the first training images, whole ones.

    Raises UserError if its groups are single channels, which AsymDecoder.pin_statistics cannot pin.
    """
    norm = model.decoder.norm_out
    if norm.num_groups == norm.num_channels:
        raise UserError("--start pinned: the highest level has one channel in each group of "
                        "its GroupNorm, and two are needed; give --start plain")
    images = next(views(run.train_set, [range(min(PINNED_IMAGES, len(run.train_set)))]))
    z = torch.cat([model.encode(pixels(image[None], run.device)) for image in images])
    model.decoder.pin_statistics(model.first_stage.post_quant_conv(z))      # (N, z, h, w)


def trained_first_stage(run, name):
    """Load the first stage for the stage `name`: (Loaded, its path, or None if it is the run's).

    The run's refit if it is finished, else what --vqgan names, else the run's vqgan.
    """
    refit = run_folder.latest(run.out / "refit")
    if refit is not None and refit["extra"].get("finished"):
        return load_first_stage(run.out), None
    where = run.settings["vqgan"]
    first_stage = load_first_stage(where or run.out)
    warn_unless_finished(name, first_stage, where or run.out)
    if refit is not None:
        print0(f"{name}: warning: the refit in {run.out} is not finished, so this {name} is "
               "trained without it; finish the refit first to train on its codes")
    return first_stage, where


def warn_unless_finished(name, first_stage, where):
    if not first_stage.finished:
        print0(f"{name}: warning: the first stage in {where} is not finished (step "
               f"{first_stage.step}); finish it first: a {name} fits only the weights that it is "
               "trained on")


@torch.no_grad()
def rebuild(run, model):
    """Rebuild a codebook from training images, on all processes: (K,d), facts. [DDM Sec. 3.2]"""
    seed, size = run.settings["seed"], run.settings["refit"]
    K, P = size["K"], size["samples"]
    print0(f"\nrefit: sampling {P:,} features of {len(run.train_set):,} images for {K:,} codes")

    def images(dataset, batches):
        for image in heed(views(dataset, batches, run.workers)):
            yield pixels(image, run.device, run.channels_last)              # (b, 3, H, W)

    # Sample features on all processes; cluster on one, because another CPU may round differently.
    features = sample_features(model.moments, partial(images, run.train_set), len(run.train_set), P,
                               (seed, STAGE_IDS["refit"])).to(run.device)   # (P, d)

    generator = torch.Generator().manual_seed(stage_seed(seed, "refit"))
    codebook, inertia = on_rank0(partial(rebuild_codebook, features, K, generator=generator))
    # Count the codes of the held-out images, with the codebook before and after.
    books = {"before": model.quantize.embedding.weight, "after": codebook.to(run.device)}
    counts = {when: torch.zeros(len(book), dtype=torch.int64) for when, book in books.items()}
    n, share = len(run.val_set), 32
    batches = (range(i, min(i + share, n)) for i in range(0, n, share)[rank()::world_size()])
    for x in images(run.val_set, batches):
        z_e = model.moments(x).permute(0, 2, 3, 1).flatten(0, 2)            # (b·h·w, d)
        for when, book in books.items():
            counts[when] += nearest_code(z_e, book).cpu().bincount(minlength=len(book))
    before, after = (code_statistics(sum(gather_objects(counts[when]))) for when in books)
    print0(f"refit: inertia {inertia[0]:.5g} at the seeds, {inertia[-1]:.5g} after "
           f"{len(inertia) - 1} moves; held out, {100 * before['usage']:.1f} % of {before['K']:,} "
           f"codes in use before (perplexity {before['perplexity']:.1f}), "
           f"{100 * after['usage']:.1f} % of {after['K']:,} after ({after['perplexity']:.1f})")
    return codebook, {"K": K, "samples": P, "inertia": [inertia[0], inertia[-1]],
                      "moves": len(inertia) - 1, "val": {"before": before, "after": after}}
