"""`python -m circuits`: the `circuits` command."""

import sys

from circuits.cli import main

if __name__ == "__main__":
    sys.exit(main())
