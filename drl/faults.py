"""What goes wrong while episodes are played, told in one line. A score is made of all episodes, or there is none."""

from typing import Any

from drl.errors import UserError

LONGEST = 200  # characters of a foreign message


class Fault(UserError):
    """An environment, or a policy, did not answer as one: the `reason`, and what to type."""

    def __init__(self, reason: str, cure: str = "mend that and type the same again"):
        super().__init__(f"{reason}; {cure}")
        self.reason, self.cure = reason, cure


class EvaluationFailed(UserError):
    """An evaluation was given up.

    Attributes:
        reason: what happened, and in which episode and step.
        environment, target_return, episodes, seed: as they were asked for.
        finished: episodes that were over by then, of which no score is made.
        results: of the target returns that were evaluated before; empty where that is not known.
    """

    def __init__(self, fault: Fault, *, environment: str, target_return: float, episodes: int, seed: int,
                 finished: int):
        super().__init__(f"{fault.reason}; {finished} of {episodes} episodes had been finished, and no score is made "
                         f"of fewer than all; {fault.cure}")
        self.reason, self.environment, self.target_return = fault.reason, environment, target_return
        self.episodes, self.seed, self.finished = episodes, seed, finished
        self.results: list[dict[str, Any]] = []


def told(error: BaseException) -> str:
    """What became of a call that raised `error`, without its subject and in one line of plain characters."""
    if isinstance(error, Fault):
        return error.reason
    line = "".join(c if c.isprintable() else " " for c in str(error).strip().partition("\n")[0])[:LONGEST].rstrip()
    return f"raised {type(error).__name__}{f': {line}' if line else ''}"
