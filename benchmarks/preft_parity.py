"""Rewards learned by prefill-only and by all-token LoRA under one budget, on TinyWorld's user task.

make preft-parity ARGS="pipeline.rl.sampler=hf"    the same comparison, with its report
python benchmarks/preft_parity.py                  runs it and writes the table: about 15 minutes on a core
python benchmarks/preft_parity.py --run runs/x     only writes the table of a run that is finished
"""

import argparse
import tempfile
from pathlib import Path
from statistics import mean

from _results import write_results

from preft.rl.config import GRPOConfig
from preft.rl.parity import Outcome, ParityConfig, run_pipeline
from preft.rl.pipeline import AdapterRLConfig
from shared.models import ModelConfig
from shared.runs import start_run
from shared.serialize import read_json

# All-token adapters sharpen the model until single tokens differ by 1e-4 nats between a cached and a whole pass.
CONFIG = ParityConfig(AdapterRLConfig(sampler="hf", grpo=GRPOConfig(max_logprob_gap=1e-3)))


def main() -> None:
    """Run the comparison, or read a finished one, and write table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = given.run or Path(folder)
        if given.run is None:
            with start_run(place, CONFIG) as run:
                run.metrics(run_pipeline(CONFIG, ModelConfig("tinyworld"), run))
        metrics, settings = read_json(place / "metrics.json"), read_json(place / "manifest.json")["config"]
        outcomes = [Outcome(**read_json(path)) for path in sorted(place.glob("*-[0-9].json"))]
    rows = [
        {
            "arm": one.arm,
            "seed": one.seed,
            "held-out reward before": mean(one.before),
            "after": mean(one.after),
            "last five steps' samples": one.train_reward,
        }
        for one in outcomes
    ]
    [(arms, (difference, low, high))] = metrics["difference"].items()
    claim = (
        f"Held-out reward of {arms} after equal training: {difference:+.3f} (95% over held-out prompts: "
        f"{low:+.3f} to {high:+.3f}; seeds are {len(rows) // 2}, one task, one model)."
    )
    print(write_results("preft_parity", claim, rows, settings, metrics))


if __name__ == "__main__":
    main()
