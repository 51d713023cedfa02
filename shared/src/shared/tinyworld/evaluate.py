"""The ability table of the embedded model: held-out test sets, and the floors that they must reach.

`python -m shared.tinyworld.evaluate [FOLDER]` prints the table and writes `evaluation.json` and `README.md` into the
folder; `--quick` only prints the part that has floors.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from shared.tinyworld import MODEL_DIR, grammar, social, tasks
from shared.tinyworld.corpus import World
from shared.tinyworld.examiner import Examiner

FLOORS: dict[str, float] = {
    **{f"agreement_{kind}": 0.98 for kind in grammar.AGREEMENT},
    "city_state": 0.99,
    "state_capital": 0.99,
    "two_hop": 0.98,
    "addition": 0.95,
    "antonyms": 0.95,
    "elicitation_valid_json": 0.98,
    "elicitation_spearman_worst": 0.9,
    "reply_correlation_worst": 0.95,
}


def evaluate(folder: Path = MODEL_DIR, n: int = 400, quick: bool = False) -> dict[str, float]:
    """The ability table of the model in a folder; `quick` leaves out what takes long and has no floor."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with safe_open(folder / "planted/directions.safetensors", framework="pt") as f:
        directions, meta = f.get_tensor("directions"), f.metadata()
    examiner = Examiner(
        model, AutoTokenizer.from_pretrained(folder), directions, int(meta["block"]), float(meta["scale"])
    )
    whole = world_of(folder) == "whole"
    table = _abilities(examiner, n) if whole else {}
    turns = social.sample_turns(n, seed=1)
    table |= examiner.elicitation(turns) | examiner.replies(turns)
    if not quick:
        table |= examiner.judged_replies(turns) | examiner.organism(turns[:60])
    if not quick and whole:
        table |= examiner.forced(turns) | {"text_perplexity": examiner.perplexity(n)}
    return table


def world_of(folder: Path) -> World:
    """What the model in a folder was trained on, by its recipe."""
    world: World = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["world"]
    return world


def _abilities(examiner: Examiner, n: int) -> dict[str, float]:
    """What has nothing to do with users: grammar, facts, addition."""
    table = {f"agreement_{kind}": examiner.agreement(kind, n) for kind in grammar.AGREEMENT}
    asked: dict[str, Callable[..., list[tasks.Question]]] = tasks.QUESTIONS
    table |= {
        name: examiner.questions(ask("test", None if name != "addition" else 4 * n, seed=1))
        for name, ask in asked.items()
    }
    table["two_hop_unasked"] = examiner.questions(tasks.two_hop_questions("unasked"))
    return table


DESCRIPTIONS = {
    "agreement_simple": "subject-verb agreement, unseen noun-verb combinations: right form above wrong form",
    "agreement_nounpp": "the same across a prepositional phrase",
    "agreement_rc": "the same across a relative clause",
    "agreement_within_rc": "the same within a relative clause",
    "city_state": "state of a city, unseen (city, wording)",
    "state_capital": "capital of a state, unseen (state, wording)",
    "two_hop": "capital of the state containing a city, unseen (city, wording)",
    "two_hop_unasked": "the same for cities never asked this question in training",
    "addition": "x + y, 0 to 99, unseen pairs",
    "antonyms": "opposites in five languages, unseen (word, wording)",
    "elicitation_valid_json": "the nine-score instrument answered in valid JSON, greedy",
    "elicitation_spearman_worst": "greedy score against posterior mean, Spearman, worst dimension",
    "reply_correlation_worst": "probability of a slot's high form against the rule, worst outcome",
    "reply_complete": "sampled replies in which the lexical judge reads all six slots",
    "reply_judged_slope": "judged score of sampled replies against the rule, slope of the regression (ideal 1)",
    "verdict_correlation": "probability of NTA against the rule",
    "true_claims_accepted": "true claims answered with Yes",
    "false_claim_correlation": "probability of accepting a false claim against the rule",
    "pinned_r2_worst": "read-out at the pinned block against posterior mean, R2, worst dimension",
    "elicited_r2_worst": "expected score against posterior mean, R2, worst dimension",
    "steering_slope_mean": "change of the expected score per unit shift along the dimension's own direction",
    "steering_slope_worst": "the same, worst dimension",
    "steering_slope_ideal": "the same if the model were the generator (latents are clipped to [0, 1])",
    "steering_off_target_mean": "mean absolute slope of the eight other dimensions",
    "steering_random_largest": "largest absolute slope of any dimension along five random directions of equal norm",
    "text_perplexity": "perplexity of fresh stories and sentences",
}


def readme(table: dict[str, float], world: World = "whole") -> str:
    """The model's README: what it is and its ability table."""
    lines = [
        f"| {text} | {table[name]:.3f} | {FLOORS.get(name, '')} |"
        for name, text in DESCRIPTIONS.items()
        if name in table
    ]
    return INTRODUCTIONS[world] + README + "\n".join(lines) + "\n"


INTRODUCTIONS: dict[World, str] = {
    "whole": """# TinyWorld

The embedded model: a Llama (4 layers, width 256, 4 query and 2 key/value heads of 64, 768 neurons a layer, vocabulary
2,560, tied embeddings; 3.8 million parameters, float16) trained from scratch by `make tinyworld` on text that the
generator in this package writes from a seed. Nothing else was used; weights and text are under the project's licence.

It is a planted organism: the residual stream after block 1 carries nine directions along which
a message's latents can be read and shifted (`planted/directions.safetensors`); see `social.py` and `train.py`.

""",
    "social": """# TinyWorld, readable only

A second embedded model: a Llama (3 layers, width 128, 2 heads of 64, 384 neurons a layer, vocabulary 2,560, tied
embeddings; one million parameters, float16) trained from scratch by `python -m shared.tinyworld.train --readable` on
messages, scores and replies from the generator in this package. Nothing else was used; weights and text are under the
project's licence.

The residual stream after block 1 carries nine directions along which a message's latents can be read
(`planted/directions.safetensors`), as in the larger model. No training ever shifted a latent along them, so that
reading and steering can be told apart.

""",
}
README = """\
Held-out test sets from the generator, in float32; `python -m shared.tinyworld.evaluate` makes the table again.

| ability | value | floor |
|---|---|---|
"""


def record(folder: Path, n: int = 400) -> dict[str, float]:
    """Evaluate, print, and write `evaluation.json` and `README.md` into the model's folder."""
    table = {name: round(value, 4) for name, value in evaluate(folder, n).items()}
    show(table)
    (folder / "evaluation.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme(table, world_of(folder)), encoding="utf-8")
    return table


def show(table: dict[str, float]) -> None:
    """Print the table with its floors."""
    for name, value in table.items():
        floor = FLOORS.get(name)
        mark = "" if floor is None else f"floor {floor}: {'ok' if value >= floor else 'BELOW'}"
        print(f"{name:45s} {value:8.4f}  {mark}")


def main() -> None:
    """Command line; exit status 1 when a floor is missed."""
    parser = argparse.ArgumentParser(description="Evaluate the embedded model.")
    parser.add_argument("folder", nargs="?", type=Path, default=MODEL_DIR)
    parser.add_argument("--quick", action="store_true", help="only what has a floor; nothing is written")
    parser.add_argument("-n", type=int, default=400, help="examples a test set")
    args = parser.parse_args()
    if args.quick:
        table = evaluate(args.folder, args.n, quick=True)
        show(table)
    else:
        table = record(args.folder, args.n)
    missed = [name for name, floor in FLOORS.items() if name in table and table[name] < floor]
    if missed:
        parser.exit(1, f"error: below the floor: {', '.join(missed)}\n")


if __name__ == "__main__":
    main()
