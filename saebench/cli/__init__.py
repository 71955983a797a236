"""The `saebench` command: parse the arguments, call the function of one command, and print its result.

Heavy packages are imported only when a command runs, so that ``--help`` and ``--version`` are fast.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from saebench.core.errors import UserError
from saebench.core.refusals import out_of_memory, refusal

USER_MUST_CHANGE_SOMETHING = 2
INTERRUPTED = 130
PIPE_CLOSED = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done. 2: the user must change something (one sentence on stderr). 130 or 143: interrupted. 141: the
    reader of stdout closed the pipe. A bug raises its exception, which gives a traceback and exit code 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that are not UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
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
    except Exception as error:
        if memory := out_of_memory(error):
            return _refuse(f"{memory}; {_to_need_less(arguments)}")
        if sentence := refusal(error):
            return _refuse(sentence)
        raise


def _doctor(*, as_json: bool) -> int:
    """Run ``saebench doctor`` without the argument parser, which may be a broken package itself."""
    from saebench.cli.doctor import doctor

    result = doctor()
    print(result.render(as_json=as_json))
    return 0 if result.error_message is None else _refuse(result.error_message)


def _refuse(sentence: str) -> int:
    print(f"saebench: {sentence}", file=sys.stderr)
    return USER_MUST_CHANGE_SOMETHING


def _to_need_less(arguments: Sequence[str]) -> str:
    """What makes the command need less memory."""
    command = arguments[0] if arguments else ""
    return {
        "train": "lower --batch-size or --d-sae",
        "harvest": "lower --batch-size or --ctx",
        "eval": "lower --batch-size",
        "index": "lower --batch-size",
        "bench": "lower --batch-size",
        "demo": "lower --d-sae or choose a smaller --model",
    }.get(command, "close other programs or use a machine with more memory")
