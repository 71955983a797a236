"""Atomic file writes, locks, and disk errors as UserError."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.core import files
from saebench.core.errors import UserError
from saebench.core.reading import read_json
from saebench.store.exports import new_directory

ROOT = Path(__file__).parents[1]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@given(JSON)
@settings(deadline=None)
def test_json_round_trips_and_equal_values_give_equal_bytes(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    path = tmp_path_factory.mktemp("json") / "value.json"
    files.write_json_atomic(path, value)
    assert read_json(path, what="the value") == value
    once = path.read_bytes()
    files.write_json_atomic(path, json.loads(once))
    assert path.read_bytes() == once


def test_json_hash_does_not_depend_on_key_order() -> None:
    assert files.sha256_json({"a": 1, "b": [2]}) == files.sha256_json({"b": [2], "a": 1})
    assert files.sha256_json({"a": 1}) != files.sha256_json({"a": 2})


def test_nonfinite_numbers_write_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json_atomic(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_exception_in_the_body_leaves_only_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    files.write_bytes_atomic(path, b"old")

    def write_half() -> None:
        with files.atomic_file(path) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


def test_data_is_synced_before_the_rename_and_the_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        done.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "data")
        fsync(descriptor)

    def noting_replace(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    files.write_bytes_atomic(tmp_path / "x.bin", b"new")
    assert done == ["data", "rename", "directory"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_kill_before_the_rename_leaves_the_old_file(tmp_path: Path, step: str) -> None:
    path = tmp_path / "x.bin"
    files.write_bytes_atomic(path, b"old")
    killed = run_python(
        """
        import os, signal, sys
        from pathlib import Path
        from saebench.core import files
        setattr(os, sys.argv[2], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        files.write_bytes_atomic(Path(sys.argv[1]), b"new")
        """,
        path,
        step,
    )
    assert killed.returncode == -9, killed.stderr
    assert path.read_bytes() == b"old"
    left = {p.name for p in tmp_path.iterdir()} - {"x.bin"}
    assert all(name.endswith(files.TEMPORARY_SUFFIX) for name in left)
    files.write_bytes_atomic(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_full_disk_raises_user_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    files.write_bytes_atomic(path, b"old")
    full = run_python(
        """
        import resource, signal, sys
        from pathlib import Path
        from saebench.core import files
        from saebench.core.errors import UserError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            files.write_bytes_atomic(Path(sys.argv[1]), bytes(100_000))
        except UserError as error:
            print(error)
        """,
        path,
    )
    assert full.returncode == 0, full.stderr
    assert full.stdout.startswith(f"no space left while writing {path}")
    assert full.stdout.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]
    assert path.read_bytes() == b"old"


def test_second_writer_raises_user_error_until_the_first_ends(tmp_path: Path) -> None:
    attempt = """
        import sys
        from pathlib import Path
        from saebench.core.errors import UserError
        from saebench.core.files import directory_lock
        try:
            with directory_lock(Path(sys.argv[1]), what="the store"):
                print("mine")
        except UserError as error:
            print(error)
        """
    with files.directory_lock(tmp_path / "new", what="the store"):
        assert "another process is writing the store" in run_python(attempt, tmp_path / "new").stdout
    assert run_python(attempt, tmp_path / "new").stdout == "mine\n"


def test_killed_writer_does_not_block_the_next(tmp_path: Path) -> None:
    killed = run_python(
        """
        import os, signal, sys
        from pathlib import Path
        from saebench.core.files import directory_lock
        with directory_lock(Path(sys.argv[1]), what="the store"):
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    assert killed.returncode == -9
    with files.directory_lock(tmp_path, what="the store"):
        pass


def test_file_instead_of_directory_raises_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="choose another --out"):
            files.require_writable(path, what="the cache")


def test_unwritable_directory_raises_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match="not writable"):
        files.require_writable(tmp_path, what="the cache")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left while writing"),
        (errno.EDQUOT, "no space left while writing"),
        (errno.EACCES, "cannot write .*choose another place"),
        (errno.EROFS, "cannot write .*choose another place"),
    ],
)
def test_refused_writes_raise_user_error(tmp_path: Path, number: int, message: str) -> None:
    with pytest.raises(UserError, match=message), files.atomic_file(tmp_path / "x"):
        raise OSError(number, "refused")
    assert not list(tmp_path.iterdir())


def test_other_os_errors_are_not_converted(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="refused"), files.atomic_file(tmp_path / "x"):
        raise OSError(errno.EIO, "refused")


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK])
def test_directory_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with files.directory_lock(tmp_path, what="the store"):
        pass
    assert "has no locks" in capsys.readouterr().err


def test_lock_that_may_not_be_opened_raises_user_error(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock"), files.directory_lock(tmp_path, what="the store"):
        pass


def test_path_that_is_not_utf8_round_trips(tmp_path: Path) -> None:
    value = {"path": os.fsdecode(b"a\xff"), "text": "\\udcff ü"}
    files.write_json_atomic(tmp_path / "x", value)
    assert json.loads((tmp_path / "x").read_text("utf-8")) == value == read_json(tmp_path / "x", what="x")


def test_too_little_disk_space_raises_user_error(tmp_path: Path) -> None:
    out = tmp_path / "not" / "yet"
    files.require_disk(out, 1, what="the cache")
    with pytest.raises(UserError, match=r"the cache needs 1024\.0 TiB but .* free"):
        files.require_disk(out, 2**50, what="the cache")
    assert not out.exists()


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 * 2**29, "1.5 GiB"), (2**50, "1024.0 TiB")],
)
def test_human_bytes(n: int, text: str) -> None:
    assert files.human_bytes(n) == text


def test_nonfinite_numbers_become_none_at_any_depth() -> None:
    nan, inf = float("nan"), float("inf")
    given = {"a": nan, "b": [1, 2.5, (inf, "x")], "c": {"d": -inf, "e": None, "f": True}}
    assert files.finite(given) == {
        "a": None,
        "b": [1, 2.5, [None, "x"]],
        "c": {"d": None, "e": None, "f": True},
    }


def test_leftovers_of_killed_writers_are_removed_and_those_of_running_ones_kept(tmp_path: Path) -> None:
    program = (
        "import os, sys, time; from pathlib import Path; from saebench.core.files import atomic_file\n"
        "from saebench.store.exports import new_directory; out = Path(sys.argv[1])\n"
        "with atomic_file(out / 'a.json') as file, new_directory(out / 'b') as folder:\n"
        "    (folder / 'x').write_text('x'); print('ready', flush=True); sys.stdin.read()\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert writer.stdout is not None and writer.stdin is not None
    writer.stdout.readline()
    left = {f".a.json.{writer.pid}.partial", f".b.{writer.pid}.partial"}
    (tmp_path / ".a.json.partial.txt").touch()
    (tmp_path / ".aajson.1.partial").touch()
    files.remove_dead(tmp_path, "a.json")
    files.remove_dead(tmp_path, "b")
    assert left <= {path.name for path in tmp_path.iterdir()}
    writer.kill()
    writer.communicate()
    with new_directory(tmp_path / "b") as folder:
        (folder / "y").touch()
    files.remove_dead(tmp_path, "a.json")
    assert {path.name for path in tmp_path.iterdir()} == {"b", ".a.json.partial.txt", ".aajson.1.partial"}
