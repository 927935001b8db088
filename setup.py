"""The compiled step of kernels/cpu, which may fail to build: the package then works without it. All else stands in
setup.cfg."""

import os
import tempfile

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
         "-fvisibility=hidden", "-pthread"]
SOURCES = ["policy", "pool", "file", "attention", "step_baseline", "step_avx2", "step_avx512", "step_avx512_bf16"]
HEADERS = ["drl_policy", "packed", "pool", "step", "file", "operator", "attention"]


class Build(build_ext):
    """A plain shared library for ctypes and C: it is no Python module and includes no header of Python's."""

    def build_extension(self, extension):
        if extension.language == "c++" and self._has("-fopenmp"):  # without it training uses one
            extension.extra_compile_args.append("-fopenmp")
            extension.extra_link_args.append("-fopenmp")
        super().build_extension(extension)

    def get_export_symbols(self, extension):
        return extension.export_symbols if extension.language == "c++" else super().get_export_symbols(extension)

    def _has(self, flag: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "empty.cpp")
            with open(source, "w") as file:
                file.write("int main() { return 0; }\n")
            try:
                objects = self.compiler.compile([source], output_dir=folder, extra_postargs=[flag])
                self.compiler.link_executable(objects, os.path.join(folder, "empty"), extra_postargs=[flag])
            except Exception:  # whatever a compiler that does not know the flag makes of it
                return False
        return True


setup(
    ext_modules=[
        Extension(
            "drl.kernels.cpu._policy",
            [f"kernels/cpu/{name}.cpp" for name in SOURCES],
            depends=[f"kernels/cpu/{name}.h" for name in HEADERS],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        ),
        Extension("drl.kernels.cpu._act", ["kernels/cpu/act.c"], depends=["kernels/cpu/drl_policy.h"],
                  extra_compile_args=["-g0", "-O2"], optional=True),  # this one is a Python module
    ],
    cmdclass={"build_ext": Build},
)
