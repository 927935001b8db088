"""What a config leaves to the machine and to the data: device, precision, whether to compile, environment, targets."""

import dataclasses

import torch

from drl.captured import is_cuda
from drl.config import Config, TrainConfig
from drl.data.store import EpisodeStore
from drl.envs import check_fit
from drl.errors import UserError

# At batch 64 on an H200 compiling takes 15 to 40 s and saves 0.33 ms of an update and seed (docs/performance.md)
COMPILED_UPDATES = 45_000


def resolve(config: Config, store: EpisodeStore, seeds: int = 1) -> Config:
    """Fill in what the config leaves to the machine and the dataset: device, precision, whether to compile,
    environment, target returns. `seeds` are trained side by side.

    Raises:
        UserError: no environment is named anywhere, it is unknown or does not fit the data, the model cannot act in the
            mode that is asked for, or the device is not there.
    """
    if config.evaluate.mode == "recurrent" and config.model.attention != "linear":
        raise UserError(f"model.attention {config.model.attention} has no recurrent step; add --evaluate.mode window")
    environment = config.environment or store.spaces.environment
    if not environment:
        raise UserError(f"dataset {config.dataset} names no environment; add --environment, e.g. Hopper-v5")
    check_fit(environment, store.spaces, f"dataset {config.dataset}")
    targets = config.evaluate.target_returns or [float(store.episode_returns.max())]
    device = resolve_device(config.device)
    return dataclasses.replace(
        config,
        environment=environment,
        device=device,
        train=chosen(config.train, device, seeds),
        evaluate=dataclasses.replace(config.evaluate, target_returns=targets),
    )


def chosen(settings: TrainConfig, device: str, seeds: int = 1) -> TrainConfig:
    """`settings` with what "auto" means on `device` for so many seeds side by side."""
    precision, compile = settings.precision, settings.compile
    if precision == "auto":
        precision = "bfloat16" if is_cuda(device) or multiplies_bfloat16() else "float32"
    if compile == "auto":
        compile = "on" if is_cuda(device) and seeds * settings.updates >= COMPILED_UPDATES else "off"
    return dataclasses.replace(settings, precision=precision, compile=compile)


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it; where it has none, bfloat16 is slower than float32."""
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16"))


def resolve_device(device: str) -> str:
    """What "auto" means here.

    Raises:
        UserError: the device is unknown or not on this machine.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise UserError(f"device {device!r} is not available (only cpu and cuda are); use --device cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} is not available ({str(error).splitlines()[0][:120]}); use --device cpu"
                        ) from error
    return device
