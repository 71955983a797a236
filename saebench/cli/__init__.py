"""The `saebench` command: parse the arguments, call the function of one command, and print its result.

Heavy packages are imported only when a command runs, so that ``--help`` and ``--version`` are fast.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from saebench.core.errors import UserError

USER_MUST_CHANGE_SOMETHING = 2
INTERRUPTED = 130
PIPE_CLOSED = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done. 2: the user must change something (one sentence on stderr). 130 or 143: interrupted. 141: the
    reader of stdout closed the pipe. A bug raises its exception, which gives a traceback and exit code 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["doctor"], ["doctor", "--json"]):
        return _doctor(as_json="--json" in arguments)
    from cyclopts import CycloptsError

    from saebench.cli.app import error_message, run

    try:
        code = run(arguments)
        sys.stdout.flush()
        return code
    except CycloptsError as error:
        return _refuse(error_message(error, arguments))
    except UserError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("saebench: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout is gone. Without this, Python reports it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        return _refuse(f"no space left on the disk{where}; free some space, then run the same command again")
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _refuse(f"{_first_line(error)}; lower {_what_to_lower(arguments)}")


def _doctor(*, as_json: bool) -> int:
    """Run ``saebench doctor`` without the argument parser, which may be a broken package itself."""
    from saebench.cli.doctor import doctor

    result = doctor()
    print(result.render(as_json=as_json))
    return 0 if result.error_message is None else _refuse(result.error_message)


def _refuse(sentence: str) -> int:
    print(f"saebench: {sentence}", file=sys.stderr)
    return USER_MUST_CHANGE_SOMETHING


def _out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    cpu_allocator = "DefaultCPUAllocator: can't allocate memory" in str(error)
    return (
        isinstance(error, MemoryError)
        or cpu_allocator
        or (torch is not None and isinstance(error, torch.OutOfMemoryError))
    )


def _first_line(error: BaseException) -> str:
    """The first sentence of an out-of-memory error."""
    text = str(error).split("\n", 1)[0].split(". ", 1)[0].strip().rstrip(".")
    return f"out of memory ({text})" if text else "out of memory"


def _what_to_lower(arguments: Sequence[str]) -> str:
    """The settings of the command that determine its memory use."""
    command = arguments[0] if arguments else ""
    return {
        "train": "--batch-size or --d-sae",
        "harvest": "--batch-size or --ctx",
        "demo": "--d-sae or choose a smaller --model",
    }.get(command, "--batch-size")
