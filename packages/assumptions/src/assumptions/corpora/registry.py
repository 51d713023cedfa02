"""The table of data sets: what a set is, its licence, where it lies, which files it has, and the type of their rows.

Row counts are those published; a file with another count is read, and the difference stands in its card. `eval_only`
sets carry a canary or a notice that asks to keep them out of training.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from assumptions.corpora import advice, files, general, premises, pressure
from assumptions.corpora.item import Item
from shared.errors import UserError


@runtime_checkable
class CorpusRow(Protocol):
    """A typed row: a dataclass whose fields are the columns."""

    def items(self, number: int) -> list[Item]:
        """The items of row `number` (from 1); raises Skip for a row that is marked unusable."""
        ...


@dataclass(frozen=True)
class Part:
    """One file of a set: its name (a pattern), the type of its rows, how it is read, its published row count."""

    file: str
    row: type[CorpusRow]
    rows: int | None = None
    read: Callable[[Path, type], files.Raw] = files.table
    split: str = "train"  # of the set on the hub


@dataclass(frozen=True)
class Corpus:
    """A data set: parts by name ("" where there is only one). Sets with the same `groups` share the names of groups."""

    name: str
    title: str
    licence: str
    url: str
    parts: dict[str, Part] = field(default_factory=dict)
    hub: str | None = None
    config: str | None = None
    eval_only: bool = False
    groups: str = ""
    notes: tuple[str, ...] = ()

    def how_to_get(self) -> str:
        """One sentence: where the set lies, under which licence, which files with which columns are expected."""
        wanted = "; ".join(
            f"{part.file} with the columns {', '.join(f.name for f in fields(cast(Any, part.row)))}"
            for part in self.parts.values()
        )
        hub = f", or give source='hf' to download {self.hub}" if self.hub else ""
        return f"{self.title} ({self.licence}) is at {self.url}; give a path to {wanted}{hub}"


_SYCO = "MIT-0"
_ELEPHANT = "https://osf.io/r3dmj (datasets.zip, linked from github.com/myracheng/elephant)"
_REDDIT = "texts by Reddit users and advice columns inside"
_MEDICAL = "medical questions: not for advice"

_ALL = (
    Corpus(
        "elephant_oeq",
        "ELEPHANT OEQ",
        "CC0 1.0",
        _ELEPHANT,
        {"": Part("OEQ*.csv", advice.OpenEndedQuery, 3027)},
        notes=(_REDDIT,),
    ),
    Corpus(
        "elephant_aita_yta",
        "ELEPHANT AITA-YTA",
        "CC0 1.0",
        _ELEPHANT,
        {"": Part("AITA-YTA*.csv", advice.BlamedPost, 2000)},
        notes=(_REDDIT,),
    ),
    Corpus(
        "elephant_aita_nta",
        "ELEPHANT AITA-NTA-OG",
        "CC0 1.0",
        _ELEPHANT,
        {"": Part("AITA-NTA-OG*.csv", advice.AcquittedPost, 1591)},
        groups="aita_nta",
        notes=(_REDDIT,),
    ),
    Corpus(
        "elephant_moral_pairs",
        "ELEPHANT AITA-NTA-FLIP",
        "CC0 1.0",
        _ELEPHANT,
        {"": Part("AITA-NTA-FLIP*.csv", advice.FlippedPost, 1591)},
        groups="aita_nta",
        notes=(_REDDIT, "the other side is written by a language model"),
    ),
    Corpus(
        "elephant_ss",
        "ELEPHANT SS",
        "CC0 1.0",
        _ELEPHANT,
        {"": Part("SS*.csv", advice.SelfStatement, 3777)},
        notes=("no human answers: framing only, baseline 0.5",),
    ),
    Corpus(
        "sycophancy_eval",
        "SycophancyEval",
        "MIT",
        "https://github.com/meg-tong/sycophancy-eval",
        {
            "answer": Part("answer.jsonl", pressure.SycophancyPrompt),
            "are_you_sure": Part("are_you_sure.jsonl", pressure.ChallengedAnswer),
            "feedback": Part("feedback.jsonl", pressure.SycophancyPrompt),
            "mimicry": Part("mimicry.jsonl", pressure.SycophancyPrompt),
        },
        hub="meg-tong/sycophancy-eval",
        eval_only=True,
    ),
    Corpus(
        "cancer_myth",
        "Cancer-Myth",
        "no licence stated",
        "https://github.com/Bill1235813/cancer-myth (data/all_data.json)",
        {"": Part("all_data*.json", premises.PatientQuestion, 585, split="validation")},
        hub="Cancer-Myth/Cancer-Myth",
        notes=(_MEDICAL,),
    ),
    Corpus(
        "cancer_myth_nfp",
        "questions without a false premise, beside Cancer-Myth (NFP)",
        "no licence stated",
        "https://github.com/ShenranTomWang/Well (data_gen/CancerMythNFP/nfp.json)",
        {"": Part("nfp.json", premises.SoundPatientQuestion, 150)},
        notes=(_MEDICAL,),
    ),
    Corpus(
        "cancer_myth_tpq",
        "CancerMyth-TPQ",
        "Apache-2.0 (its card)",
        "https://huggingface.co/datasets/shenranw/CancerMyth-TPQ",
        {"": Part("*.jsonl", premises.SoundPatientQuestion, split="test")},
        hub="shenranw/CancerMyth-TPQ",
        notes=(_MEDICAL,),
    ),
    Corpus(
        "qa2",
        "QA2",
        "no licence stated",
        "https://github.com/ShenranTomWang/Well (data_gen/QA2 names the files)",
        {
            "adaptation": Part("QAQA_adaptation_set*.csv", premises.SearchedQuestion),
            "evaluation": Part("QAQA_evaluation_set*.csv", premises.SearchedQuestion),
        },
        eval_only=True,
        notes=("570 rows in both parts",),
    ),
    Corpus(
        "syn_qa2",
        "Syn-QA2",
        "no licence stated",
        "https://github.com/ShenranTomWang/Well (data_gen/SynQA2/syn_qa2_singlehop.csv)",
        {"": Part("syn_qa2_singlehop.csv", premises.PerturbedQuestion, 1125)},
    ),
    Corpus(
        "sycon",
        "SYCON-Bench",
        "MIT",
        "https://github.com/JiseungHong/SYCON-Bench (the data folder of each setting)",
        {
            "debate": Part("arguments.txt", pressure.DebateTopic, 100, files.arguments),
            "ethical": Part("stereoset*.csv", pressure.PushedStereotype, 200),
            "false_presupposition": Part(
                "push_back.csv", pressure.PushedPresupposition, 200, files.pushbacks
            ),
        },
    ),
    Corpus(
        "syco_bench",
        "syco-bench",
        _SYCO,
        "https://github.com/timfduffy/syco-bench",
        {
            "pickside": Part("questions_pickside.csv", pressure.OpposedStatements, 40),
            "mirror": Part("questions_mirror.csv", pressure.MirroredStance, 40),
            "whosaid": Part("questions_whosaid.csv", pressure.AttributedStatement, 40),
            "delusion": Part("questions_delusion.csv", pressure.StatementRow, 20),
        },
    ),
    Corpus(
        "spiral_bench",
        "Spiral-Bench",
        "no licence file: do not pass on",
        "https://github.com/sam-paech/spiral-bench (prompts/eval_prompts_v0.2.json; res_v0.2/MODEL.json)",
        {
            "seeds": Part("eval_prompts*.json", pressure.SpiralSeed, 30),
            "transcripts": Part("*.json", pressure.SpiralTranscript, None, files.transcripts),
        },
    ),
    Corpus(
        "wildchat",
        "WildChat-1M",
        "ODC-BY",
        "https://huggingface.co/datasets/allenai/WildChat-1M",
        {"": Part("*.jsonl", general.WildConversation)},
        hub="allenai/WildChat-1M",
        notes=("the first user message of English conversations without toxic turns",),
    ),
    Corpus(
        "talktuner",
        "TalkTuner's chats",
        "MIT",
        "https://github.com/yc015/TalkTuner-chatbot-llm-dashboard (data/dataset/*.zip)",
        {"": Part("*.zip", general.AttributeChat, None, files.chats_in_archive)},
        notes=("synthetic; attributes of the user, not intents: a negative control",),
    ),
    Corpus(
        "aita_scored",
        "AITA replies with people's scores",
        "MIT (texts by Reddit users)",
        "https://github.com/LukasStrickler/LLM-Moral-Sycophancy-A-Behavioral-Study "
        "(data/humanLabel/reviews/final_human_consensus_scores.csv)",
        {"": Part("final_human_consensus_scores.csv", advice.RatedReply)},
        notes=("for calibrating a judge: -1 against the author of the post, 1 for them",),
    ),
    Corpus(
        "counsel_chat",
        "counsel-chat",
        "MIT",
        "https://github.com/nbertagnolli/counsel-chat (data/20200325_counsel_chat.csv)",
        {"": Part("*counsel_chat*.csv", advice.CounselQuestion, 2129)},
        notes=("one item a question, with its first answer; names and addresses of therapists are not read",),
    ),
    Corpus(
        "gsm8k",
        "GSM8K",
        "MIT",
        "https://github.com/openai/grade-school-math (grade_school_math/data)",
        {
            "train": Part("train.jsonl", general.WordProblem, 7473),
            "test": Part("test.jsonl", general.WordProblem, 1319, split="test"),
        },
        hub="openai/gsm8k",
        config="main",
    ),
    Corpus(
        "goal_switch",
        "goal-switch seeds",
        "Apache-2.0 (ours, shipped)",
        "this package",
        {"": Part("goal_switch.jsonl", general.GoalSwitchPair, 24)},
    ),
)
CORPORA: dict[str, Corpus] = {corpus.name: corpus for corpus in _ALL}
SHIPPED: dict[str, Path] = {"goal_switch": Path(__file__).with_name("goal_switch.jsonl")}


def corpus(name: str) -> Corpus:
    """Return the set called `name`; UserError lists the names otherwise."""
    if name not in CORPORA:
        raise UserError(f"no data set {name!r}; there are {', '.join(sorted(CORPORA))}")
    return CORPORA[name]
