"""The command `drl`, also as `python -m drl`, which is how torchrun starts it: torchrun --nproc-per-node 2 -m -- drl
train ... Without the `--` torchrun takes --run for an option of its own.
"""

import importlib
import sys

from drl import signals


def main() -> int:
    """`drl.cli.main`; a signal is answered in one line also while that is imported."""
    return signals.status(lambda: importlib.import_module("drl.cli").main())


if __name__ == "__main__":
    sys.exit(main())
