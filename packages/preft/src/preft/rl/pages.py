"""The report page of the adapter_rl pipeline: reward and agreement over the steps, held-out reward, answers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from preft.rl.rewards import Row
from shared.plots import PALETTE, subplots
from shared.report import Report

if TYPE_CHECKING:
    from preft.rl.pipeline import AdapterRLConfig


def write_pages(
    report: Report, config: "AdapterRLConfig", result: Mapping[str, Any], heldout: Sequence[Row]
) -> None:
    """Add a finished training to a report; `heldout` are the rows of the answers that are shown."""
    report.text(_summary(config, result))
    report.figure(_figure(config, result["steps"]), _caption(config))
    before, after = result["before"], result["after"]
    report.table(
        [{"answers": how, "before": before[how], "after": after[how]} for how in ("sampled", "greedy")],
        "Held-out reward",
    )
    report.table(
        [
            {"asked": _text(row), "before": old, "after": new}
            for row, old, new in zip(heldout, before["answers"], after["answers"])
        ],
        "Held-out answers, greedy",
    )


def _summary(config: "AdapterRLConfig", result: Mapping[str, Any]) -> str:
    before, after = result["before"]["sampled"], result["after"]["sampled"]
    gap = max(step["logprob_gap_max"] for step in result["steps"])
    adapter, grpo = config.adapter, config.grpo
    return (
        f"Held-out reward ({config.reward_name}) **{before:.2f}** before and **{after:.2f}** after {grpo.steps} steps "
        f"of GRPO: {adapter.method} of rank {adapter.rank}, phase {adapter.phase.value}, {grpo.prompts_per_step} "
        f"prompts with {grpo.num_generations} samples a step, rollouts in {config.sampler}. On no generated token did "
        f"trainer and sampler differ by more than {gap:.1e} nats."
    )


def _caption(config: "AdapterRLConfig") -> str:
    return (
        "Left: mean reward of the step's samples, drawn before the step is learned from. Right: difference between the "
        "trainer's and the sampler's log-probabilities of the generated tokens; the line is the limit above which the "
        "run stops."
    )


def _figure(config: "AdapterRLConfig", steps: Sequence[Mapping[str, Any]]) -> Any:
    figure, (reward, gap) = subplots(1, 2, 8.0, 3.0)
    numbers = [step["step"] for step in steps]
    reward.plot(numbers, [step["reward"] for step in steps], color=PALETTE[0])
    reward.set(xlabel="step", ylabel="reward")
    gap.plot(numbers, [step["logprob_gap_max"] for step in steps], color=PALETTE[0], label="largest")
    gap.plot(numbers, [step["logprob_gap_mean"] for step in steps], color=PALETTE[1], label="mean")
    if config.grpo.max_logprob_gap is not None:
        gap.axhline(config.grpo.max_logprob_gap, color=PALETTE[2], linestyle="--", label="limit")
    gap.set(xlabel="step", ylabel="nats")
    gap.set_yscale("symlog", linthresh=1e-8)  # Hugging Face may agree to the last bit
    gap.legend()
    return figure


def _text(row: Row) -> str:
    return row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
