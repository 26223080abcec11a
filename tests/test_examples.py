"""Which pictures a report shows."""

import torch

from examples import Examples, half_known
from metrics import Pictures


def test_words_that_are_half_known_are_found_wherever_they_are():
    x, mask = torch.zeros(3, 3, 64, 64), torch.zeros(3, 1, 64, 64)
    x[:, :, 40:48, 8:24] = torch.randint(0, 2, (8, 16)) * 2.0 - 1     # a word
    mask[0, :, :, 16:] = 1                                            # half of it is hidden
    mask[1, :, :, 40:] = 1                                            # none
    mask[2, :, 32:] = 1                                               # all
    scores, crops = half_known(x, mask)
    assert scores[0] > 100 * scores[1:].max()
    top, left, side = crops[0]
    assert side == 32
    assert top <= 40
    assert top + side >= 48
    assert left <= 12
    assert left + side >= 20


def test_examples_keep_the_best_in_the_order_of_the_data_set_and_ignore_the_outputs():
    def chosen(batches, noise):
        examples = Examples(3)
        for index, x, mask in batches:
            outputs = {(None, "vanilla"): (torch.randn_like(x) * noise, 0.0)}
            examples.offer(Pictures(index.tolist(), x, mask), outputs)
        return examples.columns(cut=False)["", "original"]

    x, mask = torch.rand(9, 3, 32, 32), torch.zeros(9, 1, 32, 32)
    mask[..., 16:] = 1
    x *= torch.tensor([1, 5, 2, 9, 3, 8, 1, 1, 4.0])[:, None, None, None] / 10
    for size, noise in ((9, 1), (2, 5), (1, 0)):
        kept = chosen(zip(torch.arange(9).split(size), x.split(size), mask.split(size)), noise)
        assert all(torch.equal(a, b) for a, b in zip(kept, x[[1, 3, 5]], strict=True))


def test_cut_examples_are_the_window_of_the_whole_ones():
    examples = Examples(1)
    x, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[..., 20:] = 1
    examples.offer(Pictures([0], x, mask), {})
    top, left, side = half_known(x, mask)[1][0]
    cut = examples.columns(cut=True)
    assert torch.equal(cut["", "original"][0], x[0, :, top:top + side, left:left + side])
    assert (cut["", "masked"][0][..., 20 - left:] == 0).all()


def test_pictures_of_another_size_than_the_first_are_not_shown_and_maskless_ones_not_offered():
    examples = Examples(4)
    for index, side in enumerate((32, 32, 64)):
        x, mask = torch.rand(1, 3, side, 32), torch.zeros(1, 1, side, 32)
        mask[..., 20:] = 1
        examples.offer(Pictures([index], x, mask), {})
    examples.offer(Pictures([3], x), {})
    assert len(examples.best) == 3
    assert len(examples.columns(cut=False)["", "original"]) == 2
