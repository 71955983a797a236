"""``python -m saebench``, where the installed command is not on the PATH."""

import sys

from saebench.cli import main

sys.exit(main())
