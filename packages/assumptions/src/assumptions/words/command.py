"""`assumptions words`: what open-ended answers say, as tables on one page.

    assumptions words runs/mine/answers.jsonl --out words.html
    assumptions words runs/mine/answers.jsonl --against runs/general/answers.jsonl --out words.html

The page holds single words and word pairs with both shares, the contrast with the other file, and clusters.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from assumptions.instruments import instrument
from assumptions.records import final, read
from assumptions.words.clusters import Clustering, cluster
from assumptions.words.contrast import contrast
from assumptions.words.documents import Response, responses_of
from assumptions.words.ngrams import ngram_shares
from shared.commands import output_file
from shared.errors import UserError
from shared.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `assumptions words`."""
    parser.add_argument("answers", type=Path, help="answers.jsonl of an open-ended instrument")
    parser.add_argument("--against", type=Path, help="answers about another data set, for the contrast")
    parser.add_argument("--out", type=output_file, required=True, help="the page (HTML)")
    parser.add_argument("--clusters", type=int, help="number of clusters; chosen by silhouette without it")
    parser.add_argument("--top", type=int, default=30, help="rows a table")


def main(arguments: argparse.Namespace) -> int:
    """Write the page."""
    said = _responses(arguments.answers)
    others = _responses(arguments.against) if arguments.against is not None else []
    page = Report(f"Assumptions in {arguments.answers}")
    page.text(f"{len(said)} responses with {sum(len(one.assumptions) for one in said)} assumptions.")
    for n, title in ((1, "Words (stop words dropped)"), (2, "Word pairs (stop words kept)")):
        page.table([asdict(row) for row in ngram_shares(said, n, arguments.top)], title)
    if others:
        rows = contrast(said, others)
        marked = [asdict(row) for row in rows if row.marked]
        shown = (
            marked if len(marked) <= 2 * arguments.top else marked[: arguments.top] + marked[-arguments.top :]
        )
        page.table(
            shown,
            f"Log-odds against {arguments.against}: the {len(marked)} of {len(rows)} words whose interval leaves out "
            f"no difference; chance alone would mark about {0.05 * len(rows):.0f}",
        )
    found: Clustering = cluster([text for one in said for text in one.assumptions], arguments.clusters)
    page.table(
        [
            {"cluster": c.number, "assumptions": c.size, "share_of_assumptions": c.share}
            | {"words": ", ".join(c.words), "nearest": c.examples[0]}
            for c in found.clusters
        ],
        "Clusters",
    )
    page.write(arguments.out)
    print(f"{arguments.out}: {len(said)} responses, {len(found.clusters)} clusters")
    return 0


def _responses(path: Path) -> list[Response]:
    if not path.is_file():
        raise UserError(f"{path} is no file of answers: give the answers.jsonl of `assumptions elicit`")
    header, records = read(path)
    if "instrument" not in header:
        raise UserError(f"{path} is no file of answers: its first line names no instrument")
    name, _, version = str(header["instrument"]).rpartition("-v")
    asked = instrument(name)
    if version != str(asked.version):
        raise UserError(
            f"{path} was asked with {header['instrument']}, this code knows {asked.id}: ask again"
        )
    return responses_of(final(records), asked)
