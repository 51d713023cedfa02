"""Freed memory stays with the process: a second round of the same blocks costs no page faults."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from shared.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(8 * 2**20) for _ in range(4)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_blocks_are_used_again() -> None:
    found = {
        how: int(subprocess.check_output([sys.executable, "-c", SCRIPT, how])) for how in ("give", "keep")
    }
    assert found["keep"] < 100 < found["give"]
