"""What every test shares: shapes checked by beartype, one thread per worker, no network, warnings as errors."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# vLLM's n-gram speculation would raise OpenMP's count for good, and a server's process would take every core.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

# Before any of the packages is imported: their jaxtyping annotations are executed in tests, and only there.
install_import_hook(["shared", "preft", "circuits", "assumptions"], "beartype.beartype")

sys.path.insert(0, str(Path(__file__).parent))  # for browser.py; the import mode adds nothing

if TYPE_CHECKING:
    from browser import Browser


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Send tests that share a fixture of their module to one worker, so that it is made once."""
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("xdist_group") is None:
            fixtures = item._fixtureinfo.name2fixturedefs.values()
            if any(definitions[-1].scope == "module" for definitions in fixtures):
                item.add_marker(pytest.mark.xdist_group(item.module.__name__))


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    """A headless Chromium for pages and their scripts; tests that ask for it skip where none is installed."""
    from browser import Browser, find_chromium

    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium is installed")
    with Browser(executable) as running:
        yield running
