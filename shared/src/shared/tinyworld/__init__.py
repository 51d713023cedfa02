"""TinyWorld: the embedded model and the small English world that it was trained on.

The world is a seeded generator (facts, grammar, social messages, users), the model a small Llama trained from
scratch by `make tinyworld`; its folder `MODEL_DIR` loads like any Hugging Face model.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "weights"

__all__ = ["MODEL_DIR"]
