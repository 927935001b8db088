"""One progress bar for all long work: on a terminal it moves, in a log it writes a line now and then."""

import sys

from tqdm import tqdm


def progress(total: int, unit: str, label: str, initial: int = 0, silent: bool = False) -> tqdm:
    """A bar over `total` units on stderr; use as a context manager and call `update`."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total, unit=f" {unit}", desc=label, initial=initial, mininterval=interval, unit_scale=total > 10_000,
        dynamic_ncols=True, file=sys.stderr, maxinterval=interval, disable=silent,
    )
