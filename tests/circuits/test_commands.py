"""The `circuits` command: what it writes, and one clear line with status 2 for what it cannot do."""

import json
import subprocess
import sys

import pytest

from circuits.cli import COMMANDS, main
from circuits.folder import open_folder
from circuits.graph import ATTN_BIAS, EMBEDDING, NEURON
from shared.serialize import plain

MODEL = "random:qwen2"


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    out = tmp_path_factory.mktemp("traced") / "graph"
    command = ["trace", "--model", MODEL, "--prompt", "one two", "--top-k", "2", "--max-nodes", "15"]
    assert main([*command, "--out", str(out)]) == 0
    return out


def test_trace_writes_graph_page_and_effects(traced, capsys, tmp_path):
    content = open_folder(traced)
    assert len(content.graph.neurons()) == 15
    kinds = [int(content.graph.kind_n[row["nodes"]][0]) for row in content.effects]
    assert kinds.count(NEURON) == 15
    assert {EMBEDDING, ATTN_BIAS} <= set(kinds)
    assert (traced / "index.html").read_text().startswith("<!doctype html>")
    supernodes = {
        "supernodes": [{"label": "two", "nodes": [[*place, 0] for place in content.graph.strongest(2)]}]
    }
    path = tmp_path / "supernodes.json"
    path.write_text(json.dumps(supernodes))
    again = ["trace", "--model", MODEL, "--prompt", "one two", "--top-k", "2", "--max-nodes", "15"]
    assert main([*again, "--supernodes", str(path), "--out", str(traced)]) == 0
    printed = capsys.readouterr().out
    assert content.graph.label(content.graph.strongest_numbers(1)[0]) in printed
    assert f"page: {traced / 'index.html'}" in printed
    assert "demeaned logit" in printed
    content = open_folder(traced)
    assert plain(content.supernodes.supernodes) == supernodes["supernodes"]
    assert sorted(content.effects[-1]["nodes"]) == sorted(content.graph.strongest_numbers(2))


def test_export_writes_the_format(traced, tmp_path, capsys):
    from jsonschema import validate

    from circuits.export import SCHEMA

    out = tmp_path / "graph.json"
    content = open_folder(traced)
    (layer, position, neuron), *_ = content.graph.strongest(1)
    rows = [
        {"label": "mine", "nodes": [[layer, position, neuron, 0]]},
        {"label": "none", "nodes": [[0, 99, 0, 0]]},
    ]
    (traced / "supernodes.json").write_text(json.dumps({"supernodes": rows}))
    assert main(["export", str(traced), "--to", "neuronpedia", "--out", str(out)]) == 0
    exported = json.loads(out.read_text())
    validate(exported, SCHEMA)
    assert exported["qParams"]["supernodes"] == [["mine", f"{layer}_{neuron}_{position}"]]
    assert capsys.readouterr().out.strip() == str(out)


def test_check_tells_the_conservation_error(capsys):
    assert main(["check", MODEL, "--dtype", "float64"]) == 0
    told = capsys.readouterr().out
    assert "qwen2 in float64" in told
    assert float(told.split("conserved to ")[1].split()[0]) < 1e-9


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["trace", "--prompt", " ", "--out", "{new}"], "--prompt is empty"),
        (["trace", "--prompt", "x", "--answer", "a", "--out", "{new}"], "both --answer and --wrong"),
        (["trace", "--prompt", "x", "--top-k", "0", "--out", "{new}"], "--top-k must be at least 1"),
        (["trace", "--prompt", "x", "--threshold", "-1", "--out", "{new}"], "--threshold must not"),
        (["trace", "--prompt", "x", "--supernodes", "{new}", "--out", "{new}"], "no such file"),
        (["trace", "--prompt", "x", "--out", "{full}"], "something other than a graph"),
        (["trace", "--model", "random:nothing", "--prompt", "x", "--out", "{new}"], "nothing"),
        (["trace", "--model", "{new}/absent", "--prompt", "x", "--out", "{new}"], "absent"),
        (["export", "{new}", "--to", "neuronpedia", "--out", "{new}/x"], "holds no graph"),
        (["export", "{full}", "--to", "neuronpedia", "--out", "{full}"], "is a folder"),
        (["check", "{new}/absent"], "absent"),
        (["view", "{new}"], "is no folder"),
        (["view", "{full}"], "holds no graph"),
    ],
)
def test_bad_input_is_one_line_and_status_two(arguments, reason, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "letter.txt").write_text("mine")
    given = [text.format(new=tmp_path / "new", full=full) for text in arguments]
    assert main(given) == 2
    told = capsys.readouterr().err.strip()
    assert reason in told
    assert told.startswith("circuits: ")
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_help_names_every_command_and_costs_nothing():
    script = (
        "import sys; from circuits.cli import main; status = main([]); "
        "assert not {'torch', 'fastapi', 'transformers'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert all(name in done.stdout for name in COMMANDS)
