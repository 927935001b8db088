"""What can be collected, by name: "<env>/<tier>", of which `drl data collect` makes the dataset drl/<env>/<tier>-v0."""

import re
from importlib import resources

from drl.errors import UserError, did_you_mean

TIERS = ("random", "medium", "medium-replay", "medium-expert", "expert")


def environments() -> list[str]:
    """Short names of the environments whose behaviour policies are shipped, e.g. "hopper"."""
    shipped = resources.files("drl.behaviour").iterdir()
    return sorted(path.name.removesuffix(".json") for path in shipped if path.name.endswith(".json"))


def names() -> list[str]:
    """Every "<env>/<tier>" that can be collected."""
    return [f"{environment}/{tier}" for environment in environments() for tier in TIERS]


def parse(name: str) -> tuple[str, str]:
    """Environment and tier of "<env>/<tier>".

    Raises:
        UserError: it cannot be collected; names the near miss.
    """
    environment, _, tier = name.partition("/")
    if name not in names():
        raise UserError(f"unknown dataset {name!r}; {did_you_mean(name, names())}")
    return environment, tier


def task(dataset: str) -> str:
    """<env>/<tier> of drl/<env>/<tier>-v0, as runs are filed under; other ids keep their namespace."""
    return re.sub(r"-v[0-9]+$", "", dataset).removeprefix("drl/")
