"""The adapter_quality pipeline: the paper's questions of quality, on TinyWorld's users or on any users' chats.

1. Every arm (LoRA and DiReFT, on all tokens and on the prompt alone, and prefix tuning) gets at every size a learning
   rate by the same rule, on other users and other chats than are reported (`preft.quality.tuning`).
2. One adapter a user and seed: held-out loss, by distance from the prompt; answers judged by the user's preferences.
3. Beside them the bare model, with nothing, with the preferences stated in the prompt, and behind the user's own chats.
4. Speed of every arm beside the bare model's, measured or read from the serving benchmark's result.
"""

from pathlib import Path
from typing import Any

from preft.quality.findings import quality_metrics
from preft.quality.pages import write_pages
from preft.quality.people import people
from preft.quality.settings import MEASURED, NONE, AdapterQualityConfig
from preft.quality.study import baselines, study
from preft.quality.tradeoff import from_benchmark, speeds
from shared.models import ModelConfig, load
from shared.runs import Pipeline, Run


def run_pipeline(config: AdapterQualityConfig, model_config: ModelConfig, run: Run) -> dict[str, Any]:
    """Run the study in its folder; returns held-out loss, learning rate and answers by arm and size, and speeds."""
    if config.throughput not in (NONE, MEASURED):
        from_benchmark(Path(config.throughput))  # a wrong file is refused before anything is trained
    reported, tuning = people(config, run.seed)
    model = run.use_model(load(model_config))
    rivals = baselines(config, model, reported, run)
    cells = study(config, model, reported, tuning, run)
    metrics = quality_metrics(cells, rivals)
    found = speeds(config, model, run)
    metrics["throughput_over_base"] = {
        arm: {str(one.rank): one.over_base for one in found if one.arm == arm} for arm in config.arms
    }
    write_pages(run, config, cells, rivals, found, reported)
    return metrics


PIPELINE = Pipeline("adapter_quality", AdapterQualityConfig, run_pipeline)
