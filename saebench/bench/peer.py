"""``Peer``: SAELens in a separate process; requests and answers are JSON lines, arrays are files."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from saebench.core.errors import UserError

SCRIPT = Path(__file__).with_name("saelens_peer.py")
MISSING = "not installed: make peers"


@dataclass(frozen=True)
class Peer:
    """A running SAELens process; ``saelens_peer.py`` has its commands."""

    process: subprocess.Popen[str]
    log: IO[str]

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and return the answer.

        Raises:
            RuntimeError: the process ended; the message has the last lines that it printed.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"the SAELens process ended during {command!r}:\n{self.log.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def python_of(environment: Path) -> Path | None:
    """The Python of a virtual environment, or None if it does not exist."""
    python = environment / "bin" / "python"
    return python if python.exists() else None


@contextlib.contextmanager
def running_peer(environment: Path, *, threads: int) -> Iterator[Peer]:
    """Run SAELens in the Python of ``environment`` until the end of the block.

    Raises:
        UserError: the environment does not exist, or cannot import sae-lens.
    """
    python = python_of(environment)
    if python is None:
        raise UserError(f"{environment} is not a virtual environment; make peers creates .venv-peers")
    settings = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [str(python), str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **settings},
        ) as process,
    ):
        peer = Peer(process, log)
        try:
            try:
                peer.ask("versions", threads=threads)
            except RuntimeError as error:
                reason = str(error).rstrip().rsplit("\n", 1)[-1]
                raise UserError(f"{environment} cannot run sae-lens ({reason}); run make peers") from None
            yield peer
        finally:
            process.terminate()
