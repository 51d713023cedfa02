"""`python -m preft`: the `preft` command."""

import sys

from preft.cli import main

sys.exit(main())
