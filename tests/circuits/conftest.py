"""Tiny random models in float64, one of each family, and the small trained model where it is at hand."""

from pathlib import Path

import pytest
import torch

from circuits.attribution import Problem, pose
from circuits.metric import top_logits
from shared.families import FAMILIES
from shared.models import Model, ModelConfig, load
from shared.tokens import pad

BESIDE = Path(__file__).parents[2] / ".." / "shared"
STORIES = BESIDE / "models" / "stories260k"
ROWS = [[1, 40, 77, 9, 120, 33, 201], [1, 90, 13, 55, 7]]


@pytest.fixture(scope="session")
def random_models() -> dict[str, Model]:
    """Filled on demand: loading all families takes seconds."""
    return {}


@pytest.fixture(params=list(FAMILIES))
def any_model(request: pytest.FixtureRequest, random_models: dict[str, Model]) -> Model:
    return _cached(random_models, request.param)


@pytest.fixture
def llama(random_models: dict[str, Model]) -> Model:
    return _cached(random_models, "llama")


@pytest.fixture(scope="session")
def linear_model() -> Model:
    """GPT-2 made linear: identity activation, no queries, and norms whose scale their epsilon alone sets."""
    from transformers import AutoModelForCausalLM

    from shared.architecture import Architecture
    from shared.loading import wrap
    from shared.random_models import byte_tokenizer, randomise, tiny_config

    tokenizer = byte_tokenizer()
    config = tiny_config("gpt2", tokenizer)
    config.activation_function, config.layer_norm_epsilon = "linear", 1e12
    hf = AutoModelForCausalLM.from_config(config)
    randomise(hf, 0)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                parameter.mul_(1e6)
            if "c_attn" in name:
                parameter[..., : config.hidden_size] = 0
    hf = hf.double().eval()
    return Model(
        hf, wrap(hf, tokenizer), tokenizer, Architecture(hf), ModelConfig("random:gpt2", dtype="float64")
    )


def _cached(models: dict[str, Model], family: str) -> Model:
    if family not in models:
        models[family] = load(ModelConfig(f"random:{family}", dtype="float64"))
    return models[family]


@pytest.fixture(scope="session")
def stories() -> Model:
    if not STORIES.is_dir():
        pytest.skip("the trained 260K model is not beside this checkout (../shared/models/stories260k)")
    return load(ModelConfig(str(STORIES)))


@pytest.fixture
def problem_of():
    def make(model: Model, rows=None, padding_side: str = "right", k: int = 2, **options) -> Problem:
        rows = ROWS if rows is None else rows
        batch = pad(rows, [len(row) for row in rows], 0, padding_side)
        return pose(model, batch, lambda logits, at: top_logits(logits, at, k), **options)

    return make


@pytest.fixture
def relative():
    """Largest difference, relative to the largest expected value."""

    def measure(got: torch.Tensor, expected: torch.Tensor) -> float:
        return float((got - expected).abs().max() / expected.abs().max())

    return measure


@pytest.fixture(scope="session")
def world() -> Model:
    """The embedded model."""
    return load(ModelConfig("tinyworld"))


@pytest.fixture(scope="session")
def sva() -> Path:
    folder = BESIDE / "data" / "sva"
    if not folder.is_dir():
        pytest.skip("the public SVA files are not beside this checkout (../shared/data/sva)")
    return folder


@pytest.fixture(scope="session")
def word_tokenizer():
    """Make a byte-level BPE tokenizer that has the words of some texts as tokens, numbers cut every few digits."""

    def make(texts, digits: int = 1):
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        space = " ?" if digits < 3 else ""  # as in GPT-2, and as in Llama 3
        pattern = rf" ?\p{{L}}+|{space}\p{{N}}{{1,{digits}}}| ?[^\s\p{{L}}\p{{N}}]+|\s"
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=8000, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
        )
        core.train_from_iterator(texts, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")

    return make
