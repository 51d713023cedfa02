"""GRPO's parts: the objective against trl's, shared prompts against plain rows, the sampler against the reference."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from preft_cases import CONFIGS, prompt, stir
from torch import Tensor

from preft.adapters import Adapter, AdapterConfig, AdapterError
from preft.reference import greedy_reference
from preft.rl import GRPOConfig, HFSampler
from preft.rl.logprobs import Group, completion_logprobs
from preft.rl.loss import advantages, policy_loss, sample_weights
from preft.rl.rewards import REWARDS, Row, reward, reward_named
from preft.rl.tasks import TASKS, task_named
from shared.generation import Request, Sampling
from shared.models import Model, ModelConfig, load

N, G, C = 3, 4, 7


@pytest.fixture(scope="module")
def trl_trainer() -> Any:
    """trl's GRPOTrainer; its import warns that it supports vLLM up to 0.31 only, which nothing here uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import GRPOTrainer
    return GRPOTrainer


class Step:
    """Random log-probabilities, rewards and lengths of one step."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logprobs_SC = -torch.rand(N * G, C, generator=generator) * 3
        self.old_SC = self.logprobs_SC + torch.randn(N * G, C, generator=generator) * 0.3
        self.base_SC = self.logprobs_SC + torch.randn(N * G, C, generator=generator) * 0.3
        self.rewards_NG = torch.randint(0, 3, (N, G), generator=generator).float()
        self.lengths_S = torch.randint(1, C + 1, (N * G,), generator=generator)
        self.mask_SC = torch.arange(C) < self.lengths_S[:, None]

    def ours(self, config: GRPOConfig, part: slice = slice(None)) -> Tensor:
        weights_S = sample_weights(self.lengths_S, config)
        advantages_S = advantages(self.rewards_NG, config.scale_rewards).flatten()
        base_SC = self.base_SC[part] if config.beta else None
        logprobs_SC = self.logprobs_SC[part]
        return policy_loss(
            logprobs_SC,
            self.old_SC[part],
            base_SC,
            advantages_S[part],
            weights_S[part],
            self.mask_SC[part],
            config,
        ).loss

    def trls(self, trl_trainer: Any, config: GRPOConfig) -> Tensor:
        """The loss of trl's GRPOTrainer on the same numbers."""
        trainer = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, **__: (self.logprobs_SC, self.logprobs_SC, None),
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level=config.importance_sampling_level,
            beta=config.beta,
            args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
            loss_type=config.loss_type,
            epsilon_low=config.epsilon,
            epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
            use_vllm=False,
            model=SimpleNamespace(training=True),
            current_gradient_accumulation_steps=1,
            max_completion_length=config.max_completion_length,
            accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
            _entropy_bonus_enabled=False,
            _metrics={"train": _Lists()},
        )
        tokens_SC = torch.zeros(N * G, C, dtype=torch.long)
        inputs = {
            "prompt_ids": tokens_SC[:, :1],
            "prompt_mask": tokens_SC[:, :1] + 1,
            "completion_ids": tokens_SC,
            "completion_mask": self.mask_SC.long(),
            "advantages": self.trl_advantages(config),
            "old_per_token_logps": self.old_SC,
            "ref_per_token_logps": self.base_SC,
            "num_items_in_batch": self.mask_SC.sum(),
        }
        return trl_trainer._compute_loss(trainer, None, inputs)

    def trl_advantages(self, config: GRPOConfig) -> Tensor:
        """As written in trl's _generate_and_score_completions, which is one function of six hundred lines."""
        from trl.trainer.utils import nanstd

        rewards_S = self.rewards_NG.flatten()
        centred_S = rewards_S - self.rewards_NG.mean(1).repeat_interleave(G)
        match config.scale_rewards:
            case "group":
                return centred_S / (nanstd(self.rewards_NG, dim=1).repeat_interleave(G) + 1e-4)
            case "batch":
                return centred_S / (nanstd(rewards_S) + 1e-4)
        return centred_S


class _Lists(dict[str, list[float]]):
    def __missing__(self, key: str) -> list[float]:
        return self.setdefault(key, [])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_and_gradient_equal_trls(
    trl_trainer: Any, loss_type: str, level: str, scale: str, beta: float
) -> None:
    config = GRPOConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        scale_rewards=scale,
        beta=beta,
        epsilon_high=0.28,
        max_completion_length=C + 2,
    )
    step = Step(seed=3)
    step.logprobs_SC.requires_grad_()
    ours, trls = step.ours(config), step.trls(trl_trainer, config)
    torch.testing.assert_close(ours, trls)
    [ours_SC], [trls_SC] = (torch.autograd.grad(loss, step.logprobs_SC) for loss in (ours, trls))
    assert ours_SC.abs().sum() > 0
    torch.testing.assert_close(ours_SC, trls_SC)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_parts_of_a_step_add_up(loss_type: Any) -> None:
    config, step = GRPOConfig(loss_type=loss_type, beta=0.1), Step(seed=4)
    parts = sum(step.ours(config, slice(start, start + G)) for start in range(0, N * G, G))
    torch.testing.assert_close(parts, step.ours(config))


def groups() -> list[Group]:
    """Prompts of unlike lengths with completions of unlike lengths, one of a single token."""
    lengths = [(5, 1, 8, 3), (12, 6, 2, 9), (1, 4, 7, 1)]
    return [
        Group(list(prompt(first, i)), [list(prompt(n, 10 * i + n)) for n in rest])
        for i, (first, *rest) in enumerate(lengths)
    ]


class TestSharedPrompts:
    """A prompt read once gives the log-probabilities and gradients of one row a sample."""

    @pytest.mark.parametrize("name", [None, *CONFIGS])
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_equal_plain(
        self, model: Model, adapters: dict[str, Adapter], name: str | None, temperature: float
    ) -> None:
        adapter = adapters[name] if name else None
        with torch.no_grad():
            shared, plain = (
                completion_logprobs(model.hf, adapter, groups(), 0, temperature, share)
                for share in (True, False)
            )
        for one, other in zip(shared, plain):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=0)
        if temperature != 1:
            assert not torch.equal(shared.raw_SC, shared.tempered_SC)

    @pytest.mark.parametrize("name", ["lora_p_0", "reft_p_1", "lora_all", "lora_decode", "lora_boundary"])
    def test_equal_gradients(self, model: Model, name: str) -> None:
        model.hf.requires_grad_(False)
        adapter = stir(Adapter.create(model.hf, CONFIGS[name]), seed=8).requires_grad_(True)
        weights_SC = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
        found = []
        for share in (True, False):
            logprobs_SC = completion_logprobs(model.hf, adapter, groups(), 0, share_prompt=share).tempered_SC
            loss = (logprobs_SC * weights_SC[:, : logprobs_SC.shape[1]]).sum()
            found.append(torch.autograd.grad(loss, list(adapter.parameters())))
        for one, other in zip(*found):
            assert other.abs().max() > 0
            torch.testing.assert_close(one, other, atol=2e-5 * float(other.abs().max()), rtol=1e-3)

    @pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral", "qwen3"])
    def test_other_families(self, family: str) -> None:
        """Sliding windows shorter than the prompt, soft caps, norms on queries and keys."""
        model = load(ModelConfig(f"random:{family}"))
        model.hf.requires_grad_(False)
        adapter = stir(Adapter.create(model.hf, AdapterConfig(rank=4)), seed=8).requires_grad_(True)
        long = [Group(list(prompt(n, n)), [list(prompt(m, n + m)) for m in (20, 3)]) for n in (40, 25)]
        found = []
        for share in (True, False):
            logprobs_SC = completion_logprobs(model.hf, adapter, long, 0, share_prompt=share).tempered_SC
            gradients = torch.autograd.grad(logprobs_SC.sum(), list(adapter.parameters()))
            found.append((logprobs_SC.detach(), *gradients))
        for one, other in zip(*found):
            torch.testing.assert_close(one, other, atol=2e-5 * max(1.0, float(other.abs().max())), rtol=1e-3)

    def test_the_log_probabilities_are_the_models(self, model: Model, adapters: dict[str, Adapter]) -> None:
        """Against one unpadded forward pass a sample and token."""
        adapter, group = adapters["lora_p_0"], groups()[1]
        with torch.no_grad():
            found = completion_logprobs(model.hf, adapter, [group], 0).raw_SC
            for row, completion in enumerate(group.completions):
                ids = torch.tensor([group.prompt + completion])
                mask = torch.arange(ids.shape[1])[None] < len(group.prompt)
                with adapter.applied(model.hf, mask):
                    logits_TV = model.hf(input_ids=ids).logits[0].float()
                for place, token in enumerate(completion):
                    expected = logits_TV[len(group.prompt) + place - 1].log_softmax(-1)[token]
                    assert abs(float(found[row, place] - expected)) < 1e-5


class TestHFSampler:
    """Sampling over a shared prompt."""

    @pytest.mark.parametrize("name", [None, "lora_p_0", "reft_p_0", "lora_all", "lora_boundary"])
    def test_greedy_equals_the_reference(
        self, model: Model, adapters: dict[str, Adapter], name: str | None
    ) -> None:
        sampler = HFSampler(model, batch_prompts=2)
        sampler.adapter = adapters[name] if name else None
        prompts = [list(prompt(length, 4)) for length in (20, 33, 7)]
        answers = sampler.generate([Request(ids) for ids in prompts], Sampling(12))
        stops = tuple(model.eos_token_ids)
        for ids, [answer] in zip(prompts, answers):
            assert answer.token_ids == greedy_reference(model.hf, sampler.adapter, ids, 12, stops).tokens
            assert (answer.finish_reason == "stop") == (answer.token_ids[-1] in stops)

    def test_samples_do_not_depend_on_their_batch(self, model: Model, adapters: dict[str, Adapter]) -> None:
        requests = [Request(list(prompt(length, 4)), seed=length) for length in (20, 33, 7)]
        sampling = Sampling(10, temperature=1.0, n=3)
        one, many = HFSampler(model, batch_prompts=1), HFSampler(model, batch_prompts=8)
        one.update(adapters["lora_p_0"])
        many.update(adapters["lora_p_0"])
        alone, together = one.generate(requests, sampling), many.generate(requests, sampling)
        tokens = [[sample.token_ids for sample in samples] for samples in together]
        assert tokens == [[sample.token_ids for sample in samples] for samples in alone]
        assert len({tuple(sample) for samples in tokens for sample in samples}) > 3

    @pytest.mark.parametrize("name", ["lora_p_0", "reft_p_0", "lora_all"])
    def test_its_log_probabilities_are_the_trainers(
        self, model: Model, adapters: dict[str, Adapter], name: str
    ) -> None:
        sampler = HFSampler(model)
        sampler.update(adapters[name])
        prompts = [list(prompt(length, 4)) for length in (20, 33, 7)]
        sampling = Sampling(10, temperature=0.8, n=3)
        answers = sampler.generate([Request(ids, seed=1) for ids in prompts], sampling)
        rows = [Group(ids, [s.token_ids for s in samples]) for ids, samples in zip(prompts, answers)]
        with torch.no_grad():
            found = completion_logprobs(model.hf, adapters[name], rows, 0, 0.8).raw_SC
        samples = [sample for group in answers for sample in group]
        for row_C, sample in zip(found, samples):
            expected_C = torch.tensor(sample.logprobs)
            torch.testing.assert_close(row_C[: len(expected_C)], expected_C, atol=2e-5, rtol=0)


class TestRewards:
    """Rewards are verdicts on text."""

    @pytest.mark.parametrize(
        ("name", "text", "answer", "expected"),
        [
            ("exact_match", " 45\n", "45", 1),
            ("exact_match", "45.", "45", 0),
            ("answers_first", " 45. What is", " 45", 1),
            ("answers_first", " 451", " 45", 0),
            ("answers_first", " 4", " 45", 0),
            ("pattern", "yes, 12", r"(yes|no), \d+", 1),
            ("pattern", "yes, 12 or so", r"(yes|no), \d+", 0),
            ("valid_json", '{"a": 1}', "", 1),
            ("valid_json", '{"a": 1', "", 0),
        ],
    )
    def test_verdicts(self, name: str, text: str, answer: str, expected: float) -> None:
        assert reward_named(name)(text, Row("?", answer)) == expected

    def test_json_keys(self) -> None:
        row = Row("?", facts={"keys": ["a", "b"]})
        assert [REWARDS["valid_json"](text, row) for text in ('{"a": 1, "b": 2}', '{"a": 1}', "[]")] == [
            1,
            0,
            0,
        ]

    def test_a_users_own_answers_meet_every_wish_and_other_styles_fewer(self) -> None:
        for split in ("train", "test"):
            rows = TASKS["user"].rows(split, 60, 5)
            assert all(REWARDS["user_style"](row.answer, row) == 1 for row in rows)
            bare = [REWARDS["user_style"](str(row.facts["sentence"]), row) for row in rows]
            assert all(value < 1 for value in bare)
            assert all(REWARDS["user_style"]("", row) <= 0.25 for row in rows)

    def test_names_are_taken_once_and_unknown_ones_listed(self) -> None:
        with pytest.raises(AdapterError, match="a reward named 'exact_match' already"):
            reward("exact_match")(lambda text, row: 0.0)
        with pytest.raises(AdapterError, match="no reward named 'best'; known are answers_first"):
            reward_named("best")
        with pytest.raises(AdapterError, match="no task named 'chess'; known are user"):
            task_named("chess")

    @pytest.mark.parametrize("name", TASKS)
    def test_splits_share_no_question(self, name: str) -> None:
        train, test = (TASKS[name].rows(split, 200, 0) for split in ("train", "test"))
        assert train
        assert test
        assert not {str(row.prompt) for row in train} & {str(row.prompt) for row in test}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_generations": 1}, "at least 2"),
        ({"temperature": 0.0}, "above 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"loss_type": "ppo"}, "not one of grpo, dapo, dr_grpo"),
    ],
)
def test_settings_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        GRPOConfig(**wrong)
