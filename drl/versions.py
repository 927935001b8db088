"""Versions of the packages whose change may change a result: stored with every dataset, checkpoint and score."""

import functools
import importlib.metadata

PACKAGES = ("drl", "torch", "numpy", "gymnasium", "mujoco", "minari")

_version = functools.cache(importlib.metadata.version)  # reading it takes milliseconds, and no run changes it


def versions() -> dict[str, str]:
    """Package name to installed version."""
    return {name: _version(name) for name in PACKAGES}
