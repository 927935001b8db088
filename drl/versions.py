"""Versions of the packages whose change may change a result: stored with every dataset, checkpoint and score."""

import importlib.metadata

PACKAGES = ("drl", "torch", "numpy", "gymnasium", "mujoco", "minari")


def versions() -> dict[str, str]:
    """Package name to installed version."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}
