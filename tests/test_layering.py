"""The import arrows of the project, read from the sources and checked again in fresh processes.

    ppcompile  ->  passes  ->  runtime.ops, runtime.program  ->  torch
    ppcompile  ->  runtime

Imports inside functions count: laziness changes when an arrow is followed, not where it points.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"ppcompile": ROOT / "ppcompile", "ppcompile.passes": ROOT / "passes", "ppcompile.runtime": ROOT / "runtime"}
CONTRACTS = {"ppcompile.runtime.ops", "ppcompile.runtime.program"}
FAMILIES = ["ppcompile.passes.recognize", "ppcompile.runtime.attention", "ppcompile.runtime.epilogues"]


@dataclass(frozen=True)
class Import:
    """``importer`` imports ``target``, on ``line``; ``lazy`` inside a function."""

    importer: str
    target: str
    line: int
    lazy: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def modules() -> dict[str, Path]:
    """Every module of the three rooms by its installed name."""
    found = {}
    for room, folder in ROOMS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([room, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def resolve(importer: str, node: ast.ImportFrom) -> str:
    """Absolute name of the module that a ``from`` import names."""
    if not node.level:
        return node.module or ""
    is_package = MODULES[importer].name == "__init__.py"
    base = importer.split(".")
    base = base[: len(base) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def imports_below(importer: str, node: ast.AST, lazy: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(importer, alias.name, child.lineno, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            source = resolve(importer, child)
            for alias in child.names:
                submodule = f"{source}.{alias.name}"
                yield Import(importer, submodule if submodule in MODULES else source, child.lineno, lazy)
        else:
            yield from imports_below(importer, child, lazy or isinstance(child, (ast.FunctionDef, ast.Lambda)))


IMPORTS = [found for name, path in MODULES.items() for found in imports_below(name, ast.parse(path.read_text("utf-8")))]


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def room(name: str) -> str:
    """The room a module belongs to, ``"outside"`` for other people's modules."""
    owners = [candidate for candidate in ROOMS if inside(name, candidate)]
    return max(owners, key=len, default="outside")


def violations(importers: str, allowed) -> list[str]:
    """Imports by modules inside the package ``importers`` for which ``allowed(import)`` is false."""
    return [str(found) for found in IMPORTS if inside(found.importer, importers) and not allowed(found)]


def fresh(code: str, cwd: Path) -> set[str]:
    """Names of the modules that a fresh process has loaded after ``code``, started outside the checkout."""
    report = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def import_all(package: str) -> str:
    return "\n".join(f"import {name}" for name in sorted(MODULES) if inside(name, package))


def test_the_reader_sees_relative_absolute_and_lazy_imports():
    tree = ast.parse("from .program import PLAIN\nimport torch\ndef f():\n    from . import attention\n")
    found = {(item.target, item.lazy) for item in imports_below("ppcompile.runtime.ops", tree)}
    assert found == {
        ("ppcompile.runtime.program", False),
        ("torch", False),
        ("ppcompile.runtime.attention", True),
    }


def test_passes_import_only_the_contracts_of_the_runtime():
    allowed = {"outside", "ppcompile.passes"}
    assert not violations("ppcompile.passes", lambda it: room(it.target) in allowed or it.target in CONTRACTS)


def test_runtime_imports_only_itself():
    assert not violations("ppcompile.runtime", lambda it: room(it.target) in {"outside", "ppcompile.runtime"})


@pytest.mark.parametrize("contract", sorted(CONTRACTS))
def test_contracts_need_only_torch_when_imported(contract):
    def allowed(found: Import) -> bool:
        top = found.target.split(".")[0]
        return found.lazy or found.target in CONTRACTS or top == "torch" or top in sys.stdlib_module_names

    assert not violations(contract, allowed)


@pytest.mark.parametrize("family", FAMILIES)
def test_members_of_a_family_do_not_import_their_siblings(family):
    def allowed(found: Import) -> bool:
        return found.importer == family or not inside(found.target, family) or found.target == found.importer

    assert not violations(family, allowed)


def test_importing_ppcompile_loads_neither_torch_nor_transformers(tmp_path):
    loaded = fresh("import ppcompile", tmp_path)
    assert not loaded & {"torch", "transformers", "numpy", "matplotlib"}


def test_importing_the_contracts_loads_nothing_else_of_ours(tmp_path):
    loaded = fresh("\n".join(f"import {name}" for name in sorted(CONTRACTS)), tmp_path)
    assert {name for name in loaded if inside(name, "ppcompile")} == {"ppcompile", "ppcompile.runtime", *CONTRACTS}


def test_importing_the_runtime_loads_no_pass(tmp_path):
    loaded = fresh(import_all("ppcompile.runtime"), tmp_path)
    assert {room(name) for name in loaded if inside(name, "ppcompile") and name != "ppcompile"} == {"ppcompile.runtime"}


def test_importing_the_passes_loads_only_the_contracts_of_the_runtime(tmp_path):
    loaded = {name for name in fresh(import_all("ppcompile.passes"), tmp_path) if inside(name, "ppcompile")}
    others = {name for name in loaded if not inside(name, "ppcompile.passes")}
    assert others <= {"ppcompile", "ppcompile.runtime", *CONTRACTS}


@pytest.mark.parametrize("name", ["passes", "runtime"])
def test_no_room_is_installed_as_a_top_level_module(name, tmp_path):
    loaded = fresh(f"import importlib.util\nassert importlib.util.find_spec({name!r}) is None", tmp_path)
    assert name not in loaded


def test_every_package_of_the_checkout_is_shipped():
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(name for name, path in MODULES.items() if path.name == "__init__.py")
