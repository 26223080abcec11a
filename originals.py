"""The pictures of a data set as they are: in their fixed view, whole, no mask.

    dataset --data.views--> uint8 (b,3,H,W) --originals--> tally.Pictures, this process's share

What samples are compared with, and what codes are counted of. With evaluation masks they come from
compare.py.
"""

from data import BadFiles, views
from distributed import print0, rank, world_size
from run_folder import Progress
from stages import pixels
from tally import Pictures


def shares(n, batch_size):
    """This process's ranges of 0..n-1: every `world_size()`-th of those of `batch_size`."""
    starts = range(0, n, batch_size)[rank()::world_size()]
    return [range(start, min(start + batch_size, n)) for start in starts]


def originals(dataset, n, batch_size, device, name=None, workers=0):
    """The first n pictures: Pictures without masks, this process's share, in order.

    name: of a progress line; workers: processes that decode. A picture that cannot be decoded is
    replaced by the next one; UserError: too many of these.
    """
    ranges, bad_files = shares(n, batch_size), BadFiles(len(dataset))
    progress = Progress(name, 0, len(ranges), batch_size) if name else None
    for done, (image, bad) in enumerate(views(dataset, ranges, workers), 1):
        for path in bad_files.update(bad):
            print0(f"cannot be decoded, the next picture stands in for it: {path}")
        bad_files.check()
        yield Pictures(list(ranges[done - 1]), pixels(image, device))
        if progress:
            progress.show(done, {})
    if progress:
        progress.close()
