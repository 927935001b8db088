"""What a C compiler needs to use the compiled step: cc act.c $(python -m drl.kernels.cpu)"""

import sys

from drl.kernels import cpu

if cpu.unavailable():
    sys.exit(f"the compiled step {cpu.unavailable()}")
folder = cpu.header()
print(f"-I{folder} {cpu.library()} -Wl,-rpath,{folder}")
