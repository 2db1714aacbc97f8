"""The shape of the package: what it exports, and that imports go downward only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import imsm

SOURCE = Path(imsm.__file__).parent
#: Low to high. A module imports from lower rows, and from its own row only within its folder.
LAYERS = (
    {"clusters", "ends", "errors", "turns"},
    {
        "attention",
        "config",
        "fingerprint",
        "folders",
        "gates",
        "groups",
        "lock",
        "loss",
        "query",
        "relevance",
        "routing",
    },
    {"cache", "mixing", "names", "settings", "views"},
    {"shared"},
    {"streams"},
    {"decoding", "probe"},
    {"building"},
    {"tasks"},
    {"dispatch"},
    {"card"},
    {"checkpoint"},
    {"task_folders"},
    {"model"},
    {"data", "generation", "loramoe"},
    {"dates"},
    {"memory_bank", "packing", "samples"},
    {"dreams"},
    {"training"},
    {"evaluation"},
    {"reproduce"},
    {"cli"},
)


def layer_of(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


class Imports(ast.NodeVisitor):
    """Top-level names under `imsm` that a file imports at run time."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parts = (node.module or "").split(".")
        if parts[0] == "imsm":
            self.names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}


def imports(path: Path) -> set[str]:
    visitor = Imports()
    visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
    return visitor.names


def test_imports_go_downward() -> None:
    wrong = []
    for path in SOURCE.rglob("*.py"):
        module = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if module.startswith("__"):
            continue
        for name in imports(path):
            if name != module and layer_of(name) >= layer_of(module):
                wrong.append(f"{path.relative_to(SOURCE)} imports {name}")
    assert not wrong


def test_every_module_has_a_layer() -> None:
    modules = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in SOURCE.rglob("*.py")}
    assert {name for name in modules if not name.startswith("__")} == set().union(*LAYERS)


def test_no_module_is_too_long() -> None:
    long = {path.name: n for path in SOURCE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 500}
    assert not long


def test_nothing_but_its_dependencies_is_needed() -> None:
    extras = ("attr", "gguf", "liger_kernel", "lm_eval", "matplotlib", "sentencepiece", "sklearn", "trl")
    modules = [
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
        for path in SOURCE.rglob("*.py")
        if path.name not in ("__init__.py", "harness.py")
    ]
    program = (
        f"import importlib, sys\nsys.modules.update(dict.fromkeys({extras!r}))\n"
        f"for name in {modules!r}: importlib.import_module(name)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_exports() -> None:
    assert imsm.__all__ == sorted(imsm.__all__)
    assert len(imsm.__all__) <= 16
    for name in imsm.__all__:
        assert getattr(imsm, name) is not None
    for name in ("GATES", "SiameseConfig", "SiameseForCausalLM", "SiameseOutput", "TrainConfig", "train"):
        assert name in imsm.__all__
