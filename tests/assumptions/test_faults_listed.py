"""The table of faults in docs/assumptions.md: every fault stands there, and every test that it names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rows():
    """Fault and named tests (file, name) of every row of the table."""
    text = (ROOT / "docs" / "assumptions.md").read_text()
    table = text.split("| fault or lesson | test |\n|---|---|\n", 1)[1].split("\n\n", 1)[0]
    for line in table.splitlines():
        _, fault, tests, _ = line.split("|")
        file, found = "", []
        for entry in re.findall(r"`([^`]+)`", tests):
            named, _, name = entry.rpartition(": ")
            file = named or file
            found.append((file, name))
        yield fault.strip(), found


def test_every_fault_has_a_test_that_exists():
    faults = dict(rows())
    assert [name.split()[0] for name in faults][:31] == [f"T{number}" for number in range(1, 32)]
    assert len(faults) == 31 + 11
    for fault, tests in faults.items():
        assert tests, fault
        for file, name in tests:
            source = (ROOT / "tests" / "assumptions" / file).read_text()
            kind = "class" if name.startswith("Test") else "def"
            assert re.search(rf"^ *{kind} {name}\b", source, re.MULTILINE), f"{fault}: {file} has no {name}"
