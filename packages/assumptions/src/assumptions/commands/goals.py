"""`assumptions goals`: do the assumptions follow a person who changes what they want?

    assumptions goals --model path/to/model --out runs/goals                  24 topics of ours, played by the model
    assumptions goals --model path/to/model --script turns.csv --switch-after 3 --out runs/goals

Four modes of conversation: each goal kept, and each changed after a turn. Every turn is elicited and answered. The
folder gets turns.jsonl, metrics.json (indices of the switches, drifts: estimate and interval) and report.html; a run
that was stopped goes on where it was.
"""

import argparse
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from assumptions.commands.engine import add_engine, check_engine, named, open_engine
from assumptions.conversation import History
from shared.commands import output_folder

if TYPE_CHECKING:
    from assumptions.conversation import Turn, User
    from assumptions.goals import GoalFigures
    from shared.report import Report

TOGETHER = 16  # conversations that are held side by side, and make one step of a resumed run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `assumptions goals`."""
    add_engine(parser)
    parser.add_argument("--out", type=output_folder, required=True, help="folder of the results")
    parser.add_argument("--instrument", default="nine_scores", help="asked at every turn")
    parser.add_argument(
        "--pairs", type=Path, help="openings in the form of the set goal_switch; default: ours"
    )
    parser.add_argument(
        "--script", type=Path, help="prepared turns: columns goal, switched, user_1, user_2, ..."
    )
    parser.add_argument("--limit", type=int, help="at most so many pairs")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--switch-after", type=int, default=5, help="the turn after which goals change")
    parser.add_argument("--speaker", help="model on --server that plays the person; default: the one asked")
    parser.add_argument("--history", choices=get_args(History), default="reply_only")
    parser.add_argument("--max-tokens", type=int, default=400, help="of a reply")
    parser.add_argument("--temperature", type=float, default=0.7, help="of a reply")
    parser.add_argument("--seed", type=int, default=0)


def main(arguments: argparse.Namespace) -> None:
    """Hold the conversations, write the figures and the page, and print the page's place."""
    from assumptions.elicitation import ElicitationSettings, check
    from assumptions.goal_users import check_modes
    from assumptions.goals import analyse
    from assumptions.instruments import instrument
    from shared.data import write_rows
    from shared.errors import UserError
    from shared.runs import start_run
    from shared.serialize import plain

    asked = instrument(arguments.instrument)
    check(asked, ElicitationSettings(guided=not arguments.free))
    check_engine(arguments)
    if not asked.dimensions:
        raise UserError(f"{asked.id} has no scores to follow; take one that does, say nine_scores")
    if not 1 <= arguments.switch_after < arguments.turns:
        raise UserError(f"--switch-after lies between 1 and --turns - 1, {arguments.turns - 1}")
    if arguments.speaker and not arguments.server:
        raise UserError("--speaker names a model on --server")
    users = _users(arguments)
    check_modes(users)
    with start_run(arguments.out, _question(arguments, users), arguments.seed) as run:
        turns = _converse(arguments, asked, users, run)
        write_rows(run.path("turns.jsonl"), [one for some in turns.values() for one in some])
        figures = analyse(turns, asked.dimensions, arguments.switch_after, seed=arguments.seed)
        run.metrics(plain(figures))
        add_goals(run.report, turns, figures, arguments.switch_after)
    print(arguments.out / "report.html")


def _question(arguments: argparse.Namespace, users: Mapping[str, Mapping[str, "User"]]) -> dict[str, Any]:
    """What the turns follow from."""
    from shared.runs import config_hash

    names = ("model", "dtype", "free", "instrument", "turns", "switch_after", "speaker", "history")
    chosen = {name: getattr(arguments, name) for name in (*names, "max_tokens", "temperature")}
    return chosen | {"command": "goals", "engine": named(arguments), "users": config_hash(users)}


def _users(arguments: argparse.Namespace) -> dict[str, dict[str, "User"]]:
    """The people of every mode: scripted, or played by a model from pairs of openings."""
    from assumptions.corpora import load_corpus
    from assumptions.corpora.turns import read_conversations
    from assumptions.goal_users import goal_users, mode, scripted_users

    if arguments.script is not None:
        return scripted_users(read_conversations(arguments.script))
    limit = None if arguments.limit is None else 2 * arguments.limit
    items = load_corpus("goal_switch", arguments.pairs, limit=limit).items
    found = {}
    for after in (None, arguments.switch_after):
        for goal, users in goal_users(items, arguments.turns, after, seed=arguments.seed).items():
            found[mode(goal, switched=after is not None)] = users
    return found


def _converse(
    arguments: argparse.Namespace, asked: Any, users: Mapping[str, Mapping[str, "User"]], run: Any
) -> dict[str, list["Turn"]]:
    """The turns of every mode; conversations that a former run has ended are kept."""
    from assumptions.conversation import Turn, converse
    from assumptions.engines import ServedEngine
    from shared.data import read_rows, write_rows
    from shared.generation import OpenAIGenerator, Sampling

    model, _, on_demand = open_engine(arguments)
    if model is not None:
        run.use_model(model)
    reply_with = Sampling(arguments.max_tokens, arguments.temperature, top_p=0.9, logprobs=None)
    found: dict[str, list[Turn]] = {name: [] for name in users}
    groups = [
        (name, sorted(some)[start : start + TOGETHER])
        for name, some in users.items()
        for start in range(0, len(some), TOGETHER)
    ]
    with closing(on_demand) as engine:
        speaker = OpenAIGenerator(arguments.server, arguments.speaker) if arguments.speaker else engine
        for number, (name, group) in enumerate(run.progress(groups, "conversations")):
            stage = run.stage(f"turns/{number:03}-{name}.jsonl")
            if not stage.done:
                turns = converse(
                    {one: users[name][one] for one in group},
                    asked,
                    engine,
                    ServedEngine(engine),
                    speaker=speaker,
                    history=arguments.history,
                    turns=arguments.turns,
                    guided=not arguments.free,
                    reply_with=reply_with,
                    seed=arguments.seed,
                )
                with stage as path:
                    write_rows(path, turns)
            found[name] += read_rows(stage.path, Turn)
    return found


def add_goals(
    report: "Report", turns: Mapping[str, list["Turn"]], figures: "GoalFigures", after: int
) -> None:
    """The page: scores over turns by mode, the indices of the switches, drifts where a goal was kept."""
    from assumptions.charts import turns_chart
    from assumptions.goals import by_turn

    count = {name: len({one.conversation for one in some}) for name, some in turns.items()}
    unread = sum(not one.scores for some in turns.values() for one in some)
    report.text(
        f"# Goals that change\n\nConversations by mode: {count}. Goals change after turn {after}. The target of a "
        "switch is what conversations that kept the new goal state at the same turns; stickiness is the share of the "
        "distance that is left at the last turn (0 has followed, 1 has not moved). Intervals are over conversations. "
        f"{unread} turns could not be read."
    )
    names = list(next(iter(figures.drifts.values())))
    lines = {name: {d: by_turn(some, d) for d in names} for name, some in turns.items()}
    report.figure(
        turns_chart(lines, dict.fromkeys(figures.switches, after)),
        "Mean score by turn; the line marks the switch.",
    )
    for name, by_score in figures.switches.items():
        report.table(
            [
                {"score": d, "before": one.pre.estimate, "jump": one.jump.estimate}
                | {"left at the end": one.residual.estimate, "stickiness": one.stickiness.estimate}
                | {"from": one.stickiness.low, "to": one.stickiness.high}
                | {"half-life, median": one.half_life_median}
                for d, one in by_score.items()
            ],
            f"Switch {name}",
        )
    for name, drifts in figures.drifts.items():
        rows = [
            {"score": d, "a turn": one.estimate, "from": one.low, "to": one.high} for d, one in drifts.items()
        ]
        report.table(rows, f"Drift while the goal stays {name}")
