"""Plain JSON values, and files that are whole or absent."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.serialize import atomic_path, plain, read_json, write_json
from shared.tokens import Phase


def test_plain_takes_the_values_of_an_experiment():
    values = {
        "np": np.float32(0.5),
        "array": np.arange(3),
        "tensor": torch.ones(2, 1),
        "nan": float("nan"),
        "inf": np.inf,
        "path": Path("a/b"),
        "enum": Phase.PREFILL,
        "set": {2, 1},
        3: True,
    }
    assert plain(values) == {
        "np": 0.5,
        "array": [0, 1, 2],
        "tensor": [[1.0], [1.0]],
        "nan": None,
        "inf": None,
        "path": "a/b",
        "enum": "prefill",
        "set": [1, 2],
        "3": True,
    }


def test_plain_refuses_what_json_cannot_say():
    with pytest.raises(TypeError, match="cannot write object"):
        plain({"x": object()})


def test_write_json_replaces_only_with_a_whole_file(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert json.loads(path.read_text()) == {"a": 1}


def test_atomic_path_leaves_nothing_behind_after_an_error(tmp_path):
    target = tmp_path / "x.txt"
    with pytest.raises(RuntimeError, match="half way"), atomic_path(target) as partial:
        partial.write_text("half")
        raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []


def test_atomic_path_replaces_a_folder(tmp_path):
    for content in ("old", "new"):
        with atomic_path(tmp_path / "adapter") as partial:
            partial.mkdir()
            (partial / content).write_text(content)
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["new"]
