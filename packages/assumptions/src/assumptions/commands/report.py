"""`assumptions report`: write a study's report anew from what its steps have left, and say where it is."""

import argparse
import shutil
import webbrowser
from pathlib import Path

from shared.commands import output_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `assumptions report`."""
    parser.add_argument("study", type=Path, help="folder of a study, however far it has come")
    parser.add_argument("--out", type=output_file, help="copy the page there; it needs no other file")
    parser.add_argument("--open", action="store_true", help="open it in the browser")


def main(arguments: argparse.Namespace) -> None:
    """Write the page."""
    from assumptions.commands.study import advance, load_study

    study = load_study(arguments.study)
    advance(arguments.study, study, study.last)
    page = arguments.study / "report.html"
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        page = Path(shutil.copyfile(page, arguments.out))
    print(page)
    if arguments.open:
        webbrowser.open(page.resolve().as_uri())
