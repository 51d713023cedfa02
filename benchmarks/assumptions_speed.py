"""Probes and elicitation at scale, each against its named baseline; the last line of output is one JSON object.

    python benchmarks/assumptions_speed.py
    python benchmarks/assumptions_speed.py --only ridge --ratio-rows 100000 --ratio-width 4096 --ratio-layers 32

Keys of that object: `ridge_over_sklearn_loop` (times faster, equal coefficients), `ridge_peak_gib` (peak resident
memory of a process that fits from disk), `vllm_over_hf` (elicited messages a second). A part is a module with
add_arguments, measure, table, CLAIM and KEYS.
"""

import argparse
import json
from typing import Any

import _assumptions_elicitation
import _assumptions_memory
import _assumptions_ridge
from _results import write_results

PARTS = {"ridge": _assumptions_ridge, "memory": _assumptions_memory, "elicitation": _assumptions_elicitation}


def main() -> None:
    """Measure the parts asked for, write each one's result, print the keys."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(PARTS), help="one part alone")
    for part in PARTS.values():
        part.add_arguments(parser)
    arguments = parser.parse_args()
    keys: dict[str, Any] = {}
    for name, part in PARTS.items():
        if arguments.only in (None, name):
            measured = part.measure(arguments)
            rows = part.table(measured, arguments)
            page = write_results(f"assumptions_{name}", part.CLAIM, rows, vars(arguments), measured)
            print(page.read_text())
            keys |= {key: measured[key] for key in part.KEYS}
    print(json.dumps(keys))


if __name__ == "__main__":
    main()
