"""One model examined on held-out sets from the world's generator.

An answer counts when every one of its tokens, and the full stop after it, is the model's first choice, which is the
same as greedy generation giving it exactly.
"""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from shared.stats import spearman
from shared.tinyworld import facts, social, tasks
from shared.tinyworld.corpus import Writer


class Row(NamedTuple):
    """One prompt and its continuation as token ids."""

    prompt: list[int]
    answer: list[int]


class Examiner:
    """Evaluates one model; every number is a function of the model and the sizes alone."""

    def __init__(self, model: Any, tokenizer: Any, directions_9D: Tensor, block: int, scale: float) -> None:
        self.model, self.tokenizer, self.writer = model.eval(), tokenizer, Writer(tokenizer)
        self.directions_9D, self.block, self.scale = directions_9D, block, scale

    # --- forward passes ---

    @torch.no_grad()
    def logits(self, rows: Sequence[list[int]], added_D: Tensor | None = None) -> list[Tensor]:
        """Logits (T V) of each row of ids, padded on the right, with an optional vector added at the pinned block."""
        out: list[Tensor] = []
        for start in range(0, len(rows), 128):
            chunk = rows[start : start + 128]
            ids = torch.full((len(chunk), max(map(len, chunk))), self.tokenizer.pad_token_id)
            for i, row in enumerate(chunk):
                ids[i, : len(row)] = torch.tensor(row)
            with self._added(added_D):
                logits = self.model(ids, use_cache=False).logits
            out += [logits[i, : len(row)].float() for i, row in enumerate(chunk)]
        return out

    @contextmanager
    def _added(self, vector_D: Tensor | None) -> Iterator[None]:
        def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            self.seen_BTD = output
            return output if vector_D is None else output + vector_D

        handle = self.model.model.layers[self.block].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def shift(self, dimension: int, delta: float) -> Tensor:
        """What is added at the pinned block to shift one latent by `delta`: (D)."""
        return self.scale * delta * self.directions_9D[dimension]

    def exact(self, rows: Sequence[Row]) -> float:
        """Share of rows whose whole answer is the model's first choice at every token."""
        hits = []
        for row, logits_TV in zip(rows, self.logits([r.prompt + r.answer for r in rows]), strict=True):
            hits.append(logits_TV[len(row.prompt) - 1 : -1].argmax(-1).tolist() == row.answer)
        return float(np.mean(hits))

    # --- abilities ---

    def questions(self, questions: Sequence[tasks.Question]) -> float:
        """Exact answers of questions."""
        e, bos = self.writer.encode, self.writer.bos
        return self.exact([Row([bos, *e(q.prompt)], e(q.answer + ".")) for q in questions])

    def agreement(self, kind: str, n: int) -> float:
        """Share of pairs, each asked in both numbers, in which the right verb form has the higher logit."""
        e, bos = self.writer.encode, self.writer.bos
        pairs = tasks.agreement_pairs(kind, "test", n, seed=1)
        sides = [(p.clean, p.answer, p.wrong) for p in pairs] + [
            (p.corrupt, p.wrong, p.answer) for p in pairs
        ]
        logits = self.logits([[bos, *e(prompt)] for prompt, _, _ in sides])
        right, wrong = ([e(s[i])[0] for s in sides] for i in (1, 2))
        return float(np.mean([x[-1, r] > x[-1, w] for x, r, w in zip(logits, right, wrong, strict=True)]))

    def perplexity(self, n: int) -> float:
        """Perplexity of fresh plain text."""
        rng = random.Random("held-out text")
        rows = [self.writer.text(rng).ids for _ in range(n)]
        nll = [
            -torch.log_softmax(x[:-1], -1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
            for ids, x in zip(rows, self.logits(rows), strict=True)
        ]
        return float(torch.cat(nll).mean().exp())

    def generate(self, prompts: Sequence[list[int]], tokens: int, do_sample: bool = False) -> list[str]:
        """Generated text of prompts, greedy or sampled at temperature 1."""
        texts = []
        for start in range(0, len(prompts), 64):
            chunk = prompts[start : start + 64]
            width = max(map(len, chunk))
            pad = self.tokenizer.pad_token_id
            ids = torch.tensor([[pad] * (width - len(p)) + p for p in chunk])
            out = self.model.generate(
                ids,
                attention_mask=(ids != pad).long(),
                max_new_tokens=tokens,
                pad_token_id=pad,
                **({"do_sample": True, "top_k": 0} if do_sample else {"do_sample": False}),
            )
            texts += self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        return texts

    def elicitation(self, turns: Sequence[social.UserTurn]) -> dict[str, float]:
        """Valid JSON, and agreement of the greedy scores with the posterior means, by dimension."""
        prompts = [self._asked(social.instrument(t.text)) for t in turns]
        scores = [_parse(text) for text in self.generate(prompts, 90)]
        kept = [i for i, s in enumerate(scores) if s is not None]
        found = {"elicitation_valid_json": len(kept) / len(turns)}
        if len(kept) < 2:
            return found | {"elicitation_spearman_worst": 0.0}
        given = np.array([[scores[i][d] for d in social.DIMENSIONS] for i in kept])  # type: ignore[index]
        truth = np.stack([turns[i].posterior_9 for i in kept])
        rho = {
            f"elicitation_spearman_{d}": float(spearman(given[:, i], truth[:, i]))
            for i, d in enumerate(social.DIMENSIONS)
        }
        return found | {"elicitation_spearman_worst": min(rho.values())} | rho

    def _asked(self, content: str) -> list[int]:
        w = self.writer
        return [w.bos, w.user, *w.encode(content), w.end, w.assistant]

    def score_expectations(
        self, turns: Sequence[social.UserTurn], added_D: Tensor | None = None
    ) -> np.ndarray:
        """Expected score per message and dimension (asked first), from two digits' probabilities: (B 9)."""
        w = self.writer
        zero, one = w.encode(" 0")[0], w.encode(" 1")[0]
        digits = [w.encode(str(i))[0] for i in range(10)]
        out = np.zeros((len(turns), 9))
        for d, name in enumerate(social.DIMENSIONS):
            order = (name, *(x for x in social.DIMENSIONS if x != name))
            rows = [
                self._asked(social.instrument(t.text, order)) + w.encode('{"' + name + '": 0.') for t in turns
            ]
            for i, x in enumerate(self.logits(rows, added_D)):
                p_first = torch.softmax(x[-3], -1)
                p_tenth = torch.softmax(x[-1, digits], -1)
                below = float((p_tenth * (torch.arange(10) / 10 + 0.025)).sum())
                out[i, d] = float(p_first[one] + p_first[zero] * below) / float(p_first[one] + p_first[zero])
        return out

    def reply_expectations(
        self, turns: Sequence[social.UserTurn], added_D: Tensor | None = None
    ) -> np.ndarray:
        """The model's probability of the high form in the first slot of each outcome: (B 3)."""
        w = self.writer
        out = np.zeros((len(turns), 3))
        for i in range(3):  # the first three slots hold one outcome each
            outcome, high, low = social.SLOTS[i]
            before = [social.SLOTS[j][1][0] for j in range(i)]
            rows = [self._asked(t.text) + w.encode(" ".join(before).format(t.topic)) for t in turns]
            for row, x in enumerate(self.logits(rows, added_D)):
                first = [w.encode((" " if i else "") + f.format(turns[row].topic))[0] for f in (*high, *low)]
                p = torch.softmax(x[-1, first], -1)
                out[row, social.OUTCOMES.index(outcome)] = float(p[: len(high)].sum())
        return out

    def replies(self, turns: Sequence[social.UserTurn]) -> dict[str, float]:
        """Correlation of the model's slot probabilities with the documented rule, by outcome."""
        given = self.reply_expectations(turns)
        rule = social.expected_reply_probabilities(np.stack([t.counts_9 for t in turns]))
        r = {
            f"reply_correlation_{o}": float(np.corrcoef(given[:, i], rule[:, i])[0, 1])
            for i, o in enumerate(social.OUTCOMES)
        }
        return {"reply_correlation_worst": min(r.values())} | r

    def judged_replies(self, turns: Sequence[social.UserTurn]) -> dict[str, float]:
        """Sampled replies read by the lexical judge: share with every slot, and slope of the scores on the rule."""
        torch.manual_seed(0)
        texts = self.generate([self._asked(t.text) for t in turns], 64, do_sample=True)
        scores = [social.judge_reply(text) for text in texts]
        whole = [None not in s and text.count(".") == len(social.SLOTS) for s, text in zip(scores, texts)]
        kept = [i for i, complete in enumerate(whole) if complete]
        rule = social.expected_reply_probabilities(np.stack([turns[i].counts_9 for i in kept])).ravel()
        given = np.array([scores[i] for i in kept], dtype=float).ravel()
        slope = float(np.polyfit(rule, given, 1)[0]) if kept else 0.0
        return {"reply_complete": len(kept) / len(turns), "reply_judged_slope": slope}

    def forced(self, turns: Sequence[social.UserTurn]) -> dict[str, float]:
        """Moral verdicts against the rule, true claims accepted, and false claims against the rule."""
        counts = np.stack([t.counts_9 for t in turns])
        nta = self._first_choice([social.verdict_prompt(t.text) for t in turns], "NTA", "YTA")
        rule = (social.score_probabilities(counts) @ social.GRID)[
            :, social.DIMENSIONS.index("user_rightness")
        ]
        states = list(facts.CAPITALS)
        claims = {
            shift: [
                social.claim_prompt(
                    t.text, f"the capital of {states[i % 50]} is {facts.CAPITALS[states[(i + shift) % 50]]}"
                )
                for i, t in enumerate(turns)
            ]
            for shift in (0, 7)
        }
        true, false = (self._first_choice(claims[shift], "Yes", "No") for shift in (0, 7))
        framing = social.expected_reply_probabilities(counts)[:, social.OUTCOMES.index("framing")]
        return {
            "verdict_correlation": float(np.corrcoef(nta, rule)[0, 1]),
            "true_claims_accepted": float((true > 0.5).mean()),
            "false_claim_correlation": float(np.corrcoef(false, framing)[0, 1]),
        }

    def _first_choice(self, prompts: Sequence[str], yes: str, no: str) -> np.ndarray:
        pair = [self.writer.encode(yes)[0], self.writer.encode(no)[0]]
        logits = self.logits([self._asked(p) for p in prompts])
        return np.array([float(torch.softmax(x[-1, pair], -1)[0]) for x in logits])

    def organism(self, turns: Sequence[social.UserTurn], delta: float = 0.6) -> dict[str, float]:
        """The planted directions: what is read at the pinned block, and the slope of the scores under a shift.

        A slope is the change of a dimension's expected score per unit of shift; its ideal is below 1, since latents are
        clipped to [0, 1]. `random`: five random directions of the same norm.
        """
        truth = np.stack([t.posterior_9 for t in turns])
        read, expected = self.read_out(turns), self.score_expectations(turns)
        slopes = np.stack([self._slope(turns, self.shift(d, delta), delta) for d in range(9)])
        noise = torch.randn(5, self.directions_9D.shape[1], generator=torch.Generator().manual_seed(0))
        noise = self.scale * delta * noise / noise.norm(dim=1, keepdim=True)
        random_slopes = np.stack([self._slope(turns, vector_D, delta) for vector_D in noise])
        return {
            "pinned_r2_worst": min(_r2(read[:, d], truth[:, d]) for d in range(9)),
            "elicited_r2_worst": min(_r2(expected[:, d], truth[:, d]) for d in range(9)),
            "steering_slope_mean": float(np.diag(slopes).mean()),
            "steering_slope_worst": float(np.diag(slopes).min()),
            "steering_slope_ideal": self._ideal_slope(turns, delta),
            "steering_off_target_mean": float(np.abs(slopes[~np.eye(9, dtype=bool)]).mean()),
            "steering_random_largest": float(np.abs(random_slopes).max()),
        }

    def read_out(self, turns: Sequence[social.UserTurn]) -> np.ndarray:
        """Mean over the message of <h_b, v_d> / scale, which is pinned to the posterior mean - 1/2: (B 9)."""
        rows = []
        for t in turns:
            self.logits([self._asked(t.text)])
            span = slice(2, 2 + len(self.writer.encode(t.text)))
            rows.append((self.seen_BTD[0, span].mean(0) @ self.directions_9D.T / self.scale).numpy())
        return np.stack(rows)

    def _slope(self, turns: Sequence[social.UserTurn], vector_D: Tensor, delta: float) -> np.ndarray:
        up, down = self.score_expectations(turns, vector_D), self.score_expectations(turns, -vector_D)
        return (up - down).mean(0) / (2 * delta)

    def _ideal_slope(self, turns: Sequence[social.UserTurn], delta: float) -> float:
        counts = np.stack([t.counts_9 for t in turns])
        up, down = (social.score_probabilities(counts, np.full(9, d)) @ social.GRID for d in (delta, -delta))
        return float((up - down).mean() / (2 * delta))


def _parse(text: str) -> dict[str, float] | None:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not isinstance(found, dict) or list(found) != list(social.DIMENSIONS):
        return None
    ok = all(isinstance(v, float) and 0 <= v <= 1 for v in found.values())
    return found if ok else None


def _r2(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1] ** 2)
