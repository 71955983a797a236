"""Parts of GPU timing that need no GPU: numbers of calls, reasons of failures, and the commit."""

import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saebench.bench import provenance
from saebench.bench.gpu_timing import CALL_SECONDS, MOST_REPEATS, reason, repeats_for


@given(st.floats(0, 1e4))
def test_repeats_fit_in_call_seconds_and_are_at_least_1(seconds):
    repeats = repeats_for(seconds)
    assert 1 <= repeats <= MOST_REPEATS
    assert repeats == 1 or repeats * seconds <= CALL_SECONDS
    assert repeats == MOST_REPEATS or (repeats + 1) * seconds > CALL_SECONDS * (1 - 1e-9)


OUT_OF_MEMORY = """CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB
of which 1.2 GiB is free."""


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            torch.OutOfMemoryError(OUT_OF_MEMORY),
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        ),
        (
            ImportError("cannot import name 'A'\nfrom 'b'. Try c."),
            "ImportError: cannot import name 'A' from 'b'",
        ),
        (ValueError(), "ValueError"),
    ],
)
def test_reason_is_type_and_first_sentence(error, text):
    assert reason(error) == text


@given(st.text())
def test_reason_is_one_line_of_at_most_100_characters(text):
    line = reason(RuntimeError(text))
    assert line.startswith("RuntimeError")
    assert len(line) <= 100
    assert len(line.splitlines()) == 1


def test_commit_is_of_checkout_and_none_outside(tmp_path, monkeypatch):
    assert provenance.commit(tmp_path) is None
    (tmp_path / ".git").mkdir()  # a damaged repository is not an error
    assert provenance.commit(tmp_path) is None
    (tmp_path / ".git").rmdir()
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@b")

    def git(*words):
        done = subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "--quiet")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "--quiet", "-m", "a")
    clean = provenance.commit(tmp_path)
    assert clean is not None and git("rev-parse", "HEAD").startswith(clean)
    (tmp_path / "a").write_text("2")
    assert provenance.commit(tmp_path) == f"{clean}-dirty"
