"""What can be said of the kernels on a Hopper GPU without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(("tokens", "width"), [(60, 32), (60, 64), (600, 32)])
def test_the_kernels_of_training_compile_for_hopper_and_spill_nothing(tokens, width):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    shown = subprocess.run([sys.executable, Path(__file__).with_name("sm90.py"), str(tokens), str(width), "bfloat16"],
                           capture_output=True, text=True, env=environment)
    assert not shown.returncode, shown.stderr[-2000:]
    usage = json.loads(shown.stdout)
    assert usage.keys() == {"forward", "backward"}
    for kernel, used in usage.items():
        assert 32 < used["registers"] <= 255 and used["stack"] == 0, (kernel, used)
