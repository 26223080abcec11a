"""The few pictures that a report shows, chosen without a look at what the decoders made of them.

    x, mask --half_known--> how much fine detail the mask's border cuts, and where
    batches --Examples.offer--> the best so far --Examples.columns--> columns of pictures.image_grid
"""

import torch
import torch.nn.functional as F

from distributed import gather_objects
from pictures import show_masked


class Examples:
    """The few pictures whose detail lies on both sides of the mask's border, chosen by x and mask.

    On Signs this finds words that are half known. What the decoders made of them has no say.
    """

    def __init__(self, count):
        self.count, self.best = count, []        # [(score, position, crop, {caption: ...})]

    def offer(self, pictures, outputs):
        """Keep the best of one batch. pictures: metrics.Pictures; outputs: metrics.decode_all's."""
        x, mask = pictures.x, pictures.mask
        if mask is None:
            return
        scores, crops = half_known(x, mask)
        for i in scores.argsort(descending=True)[:self.count].tolist():
            shown = {("", "original"): x[i], ("", "masked"): show_masked(x[i], mask[i])}
            shown |= {key: x_hat[i] for key, (x_hat, _) in outputs.items() if key[1] != "paste"}
            shown = {key: picture.to("cpu", copy=True) for key, picture in shown.items()}
            self.best.append((scores[i].item(), pictures.index[i], crops[i], shown))
        self._keep_best()

    def over_ranks(self):
        """Keep the best of all processes."""
        self.best = [entry for best in gather_objects(self.best) for entry in best]
        self._keep_best()

    def _keep_best(self):
        self.best = sorted(self.best, key=lambda entry: (-entry[0], entry[1]))[:self.count]

    def columns(self, cut):
        """{(run, decoder): [(3,H,W), ...]} in the order of the data set; cut out where `cut`.

        Pictures of another size than the first one's are left out: a grid has one size.
        """
        columns, best = {}, sorted(self.best, key=lambda entry: entry[1])
        for _, _, (top, left, side), shown in best:
            if shown["", "original"].shape != best[0][3]["", "original"].shape:
                continue
            for key, picture in shown.items():
                window = picture[:, top:top + side, left:left + side] if cut else picture
                columns.setdefault(key, []).append(window)
        return columns


def half_known(x, mask):
    """How much fine detail meets the mask's border (B,), and the window: [(top, left, side)].

    Detail is the squared step between neighbours. In the best window of half the picture's side,
    the score is its known detail, or thrice its hidden detail where that is less.
    """
    step_x = F.pad(x.diff(dim=3).square(), (0, 1))                              # (B,3,H,W)
    step_y = F.pad(x.diff(dim=2).square(), (0, 0, 0, 1))
    detail = (step_x + step_y).mean(1, keepdim=True)                            # (B,1,H,W)
    side = min(x.shape[2:]) // 2
    stride = max(1, side // 16)
    known = F.avg_pool2d(detail * (1 - mask), side, stride)                     # (B,1,h,w)
    hidden = F.avg_pool2d(detail * mask, side, stride)
    scores, places = torch.minimum(known, 3 * hidden).flatten(1).max(1)         # (B)
    tops, lefts = places // known.shape[3] * stride, places % known.shape[3] * stride
    return scores, [(top, left, side) for top, left in zip(tops.tolist(), lefts.tolist())]
