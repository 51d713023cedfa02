"""The demo's main figures on this machine: speed beside the bare model's, exactness, faithfulness, control.

Runs `python -m shared.demo` and records its summary. The throughput arms are interleaved in one engine of one run.
"""

from _results import write_results

from shared import demo
from shared.serialize import read_json

CLAIM = (
    "Prefill-only adapters generate at nearly the bare model's speed with every token equal to the masked reference; "
    "a few hundred neurons carry a behaviour; an assumption's own direction moves replies more than a random one."
)


def main() -> None:
    """Run the demo, record its summary."""
    demo.main()
    summary = read_json(demo.FOLDER / "summary.json")
    preft, circuits, assumptions = (summary[key] for key in ("preft", "circuits", "assumptions"))
    base = preft["throughput"]["base"]
    rows = [{"figure": "answers equal to the reference, share", "value": preft["match_rate"]}]
    for kind, speed in preft["throughput"].items():
        rows.append({"figure": f"{kind}: generated tokens a second", "value": speed})
        rows.append({"figure": f"{kind}: over base", "value": speed / base})
    for kind, loss in preft["heldout_loss"].items():
        rows.append({"figure": f"{kind}: held-out loss, nats a token", "value": loss})
    rows.append({"figure": "conservation error", "value": circuits["conservation_error"]})
    for task, estimators in circuits["faithfulness"].items():
        for estimator, curve in estimators.items():
            rows.append(
                {"figure": f"{task}, {estimator}: faithfulness of 200 neurons", "value": curve["200"]}
            )
    scores = assumptions["spearman"].values()
    rows.append({"figure": "elicited against posterior, Spearman, mean", "value": sum(scores) / len(scores)})
    for name, slope in assumptions["dose_response_slope"].items():
        rows.append({"figure": f"{name}: slope of the judged reply on the dose", "value": slope})
    rows.append({"figure": "seconds", "value": summary["seconds"]})
    print(write_results("demo", CLAIM, rows, {"model": "tinyworld", "dtype": "float32"}, summary))


if __name__ == "__main__":
    main()
