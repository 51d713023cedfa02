"""The demo's bookkeeping: summary, missing figures, a pipeline that fails. Real pipelines run in tests/smoke."""

from pathlib import Path

import pytest

from shared import demo
from shared.serialize import read_json, write_json

METRICS = {
    "adapter_serving": {
        "match_rate": 1.0,
        "heldout_loss": {"base": 2.0},
        "throughput": {"base": 1.0, "lora": 2.0, "lora_p": 3.0, "reft_p": 4.0},
    },
    "circuit_tracing": {"conservation_error": 1e-6, "faithfulness": {"nounpp": {"relp": {"50": 0.9}}}},
    "assumption_probing": {"spearman": {"validation_seeking": 0.9}, "dose_response_rho": {"x": 0.8}},
}


@pytest.fixture
def pipelines(tmp_path, monkeypatch):
    """Stand-ins for the three subprocesses: each writes its metrics, or fails as told."""
    failing: dict[str, int] = {}
    metrics = dict(METRICS)

    def status(command, log):
        settings = dict(argument.split("=", 1) for argument in command if "=" in argument)
        log.write(f"{settings['pipeline']} says so\n")
        write_json(Path(settings["run.folder"]) / "metrics.json", metrics[settings["pipeline"]])
        return failing.get(settings["pipeline"], 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_status", status)
    monkeypatch.setattr("sys.argv", ["demo"])
    return metrics, failing


def test_the_summary_holds_every_figure(pipelines, capsys):
    demo.main()
    summary = read_json(demo.FOLDER / "summary.json")
    assert summary["preft"] == METRICS["adapter_serving"]
    assert summary["circuits"]["conservation_error"] == 1e-6
    assert summary["assumptions"]["spearman"]["validation_seeking"] == 0.9
    assert summary["seconds"] >= 0
    screen = capsys.readouterr().out
    for expected in ("lora_p 3", "1e-06", "validation_seeking 0.9", "report.html", "summary.json"):
        assert expected in screen
    assert len(screen.splitlines()) <= 50, "one screen"


def test_a_failing_pipeline_ends_the_demo_with_its_log(pipelines, capsys):
    pipelines[1]["circuit_tracing"] = 3
    with pytest.raises(SystemExit, match="circuit_tracing failed with exit status 3"):
        demo.main()
    assert "circuit_tracing says so" in capsys.readouterr().out
    assert not (demo.FOLDER / "summary.json").exists()


def test_a_missing_figure_is_named(pipelines):
    pipelines[0]["adapter_serving"] = {"match_rate": 1.0, "throughput": {"base": 1.0}}
    with pytest.raises(SystemExit, match="did not report preft.throughput.lora, preft.throughput.lora_p"):
        demo.main()
