"""Every configuration composes into its dataclasses, and a wrong one is one line that names the key."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext

from shared.config import ConfigError
from shared.run import configuration_folder, pipelines, register_defaults, typed

CONF = Path(__file__).parents[2] / "conf"
NAMES = {
    "preft": "adapter_serving",
    "quality": "adapter_quality",
    "rl": "adapter_rl",
    "parity": "adapter_parity",
    "circuits": "circuit_tracing",
    "assumptions": "assumption_probing",
}
LAUNCHERS = {
    "basic": "BasicLauncher",
    "joblib": "JoblibLauncher",
    "local": "JoblibLauncher",
    "submitit_local": "LocalLauncher",
    "submitit_slurm": "SlurmLauncher",
    "slurm": "SlurmLauncher",
    "ray": "RayLauncher",
    "ray_cluster": "RayLauncher",
}


def options(group):
    folder = CONF / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def hydra():
    register_defaults()
    with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


def composed(*overrides, **options):
    return compose("config", list(overrides), **options)


def test_the_pipelines_are_installed():
    assert set(NAMES.values()) <= set(pipelines())
    assert set(options("pipeline")) == set(pipelines())


@pytest.mark.parametrize("name", options("pipeline"))
def test_a_pipelines_defaults_are_those_of_its_dataclass(name):
    job = typed(composed(f"pipeline={name}"))
    assert job.settings == pipelines()[name].config_class()
    assert job.model.name == "tinyworld"


@pytest.mark.parametrize("name", options("model"))
def test_every_model_composes(name):
    given = ["model.name=somewhere"] if name == "local" else []
    job = typed(composed("pipeline=circuit_tracing", f"model={name}", *given))
    assert job.model.name


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes_and_chooses_its_pipeline(name):
    job = typed(composed(f"experiment={name}"))
    assert job.pipeline.name == NAMES[name.partition("/")[0]]
    assert job.settings != job.pipeline.config_class(), "an experiment that changes nothing"


def test_every_pipeline_has_a_smoke_experiment():
    assert {f"{package}/smoke" for package in NAMES} <= set(options("experiment"))


@pytest.mark.parametrize("name", sorted({*LAUNCHERS, *options("hydra/launcher")}))
def test_every_launcher_is_built(name):
    config = composed("pipeline=circuit_tracing", f"hydra/launcher={name}", return_hydra_config=True)
    config.hydra.sweep.dir = "runs/sweep/x"
    context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=context, task_function=typed, config=config
    )
    assert type(launcher).__name__ == LAUNCHERS[name]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["pipeline=circuit_tracing", "pipeline.taks=[simple]"],
            r"'pipeline.taks' \(did you mean 'tasks'\?\)",
        ),
        (
            ["pipeline=circuit_tracing", "pipeline.ablate=many"],
            "'pipeline.ablate' must be int, got str 'many'",
        ),
        (["pipeline=adapter_serving", "model.nam=x"], r"'model.nam' \(did you mean 'name'\?\)"),
        (["pipeline=adapter_serving", "model=local"], r"'model.name' is not set: give model.name="),
        (["pipeline=adapter_serving", "+run.sede=1"], r"'run.sede' \(did you mean 'seed'\?\)"),
        (
            ["pipeline=adapter_serving", "+seed=3"],
            r"'seed' \(did you mean 'run.seed'\?\); allowed: hydra, model, pipe",
        ),
        (["pipeline=adapter_serving", "+runs.seed=3"], r"'runs' \(did you mean 'run'\?\); allowed"),
    ],
)
def test_a_wrong_key_or_value_is_named(overrides, expected):
    with pytest.raises(ConfigError, match=expected):
        typed(composed(*overrides))


def test_a_stray_key_of_an_experiment_is_named(tmp_path):
    """An experiment is merged at the top: `seed: 1` in it would change nothing."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/stray.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /pipeline: circuit_tracing\nseed: 1\n", encoding="utf-8"
    )
    search = f"hydra.searchpath=[file://{tmp_path}]"
    with pytest.raises(ConfigError, match=r"'seed' \(did you mean 'run.seed'\?\); allowed: hydra, model"):
        typed(composed("experiment=stray", search))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["pipeline=adapter_serving", "pipeline.train.stepz=2"],
            "'pipeline.train.stepz' (did you mean 'steps'?)",
        ),
        (["pipeline=nope"], "adapter_serving"),
    ],
)
def test_a_users_error_is_one_line_and_exit_status_two(arguments, expected, tmp_path):
    command = [sys.executable, "-m", "shared.run", *arguments, f"run.folder={tmp_path / 'run'}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
