"""Permissive defaults of dependencies are decided; docs/security.md lists all decisions and their tests."""

from __future__ import annotations

import ast
import contextlib
import http.server
import re
import threading
from importlib.metadata import version
from pathlib import Path

import pytest

from saebench.core.errors import UserError

ROOT = Path(__file__).parent.parent
FILES = [
    path
    for folder in ("saebench", "app", "data", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
REFUSED = {"pickle.load", "pickle.loads", "torch.load", "yaml.load", "yaml.unsafe_load", "eval", "exec",
           "np.fromfile", "marshal.loads", "shelve.open", "os.system", "tarfile.open"}  # fmt: skip


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]


def test_no_code_of_ours_reads_data_as_code() -> None:
    found = {f"{path.relative_to(ROOT)}: {ast.unparse(one.func)}" for path in FILES for one in calls(path)}
    assert {one for one in found if one.partition(": ")[2] in REFUSED} <= {
        "saebench/bench/peer.py: exec",
    }


def test_no_page_shows_markup_of_its_own() -> None:
    for path in FILES:
        text = path.read_text("utf-8")
        assert "unsafe_allow_html" not in text and "shell=True" not in text, path
        assert "trust_remote_code=True" not in text and "follow_redirects=True" not in text, path


def test_data_sets_with_scripts_are_not_supported_by_the_version_that_is_required() -> None:
    assert int(version("datasets").split(".")[0]) >= 4
    assert re.search(r'"datasets>=4"', (ROOT / "pyproject.toml").read_text())


def test_a_chat_template_cannot_leave_its_sandbox() -> None:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(TemplateError, match="unsafe"):
        render_jinja_template([[{"role": "user", "content": "x"}]], chat_template=template)


def test_the_api_key_does_not_follow_a_redirect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saebench.explaining.openai import OpenAICompatible
    from saebench.explaining.provider import Question

    asked: list[str] = []

    class Redirect(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(307)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    monkeypatch.setenv("A_KEY", "secret")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirect) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        provider = OpenAICompatible(
            "m", base_url=f"http://127.0.0.1:{server.server_port}", key_env="A_KEY", timeout=5, retries=0,
            concurrency=1, answers=tmp_path,
        )  # fmt: skip
        with contextlib.suppress(UserError):
            provider.ask([Question("s", "u", False, 5)])
        server.shutdown()
    assert set(asked) == {"/chat/completions"}
