"""`python -m preft`: the `preft` command."""

import sys

from preft.cli import main

if __name__ == "__main__":
    sys.exit(main())
