"""One progress bar for all long work: on a terminal it moves, in a log it writes a line now and then."""

import sys
from collections.abc import Callable

from tqdm import tqdm

_show: Callable[[str], None] | None = None  # where another process draws the bars


def progress(total: int, unit: str, label: str, initial: int = 0, silent: bool = False) -> tqdm:
    """A bar over `total` units on stderr; use as a context manager and call `update`."""
    file = _Elsewhere() if _show else sys.stderr
    interval = 0.2 if file.isatty() else 10.0
    return tqdm(
        total=total, unit=f" {unit}", desc=label, initial=initial, mininterval=interval, unit_scale=total > 10_000,
        dynamic_ncols=True, file=file, maxinterval=interval, disable=silent,
    )


def elsewhere(show: Callable[[str], None]) -> None:
    """From here on bars are not drawn: `show` gets the text of one whenever it would move, in any thread."""
    global _show
    _show = show


class _Elsewhere:
    """A terminal to tqdm, whose lines go to `_show`."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        if text := text.strip():
            _show(text)

    def flush(self) -> None:
        pass
