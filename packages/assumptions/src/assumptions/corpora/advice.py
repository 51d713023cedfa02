"""Sets in which people tell of their lives and ask for advice or a verdict (ELEPHANT, counsel-chat, AITA with scores).

ELEPHANT (arXiv 2505.13995): open-ended queries with a person's answer; posts judged "you are the asshole"; posts judged
"not the asshole" beside the same conflict told by the other side; statements about oneself. Cells of labels may be
empty or say ERROR: the text is kept and the label is None.
"""

from dataclasses import dataclass

from assumptions.chats import text_key
from assumptions.corpora.item import Item, Skip, asked, label, require
from shared.tokens import Message

Label = str | float | bool | None


def _labels(row: object) -> dict[str, float | None]:
    return {name: label(getattr(row, f"{name}_human")) for name in ("validation", "indirectness", "framing")}


@dataclass(frozen=True)
class OpenEndedQuery:
    """A row of ELEPHANT's OEQ; some prompts stand twice, so the group is the text."""

    prompt: str
    human: str
    source: str = ""
    validation_human: Label = None
    indirectness_human: Label = None
    framing_human: Label = None

    def __post_init__(self) -> None:
        require(self, "prompt")
        _labels(self)

    def items(self, number: int) -> list[Item]:
        """One item."""
        human = {"reply": self.human, **_labels(self)}
        key = text_key(self.prompt)
        return [Item(str(number), asked(self.prompt), key, human=human, meta={"forum": self.source})]


@dataclass(frozen=True)
class BlamedPost:
    """A row of ELEPHANT's AITA-YTA: a post whose author was found to be in the wrong."""

    prompt: str
    top_comment: str | None = None
    is_asshole: Label = None
    ytanta: str | None = None
    validation_human: Label = None
    indirectness_human: Label = None
    framing_human: Label = None

    def __post_init__(self) -> None:
        require(self, "prompt")
        _labels(self)
        label(self.is_asshole)

    def items(self, number: int) -> list[Item]:
        """One item; `verdict` is the crowd's, `wrong` its number."""
        human = {
            "reply": self.top_comment or "",
            "verdict": self.ytanta or "YTA",
            "wrong": label(self.is_asshole),
        }
        return [Item(str(number), asked(self.prompt), text_key(self.prompt), human=human | _labels(self))]


@dataclass(frozen=True)
class AcquittedPost:
    """A row of ELEPHANT's AITA-NTA-OG: a post whose author was found to be in the right."""

    id: str
    original_post: str

    def __post_init__(self) -> None:
        require(self, "id", "original_post")

    def items(self, number: int) -> list[Item]:
        """One item, grouped by the post's id, which AITA-NTA-FLIP shares."""
        return [Item(self.id, asked(self.original_post), self.id, human={"verdict": "NTA"})]


@dataclass(frozen=True)
class FlippedPost:
    """A row of ELEPHANT's AITA-NTA-FLIP: one conflict told by both sides, the second side by a language model."""

    id: str
    original_post: str
    flipped_story: str

    def __post_init__(self) -> None:
        require(self, "id", "original_post")

    def items(self, number: int) -> list[Item]:
        """Two items of one group: the side that was in the right, then the other."""
        story = self.flipped_story.strip()
        if not story or story.upper().startswith("ERROR"):
            raise Skip("the other side was not written")
        return [
            Item(f"{self.id}/{side}", asked(text), self.id, human={"verdict": verdict}, meta={"side": side})
            for side, text, verdict in (
                ("original", self.original_post, "NTA"),
                ("flipped", self.flipped_story, "YTA"),
            )
        ]


@dataclass(frozen=True)
class SelfStatement:
    """A row of ELEPHANT's SS: one sentence about oneself; there is no human answer to it."""

    sentence: str
    self_attitude: str | None = None
    other_attitude: str | None = None

    def __post_init__(self) -> None:
        require(self, "sentence")

    def items(self, number: int) -> list[Item]:
        """One item."""
        meta = {"self_attitude": self.self_attitude, "other_attitude": self.other_attitude}
        return [Item(str(number), asked(self.sentence), text_key(self.sentence), meta=meta)]


@dataclass(frozen=True)
class RatedReply:
    """A post, a model's reply and people's score of its sycophancy (-1 against the author, 1 for them)."""

    response_id: int | str
    prompt_body: str
    model_response_text: str
    chosen_consensus: float

    def __post_init__(self) -> None:
        require(self, "prompt_body", "model_response_text")
        if not -1 <= self.chosen_consensus <= 1:
            raise ValueError(f"a consensus lies between -1 and 1, got {self.chosen_consensus}")

    def items(self, number: int) -> list[Item]:
        """One item that ends with the reply."""
        messages = (*asked(self.prompt_body), Message(role="assistant", content=self.model_response_text))
        human = {"sycophancy": self.chosen_consensus}
        return [Item(str(self.response_id), messages, text_key(self.prompt_body), human=human)]


@dataclass(frozen=True)
class CounselQuestion:
    """A row of counsel-chat: a question to therapists with one answer; their names and addresses are not read."""

    questionID: int | str
    questionTitle: str
    questionText: str | None = None
    topic: str | None = None
    answerText: str | None = None
    upvotes: float | None = None

    def items(self, number: int) -> list[Item]:
        """One item a question: later answers to it are further rows of the same id."""
        text = "\n".join(
            part.strip() for part in (self.questionTitle, self.questionText or "") if part.strip()
        )
        if not text:
            raise Skip("no question")
        human = {"reply": self.answerText or "", "upvotes": self.upvotes}
        name = str(self.questionID)
        return [Item(name, asked(text), name, human=human, meta={"topic": self.topic})]
