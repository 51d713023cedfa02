"""Every subcommand of the three packages: what is wrong with a file is one line and status 2, before a model loads."""

import io
import json
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from shared import commands
from shared.errors import UserError, told

PACKAGES = ("preft", "circuits", "assumptions")


@dataclass(frozen=True)
class Use:
    """One way to call a subcommand: {in} and {out} stand for the file that is read and the place that is written."""

    words: str
    reads: str = ""  # what {in} is, of `WRONG`
    writes: str = ""  # what {out} is: file or folder
    suffix: str = ""  # of {out}
    leaves: str = ""  # a run folder, whose manifest tells the failure


USES = [
    Use("assumptions data syco_bench {in} --part delusion --out {tmp}/x.jsonl", reads="rows"),
    Use("assumptions data goal_switch --out {out}", writes="file"),
    Use("assumptions elicit --model tinyworld --engine hf --free --data {in} --out {tmp}/x", reads="rows"),
    Use(
        "assumptions elicit --server http://127.0.0.1:9/v1 --model x --data {in} --out {tmp}/x", reads="rows"
    ),
    Use("assumptions elicit --model tinyworld --engine hf --free --data {good} --out {out}", writes="folder"),
    Use("assumptions words {in} --out {tmp}/x.html", reads="answers"),
    Use("assumptions words {answers} --out {out}", writes="file"),
    Use("assumptions words {answers} --against {in} --out {tmp}/x.html", reads="answers"),
    Use(
        "assumptions goals --server http://127.0.0.1:9/v1 --model x --script {in} --out {tmp}/x", reads="rows"
    ),
    Use(
        "assumptions goals --server http://127.0.0.1:9/v1 --model x --pairs {in} --out {tmp}/x", reads="rows"
    ),
    Use("assumptions goals --server http://127.0.0.1:9/v1 --model x --out {out}", writes="folder"),
    Use(
        "assumptions transcripts --server http://127.0.0.1:9/v1 --model x --data {in} --out {tmp}/x",
        reads="rows",
    ),
    Use(
        "assumptions transcripts --server http://127.0.0.1:9/v1 --model x --data x --out {out}",
        writes="folder",
    ),
    Use("assumptions survey items {in} --participants 2 --out {tmp}/x.csv", reads="rows"),
    Use("assumptions survey items {good} --participants 2 --out {out}", writes="file"),
    Use("assumptions survey analyze {in} {good} --out {tmp}/x", reads="rows"),
    Use("assumptions survey analyze {good} {good} --out {out}", writes="folder"),
    Use("assumptions probe {in}", reads="study"),
    Use("assumptions steer {in}", reads="study"),
    Use("assumptions report {in}", reads="study"),
    Use("assumptions report {study} --out {out}", writes="file"),
    Use("assumptions monitor --port 0 --sessions {tmp}/x --study {in}", reads="study"),
    Use("assumptions monitor --port 0 --sessions {tmp}/x --model a/b --probes {in}", reads="folder"),
    Use("assumptions monitor --port 0 --sessions {tmp}/x --directions {in}", reads="folder"),
    Use("assumptions monitor --port 0 --sessions {out}", writes="folder"),
    Use("circuits trace --prompt x --supernodes {in} --out {tmp}/x", reads="json"),
    Use("circuits trace --prompt x --out {out}", writes="folder"),
    Use("circuits score --model tinyworld --prompts {in} --out {tmp}/x", reads="rows"),
    Use("circuits score --model tinyworld --prompts {good} --out {out}", writes="folder"),
    Use("circuits view {in}", reads="folder"),
    Use("circuits check {in}", reads="model"),
    Use("circuits plot {in} --out {tmp}/x.png", reads="folder"),
    Use("circuits plot {run} --out {out}", writes="file", suffix=".png"),
    Use("circuits export {in} --to csv --out {tmp}/x", reads="folder"),
    Use("preft adapter inspect {in}", reads="folder"),
    Use("preft adapter convert {in} {tmp}/x", reads="folder"),
    Use("preft adapter convert {study} {out}", writes="folder"),
    Use("preft train --model tinyworld --data {in} --out {tmp}/x", reads="rows"),
    Use("preft train --model tinyworld --data {chats} --heldout {in} --out {tmp}/x", reads="rows"),
    Use("preft train --model tinyworld --data {chats} --out {out}", writes="folder"),
    Use("preft train-many --model tinyworld --data {in} --out {tmp}/x", reads="rows"),
    Use("preft train-many --model tinyworld --data tinyworld:1 --out {out}", writes="folder"),
    Use(
        "preft rl --sampler hf --reward exact_match --data {in} --heldout-data {in} --out {tmp}/x",
        reads="rows",
        leaves="x",
    ),
    Use("preft rl --sampler hf --out {out}", writes="folder"),
    Use("preft serve tinyworld --port 0 --adapters {in}", reads="folder"),
    Use("preft serve tinyworld --port 0 --store {out}", writes="folder"),
]


def test_every_subcommand_is_used():
    known = {f"{name} {one}" for name in PACKAGES for one in import_module(f"{name}.cli").COMMANDS}
    assert {" ".join(use.words.split()[:2]) for use in USES} == known


LATIN = "text,prompt,response\ncaf\u00e9,b,c\n".encode("latin-1")
RAGGED = b"text,prompt,response\na,b,c\na,b\n"
WRONG = {  # what {in} may be -> name and content: bytes, None for a folder, "absent" for nothing
    "rows": [
        ("absent.csv", "absent"),
        ("folder", None),
        ("latin.csv", LATIN),
        ("latin.json", LATIN),
        ("ragged.csv", RAGGED),
        ("columns.csv", b"other\nx\n"),
        ("empty.csv", b""),
        ("half.jsonl", b'{"text": "a", "prompt": '),
        ("emoji.jsonl", b'{"text": "\\ud83d", "prompt": "a", "response": "b"}\n'),
        ("utf16.csv", "text\nx\n".encode("utf-16")),
        ("rows.parquet", b"PAR1"),
    ],
    "json": [("absent.json", "absent"), ("folder", None), ("half.json", b"{"), ("latin.json", LATIN)],
    "answers": [
        ("absent.jsonl", "absent"),
        ("folder", None),
        ("half.jsonl", b'{"instrument": \n'),
        ("latin.jsonl", LATIN),
        ("other.jsonl", b"{}\n"),
        ("empty.jsonl", b""),
    ],
    "study": [
        ("absent", "absent"),
        ("folder", None),
        ("file", b"x"),
        ("half/study.json", b"{"),
        ("latin/study.json", LATIN),
        ("list/study.json", b"[1]"),
        ("number/study.json", b"5"),
    ],
    "model": [("absent/model", "absent"), ("folder", None), ("file", b"x")],
    "folder": [("absent", "absent"), ("folder", None), ("file", b"x")],
}


@pytest.fixture
def place(tmp_path):
    """A folder with a good file of every kind that the commands read beside the wrong one."""
    (tmp_path / "good.csv").write_text("text\nhello\n")
    (tmp_path / "chats.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    models = [{"model_name": "a", "description": "b", "probability": 0.3}] * 3
    answer = {"id": "a", "sample": 0, "status": "clean", "scores": {}} | {
        "text": json.dumps({"mental_models": models})
    }
    (tmp_path / "answers.jsonl").write_text(f'{{"instrument": "openended-v1"}}\n{json.dumps(answer)}\n')
    for folder, file in (("study", "study.json"), ("run", "metrics.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text('{"model": {}, "settings": {}}')
    return tmp_path


@pytest.fixture
def no_model(monkeypatch):
    def refuse(*_):
        pytest.fail("a model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)


def fails(words, place, capsys):
    """Run a command that must fail; returns its one line."""
    names = {name: place / f"{name}.{kind}" for name, kind in (("good", "csv"), ("chats", "jsonl"))}
    names |= {
        "answers": place / "answers.jsonl",
        "study": place / "study",
        "run": place / "run",
        "tmp": place,
    }
    program, *arguments = words.format_map(names).split()
    assert import_module(f"{program}.cli").main(arguments) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith(f"{program}: ")
    assert len(told.splitlines()) == 1, told
    return told


@pytest.mark.parametrize("use", [use for use in USES if use.reads], ids=lambda use: use.words)
def test_a_wrong_file_is_one_line_that_names_it(use, place, capsys, no_model):
    (place / "in").mkdir()
    for name, content in WRONG[use.reads]:
        path = place / "in" / name
        path.parent.mkdir(exist_ok=True)
        if content is None:
            path.mkdir()
        elif content != "absent":
            path.write_bytes(content)
        given = path.parent if path.name == "study.json" else path
        before = {path.relative_to(place) for path in place.rglob("*")}
        assert str(given) in fails(use.words.replace("{in}", str(given)), place, capsys), name
        left = {path.relative_to(place) for path in place.rglob("*")} - before
        assert not left or {path.parts[0] for path in left} == {use.leaves}


@pytest.mark.parametrize("use", [use for use in USES if use.writes], ids=lambda use: use.words)
def test_what_cannot_be_written_is_told_before_any_work(use, place, capsys, no_model, monkeypatch):
    (place / "file").write_text("mine")
    (place / f"folder{use.suffix}").mkdir()
    outs = [place / f"folder{use.suffix}"] if use.writes == "file" else [place / "file"]
    outs += [place / "file" / f"below{use.suffix}", place / "file" / "far" / f"below{use.suffix}"]
    for out in outs:
        assert str(out) in fails(use.words.replace("{out}", str(out)), place, capsys)
    monkeypatch.setattr(os, "access", lambda *_: False)
    said = fails(use.words.replace("{out}", str(place / "new" / f"x{use.suffix}")), place, capsys)
    assert f"no permission in {place}" in said
    assert not (place / "new").exists()


class Command:
    """A module with one option, whose `main` does what it is told."""

    def __init__(self, does):
        self.main = does

    @staticmethod
    def add_arguments(parser):
        parser.add_argument("--file", type=Path)


def run(monkeypatch, does, *words):
    monkeypatch.setattr(commands, "import_module", lambda _: Command(does))
    return commands.run_command("prog", "what it does", {"do": ("nowhere", "does it")}, ["do", *words])


def test_a_file_that_the_system_refuses_is_one_line_and_a_defect_keeps_its_traceback(
    tmp_path, monkeypatch, capsys
):
    assert run(monkeypatch, lambda given: given.file.read_text() and 0, "--file", str(tmp_path / "no")) == 2
    assert capsys.readouterr().err.startswith(f"prog: {tmp_path / 'no'}: No such file or directory; give")
    full = OSError(28, "No space left on device")
    assert told(full) == "No space left on device; free some space"
    assert told(UserError("so")) == "so"
    for defect in (OSError("odd"), ConnectionResetError(104, "reset"), KeyError("x")):
        assert told(defect) is None

        def fails(_, defect=defect):
            raise defect

        with pytest.raises(type(defect)):
            run(monkeypatch, fails)


def test_an_interrupt_and_a_closed_pipe_end_without_a_traceback(monkeypatch, capsys, tmp_path):
    def interrupted(_):
        raise KeyboardInterrupt

    assert run(monkeypatch, interrupted) == commands.INTERRUPTED
    assert capsys.readouterr().err.strip() == "prog: interrupted"
    read, write = os.pipe()
    os.close(read)
    with io.TextIOWrapper(os.fdopen(write, "wb")) as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert run(monkeypatch, lambda _: print("much")) == 1
