"""Many prompts: batches equal single prompts, processes share them, a stopped run goes on; memory is stated first."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from circuits.attribution import Settings, attribute, pose
from circuits.batches import Share, read_scores, score_prompts
from circuits.cli import main
from circuits.frozen_attention import ROWS
from circuits.linearize import LinearizeError, linearize, observe
from circuits.memory import GIB, NotEnoughMemoryError, available_bytes, estimate, require_memory
from circuits.metric import token_logits
from circuits.rules import Rules
from circuits.selfcheck import check, check_block
from shared.errors import UserError
from shared.hooks import edit
from shared.interventions import Add
from shared.models import ModelConfig, load
from shared.tokens import pad

PROMPTS = ["one", "a longer prompt", "two", "the longest prompt of all", "six"]


def metric_of(rows):
    return lambda logits, at: token_logits(logits, at, [[3 + row, 9] for row in rows])


def run(folder, model, **options):
    options = {"batch_size": 2} | options
    return score_prompts(folder, model, PROMPTS, metric_of, "two logits", **options)


def test_batches_equal_single_prompts(llama, tmp_path, relative):
    found = read_scores(run(tmp_path, llama))
    assert [one.prompt for one in found] == list(range(len(PROMPTS)))
    for one, prompt in zip(found, PROMPTS, strict=True):
        problem = pose(llama, llama.encode([prompt]), metric_of([one.prompt]))
        assert relative(one.scores_KLTN, attribute(problem, "relp")[0]) < 1e-10
        torch.testing.assert_close(one.value_K, problem.metric.value(problem.network.logits_BTV)[0])
        assert one.conservation_error < 1e-10


def test_processes_share_the_batches(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run(tmp_path, llama)
    assert [path.name for path in sorted(tmp_path.glob("*.safetensors"))] == ["scores-00001.safetensors"]
    with pytest.raises(UserError, match=r"\[0, 2\] of 3"):
        read_scores(tmp_path)
    run(tmp_path, llama, share=Share(0, 2))
    assert len(read_scores(tmp_path)) == 5
    with pytest.raises(UserError, match="rank 2"):
        Share(2, 2)


def test_two_processes_fill_one_folder(tmp_path):
    """Two real processes at once, each with its share; the whole equals one process's."""
    rows = "\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS)
    (tmp_path / "prompts.jsonl").write_text(rows)
    command = [sys.executable, "-m", "circuits", "score", "--model", "random:llama", "--prompts"]
    command += [str(tmp_path / "prompts.jsonl"), "--batch-size", "2", "--top-k", "3"]
    both = [
        subprocess.Popen(
            [*command, "--out", str(tmp_path / "both"), "--share", f"{rank}/2"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert any("5 prompts" in text for text in said)  # the last to finish
    assert main([*command[3:], "--out", str(tmp_path / "one"), "--share", "0/1"]) == 0
    for one, other in zip(read_scores(tmp_path / "both"), read_scores(tmp_path / "one"), strict=True):
        assert one.prompt == other.prompt
        torch.testing.assert_close(one.scores_KLTN, other.scores_KLTN, rtol=1e-5, atol=1e-6)


def test_the_command_names_the_neurons_that_act_most(tmp_path, capsys):
    """By their expert where there are experts; shares are means over prompts, not over files."""
    prompts = ["abc", "a longer prompt", "def"]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": one}) for one in prompts))
    arguments = [
        "--model",
        "random:qwen2_moe",
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
        "--batch-size",
        "2",
    ]
    assert main(["score", *arguments, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    sizes_BLN = torch.stack([one.scores_KLTN.abs().sum((0, 2)) for one in read_scores(tmp_path / "out")])
    share_BLN = sizes_BLN / sizes_BLN.sum((1, 2), keepdim=True)
    top_LN = share_BLN.mean(0)
    layer, neuron = divmod(int(top_LN.argmax()), top_LN.shape[1])
    name = load(ModelConfig("random:qwen2_moe")).architecture.neuron_name(layer, neuron)
    often = int((share_BLN[:, layer, neuron] >= 0.005).sum())
    line = said.splitlines()[2].split()
    assert line == [f"L{layer}/{name}", f"{float(top_LN.max()):.2%}", str(often), "of", "3"]
    assert "/E" in said


@pytest.mark.parametrize("share", ["2", "a/2", "2/2", "-1/2"])
def test_a_share_that_is_none_is_refused_before_the_model(tmp_path, share, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n')
    arguments = ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out")]
    assert main(["score", *arguments, "--model", "/nowhere", f"--share={share}"]) == 2
    assert "rank 2" in (text := capsys.readouterr().err) or "I/N" in text


def test_a_stopped_run_does_what_is_missing(llama, tmp_path, monkeypatch):
    seen = []
    settings = Settings(progress=lambda items, label: (seen.append(len(items)), items)[1])
    run(tmp_path, llama, settings=settings)
    (tmp_path / "scores-00001.safetensors").unlink()
    before = (tmp_path / "scores-00000.safetensors").stat().st_mtime_ns
    run(tmp_path, llama, settings=settings)
    assert seen == [3, 1]
    assert (tmp_path / "scores-00000.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another estimator"):
        run(tmp_path, llama, estimator="atp")
    with pytest.raises(UserError, match=r"no scores\.json"):
        read_scores(tmp_path / "elsewhere")


def test_memory_is_stated_and_refused_before_the_run(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(type(llama), "__call__", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(
        NotEnoughMemoryError, match=r"2 prompts of \d+ tokens \(targets: 2\) takes about .* GiB"
    ):
        run(tmp_path, llama, memory_limit=1000)
    wanted = require_memory(llama, llama.encode(["one"]))
    assert wanted.total < available_bytes(llama.device)
    with pytest.raises(NotEnoughMemoryError, match="gradients"):
        require_memory(llama, llama.encode(["one"]), wanted.total, "atp")
    with pytest.raises(NotEnoughMemoryError, match="targets: 20"):
        require_memory(llama, llama.encode(["one"]), wanted.total, n_targets=20)


def test_memory_grows_with_tokens_not_with_their_square(llama):
    short, long = estimate(llama, 1, 1024), estimate(llama, 1, 4096)
    assert long.total < 4.1 * short.total
    assert long.patterns == 4 * short.patterns == 4096 * ROWS * 4 * 3 * 8
    assert estimate(llama, 1, 1024, estimator="atp").gradients > short.sites
    assert estimate(llama, 8, 1024).total == 8 * short.total
    assert "scores" in str(short)
    assert short.total / GIB < 1


def test_self_check_tells_the_conservation_error(any_model):
    found = check(any_model)
    assert found.family == any_model.architecture.family
    assert 0 <= found.conservation_error < 1e-10 < found.allowed


def test_self_check_refuses_a_model_that_computes_something_else(llama):
    vector = torch.ones(llama.architecture.n_neurons, dtype=torch.float64)
    with edit(llama, Add("blocks.2.neurons", vector)), pytest.raises(UserError, match=r"blocks\.2\.neurons"):
        check(llama)


def test_long_prompts_are_checked_at_their_far_end(llama):
    """Spot checks reach the last columns: a pattern that is wrong beyond the window of the others is found."""
    ids = torch.randint(5, 200, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = pad([ids], [300], 0)
    network, acts = linearize(llama, batch), observe(llama, batch).acts
    block = network.blocks[1]
    check_block(block, acts, 1, Rules(), 1e-9)
    windowed = replace(block, attention=replace(block.attention, window=200))
    with pytest.raises(LinearizeError, match=r"blocks\.1\.attn_out"):
        check_block(windowed, acts, 1, Rules(), 1e-9)
