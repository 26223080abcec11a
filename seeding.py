"""Name every random stream, and make the generators that draw from it.

    (stream, seed, ..., position) --numpy_generator--> order, crops, masks, drawn scenes
    (seed, stage, position)       --keyed_generators-> a latent's noise, t and the diffusion's noise

Each random number is a function of such a key, so no rank, worker or batch size changes it. All
generators are on the CPU, so the device changes none either.
"""

import numpy as np
import torch

STAGE_IDS = {"vqgan": 0, "refit": 1, "decoder": 2, "prior": 3}

# The first number of each numpy key.
MASK_SHAPE, MASK_FULL, MASK_EVALUATION = 101, 102, 103  # LaMa's; the 50 % schedule; the tables'
SIGNS, ORDER, CROP = 201, 202, 203               # drawn scenes; an epoch's permutation; crops
FEATURES = 301                                   # the features that ReFiT clusters
SAMPLE, FIGURE, COMPLETION, SHIFT = 401, 402, 403, 404  # sample.py; DDM Fig. 8; inpaint.py; eval.py


def numpy_generator(stream, *key):
    """Make the numpy generator of a stream, a number above, and a key of integers >= 0.

    Keys of one stream need one length or their length in front: numpy pads short keys with zeros,
    so that (1, 2) and (1, 2, 0) are the same.
    """
    return np.random.default_rng((stream, *key))


def keyed_generators(keys):
    """Make one CPU torch.Generator per key, a tuple of integers >= 0."""
    states = (np.random.SeedSequence(key).generate_state(1, np.uint64)[0] for key in keys)
    return [torch.Generator().manual_seed(int(state)) for state in states]


def image_generators(seed, stage, positions):
    """Make one generator per image, from the run's seed, the stage and the image's position."""
    return keyed_generators((seed, STAGE_IDS[stage], position) for position in positions)


def stage_seed(seed, stage):
    """Give the number that seeds a stage's initial weights."""
    return int(np.random.SeedSequence((seed, STAGE_IDS[stage])).generate_state(1)[0])


def per_image(generator, B):
    """Return a list of B generators as it is, or seed B from one generator (None: torch's own)."""
    if isinstance(generator, list):
        if len(generator) != B:
            raise ValueError(f"{len(generator)} generators for {B} images; give one for each")
        return generator
    seeds = torch.randint(2**63 - 1, (B,), generator=generator)                     # (B)
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]


def uniforms(generators, *shape):
    """Draw `shape` numbers in [0,1) from each of B generators: (n, B, ...) float64 on the CPU."""
    return torch.stack([torch.rand(shape, dtype=torch.float64, generator=generator)
                        for generator in generators], dim=1)                        # (n, B, ...)
