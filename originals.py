"""The pictures of a data set as they are: in their fixed view, whole, no mask.

    dataset --data.views--> uint8 (b,3,H,W) --originals--> metrics.Pictures, this process's share

What samples are compared with, and what codes are counted of. With evaluation masks they come from
metrics.py.
"""


from data import pixels, views
from distributed import rank, world_size
from metrics import Pictures
from run_folder import Progress


def shares(n, batch_size):
    """This process's ranges of 0..n-1: every `world_size()`-th of those of `batch_size`."""
    starts = range(0, n, batch_size)[rank()::world_size()]
    return [range(start, min(start + batch_size, n)) for start in starts]


def originals(dataset, n, batch_size, device, name=None, workers=0, bad=None):
    """The first n pictures: Pictures without masks, this process's share, in order.

    name: of a progress line; workers: processes that decode; bad: a data.BadFiles, told of the
    pictures that cannot be decoded, for which the next ones stand in. UserError: too many of these.
    """
    ranges = shares(n, batch_size)
    progress = Progress(name, 0, len(ranges), batch_size) if name else None
    for done, (image, index) in enumerate(views(dataset, ranges, workers), 1):
        yield Pictures(index, pixels(image, device))
        if progress:
            progress.show(done, {})
    if progress:
        progress.close()


def report_bad(bad, paths):
    """Tell `bad`, a data.BadFiles, and the user of files that this process could not decode.

    Each process speaks for its own share. Raises UserError where they are too many.
    """
    for path in bad.update(paths):
        print(f"cannot be decoded, the next picture stands in for it: {path}", flush=True)
    bad.check()
