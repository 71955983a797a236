"""Another library in a process of its own: requests and answers are JSON lines, arrays are files."""

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
    """A running SAELens; see ``saelens_peer.py`` for what it can be asked."""

    process: subprocess.Popen[str]
    log: IO[str]

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Wait for the answer to one request.

        Raises:
            RuntimeError: the other process ended, with the last lines that it printed.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"the peer ended while asked to {command}:\n{self.log.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def python_of(environment: Path) -> Path | None:
    """The Python of a virtual environment, if it is there."""
    python = environment / "bin" / "python"
    return python if python.exists() else None


@contextlib.contextmanager
def running_peer(environment: Path, *, threads: int) -> Iterator[Peer]:
    """SAELens in the Python of ``environment``; it ends with the block.

    Raises:
        UserError: there is no such environment, or none with sae-lens.
    """
    python = python_of(environment)
    if python is None:
        raise UserError(f"{environment} is no virtual environment; make peers builds .venv-peers")
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
