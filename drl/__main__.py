"""`python -m drl`, which is how torchrun starts it: torchrun --nproc-per-node 2 -m -- drl train ...

Without the `--` torchrun takes --run for an option of its own.
"""

import sys

from drl.cli import main

sys.exit(main())
