"""What the READMEs show runs as it stands."""

import re
from pathlib import Path

import pytest

from shared.serialize import read_json

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "shared/README.md"])
def test_the_snippet_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(compile(snippet, page, "exec"), names)
    if "run" in names:
        metrics = read_json(tmp_path / "runs/first/metrics.json")
        assert metrics["largest_neuron"] > 0
        assert metrics["largest_change"] > 0
    else:
        assert (names["changed_BTV"] - names["logits_BTV"]).abs().max() > 0
