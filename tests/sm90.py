"""Compile the kernels for a Hopper GPU, without one, as `launch.py` would: registers and spilled bytes of
each, as JSON.

A program of its own, because Triton either interprets or compiles for the whole life of a process.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from drl.kernels.triton import backward, forward, launch, mlp, step, token_wise_launch

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
FLAGS = ("mask", "restart")
HEADS = 4  # numbers in a decay
DISASSEMBLER = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compiled(kernel, constants: dict, dtype: torch.dtype, in_dtype: str, tiles) -> dict[str, int]:
    """Registers of a thread and bytes of its stack; tensors named in `in_dtype` are of `dtype`, others float32."""
    built = assembled(kernel, constants, dtype, in_dtype, tiles)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [DISASSEMBLER, "-res-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", shown).groups()
    return {"registers": int(registers), "stack": int(stack)}


def assembled(kernel, constants: dict, dtype: torch.dtype, in_dtype: str, tiles):
    """What Triton's compiler makes of it."""
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
            continue
        aligned = True
        if name == "eps":
            signature[name], aligned = "fp32", False
        elif name in ("rates", "decay"):
            signature[name], aligned = ("fp32",) * HEADS, False
        elif name in ("T", "H", "N", "tokens"):
            signature[name], aligned = "i32", False
        elif re.search("_(row|token|head)$", name):
            signature[name] = "i32"
        else:
            signature[name] = "*u8" if name in FLAGS else POINTERS[dtype] if name in in_dtype.split() else "*fp32"
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "maxnreg": getattr(tiles, "registers", None)}
    return triton.compile(ASTSource(kernel, signature, values, attributes), GPUTarget("cuda", 90, 32), options)


def usage(T: int, D: int, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Forward and backward as in training: a given state, masks, restarts; without and with a memory that fades."""
    C = launch.chunk(T, dtype)
    one, shape = T <= C, {"K": D, "V": D, "C": C, "MAP": "elu1", "MASK": True} | ({"N": 1} if T <= C else {})
    ahead, back = launch.forward_tiles(D, D, dtype), launch.backward_tiles(D, D, dtype, programs=256)
    whole_k, whole_v = launch.blocks(D, D)
    ahead_constants = {"BLOCK_K": ahead.K, "BLOCK_V": ahead.V, "RESTART": True, "STATE": True, "SAVE": True,
                       "ONE_CHUNK": one}
    back_constants = {"WHOLE_K": whole_k, "WHOLE_V": whole_v, "SPLIT": back.split, "SPLIT_K": back.K, "SPLIT_V": back.V,
                      "RESTART": one, "PAST": True, "FUTURE": not one, "BEFORE": False}
    kernels = {"forward": (forward.forward, shape | ahead_constants, dtype, "q k v out", ahead),
               "backward": (backward.backward, shape | back_constants, dtype, "q k v out d_out dq dk dv", back)}
    if not one:
        block_v, warps = min(whole_v, 64), 8 if whole_k > 64 else 4
        states_constants = {"BLOCK_K": whole_k, "BLOCK_V": block_v, "WHOLE_V": whole_v, "RESTART": True,
                            "AFTER": False, "BEFORE": False}
        kernels["states"] = (backward.states, shape | states_constants, dtype, "q out d_out",
                             launch.Tiles(whole_k, block_v, warps, stages=2))
    return faded_and_not(kernels)


def faded_and_not(kernels: dict[str, tuple]) -> dict[str, dict[str, int]]:
    """Each without and with a decay."""
    used = {}
    for name, (kernel, constants, *rest) in kernels.items():
        faded, = {"rates", "decay"}.intersection(kernel.arg_names)
        used[name] = compiled(kernel, constants | {faded: None}, *rest)
        used[f"{name}, fading"] = compiled(kernel, constants, *rest)
    return used


def token_wise_usage(tokens: int, D: int, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """The MLP of a layer of width D on a float32 stream of so many tokens, and three tokens of a step."""
    ahead = token_wise_launch.forward_tiles(tokens, D, 4 * D, dtype)
    back = token_wise_launch.backward_tiles(tokens, D, dtype)
    written = "read d_out_rounded hidden d_hidden"
    shapes = [{"D": D, "HIDDEN": 4 * D, "BLOCK_M": tiles.M, "BLOCK_H": tiles.H} for tiles in (ahead, back)]
    few = {"K": 32, "V": 32, "T": 3, "BLOCK_K": 32, "BLOCK_V": 32, "MAP": "elu1", "MASK": True, "RESTART": True,
           "STATE": True}
    return {
        "mlp forward": compiled(mlp.forward, shapes[0], dtype, "weight_in weight_out", ahead),
        "mlp backward": compiled(mlp.backward, shapes[1] | {"ROUND": True}, dtype, f"weight_in weight_out {written}",
                                 back),
    } | faded_and_not({"step": (step.step, few, dtype, "q k v out", launch.Tiles(32, 32, warps=1))})


if __name__ == "__main__":
    count, D, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
    print(json.dumps((token_wise_usage if count > 1000 else usage)(count, D, dtype)))
