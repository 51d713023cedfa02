"""`preft adapter inspect | convert | check`: look at adapter folders, turn one format into another, try one on a model.

`check` ends with status 1 where it found a fault; every error is one line.
"""

import argparse
import json
from dataclasses import asdict

import torch

from preft.adapter_config import AdapterError
from shared.commands import output_folder
from shared.tokens import Phase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three actions and their options."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    inspect = actions.add_parser(
        "inspect", help="what a folder holds: method, phase, ranks, modules, size, digest"
    )
    inspect.add_argument("folder")
    inspect.add_argument("--json", action="store_true", help="one JSON object in place of lines")
    inspect.set_defaults(action=_inspect)

    convert = actions.add_parser(
        "convert", help="peft <-> preft, pyreft -> preft, strict or not, another float type"
    )
    convert.add_argument("source")
    convert.add_argument("target", type=output_folder, help="a folder that is not there yet")
    convert.add_argument("--to", choices=("preft", "peft"), default="preft")
    convert.add_argument(
        "--phase", type=Phase, choices=list(Phase), help="for a peft folder, which states none"
    )
    convert.add_argument(
        "--positions", help="tokens that a pyreft checkpoint was trained to edit: prompt or all"
    )
    convert.add_argument("--model", help="base model of a pyreft checkpoint")
    convert.add_argument("--dtype", choices=list(DTYPES), default="float32")
    convert.add_argument(
        "--no-strict",
        action="store_true",
        help="peft's names even where other loaders would misread the adapter",
    )
    convert.set_defaults(action=_convert)

    check = actions.add_parser("check", help="does it fit a model, is it sound, would vLLM serve it")
    check.add_argument("folder")
    check.add_argument(
        "--model", required=True, help="tinyworld, random:FAMILY, a folder or a Hugging Face id"
    )
    check.add_argument("--json", action="store_true", help="one JSON object in place of lines")
    check.set_defaults(action=_check)


def main(arguments: argparse.Namespace) -> int:
    """Run the chosen action; returns the exit status."""
    return int(arguments.action(arguments))


def _inspect(arguments: argparse.Namespace) -> int:
    from preft.adapter_summary import summarise

    summary = summarise(arguments.folder)
    print(json.dumps(asdict(summary)) if arguments.json else "\n".join(summary.lines()))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from preft.convert import convert, convert_pyreft

    strict, dtype = not arguments.no_strict, DTYPES[arguments.dtype]
    source, target = arguments.source, arguments.target
    given = [name for name in ("model", "positions") if getattr(arguments, name)]
    if len(given) == 1:
        raise AdapterError(f"--{given[0]} is for a pyreft checkpoint, which needs --model and --positions")
    if given and (arguments.phase or arguments.to != "preft"):
        raise AdapterError("a pyreft checkpoint becomes a preft folder, whose phase follows from --positions")
    if given:
        from shared.models import load

        model, positions = load(arguments.model), arguments.positions
        folder = convert_pyreft(source, target, model, positions, strict=strict, dtype=dtype)
    else:
        folder = convert(source, target, arguments.to, phase=arguments.phase, strict=strict, dtype=dtype)
    print(f"wrote {folder}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from preft.adapter_check import check_folder
    from shared.models import load

    model = load(arguments.model)
    report = check_folder(arguments.folder, model.hf, model.fingerprint)
    if arguments.json:
        print(json.dumps(asdict(report) | {"ok": report.ok}))
    elif report.ok:
        print(
            f"ok: {arguments.folder} fits {arguments.model}; serve it with --max-lora-rank {report.max_lora_rank}"
        )
    else:
        print("\n".join(f"fault: {fault}" for fault in report.faults))
    return 0 if report.ok else 1
