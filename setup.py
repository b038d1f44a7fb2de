"""Builds fasthyper._C against the installed torch: FASTHYPER_BUILD = auto (warn and go on) | cpu (fail loudly) | none |
sanitize (cpu under AddressSanitizer and UndefinedBehaviorSanitizer, see the Makefile)."""

import glob
import os
import warnings

from setuptools import setup

BUILD = os.environ.get("FASTHYPER_BUILD", "auto")
MUST = BUILD in ("cpu", "sanitize")
SANITIZE = ["-fsanitize=address,undefined"] if BUILD == "sanitize" else []
# Python's own flags hold -fwrapv, under which an overflow is not reported
CHECKED = ["-O1", "-g", "-fno-wrapv", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", "-D_GLIBCXX_ASSERTIONS"]
OPTIMIZE = CHECKED if SANITIZE else ["-O3"]
FLAGS = ["-std=c++17", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # built once, loads under torch 2.11 and later


def extension():
    """Keyword arguments for setup(), or nothing where the extension is not wanted or cannot be built."""
    if BUILD not in ("auto", "cpu", "none", "sanitize"):
        raise SystemExit(f"FASTHYPER_BUILD={BUILD!r} is not known; set it to auto, cpu, none or sanitize")
    if BUILD == "none":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
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

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:  # a compiler fails in many ways; in auto none of them may stop the install
                if MUST:
                    raise
                warnings.warn(f"the C++ extension was not built, the slow reference will run: {error}", stacklevel=2)

    sources = sorted(["csrc/module.cpp", *glob.glob("csrc/cpu/*.cpp")])
    module = CppExtension(
        "fasthyper._C",
        sources,
        depends=glob.glob("csrc/cpu/*.h"),
        extra_compile_args=[*OPTIMIZE, *SANITIZE, *FLAGS, STABLE_ABI],
        extra_link_args=SANITIZE,
        py_limited_api=True,
        define_macros=[("Py_LIMITED_API", "0x030A0000")],
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
