"""The one exception whose message is meant for a user's eyes: `drl` prints it as one line and exits with 2."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

SHOWN = 60  # characters of a value that a message shows
_short = reprlib.Repr()
_short.maxstring = _short.maxother = SHOWN


class UserError(ValueError):
    """A mistake that the user can mend; the message says what to type instead."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'did you mean X?' for a near miss, else the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name[:SHOWN], known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"


def shown(value: Any) -> str:
    """A value that a stranger may have chosen, as a message shows it: printable, on one line, and cut, however large
    the value is."""
    try:
        text = _short.repr(value)
    except ValueError:  # Python writes no integers of more than 4300 digits
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= SHOWN + 2 else text[:SHOWN] + "..."
