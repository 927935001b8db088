"""What is compiled for CPUs: the whole step of a policy as one function, weights packed once, nothing allocated, one
thread or several; and the operator, forward and backward.

    drl_policy.h      the C interface: what a program in C includes
    policy.cpp        instruction set, packing, the calls
    step.h            one environment step; the step_*.cpp compile it once for each instruction set
    act.c             the shortest way from Python to a step
    file.h, file.cpp  reads the model.safetensors of an exported policy
    attention.h, .cpp the operator on a chunk of tokens   operator.h  one call of it
    attention.py      the operator as torch sees it

This file is the door from Python, with addresses for arguments: it knows neither numpy nor a policy. The library is
built where a C++ compiler is found; without it the package works, slower.
"""

import ctypes
import functools
import importlib
from collections.abc import Callable, Mapping
from importlib import machinery
from pathlib import Path

from torch import Tensor

ABI = 3
PRECISIONS = {"float32": 0, "bfloat16": 1}
FEATURE_MAPS = {"elu1": 0, "relu": 1, "identity": 2}
ERROR = 500  # bytes of a message


class _Sizes(ctypes.Structure):

    _fields_ = [(name, ctypes.c_int32) for name in (
        "observation_dim", "action_dim", "width", "layers", "heads", "max_timesteps", "feature_map"
    )] + [("return_scale", ctypes.c_float)]


class _Tensor(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("count", ctypes.c_int64)]


def header() -> Path:
    """The folder of drl_policy.h, for a C compiler."""
    return Path(__file__).parent


def library() -> Path | None:
    """The compiled library, to be linked with; None where it was not built."""
    found = (Path(__file__).parent / f"_policy{suffix}" for suffix in machinery.EXTENSION_SUFFIXES)
    return next(filter(Path.is_file, found), None)


@functools.cache
def unavailable() -> str | None:
    """Why the compiled step cannot run here; None if it can."""
    try:
        _library()
    except OSError as error:
        return str(error)
    return None


@functools.cache
def instruction_sets() -> list[str]:
    """What this machine can run, best first: of avx512-bf16, avx512, avx2, baseline.

    Raises:
        OSError: there is no library.
    """
    return _library().drl_instruction_sets().decode().split()


class CompiledPolicy:
    """A policy packed for the compiled step. It takes addresses of C-contiguous memory and checks nothing.

    Attributes:
        state_size, state_head, state_padded: as in drl_policy.h.
        instruction_set: what it was packed for.
        step: drl_policy_step without its first argument.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        precision: str,
        instruction_set: str | None = None,
        *,
        feature_map: str,
        **sizes: float,
    ):
        """Pack.

        Args:
            tensors: float32, contiguous, on the CPU, by the names of an exported file.
            precision: what weights are kept in, "float32" or "bfloat16".
            instruction_set: one of `instruction_sets()`; None: the first.
            feature_map, sizes: the fields of drl_sizes.

        Raises:
            OSError: there is no library.
            ValueError: a tensor is missing, unknown, does not fit the sizes or is not finite; the machine lacks the
                instruction set.
        """
        self._functions = functions = _library()
        named = (_Tensor * len(tensors))(*(
            _Tensor(name.encode(), tensor.data_ptr(), tensor.numel()) for name, tensor in tensors.items()
        ))
        sizes = _Sizes(feature_map=FEATURE_MAPS[feature_map], **sizes)
        error = ctypes.create_string_buffer(ERROR)
        self._policy = functions.drl_policy_new(
            ctypes.byref(sizes), named, len(tensors), PRECISIONS[precision],
            None if instruction_set is None else instruction_set.encode(), error, ERROR
        )
        if not self._policy:
            raise ValueError(error.value.decode(errors="replace"))
        self.state_size = functions.drl_policy_state_size(self._policy)
        self.state_head = functions.drl_policy_state_head(self._policy)
        self.state_padded = functions.drl_policy_state_padded(self._policy)
        self.instruction_set = functions.drl_policy_instruction_set(self._policy).decode()
        self.step = functools.partial(functions.drl_policy_step, self._policy)

    def caller(
        self,
        *addresses: int,
        rows: int,
        channels: int,
        threads: int,
        result: Callable[[], object],
        refuse: Callable[[int], object],
        owner: object,
    ):
        """act(observations, reward) of act.c; None where it was not built.

        Args:
            addresses: of observations, rewards, states and actions, in memory that `owner` keeps.
            result: called for what it returns.
            refuse: called with what drl_policy_step returned, where that is not 0; raises.
        """
        try:
            act = importlib.import_module("drl.kernels.cpu._act")
        except ImportError:
            return None
        step = ctypes.cast(self._functions.drl_policy_step, ctypes.c_void_p).value
        return act.Caller(step, self._policy, *addresses, rows, channels, threads, result, refuse, (self, owner))

    def __del__(self):
        if getattr(self, "_policy", None):
            self._functions.drl_policy_free(self._policy)


@functools.cache
def function(name: str, result: type, arguments: tuple[type, ...]) -> Callable:
    """A function of the library, for the files beside this one.

    Raises:
        OSError: there is no library.
    """
    found = getattr(_library(), name)
    found.restype, found.argtypes = result, arguments
    return found


@functools.cache
def _library() -> ctypes.CDLL:
    file = library()
    if file is None:
        raise OSError("was not built: install a C++ compiler (apt install g++) and drl again, or use engine 'torch'")
    functions = ctypes.CDLL(str(file))
    pointer, number, size, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_char_p
    for name, result, arguments in (
        ("drl_abi", ctypes.c_int, []),
        ("drl_instruction_sets", text, []),
        ("drl_policy_new", pointer, [ctypes.POINTER(_Sizes), ctypes.POINTER(_Tensor), number, ctypes.c_int, text, text,
                                     size]),
        ("drl_policy_free", None, [pointer]),
        ("drl_policy_instruction_set", text, [pointer]),
        ("drl_policy_state_size", number, [pointer]),
        ("drl_policy_state_head", number, [pointer]),
        ("drl_policy_state_padded", number, [pointer]),
        ("drl_policy_step", number, [pointer, number, *[pointer] * 7, ctypes.c_int]),
    ):
        entry = getattr(functions, name)
        entry.restype, entry.argtypes = result, arguments
    if functions.drl_abi() != ABI:
        raise OSError(f"{file.name} is of another version of drl; install drl again")
    return functions
