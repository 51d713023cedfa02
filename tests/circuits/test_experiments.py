"""Every paper experiment by name, on a tiny random model whose tokenizer has the words of the experiment's tasks."""

import random
from itertools import islice
from pathlib import Path

import pytest

from circuits.pipeline import PIPELINE
from circuits.tasks import find_task
from shared.config import to_dataclass
from shared.models import ModelConfig
from shared.random_models import randomise, tiny_config
from shared.runs import start_run

CONF = Path(__file__).parents[2] / "conf" / "experiment" / "circuits"
NAMES = ("sva", "capitals", "addition", "antonyms", "users", "users_infobox", "ioi", "greater_than")
SMALL = {
    "train_pairs": 6, "test_pairs": 4, "sizes": [5], "ablate": 5, "max_nodes": 10, "max_edges": 20, "contexts": 4,
    "edge_pairs": 2, "examples": 1, "supernodes": [], "steps": 0,
}  # fmt: skip


def settings(name):
    import yaml

    return yaml.safe_load((CONF / f"circuits_{name}.yaml").read_text(encoding="utf-8"))["pipeline"]


def saved_model(folder, tokenizer):
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_config(tiny_config("llama", tokenizer))
    randomise(hf, 0)
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig(str(folder))


def texts_of(tasks):
    rng = random.Random(0)
    for task in tasks:
        for part in ("train", "test"):
            for item in islice(find_task(task).candidates(part, rng), 300):
                for form in item.forms:
                    yield from (form.clean + form.answer, form.corrupt + form.wrong)


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_runs_on_a_small_model(name, tmp_path, word_tokenizer):
    given = settings(name)
    sizes = {"edge_sizes": [3]} if given.get("edge_sizes") else {}
    config = to_dataclass(PIPELINE.config_class, given | SMALL | sizes | {"tasks": given["tasks"][:1]})
    tokenizer = word_tokenizer(list(texts_of(config.tasks)), 1)
    tokenizer.add_special_tokens({"bos_token": "<eos>"})
    if config.style == "chat":
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = saved_model(tmp_path / "model", tokenizer)
    with start_run(tmp_path / "run", config) as run:
        metrics = PIPELINE.run(config, model, run)
    (task,) = metrics["faithfulness_5"]
    assert task == config.tasks[0]
    assert metrics["pairs"][task]["train"] == 6
    assert metrics["conservation_error"] < 1e-4
    assert ("edge_faithfulness" in metrics) == bool(sizes)
    assert ("hypotheses" in metrics) == ("hypotheses" in given)


def test_there_is_one_experiment_for_each_study_of_the_paper():
    assert {path.stem for path in CONF.glob("circuits_*.yaml")} == {f"circuits_{name}" for name in NAMES}
