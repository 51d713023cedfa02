"""House rules that a reader relies on: plain text, documented modules, small files, no pickle, no machine's paths."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = {
    ".py",
    ".md",
    ".toml",
    ".yaml",
    ".yml",
    ".in",
    ".txt",
    ".cff",
    ".j2",
    ".html",
    ".css",
    ".js",
    ".json",
    "",
}


def tracked(*suffixes: str) -> list[Path]:
    """The repository's files with one of the suffixes; those git tracks, or all in an exported copy."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.suffix in suffixes and path.is_file()]


def named(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def sources() -> list[Path]:
    return [path for path in tracked(".py") if "src" in path.relative_to(ROOT).parts]


def test_text_is_ascii():
    licences = {"LICENSE"}
    wrong = [path for path in tracked(*TEXT) if path.name not in licences and not path.read_bytes().isascii()]
    # A tokenizer's vocabulary writes bytes as it must.
    assert not [name for name in named(wrong) if not name.endswith(("tokenizer.json", "vocab.json"))]


def test_every_module_says_what_it_is():
    silent = [
        path for path in sources() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not named(silent)


def test_no_source_file_is_over_four_hundred_lines():
    long = [path for path in sources() if len(path.read_text(encoding="utf-8").splitlines()) > 400]
    assert not named(long)


def test_nothing_is_pickled():
    """JSON, JSONL and safetensors only: no pickle module, no torch.save or torch.load.

    One file reads the .bin files of other programs (peft, pyreft), and takes tensors only out of them.
    """
    pattern = re.compile(
        r"^\s*(import|from) (pickle|dill|cloudpickle|joblib)\b|torch\.(save|load)\(", re.MULTILINE
    )
    foreign = ROOT / "packages/preft/src/preft/adapter_files.py"
    found = [path for path in sources() if pattern.search(path.read_text(encoding="utf-8"))]
    assert named(found) == named([foreign])
    reader = foreign.read_text(encoding="utf-8")
    assert "torch.save(" not in reader
    loads = re.findall(r"torch\.load\([^)]*\)", reader)
    assert loads
    assert all("weights_only=True" in load for load in loads)


def test_no_path_of_a_machine_is_written_down():
    pattern = re.compile(r"(?<![\w.$}])/(home|root|Users|work)/\w")
    found = [
        path for path in tracked(*TEXT) if pattern.search(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert not [name for name in named(found) if name != "tests/architecture/test_house.py"]


def test_every_relative_link_of_the_documentation_leads_somewhere():
    link = re.compile(r"\]\(\s*([^)\s#]+)[^)]*\)")
    pages = [
        ROOT / "README.md",
        ROOT / "ARCHITECTURE.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "shared/README.md",
    ]
    pages += [*ROOT.glob("docs/*.md"), *ROOT.glob("packages/*/README.md")]
    found = [(page, target) for page in pages for target in link.findall(page.read_text(encoding="utf-8"))]
    relative = [(page, target) for page, target in found if "://" not in target]
    assert len(relative) > 15, "the links are not recognised"
    broken = [(page, target) for page, target in relative if not (page.parent / target).exists()]
    names = {f"{page.relative_to(ROOT).as_posix()}: {target}" for page, target in broken}
    assert not names


def test_the_documentations_index_names_every_page():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"}
    assert not [page for page in sorted(pages) if f"({page})" not in index]


@pytest.mark.xdist_group("kept")
def test_groups_of_tests_reach_the_workers(request):
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("runs without --dist loadgroup")
    assert request.node.nodeid.endswith("@kept"), "this pytest-xdist cannot group tests under this pytest"
