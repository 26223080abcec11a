"""Codes for a hole: what the encoder is shown of the picture, what the prior draws. DDM Sec. 4.4.

    x, mask --fill_with_mean--> x that hides what is under the mask --encoder--> indices
    indices, known --complete--> indices: at once on the grid of codes that the prior was trained
                                 on, window by window on a larger one

A prior has seen maps of one size only, so no other is given to it. Not here: how one window is
completed (diffusion.py), photos and pictures (inpaint.py).
"""


def fill_with_mean(x, mask):
    """x with its hole in the mean colour of its known pixels; mid-grey where there are none.

    x (B,3,H,W), mask (B,1,H,W) in {0,1} -> (B,3,H,W). All codes see the hole a little, so it
    should look like nothing in particular.  deviation D50
    """
    known = 1 - mask
    mean = (x * known).sum((2, 3), True) / known.sum((2, 3), True).clamp(min=1)     # (B, 3, 1, 1)
    return x * known + mean * mask


def windows(unknown, grid):
    """Where maps of `grid` (h,w) cells are to be completed: [(rows, columns)], slices.

    unknown: bool (H,W), at least as large as the grid. One window with the hole in its middle,
    where a quarter of a window of context fits around it; else windows half a window apart, from
    the context's top left on, line by line, of which each sees what is known and what was drawn
    before it. Windows that would find nothing left to draw are left out.
    """
    left, chosen = unknown.cpu().numpy().copy(), []
    if not left.any():
        return chosen
    tops, lefts = (_starts(left.any(1 - axis), grid[axis]) for axis in (0, 1))
    for top in tops:
        for start in lefts:
            window = slice(top, top + grid[0]), slice(start, start + grid[1])
            if left[window].any():
                left[window] = False
                chosen.append(window)
    return chosen


def _starts(unknown, length):
    """Where windows of `length` cells begin along one axis; unknown: bool (n,)."""
    n, where = len(unknown), unknown.nonzero()[0].tolist()
    first, end, context = where[0], where[-1] + 1, length // 4
    low, high = max(0, first - context), min(n, end + context)
    if high - low <= length:
        return [min(max(0, (first + end - length) // 2), n - length)]
    return [*range(low, high - length, max(1, length // 2)), high - length]


def complete(prior, indices, known, generators, steps=None, resample=1, temperature=1.0):
    """Codes (B,h,w) with all cells that are not known drawn by the prior. [DDM Sec. 4.4]

    prior: a prior.Prior; indices: codes (B,h,w), any where unknown; known: bool (B,h,w). Maps of
    the prior's own grid are drawn at once, larger ones window by window. generators, steps,
    resample, temperature: see MultinomialDiffusion.inpaint.
    """
    indices, known = indices.clone(), known.clone()
    for window in windows(~known.all(0), prior.grid):
        window = (slice(None), *window)
        indices[window] = prior.diffusion.inpaint(
            prior.unet, indices[window], known[window], steps, resample, generators, temperature)
        known[window] = True
    return indices
