"""Write the lock files anew: ``make lock``. Needs uv.

``lock.txt`` names every package of the environment of ``make`` (the extra ``dev``), with the SHA-256 of each
file that a package index may serve for it, for every Python and platform that pyproject.toml allows.
``cuda.txt`` has the libraries that the CUDA build of torch needs; ``make`` installs them where that build was
chosen. CPU builds of torch for Linux are not on PyPI: ``--torch-wheels FOLDER`` adds the hashes of those in a
folder. Hashes of them that are in the file stay as long as the version of torch does.

Versions stay as they are, unless ``--upgrade`` is given or pyproject.toml asks for others.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
LOCK, CUDA, BUILD = FOLDER / "lock.txt", FOLDER / "cuda.txt", FOLDER / "build.txt"
OLDEST_PYTHON = "3.11.5"  # mkdocs-material's dependencies need it
HEADER = "# Written by `make lock`. {}\n"


def entries(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """Of each package: its name, the line that pins it, its hashes."""
    for block in re.split(r"\n(?=[^\s#])", "\n" + re.sub(r"^#.*\n", "", text, flags=re.M)):
        if block.strip():
            pin, *hashes = [line.strip().rstrip("\\").strip() for line in block.strip().splitlines()]
            yield re.split(r"[=\s]", pin, maxsplit=1)[0], pin, sorted(hashes)


def is_build(name: str) -> bool:
    """Packages that build others; they come first, so that none is built with a version nobody chose."""
    return name == "setuptools"


def is_cuda(name: str) -> bool:
    return name.startswith(("nvidia-", "cuda-"))


def written(packages: list[tuple[str, str, list[str]]], header: str) -> str:
    lines = [" \\\n".join([pin, *(f"    {each}" for each in hashes)]) for _, pin, hashes in packages]
    return HEADER.format(header) + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch-wheels", type=Path, help="a folder with CPU builds of the locked torch")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    options = parser.parse_args()
    before = "".join(file.read_text("utf-8") for file in (LOCK, CUDA, BUILD) if file.exists())
    with tempfile.TemporaryDirectory() as folder:
        pins, out = Path(folder) / "pins.txt", Path(folder) / "lock.txt"
        pins.write_text("" if options.upgrade else "\n".join(pin for _, pin, _ in entries(before)))
        call = [
            *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes"),
            *("--python-version", OLDEST_PYTHON, "--no-header", "--no-annotate", "--extra", "dev"),
            *("--constraint", str(pins), "--output-file", str(out), str(FOLDER.parent / "pyproject.toml")),
        ]
        if subprocess.run(call, check=False).returncode:
            return 1
        found = list(entries(out.read_text("utf-8")))
    known = {(name, pin): hashes for name, pin, hashes in entries(before)}
    for name, pin, hashes in found:
        if name == "torch":
            version = pin.split("==")[1].split()[0]
            wheels = options.torch_wheels.glob(f"torch-{version}+*.whl") if options.torch_wheels else ()
            extra = [f"--hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}" for wheel in wheels]
            hashes[:] = sorted({*hashes, *extra, *known.get((name, pin), ())})
    rest = [one for one in found if not is_cuda(one[0]) and not is_build(one[0])]
    LOCK.write_text(written(rest, "Every package of `make`'s .venv, but for build.txt."))
    CUDA.write_text(written([one for one in found if is_cuda(one[0])], "What the CUDA build of torch needs."))
    BUILD.write_text(written([one for one in found if is_build(one[0])], "What builds packages from source."))
    return 0


if __name__ == "__main__":
    sys.exit(main())
