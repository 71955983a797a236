"""``python -m saebench.cli``: the `saebench` command, also if it is not on the PATH."""

import sys

from saebench.cli import main

sys.exit(main())
