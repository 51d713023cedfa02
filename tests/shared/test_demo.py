"""The demo's bookkeeping: summary, missing figures, a pipeline that fails. Real pipelines run in tests/smoke."""

import copy
from pathlib import Path

import pytest

from shared import demo
from shared.serialize import read_json, write_json

KINDS = ("base", "lora", "lora_p", "reft_p")
SIZES = ("5", "10", "20", "50", "100", "200", "500", "1000")
DIMENSIONS = (
    "validation_seeking", "user_rightness", "user_information_advantage", "objectivity_seeking", "emotional_support",
    "social_companionship", "belonging_support", "information_guidance", "tangible_support",
)  # fmt: skip
ARMS = ("model", "ablated", "swapped", "random ablated", "random swapped")
# As wide as the real ones: two tasks, three estimators, eight sizes, nine dimensions, two directions with controls.
METRICS = {
    "adapter_serving": {
        "match_rate": 1.0,
        "requests_compared": 64,
        "heldout_loss": dict.fromkeys(KINDS, 0.2771234),
        "throughput": {kind: 2000.5 + i for i, kind in enumerate(KINDS)},
        "throughput_spread": {kind: [1.0, 2.0] for kind in KINDS},
    },
    "circuit_tracing": {
        "conservation_error": 1e-6,
        "faithfulness": {
            task: {name: {size: int(size) / 1234 for size in SIZES} for name in ("relp", "atp", "random")}
            for task in ("nounpp", "capitals")
        },
        "ablation": {
            task: {"neurons": 200} | {arm: {"accuracy": 0.578125, "logit_difference": 1.5} for arm in ARMS}
            for task in ("nounpp", "capitals")
        },
    },
    "assumption_probing": {
        "spearman": {name: 0.9 + i / 100 for i, name in enumerate(DIMENSIONS)},
        "probe": {name: {"r2": 0.5, "auroc": 0.9} for name in DIMENSIONS},
        "dose_response_rho": {
            "validation_seeking": 0.8123,
            "objectivity_seeking": -1.0,
            "validation_seeking_random0": None,
            "objectivity_seeking_random0": 0.5,
        },
        "dose_response_slope": {
            "validation_seeking": 0.25,
            "objectivity_seeking": -0.5,
            "validation_seeking_random0": 0.0,
            "objectivity_seeking_random0": -0.0625,
        },
    },
}


@pytest.fixture
def pipelines(tmp_path, monkeypatch):
    """Stand-ins for the three subprocesses: each writes its metrics, or fails as told."""
    failing: dict[str, int] = {}
    metrics = copy.deepcopy(METRICS)

    def status(command, log):
        settings = dict(argument.split("=", 1) for argument in command if "=" in argument)
        log.write(f"{settings['pipeline']} says so: {' '.join(command)}\n")
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


def test_near_ties_of_half_precision_are_shown_where_there_are_any(pipelines, capsys):
    pipelines[0]["adapter_serving"]["near_ties"] = {"requests": 3, "tolerance": 0.5}
    demo.main()
    assert "of them other only after a near tie 3" in " ".join(capsys.readouterr().out.split())
    pipelines[0]["adapter_serving"]["near_ties"]["requests"] = 0
    demo.main()
    assert "near tie" not in capsys.readouterr().out


def test_the_figures_of_real_size_fit_one_screen(pipelines, capsys):
    demo.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    cells = [text.split() for text in lines]
    for expected in (
        ["held-out", "loss,", "nats", "a", "token", *["0.277"] * 4],
        ["generated", "tokens", "a", "second", "2,000", "2,002", "2,002", "2,004"],
        ["conservation", "error", "of", "the", "attribution", "1e-06"],
        ["faithfulness", "by", "number", "of", "neurons", "5", "20", "200", "1000"],
        ["nounpp,", "relp", "0.00405", "0.0162", "0.162", "0.81"],
        ["capitals,", "random", "0.00405", "0.0162", "0.162", "0.81"],
        ["capitals", *["0.578"] * 4],
        ["worst", "validation_seeking", "0.9", "0.94"],
        ["validation_seeking", "0.812", "0.25", "0"],
        ["objectivity_seeking", "-1", "-0.5", "0.0625"],
        ["report", "runs/demo/circuit_tracing/report.html"],
    ):
        assert expected in cells
    assert "runs/demo/summary.json" in lines[-1]


@pytest.mark.parametrize("gpu", [False, True])
def test_on_a_gpu_the_adapters_are_served_in_16_bit_unless_the_user_says_otherwise(
    pipelines, monkeypatch, gpu
):
    """The last of two settings of a key holds, and the user's come last; the other parts stay in float32."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("sys.argv", ["demo", "model.dtype=float16"])
    demo.main()
    logs = {part.key: (demo.FOLDER / f"{part.pipeline}.log").read_text() for part in demo.PARTS}
    given = "model.dtype=bfloat16 " * gpu + "model.dtype=float16\n"
    assert logs["preft"].endswith(f"run.folder={demo.FOLDER / 'adapter_serving'} {given}")
    for key in ("circuits", "assumptions"):
        assert "bfloat16" not in logs[key]


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


def test_a_null_is_a_missing_figure(pipelines):
    pipelines[0]["assumption_probing"]["spearman"]["tangible_support"] = None
    pipelines[0]["circuit_tracing"]["conservation_error"] = None
    expected = "did not report circuits.conservation_error, assumptions.spearman.tangible_support$"
    with pytest.raises(SystemExit, match=expected):
        demo.main()


@pytest.mark.parametrize(
    ("pipeline", "metric", "value", "expected"),
    [
        ("adapter_serving", "match_rate", 0.984375, r"preft.match_rate is 0.984375, must lie in \[1, 1\]"),
        (
            "circuit_tracing",
            "conservation_error",
            2e-4,
            "circuits.conservation_error is 0.0002, must lie in .0, 0.0001",
        ),
    ],
)
def test_a_figure_outside_of_its_limit_fails_the_demo(pipelines, pipeline, metric, value, expected):
    pipelines[0][pipeline][metric] = value
    with pytest.raises(SystemExit, match=expected):
        demo.main()
    assert (demo.FOLDER / "summary.json").exists()


def test_nothing_of_a_former_demo_outlives_a_failure(pipelines):
    demo.main()
    pipelines[1]["adapter_serving"] = 1
    with pytest.raises(SystemExit, match="adapter_serving failed"):
        demo.main()
    left = {path.relative_to(demo.FOLDER).as_posix() for path in demo.FOLDER.rglob("*") if path.is_file()}
    assert left == {"adapter_serving.log", "adapter_serving/metrics.json"}
