"""The one exception whose message is meant for a user's eyes: `drl` prints it as one line and exits with 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend; the message says what to type instead."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'did you mean X?' for a near miss, else the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
