"""Who may import whom (DESIGN, How it is cut), read from the sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fasthyper"

# module -> the modules of the package that it may import; what is not named here may not exist
ALLOWED = {
    "version": set(),
    "errors": set(),
    "distributed": {"errors"},
    "activations": set(),
    "layout": set(),
    "interrupt": set(),
    "progress": set(),
    "metrics": set(),
    "loggers": {"errors", "metrics"},
    "losses": set(),
    "nets": {"activations"},
    "vision": set(),
    "streams": {"errors"},
    "reference": {"activations"},
    "ops": {"reference"},
    "_backend": {"kernels", "ops", "reference"},
    "kernels": set(),
    "planner": {"layout"},
    "trunk": {"activations", "reference"},
    "patterns": set(),
    "batchnorm": set(),
    "heads": {"layout"},
    "target": {"batchnorm", "heads", "layout", "patterns"},
    "shared": {"target"},
    "generation": {"layout", "ops", "planner", "target"},
    "mixed": {"nets", "target"},
    "environment": {"version", "_backend"},
    "checkpoint": {"errors"},
    "lookahead": {"ops"},
    "init": {"activations", "layout", "trunk"},
    "hypernet": {
        *("activations", "checkpoint", "generation", "init", "layout", "mixed", "nets", "shared", "streams", "target"),
        "trunk",
    },
    "export": {"checkpoint", "errors", "hypernet", "init", "nets"},
    "affine": {"ops", "planner"},
    "regularizer": {"affine", "hypernet", "ops", "planner", "reference", "trunk"},
    "inference": {"hypernet", "losses", "mixed", "streams"},
    "graph": set(),
    "training": {"export", "graph", "metrics"},
    "trainer": {
        *("checkpoint", "distributed", "environment", "errors", "export", "graph", "hypernet", "inference", "interrupt"),
        *("loggers", "lookahead", "losses", "metrics", "nets", "progress", "regularizer", "streams", "training"),
    },
    "replay_model": {"hypernet", "mixed", "nets", "streams", "trainer", "training"},
    "replay": {
        *(
            "checkpoint",
            "environment",
            "errors",
            "export",
            "inference",
            "interrupt",
            "loggers",
            "lookahead",
            "metrics",
            "nets",
        ),
        *("progress", "replay_model", "streams", "trainer", "training"),
    },
    "recipes": {
        *("checkpoint", "distributed", "errors", "hypernet", "loggers", "metrics", "nets", "replay", "replay_model"),
        *("streams", "trainer"),
    },
    "report": {"checkpoint", "errors", "metrics", "recipes", "version"},
    "sweep": {"checkpoint", "errors", "loggers", "losses", "metrics", "recipes"},
    "bench": {
        *("compat", "environment", "errors", "hypernet", "layout", "metrics", "nets", "planner", "regularizer", "trainer"),
    },
    "compat": {
        *("activations", "errors", "hypernet", "interrupt", "layout", "lookahead", "nets", "ops", "planner", "reference"),
        *("regularizer", "streams", "trainer", "trunk", "vision"),
    },
    "cli": {
        *("bench", "checkpoint", "distributed", "environment", "errors", "export", "inference", "interrupt", "loggers"),
        *("metrics", "planner", "recipes", "report", "streams", "sweep", "trainer", "vision"),
    },
    "__main__": {"cli"},
}
THIRD_PARTY = {  # beside torch and the standard library; imported inside functions only
    "bench": {"hypnettorch", "matplotlib", "rich"},
    "checkpoint": {"safetensors"},
    "compat": {"avalanche", "hypnettorch", "numpy"},  # avalanche at the top of the module that subclasses its classes
    "kernels": {"triton"},  # at the top of its modules, which _backend alone imports, where Triton is installed
    "loggers": {"wandb"},
    "progress": {"rich"},
    "recipes": {"tomli"},  # before Python 3.11
    "report": {"matplotlib", "numpy"},
    "streams": {"PIL", "numpy", "sklearn"},
    "sweep": {"optuna", "ray"},
}
PUBLIC = {"__init__"}
SOURCES = sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")})  # a link, which rglob may not follow


def imports(path):
    """(module, is at the top of the file) for each import of a file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"fasthyper.{alias.name}" for alias in node.names] if node.module == "fasthyper" else [node.module]
        yield from ((name, id(node) in top) for name in names)


def module_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    import sys

    module = module_of(path)
    if module in PUBLIC:
        return
    for name, at_top in imports(path):
        first, *rest = name.split(".")
        if first == "fasthyper":
            if not rest:  # the public package, for a caller of it
                assert module == "cli", f"{module} imports the whole package"
                continue
            assert rest[0] == module or rest[0] in ALLOWED[module], f"{module} may not import fasthyper.{rest[0]}"
        elif first != "torch" and first not in sys.stdlib_module_names:
            assert first in THIRD_PARTY.get(module, set()), f"{module} may not import {first}"
            assert not at_top or module == "kernels", f"{module}: {first} must be imported where it is used"


def test_arrows_form_no_circle():
    seen = {}

    def visit(module, path):
        assert module not in path, f"circle: {' -> '.join([*path, module])}"
        if module not in seen:
            seen[module] = True
            for other in ALLOWED[module]:
                visit(other, [*path, module])

    for module in ALLOWED:
        visit(module, [])
    assert set(ALLOWED) == {module_of(path) for path in SOURCES} - PUBLIC


def test_kernels_use_the_stable_abi_only():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            for line in path.read_text().splitlines():
                if line.startswith(("#include <torch/", "#include <ATen", "#include <c10")):
                    assert line.startswith(("#include <torch/csrc/stable/", "#include <torch/headeronly/")) or (
                        line == "#include <torch/csrc/inductor/aoti_torch/c/shim.h>"
                    ), f"{path}: {line}"
