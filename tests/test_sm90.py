"""What can be said of the kernels on a Hopper GPU without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


ATTENTION = {"forward", "forward, fading", "backward", "backward, fading"}
TOKEN_WISE = {"mlp forward", "mlp backward", "step", "step, fading"}
SPILLS = 64  # bytes of a thread's stack: what the large blocks of the MLP's backward spill, the fastest nonetheless


@pytest.mark.parametrize(
    ("tokens", "width", "kernels", "most"),
    [
        (30, 32, ATTENTION, 0),
        (60, 32, ATTENTION, 0),
        (60, 64, ATTENTION, 0),
        (600, 32, ATTENTION | {"states", "states, fading"}, 0),
        (3840, 128, TOKEN_WISE, 0),
        (245760, 128, TOKEN_WISE, SPILLS),
    ],
)
@pytest.mark.slow
def test_the_kernels_of_training_compile_for_hopper_and_spill_little(tokens, width, kernels, most):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    shown = subprocess.run([sys.executable, Path(__file__).with_name("sm90.py"), str(tokens), str(width), "bfloat16"],
                           capture_output=True, text=True, env=environment)
    assert not shown.returncode, shown.stderr[-2000:]
    usage = json.loads(shown.stdout)
    assert usage.keys() == kernels
    for kernel, used in usage.items():
        assert 32 < used["registers"] <= 255 and used["stack"] <= most, (kernel, used)
