"""seeding.py: numbers that depend on a key or on a generator, and not on the batch."""

import pytest
import torch

from seeding import per_image, uniforms


def test_one_generator_seeds_images_that_do_not_depend_on_how_many_there_are():
    whole = uniforms(per_image(torch.Generator().manual_seed(3), 5), 2, 4)
    generator = torch.Generator().manual_seed(3)
    parts = [uniforms(per_image(generator, B), 2, 4) for B in (2, 3)]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert whole.shape == (2, 5, 4)
    assert whole.unique().numel() == 40


def test_a_list_of_generators_is_taken_as_it_is_and_its_length_is_checked():
    generators = [torch.Generator().manual_seed(n) for n in range(3)]
    assert per_image(generators, 3) is generators
    with pytest.raises(ValueError, match="3 generators for 4 images"):
        per_image(generators, 4)
