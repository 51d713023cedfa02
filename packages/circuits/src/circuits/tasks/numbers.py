"""Two-digit addition and greater-than: forms for tokenizers with whole numbers, three digits a token, or single digits.

Addition: 36 + 59 = 95, operands from 0 to 99. The counterfactual has another sum of the same tens, so that the pair can
also be put to a tokenizer of single digits: the tens are given and the last digit is asked ("36 + 59 = 9", "5").

Greater-than (Hanna et al., arXiv 2305.00586): "The war lasted from the year 1732 to the year 17" must go on with more
than 32. The answer lies between the clean start and the counterfactual's, the wrong answer below both: right under the
clean prompt alone, so that the counterfactual's metric is near zero, not negative.
"""

import random
from collections.abc import Iterator

from circuits.tasks.items import Item, Task
from shared.tinyworld.tasks import Pair


def _addition(part: str, rng: random.Random) -> Iterator[Item]:
    while True:
        x, y = rng.randrange(100), rng.randrange(100)
        total = x + y
        other = rng.choice([n for n in range(total // 10 * 10, total // 10 * 10 + 10) if n != total])
        if other > 198:
            continue
        u = rng.randint(max(0, other - 99), min(99, other))
        yield _sum_item((x, y), (u, other - u))


def _sum_item(clean: tuple[int, int], corrupt: tuple[int, int]) -> Item:
    total, other = sum(clean), sum(corrupt)
    plain, asked = "{} + {} =", "What is {} + {}? Answer: "
    head = str(total)[:-1]
    last_digits = (str(total % 10), str(other % 10)) if head else (f" {total}", f" {other}")
    forms = (
        _pair(plain, clean, corrupt, f" {total}", f" {other}"),
        _pair(asked, clean, corrupt, str(total), str(other)),
        _pair(f"{plain} {head}" if head else plain, clean, corrupt, *last_digits),
    )
    labels = {
        "ones": str(total % 10),
        "ones mod 5": str(total % 5),
        "parity": "even" if total % 2 == 0 else "odd",
        "tens": str(total // 10 % 10),
        "hundreds": str(total // 100),
    }
    groups = tuple("{}+{}".format(*operands) for operands in (clean, corrupt))
    return Item(forms, groups, labels, "Answer: ")


def _pair(wording: str, clean: tuple[int, int], corrupt: tuple[int, int], answer: str, wrong: str) -> Pair:
    return Pair(wording.format(*clean), wording.format(*corrupt), answer, wrong, "addition")


EVENTS = (
    "war", "siege", "voyage", "reign", "project", "famine", "strike", "drought", "trial", "tour", "boom", "plague",
    "campaign", "dispute", "expedition", "construction",
)  # fmt: skip


def _greater_than(part: str, rng: random.Random) -> Iterator[Item]:
    while True:
        event, century = rng.choice(EVENTS), rng.randint(11, 18)
        low, start, answer, end = sorted(rng.sample(range(1, 100), 4))
        tens = [n // 10 for n in (low, start, answer, end)]
        wording = f"The {event} lasted from the year {century}{{:02d}} to the year "
        forms = [_years(wording + str(century), start, end, f"{answer:02d}", f"{low:02d}")]
        if tens[0] < tens[1] < tens[2] < tens[3]:  # also in tens, for tokens of one digit or of three
            forms.append(_years(wording + str(century), start, end, str(tens[2]), str(tens[0])))
            forms.append(_years(wording, start, end, f"{century}{tens[2]}", f"{century}{tens[0]}"))
        groups = (event, f"{century}{start:02d}")
        yield Item(tuple(forms), groups, {"century": str(century), "decade": str(tens[1])})


def _years(wording: str, start: int, end: int, answer: str, wrong: str) -> Pair:
    return Pair(wording.format(start), wording.format(end), answer, wrong, "greater_than")


TASKS = {"addition": Task("addition", _addition), "greater_than": Task("greater_than", _greater_than)}
