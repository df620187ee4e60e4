"""Builds moepad._core, one abi3 extension in C11. Everything else is in pyproject.toml.

MOEPAD_BUILD_CFLAGS and MOEPAD_BUILD_LDFLAGS are appended (sanitizers, -Werror).
"""

import glob
import os
import platform
import shlex
from concurrent.futures import ThreadPoolExecutor

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

SOURCES = [
    "csrc/status.c",
    "csrc/view.c",
    "csrc/plan.c",
    "csrc/pool.c",
    "csrc/copy.c",
    "csrc/moe.c",
    "csrc/library.c",
    "csrc/gpu_plan.c",
    "csrc/gpu_hip.c",
    "csrc/gpu_cuda.c",
    "csrc/gpu_run.c",
    "csrc/gpu_memory.c",
    "csrc/cpu_portable.c",
    "csrc/cpu.c",
    "csrc/tensor.c",
    "csrc/device.c",
    "csrc/memory.c",
    "csrc/module.c",
]
# One kernel file per instruction set, each compiled for it; cpu.c picks one at run time.
ISA_FLAGS = {
    "csrc/cpu_avx2.c": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/cpu_avx512.c": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "csrc/cpu_avx512bf16.c": [
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mavx512vbmi",
        "-mfma", "-mf16c",
    ],
}  # fmt: skip
if platform.machine() in ("x86_64", "AMD64"):
    SOURCES = [*ISA_FLAGS, *SOURCES]  # what takes longest first

SHARED_WITH_KERNELS = ["csrc/gpu_args.h", "csrc/variants.def"]

CFLAGS = ["-std=c11", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-ffp-contract=fast"]


class BuildExt(build_ext):
    """build_ext, a source per processor at a time, with flags of ISA_FLAGS for some."""

    def build_extensions(self) -> None:
        compile_all, compile_one = self.compiler.compile, self.compiler._compile

        def compile_for_isa(obj, src, ext, cc_args, extra_postargs, pp_opts):
            compile_one(obj, src, ext, cc_args, extra_postargs + ISA_FLAGS.get(src, []), pp_opts)

        def compile_at_once(*args, **options):
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                jobs = []

                def submit(*job):
                    jobs.append(pool.submit(compile_for_isa, *job))

                self.compiler._compile = submit
                objects = compile_all(*args, **options)
            for job in jobs:
                job.result()
            return objects

        self.compiler.compile = compile_at_once
        super().build_extensions()


class BuildPy(build_py):
    """build_py that takes along the kernels' sources, as moepad/kernels/{hip,csrc}."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source in (*sorted(glob.glob("hip/*")), *SHARED_WITH_KERNELS):
                target = os.path.join(self.build_lib, "moepad", "kernels", source)
                self.mkpath(os.path.dirname(target))
                self.copy_file(source, target)


setup(
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    ext_modules=[
        Extension(
            "moepad._core",
            SOURCES,
            depends=[f"csrc/{name}" for name in os.listdir("csrc") if name.endswith(".h")],
            include_dirs=[numpy.get_include()],
            define_macros=[
                ("_GNU_SOURCE", "1"),
                ("Py_LIMITED_API", "0x030A0000"),
                ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
                ("NPY_TARGET_VERSION", "NPY_1_23_API_VERSION"),
            ],
            extra_compile_args=CFLAGS + shlex.split(os.environ.get("MOEPAD_BUILD_CFLAGS", "")),
            extra_link_args=["-pthread", *shlex.split(os.environ.get("MOEPAD_BUILD_LDFLAGS", ""))],
            libraries=["m", "dl"],
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
