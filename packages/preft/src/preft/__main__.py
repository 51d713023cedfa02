"""`python -m preft`: the `preft` command."""

import sys

from preft.cli import main

if __name__ == "__main__":  # processes that vLLM spawns import this module again
    sys.exit(main())
