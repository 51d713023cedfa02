"""The Python in docs/circuits.md runs as it stands, in order, on the embedded model."""

import re
from pathlib import Path

import pytest
import torch

from shared.tinyworld import MODEL_DIR

DOCS = Path(__file__).parents[2] / "docs" / "circuits.md"


@pytest.mark.skipif(not any(MODEL_DIR.glob("*.safetensors")), reason="TinyWorld is not trained yet")
def test_snippets_run_and_leave_no_autograd_graph(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    snippets = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) >= 3
    for snippet in snippets:
        exec(compile(snippet, str(DOCS), "exec"), names)
    tensors = {name: value for name, value in names.items() if isinstance(value, torch.Tensor)}
    assert {"logits", "scores"} <= set(tensors)
    assert not [name for name, tensor in tensors.items() if tensor.requires_grad]
    assert (tmp_path / "circuit.html").exists()
    assert len(capsys.readouterr().out.splitlines()) >= 2
