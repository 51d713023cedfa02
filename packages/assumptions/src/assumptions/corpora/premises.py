"""Sets of questions whose premise is false, with their twins whose premise holds (Cancer-Myth, NFP/TPQ, QA2, Syn-QA2).

The twin is the control: a model that corrects everybody also "corrects" those who are right. `meta["premise"]` is
"false" or "true" throughout.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from assumptions.chats import text_key
from assumptions.corpora.item import Item, asked, require


@dataclass(frozen=True)
class PatientQuestion:
    """A row of Cancer-Myth (arXiv 2504.11373), under the names of the hub or of the repository's JSON."""

    question: str | None = None
    example_question: str | None = None
    presupposition_correction: str | None = None
    example_assumption: str | None = None
    category: Any = None
    QID: int | str | None = None
    id: int | str | None = None
    cancer: str | None = None
    source_cancer: str | None = None
    PREMISE: ClassVar[str] = "false"

    def __post_init__(self) -> None:
        require(self, "question" if self.question is not None else "example_question")

    def items(self, number: int) -> list[Item]:
        """One item; `correction` says what is wrong with the premise, where the set says so."""
        text = self.question or self.example_question or ""
        name = next((str(value) for value in (self.QID, self.id) if value is not None), str(number))
        told = self.presupposition_correction or self.example_assumption
        human = {"correction": told} if self.PREMISE == "false" else {}
        meta = {
            "premise": self.PREMISE,
            "category": self.category,
            "cancer": self.cancer or self.source_cancer,
        }
        return [Item(name, asked(text), text_key(text), human=human, meta=meta)]


@dataclass(frozen=True)
class SoundPatientQuestion(PatientQuestion):
    """A row of the control of Cancer-Myth (NFP, TPQ): a patient's question whose premise holds."""

    PREMISE: ClassVar[str] = "true"


@dataclass(frozen=True)
class SearchedQuestion:
    """A row of QA2: a question people typed into a search engine, its assumptions checked by people."""

    question: str
    all_assumptions_valid: str
    abstractive_answer: str = ""
    questionable_assumption: str = ""

    def __post_init__(self) -> None:
        require(self, "question")
        if self.all_assumptions_valid not in ("has_invalid", "all_valid"):
            raise ValueError(
                f"'all_assumptions_valid' is has_invalid or all_valid, got {self.all_assumptions_valid!r}"
            )

    def items(self, number: int) -> list[Item]:
        """One item."""
        premise = "false" if self.all_assumptions_valid == "has_invalid" else "true"
        human = {"reply": self.abstractive_answer, "correction": self.questionable_assumption}
        key = text_key(self.question)
        return [Item(str(number), asked(self.question), key, human=human, meta={"premise": premise})]


@dataclass(frozen=True)
class PerturbedQuestion:
    """A row of Syn-QA2: a question about a fact, and one with another subject, which presumes a falsehood."""

    original_question: str
    perturbed_question: str
    wikidata_property: str = ""

    def __post_init__(self) -> None:
        require(self, "original_question", "perturbed_question")

    def items(self, number: int) -> list[Item]:
        """Two items of one group."""
        sides = (("true", self.original_question), ("false", self.perturbed_question))
        relation = self.wikidata_property
        return [
            Item(
                f"{number}/{premise}",
                asked(text),
                str(number),
                meta={"premise": premise, "relation": relation},
            )
            for premise, text in sides
        ]
