"""drl: a decision transformer with linear attention, trained in parallel and stepped as a recurrent network.

    drl.RecurrentPolicy    act with a trained model, one timestep at a time at constant cost
    drl.WindowPolicy       act by recomputing a window
    drl.EpisodeStore       a validated dataset in flat arrays
    drl.kernels            the linear attention operator
"""

import importlib

__version__ = "0.1.0"
_HOMES = {"RecurrentPolicy": "drl.policy", "WindowPolicy": "drl.policy", "EpisodeStore": "drl.data.store"}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Names are fetched when asked for: `import drl` loads neither torch nor mujoco."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'drl' has no attribute {name!r}")
