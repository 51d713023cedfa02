"""`python -m assumptions`: the `assumptions` command."""

import sys

from assumptions.cli import main

if __name__ == "__main__":
    sys.exit(main())
