"""A store on a read-only mount is read, checked and exported; what would write says so in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from saebench.store import open_store
from tests.store.small_store import build_small_store

SCRIPT = """
import json, sys
import saebench as sb
from saebench.core.errors import UserError
from saebench.store import open_store
from saebench.store.check import check_store
from saebench.store.extras import publish_extra
from saebench.store.rebuild import rebuild_store

path, out, said = sys.argv[1], sys.argv[2], {}

def attempt(name, do):
    try:
        said[name] = do()
    except UserError as error:
        said[name] = f"refused: {error}"

try:
    open(path + "/x", "w").close()
    said["mount"] = "writable"
except OSError:
    said["mount"] = "fixed"
attempt("check", lambda: [str(finding) for finding in check_store(path)])
with open_store(path) as store:
    notes = store.annotations
    attempt("features", lambda: len(store.features()))
    attempt("sql", lambda: int(store.sql("SELECT count(*) AS n FROM feature")["n"][0]))
    attempt("label", lambda: notes.label(3))
    attempt("export", lambda: sb.export_store(store=path, format="html", features=[3], out=out).n_features)
    for name, do in {
        "set_label": lambda: notes.set_label(1, "x"),
        "bookmark": lambda: notes.bookmark(1),
        "comment": lambda: notes.comment(1, "x"),
        "add_to_list": lambda: notes.add_to_list("mine", [1]),
        "import": lambda: notes.import_json(notes.export_json()),
        "explain": lambda: sb.explain(path, quiet=True),
        "rebuild": lambda: rebuild_store(path, quiet=True),
        "extra": lambda: publish_extra(
            store.path, store.sae, "effects", lambda connection: None, made_from=store.info()
        ),
    }.items():
        attempt(name, do)
print(json.dumps(said, default=str))
"""


def read_only(store: Path, out: Path) -> dict[str, object]:
    """What the script says about ``store``, in a namespace where it is mounted read-only."""
    mount = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit 77; exec "$0" -c "$3" "$1" "$2"'
    own = [] if os.geteuid() == 0 else ["--map-root-user"]
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare, to mount the store read-only")
    done = subprocess.run(
        ["unshare", "--mount", *own, "sh", "-c", mount, sys.executable, str(store), str(out), SCRIPT],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"the store cannot be mounted read-only here ({done.stderr.strip()[-200:]})")
    assert done.returncode == 0, done.stderr
    said: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert said["mount"] == "fixed"
    return said


@pytest.mark.parametrize("left", ["closed", "killed", "copied", "none"])
def test_a_read_only_store_is_healthy_and_refuses_writes_with_a_sentence(tmp_path: Path, left: str) -> None:
    """``left``: how user.sqlite was left: closed, with the log and index of a killed writer, with the log
    alone (as a copy leaves it), or not there."""
    path = build_small_store(tmp_path / "store")
    if left != "none":
        with open_store(path) as store:
            store.annotations.set_label(3, "first")
    if left in ("killed", "copied"):
        writer = (
            "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
            "c.execute('PRAGMA wal_autocheckpoint = 0'); c.execute(\"UPDATE labels SET label = 'newer'\")\n"
            "os._exit(0)"
        )
        subprocess.run([sys.executable, "-c", writer, str(path / "user.sqlite")], check=True)
        assert (path / "user.sqlite-wal").stat().st_size > 0
    if left == "copied":
        (path / "user.sqlite-shm").unlink()
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    said = read_only(path, tmp_path / "out")
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}.keys() == before.keys()
    assert said["check"] == []
    assert (said["features"], said["sql"], said["export"]) == (24, 24, 1)
    assert said["label"] == {"closed": "first", "none": None}.get(left, "newer")
    for name in ("set_label", "bookmark", "comment", "add_to_list", "explain", "rebuild", "extra"):
        assert str(said[name]).startswith("refused: "), (name, said[name])
        assert "\n" not in str(said[name])
    for name in ("set_label", "bookmark", "comment", "add_to_list"):
        assert "ask for write access to the store" in str(said[name]), said[name]
