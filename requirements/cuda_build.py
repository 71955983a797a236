"""Exit status 0 if the installed torch needs libraries of CUDA that are packages of their own."""

import re
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

needed = [Requirement(line) for line in requires("torch") or ()]
cuda = [
    one for one in needed if re.match(r"nvidia|cuda", one.name) and (not one.marker or one.marker.evaluate())
]
sys.exit(not cuda)
