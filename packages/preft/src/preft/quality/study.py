"""Training and measuring: for every arm and size first its learning rate, then one adapter a user and seed.

Each arm and size leaves a file in tuning/ and one in cells/ (`preft.quality.stored`), so an interrupted study goes on
where it stopped, and an extended one trains what is new. A seed draws the adapter's start and the order of the batches;
the users are the same for all arms.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

from preft.quality.arms import PREFIX, Trained, bare, train
from preft.quality.measures import by_distance, mean_loss, response_losses, rows_of
from preft.quality.people import Person
from preft.quality.prompting import answer_shares, instructed
from preft.quality.settings import AdapterQualityConfig
from preft.quality.stored import stored
from preft.quality.tuning import Tuned, walk
from preft.train.rows import padding_id
from shared.models import Model
from shared.runs import Run
from shared.tokens import Message


@dataclass(frozen=True)
class Result:
    """One trained adapter (or prompt) on its user's held-out chats."""

    user: str
    seed: int
    loss: float
    bins: dict[str, list[float]]  # distance: sum of losses, tokens
    parameters: int
    answers: dict[str, float] | None  # share of answers that keep each preference, where they were judged


@dataclass(frozen=True)
class Cell:
    """An arm at a size: how it was tuned, and its results over users and seeds."""

    arm: str
    size: int
    tuned: Tuned | None
    results: list[Result]


def sizes_of(config: AdapterQualityConfig) -> list[tuple[str, int]]:
    """Every arm and size that is trained, prefixes last."""
    adapters = [(arm, rank) for arm in config.arms for rank in config.ranks]
    return adapters + [(PREFIX, tokens) for tokens in config.prefix_tokens]


def study(
    config: AdapterQualityConfig, model: Model, reported: Sequence[Person], tuning: Sequence[Person], run: Run
) -> list[Cell]:
    """Tune and measure all arms and sizes; a size begins its walk at the rate of the size before."""
    cells: list[Cell] = []
    for arm, size in run.progress(sizes_of(config), "training adapters"):
        before = next((cell.tuned for cell in reversed(cells) if cell.arm == arm), None)
        tuned = _tuned(config, model, arm, size, before.rate if before else None, tuning, run)
        measured = _measured(config, model, arm, size, tuned.rate, reported, run)
        cells.append(Cell(arm, size, tuned, [Result(**row) for row in measured]))
    return cells


def _tuned(
    config: AdapterQualityConfig,
    model: Model,
    arm: str,
    size: int,
    start: float | None,
    tuning: Sequence[Person],
    run: Run,
) -> Tuned:
    def loss(rate: float) -> float:
        settings = replace(config.train, learning_rate=rate, seed=run.seed)
        return mean(
            heldout(train(model, arm, size, person.train, settings), person.validation) for person in tuning
        )

    def search() -> list[list[float]]:
        return [[rate, value] for rate, value in walk(config.rates, start, loss).losses.items()]

    asked = {"arm": arm, "size": size, "start": start, "rates": config.rates}
    found = stored(run, f"tuning/{arm}-{size}", _identity(config, model, run) | asked, search)
    # A loss that is not finite is null in a file.
    losses = {rate: float("nan") if loss is None else loss for rate, loss in found}
    return walk(config.rates, start, losses.__getitem__)


def _identity(config: AdapterQualityConfig, model: Model, run: Run) -> dict[str, Any]:
    """What every result depends on: model, seed, whose chats, how many, and how training runs."""
    names = ("data", "users", "tuning_users", "train_chats", "validation_chats", "heldout_chats", "train")
    return {"model": model.fingerprint, "seed": run.seed} | {name: getattr(config, name) for name in names}


def _measured(
    config: AdapterQualityConfig,
    model: Model,
    arm: str,
    size: int,
    rate: float,
    reported: Sequence[Person],
    run: Run,
) -> list[dict[str, Any]]:
    judged = arm == PREFIX or size in config.answer_ranks

    def results() -> list[dict[str, Any]]:
        rows = []
        for seed in range(config.seeds):
            settings = replace(config.train, learning_rate=rate, seed=run.seed + seed)
            for person in reported:
                trained = train(model, arm, size, person.train, settings)
                rows.append(asdict(measure(config, trained, person, seed, judged and seed == 0)))
        return rows

    asked = {"arm": arm, "size": size, "rate": rate, "seeds": config.seeds}
    asked["answers"] = [config.answers, config.answer_tokens] if judged else None
    found: list[dict[str, Any]] = stored(
        run, f"cells/{arm}-{size}", _identity(config, model, run) | asked, results
    )
    return found


def baselines(
    config: AdapterQualityConfig, model: Model, reported: Sequence[Person], run: Run
) -> dict[str, list[Result]]:
    """The bare model, with nothing, with the preferences stated, and behind some of the user's chats as examples."""

    def compute() -> dict[str, list[dict[str, Any]]]:
        base = bare(model)
        found = {"base": [measure(config, base, person, 0, True) for person in reported]}
        if all(person.preferences for person in reported):
            found["stated"] = [
                measure(config, base, instructed(person), 0, True, asked=person) for person in reported
            ]
        for count in config.shown_chats:
            found[f"shown {count}"] = [
                measure(config, base, person, 0, True, [m for chat in person.train[:count] for m in chat])
                for person in reported
            ]
        return {name: [asdict(result) for result in results] for name, results in found.items()}

    asked = {"shown": config.shown_chats, "answers": [config.answers, config.answer_tokens]}
    found = stored(run, "baselines", _identity(config, model, run) | asked, compute)
    return {name: [Result(**row) for row in rows] for name, rows in found.items()}


def heldout(trained: Trained, chats: Sequence[Sequence[Message]]) -> float:
    """Mean loss (nats) over the response tokens of chats."""
    tokenizer = trained.model.tokenizer
    return mean_loss(response_losses(trained.logits, rows_of(tokenizer, chats), padding_id(tokenizer)))


def measure(
    config: AdapterQualityConfig,
    trained: Trained,
    person: Person,
    seed: int,
    judged: bool,
    shown: Sequence[Message] = (),
    asked: Person | None = None,
) -> Result:
    """Losses on a person's held-out chats behind the messages `shown`, and greedy answers where they are `judged`.

    `asked` is the person whose plain questions the answers are judged by, where `person`'s prompts say more.
    """
    tokenizer = trained.model.tokenizer
    rows = rows_of(tokenizer, person.heldout, shown)
    losses = response_losses(trained.logits, rows, padding_id(tokenizer))
    answers = (
        answer_shares(trained, person, asked or person, shown, config.answers, config.answer_tokens)
        if judged and config.answers and person.preferences
        else None
    )
    return Result(person.name, seed, mean_loss(losses), by_distance(losses), trained.parameters, answers)
