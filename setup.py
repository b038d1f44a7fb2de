"""Builds fasthyper._C against the installed torch. FASTHYPER_BUILD is

auto      the C++ part, and the CUDA part where torch has CUDA and nvcc is found; warns and goes on without what fails
cpu       the C++ part, or an error
cuda      both parts, or an error
none      neither
sanitize  cpu under AddressSanitizer and UndefinedBehaviorSanitizer, see the Makefile
"""

import glob
import os
import warnings

from setuptools import setup

BUILD = os.environ.get("FASTHYPER_BUILD", "auto")
CHOICES = ("auto", "cpu", "cuda", "none", "sanitize")
MUST = BUILD in ("cpu", "cuda", "sanitize")
SANITIZE = ["-fsanitize=address,undefined"] if BUILD == "sanitize" else []
# Python's own flags hold -fwrapv, under which an overflow is not reported
CHECKED = ["-O1", "-g", "-fno-wrapv", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", "-D_GLIBCXX_ASSERTIONS"]
OPTIMIZE = CHECKED if SANITIZE else ["-O3"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # built once, loads under torch 2.11 and later
CXX = [*OPTIMIZE, *SANITIZE, "-std=c++17", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra", STABLE_ABI]
NVCC = ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", STABLE_ABI]  # tests/test_cuda_compiles.py too
ARCHITECTURES = "8.0;9.0+PTX"  # unless TORCH_CUDA_ARCH_LIST names others


def extension():
    """Keyword arguments for setup(), or nothing where the extension is not wanted or cannot be built."""
    if BUILD not in CHOICES:
        raise SystemExit(f"FASTHYPER_BUILD={BUILD!r} is not known; set it to one of {', '.join(CHOICES)}")
    if BUILD == "none":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        if MUST:
            raise SystemExit(
                f"FASTHYPER_BUILD={BUILD} needs torch installed first ({error}), and --no-build-isolation"
            ) from error
        warnings.warn(
            "torch is not installed here: pure-Python install. To compile, install torch, then "
            "pip install --no-build-isolation -e .",
            stacklevel=2,
        )
        return {}
    lacking = "a torch with CUDA" if torch.version.cuda is None else "nvcc; set CUDA_HOME" if CUDA_HOME is None else ""
    if BUILD == "cuda" and lacking:
        raise SystemExit(f"FASTHYPER_BUILD=cuda needs {lacking}")
    has_cuda = BUILD == "cuda" or (BUILD == "auto" and not lacking)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:  # a compiler fails in many ways; in auto none of them may stop the install
                if MUST:
                    raise
                warnings.warn(f"the C++ extension was not built, the slow reference will run: {error}", stacklevel=2)

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                if MUST or not has_cuda:
                    raise
                warnings.warn(f"the CUDA part of the extension was not built, Triton will serve GPUs: {error}", stacklevel=2)
                for module in self.extensions:
                    module.sources = [source for source in module.sources if not source.endswith(".cu")]
                    module.libraries = [name for name in module.libraries if "cuda" not in name]
                super().build_extensions()

    sources = ["csrc/module.cpp", *glob.glob("csrc/cpu/*.cpp"), *(glob.glob("csrc/cuda/*.cu") if has_cuda else ())]
    module = (CUDAExtension if has_cuda else CppExtension)(
        "fasthyper._C",
        sorted(sources),
        depends=[path for pattern in ("*.h", "cpu/*.h", "cuda/*.cuh") for path in glob.glob(f"csrc/{pattern}")],
        extra_compile_args={"cxx": CXX, "nvcc": NVCC},
        extra_link_args=SANITIZE,
        py_limited_api=True,
        define_macros=[("Py_LIMITED_API", "0x030A0000")],
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(**extension())
