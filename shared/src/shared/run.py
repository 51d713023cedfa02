"""The command line: Hydra composes conf/ into one pipeline's dataclass, and the pipeline runs in its folder.

    python -m shared.run pipeline=circuit_tracing model=tinyworld run.folder=runs/mine
    python -m shared.run experiment=circuits/smoke
    python -m shared.run -m pipeline=circuit_tracing run.seed=0,1 hydra/launcher=joblib

This is the only module that knows Hydra. The defaults of a pipeline are those of its dataclass; `--cfg job` prints all.
What is the user's to mend (shared.errors.told, or a configuration that does not compose) is one line and status 2.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from shared.allocator import keep_freed_memory
from shared.config import ConfigError, to_dataclass, unknown_key
from shared.errors import UserError, told
from shared.models import ModelConfig
from shared.runs import Pipeline, start_run
from shared.serialize import plain

GROUP = "innerworks.pipelines"
PARTS = ("pipeline", "model", "run", "sweep", "hydra")  # the top of a composed configuration


@dataclass
class RunConfig:
    """Where a run writes, its seed, and whether it continues what the folder holds."""

    folder: str
    seed: int = 0
    resume: bool = True


def pipelines() -> dict[str, Pipeline]:
    """Every installed pipeline by name."""
    found = (entry.load() for entry in metadata.entry_points(group=GROUP))
    return {pipeline.name: pipeline for pipeline in found}


def configuration_folder() -> Path:
    """The folder conf/: INNERWORKS_CONF, or that of the checkout."""
    folder = Path(os.environ.get("INNERWORKS_CONF", Path(__file__).parents[3] / "conf"))
    if not (folder / "config.yaml").exists():
        raise UserError(
            f"no configuration in {folder}: run from a checkout, or set INNERWORKS_CONF to its conf/"
        )
    return folder.resolve()


def register_defaults() -> None:
    """Offer each dataclass's defaults to conf/ as `defaults/pipeline/NAME` and `defaults/model`.

    They accept any key (struct off), so that a wrong one reaches `to_dataclass`, whose error lists the right ones.
    """
    store = ConfigStore.instance()
    for name, pipeline in pipelines().items():
        _store(store, "defaults/pipeline", name, plain(pipeline.config_class()))
    _store(store, "defaults", "model", plain(ModelConfig()))


def _store(store: ConfigStore, group: str, name: str, values: dict[str, Any]) -> None:
    store.store(group=group, name=name, node=OmegaConf.create(values, flags={"struct": False}))


def task(config: DictConfig) -> None:
    """`execute`, for Hydra: in a sweep its launcher reports the error, which belongs to one job of many."""
    try:
        execute(config)
    except (UserError, OSError) as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        _fail(error)


class Job(NamedTuple):
    """A composed configuration as typed values."""

    pipeline: Pipeline
    settings: Any
    model: ModelConfig
    run: RunConfig


def typed(config: DictConfig) -> Job:
    """The composed configuration as dataclasses; raises UserError naming a key that does not fit."""
    values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    check_parts(values)
    pipeline = _chosen(values["pipeline"].pop("name"))
    settings: Any = to_dataclass(pipeline.config_class, values["pipeline"], where="pipeline")
    model = to_dataclass(ModelConfig, values["model"], where="model")
    return Job(pipeline, settings, model, to_dataclass(RunConfig, values["run"], where="run"))


def check_parts(values: Mapping[str, Any]) -> None:
    """Refuse a key outside of `PARTS`, which nothing would read; raises ConfigError naming it and the right ones."""
    for key in values:
        if key not in PARTS:
            inside = f"run.{key}" if key in {field.name for field in fields(RunConfig)} else None
            raise ConfigError(unknown_key(str(key), PARTS, near=inside))


def execute(config: DictConfig) -> None:
    """Run the composed pipeline in Hydra's output folder."""
    job = typed(config)
    record = {"pipeline": job.pipeline.name, "settings": job.settings, "model": job.model}
    folder = Path(HydraConfig.get().runtime.output_dir)
    with start_run(folder, record, job.run.seed, job.run.resume) as run:
        run.metrics(job.pipeline.run(job.settings, job.model, run))
    print(f"{run.path('report.html')}", file=sys.stderr)


def _chosen(name: str) -> Pipeline:
    known = pipelines()
    if name not in known:
        raise UserError(f"unknown pipeline {name!r}; installed: {', '.join(sorted(known)) or 'none'}")
    return known[name]


def main() -> None:
    """Entry point of `python -m shared.run`."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and we decide how an error looks
    keep_freed_memory()
    try:
        register_defaults()
        hydra.main(version_base="1.3", config_path=str(configuration_folder()), config_name="config")(task)()
    except (UserError, OSError, HydraException, OmegaConfBaseException) as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    if isinstance(error, OSError) and not isinstance(error, HydraException) and told(error) is None:
        raise error
    print(f"error: {_one_line(error)}", file=sys.stderr)
    sys.exit(2)


def _one_line(error: Exception) -> str:
    """The message without Hydra's layout; a composition error's cause says what was wrong."""
    parts = [told(error) or str(error)]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        parts.append(str(error.__cause__))
    return " ".join(" ".join(parts).split()).partition(" Config search path:")[0]


if __name__ == "__main__":
    main()
