"""TinyWorld: the embedded model and the small English world that it was trained on.

The world is a seeded generator (facts, grammar, social messages, users), the model a small Llama trained from
scratch by `make tinyworld`; its folder `MODEL_DIR` loads like any Hugging Face model. `READABLE_DIR` holds a second,
smaller one, which answers about messages alone: its planted directions can be read as well, but no training ever
shifted a latent along them (`python -m shared.tinyworld.train --readable`).
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "weights"
READABLE_DIR = Path(__file__).parent / "weights_readable"
EMBEDDED = {"tinyworld": MODEL_DIR, "tinyworld-readable": READABLE_DIR}  # by the name that loads them

__all__ = ["EMBEDDED", "MODEL_DIR", "READABLE_DIR"]
