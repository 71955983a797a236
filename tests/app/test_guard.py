"""What the server answers to whom, over real sockets, and the gate in front of it with a recording stub."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saebench_app.access import Access, is_loopback
from saebench_app.guard import NO_PATH, NO_TOKEN, WRONG_HOST, WRONG_ORIGIN, Guard, content_policy
from saebench_app.launch import start_server, stop, wait_until_up
from tests.app.test_launch import free_port

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
TOKEN = "a-token-of-the-tests"
PRIVATE = ("10.1.2.3", "box.example", "0.0.0.0")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: str


@dataclass
class Client:
    """Sends one request per connection, exactly as it is given."""

    port: int

    def ask(self, method: str, path: str, *lines: str, host: str | None = None) -> Answer:
        """``lines`` are header lines; ``host`` None is our own, '' leaves the header out."""
        host = f"127.0.0.1:{self.port}" if host is None else host
        head = [f"{method} {path} HTTP/1.1", *([f"Host: {host}"] if host else []), *lines]
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall("\r\n".join([*head, "Connection: close", "", ""]).encode("latin-1"))
            return self._read(connection)

    def websocket(self, *lines: str, path: str = "/_stcore/stream", host: str | None = None) -> int:
        """The status of the handshake: 101 when it is accepted."""
        key = ("Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")
        host = f"127.0.0.1:{self.port}" if host is None else host
        head = [f"GET {path} HTTP/1.1", f"Host: {host}", "Upgrade: websocket", "Connection: Upgrade"]
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall("\r\n".join([*head, *key, *lines, "", ""]).encode("latin-1"))
            return int(connection.recv(4096).split()[1])

    def _read(self, connection: socket.socket) -> Answer:
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65_536):
                received += part
        head, _, body = received.decode("utf-8", "replace").partition("\r\n\r\n")
        first, *lines = head.split("\r\n")
        pairs = [line.partition(": ") for line in lines]
        return Answer(int(first.split()[1]), {name.lower(): value for name, _, value in pairs}, body)


@contextlib.contextmanager
def serving(store: Path, token: str | None = None) -> Iterator[Client]:
    port = free_port()
    access = Access("127.0.0.1", port, token)
    server = start_server(store, access)
    try:
        assert wait_until_up(server, access)
        yield Client(port)
    finally:
        stop(server)


@pytest.fixture(scope="module")
def client(small_store: Path) -> Iterator[Client]:
    with serving(small_store) as client:
        yield client


@pytest.fixture(scope="module")
def private(small_store: Path) -> Iterator[Client]:
    """A server that asks for `TOKEN`."""
    with serving(small_store, TOKEN) as client:
        yield client


def routes() -> list[str]:
    """The paths of all routes that Streamlit registers, with names in place of their parameters."""
    from streamlit import config
    from streamlit.web.server.starlette.starlette_app import create_streamlit_routes

    with pytest.MonkeyPatch.context() as patch:
        options = config.get_config_options()
        for name in ("server.enableStaticServing", "server.scriptHealthCheckEnabled"):
            patch.setattr(options[name], "_value", True, raising=False)
            config.set_option(name, True)
        found = create_streamlit_routes(MagicMock(_main_script_path=__file__))
        for name in ("server.enableStaticServing", "server.scriptHealthCheckEnabled"):
            config.set_option(name, False)
    paths = [re.sub(r"\{[^}]*\}", "x", getattr(route, "path", "")) or "/" for route in found]
    return sorted(set(paths))


def pages() -> list[str]:
    from saebench_app.main import MODULES

    return [f"/{module.PATH}" for module in MODULES]


ALL_PATHS = [*routes(), "/features", "/feature?f=1", "/sql?query=SELECT%201", "/static/x.js", "/nothing/here"]


def test_the_walk_over_routes_sees_all_kinds_of_them() -> None:
    there = " ".join(ALL_PATHS)
    for kind in ("health", "metrics", "host-config", "media", "upload", "component", "stream", "agent"):
        assert kind in there


# Whom the server answers


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST", "127.0.0.1:9"])
def test_own_names_are_answered(client: Client, host: str) -> None:
    host = host.format(port=client.port)
    assert client.ask("GET", "/features", host=host).status == 200
    assert client.ask("GET", "/_stcore/health", f"Origin: http://{host}", host=host).status == 200
    assert client.websocket(f"Origin: http://{host}", host=host) == 101


FOREIGN_HOSTS = [
    "evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example",
    "127.0.0.1@evil.example", "evil.example#127.0.0.1", "127.0.0.1:{port}:80", "10.0.0.1", "[::1]",
    "0.0.0.0:{port}", "127.1", "2130706433", "127.0.0.1:x", "localhost.", "[127.0.0.1]x", "",
]  # fmt: skip


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_foreign_host_is_refused_on_every_path(client: Client, host: str) -> None:
    host = host.format(port=client.port)
    for path in ALL_PATHS if host.startswith("evil.example:") else ("/features", "/_stcore/health"):
        for origin in ((), (f"Origin: http://{host}",)):
            answer = client.ask("GET", path, *origin, host=host)
            assert (answer.status, answer.body.strip()) in [(403, WRONG_HOST), (400, answer.body.strip())]
    assert client.websocket(f"Origin: http://{host}", host=host) in (400, 403)
    assert client.websocket(host=host) in (400, 403)


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "http://127.0.0.1:1", "http://localhost:{port}", "https://127.0.0.1:{port}",
     "null", "http://127.0.0.1:{port}.evil.example", "http://127.0.0.1:{port}/", "file://", ""],
)  # fmt: skip
def test_a_foreign_origin_is_refused_on_every_path(client: Client, origin: str) -> None:
    line = f"Origin: {origin.format(port=client.port)}"
    for path in ALL_PATHS if "evil" in origin else ("/features", "/_stcore/health"):
        for method in METHODS if "evil" in origin else ("GET", "OPTIONS"):
            answer = client.ask(method, path, line)
            assert answer.status == 403
            assert method == "HEAD" or answer.body.strip() == WRONG_ORIGIN
            assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert client.websocket(line) == 403


def test_two_hosts_or_origins_are_refused(client: Client) -> None:
    own = f"127.0.0.1:{client.port}"
    assert client.ask("GET", "/", "Host: evil.example").status in (400, 403)
    assert client.ask("GET", "/", f"Origin: http://{own}", "Origin: http://evil.example").status == 403
    assert client.ask("GET", f"http://evil.example:{client.port}/features").status in (200, 400, 404)


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_only_links_that_are_followed_reach_a_page_from_another_site(client: Client, site: str) -> None:
    def ask(mode: str, dest: str, path: str = "/features", method: str = "GET") -> int:
        lines = (f"Sec-Fetch-Site: {site}", f"Sec-Fetch-Mode: {mode}", f"Sec-Fetch-Dest: {dest}")
        return client.ask(method, path, *lines).status

    assert ask("navigate", "document") == 200
    for dest in ("iframe", "frame", "object", "embed"):
        assert ask("navigate", dest) == 403
    for dest in ("script", "image", "style", "empty", "video", "font"):
        assert ask("no-cors", dest, "/favicon.png") == 403
    assert ask("navigate", "document", method="POST") == 403
    assert client.ask("GET", "/features", "Sec-Fetch-Site: none").status == 200


# What is served


def test_only_what_pages_need_is_served(client: Client) -> None:
    assert {path for path in ALL_PATHS if client.ask("GET", path).status == 200} == {
        "/", "/_stcore/health", "/_stcore/host-config", "/features", "/feature?f=1", "/sql?query=SELECT%201",
        "/static/x.js",  # an unknown file is the index of all pages
    }  # fmt: skip
    for path in (*ALL_PATHS, "/_stcore/upload_file/x/y"):
        for method in METHODS:
            answer = client.ask(method, path)
            if answer.status != 404:
                upload = path.startswith("/_stcore/upload_file/") and method in ("PUT", "DELETE")
                assert (method in ("GET", "HEAD") and answer.status == 200) or upload, (method, path)
    assert client.websocket(path="/_stcore/other") == 403


def test_every_page_of_the_menu_is_served(client: Client) -> None:
    assert {client.ask("GET", page).status for page in pages()} == {200}


@pytest.mark.parametrize(
    "path",
    ["/static/../../../../etc/passwd", "/static/%2e%2e/%2e%2e/app.py", "/static/..%2f..%2fconfig.py",
     "/media/..%2f..%2fetc%2fpasswd", "/%2e%2e/%2e%2e/etc/passwd", "//evil.example", "/\\evil.example",
     "/static/..%5c..%5cconfig.py", "/static/%00", "/component/x/../../y",
     "/features/../_stcore/metrics", "/./_stcore/metrics", "/_stcore//metrics", "/%5fstcore/metrics"],
)  # fmt: skip
def test_no_path_leaves_what_is_served(client: Client, path: str) -> None:
    answer = client.ask("GET", path)
    assert answer.status in (400, 404)
    assert "location" not in answer.headers
    assert not any(word in answer.body for word in ("root:", "import ", "# TYPE", "Traceback"))


def test_an_upload_needs_the_token_of_a_page(client: Client) -> None:
    body = "Content-Length: 0"
    assert client.ask("PUT", "/_stcore/upload_file/x/y", body).status == 403
    assert client.ask("DELETE", "/_stcore/upload_file/x/y").status == 403


def test_no_page_may_send_messages_to_the_app(client: Client) -> None:
    assert '"allowedOrigins":[]' in client.ask("GET", "/_stcore/host-config").body


def test_every_answer_forbids_frames_other_sites_and_shared_caches(client: Client) -> None:
    for path in ("/", "/features", "/_stcore/health", "/favicon.png", "/no/such", "/media/none.csv"):
        headers = client.ask("GET", path).headers
        policy = headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy and "default-src 'none'" in policy
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "cache-control" in headers
    script = policy.split("script-src ")[1].split(";")[0]
    assert "unsafe-inline" not in script and "http" not in script
    assert "SameSite=Strict" in client.ask("GET", "/_stcore/health").headers["set-cookie"]


def test_the_policy_allows_just_the_scripts_of_the_index() -> None:
    policy = content_policy("<script>a</script><script src='x.js'></script>")
    assert re.findall("sha256-[^']+", policy) == ["sha256-ypeBEsobvcr6wjGzmiPcTaeG7/gUfE5yuYB3ha/uSLs="]


# The token


def refused(answer: Answer, method: str = "GET") -> bool:
    """Whether it is 403 with our sentence alone."""
    quiet = not any(word in str(answer.headers) + answer.body for word in ("small", "/store", "set-cookie"))
    return answer.status == 403 and quiet and (method == "HEAD" or answer.body == f"{NO_TOKEN}\n")


@pytest.mark.parametrize(
    "line", ["X-None: 1", "Cookie: saebench_{port}=wrong", "Cookie: saebench_{port}=" + TOKEN,
             "Authorization: token " + TOKEN, "Cookie: saebench_{port}="],
)  # fmt: skip
def test_without_the_cookie_no_route_answers(private: Client, line: str) -> None:
    line = line.format(port=private.port)
    for path in ALL_PATHS:
        for method in METHODS:
            assert refused(private.ask(method, path, line), method), (method, path)
        mark = "&" if "?" in path else "?"
        for wrong in (f"token={TOKEN}x", "token=", f"token={TOKEN}&token=x", "token=%00", "token=%ff"):
            assert refused(private.ask("GET", f"{path}{mark}{wrong}", line))
        assert private.websocket(line, path=path.partition("?")[0]) == 403
    assert private.websocket(line, path=f"/_stcore/stream?token={TOKEN}") == 403


def cookie(private: Client) -> str:
    answer = private.ask("GET", f"/features?token={TOKEN}")
    pair, *attributes = answer.headers["set-cookie"].split("; ")
    assert sorted(attributes) == ["HttpOnly", "Path=/", "SameSite=Strict"]
    assert TOKEN not in pair
    return pair


def test_the_token_is_exchanged_for_a_cookie_and_a_clean_url(private: Client) -> None:
    answer = private.ask("GET", f"/features?q=a%26b&token={TOKEN}&sort=density")
    assert answer.status == 303
    assert answer.headers["location"] == "/features?q=a%26b&sort=density"
    assert answer.headers["cache-control"] == "no-store"
    line = f"Cookie: a=b; {cookie(private)}; c=d"
    assert private.ask("GET", "/features?sort=density", line).status == 200
    assert private.ask("GET", "/_stcore/metrics", line).body == f"{NO_PATH}\n"
    assert private.websocket(line, f"Origin: http://127.0.0.1:{private.port}") == 101
    assert private.websocket(line, "Origin: http://evil.example") == 403
    assert private.ask("GET", "/features", line, host="evil.example").status == 403
    assert refused(private.ask("GET", "/features?token=wrong", line))


def test_a_link_on_another_site_gives_the_cookie_without_a_redirect(private: Client) -> None:
    lines = ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document")
    answer = private.ask("GET", f"/features?token={TOKEN}", *lines)
    assert (answer.status, answer.headers["refresh"]) == (200, "0; url=/features")


def test_the_token_leads_nowhere_but_to_pages(private: Client) -> None:
    for path in (
        "//evil.example",
        "/_stcore/metrics",
        "/%2f%2fevil.example",
        "/\\evil.example",
        "/static/%0d%0aSet-Cookie:%20x",
    ):
        answer = private.ask("GET", f"{path}?token={TOKEN}")
        assert (answer.status, "location" in answer.headers) in [(404, False), (400, False)]
    answer = private.ask("GET", f"/static/a%20b;%22?token={TOKEN}&q=%0d%0aSet-Cookie:%20x")
    assert answer.headers["location"] == "/static/a%20b%3B%22?q=%0D%0ASet-Cookie%3A+x"


# The gate itself, with nothing behind it


@given(
    host=st.sampled_from(["127.0.0.1:8501", "localhost", "evil.example", "10.1.2.3:8501", "[::1]:8501"]),
    origin=st.sampled_from([None, "http://127.0.0.1:8501", "http://localhost", "http://evil.example", ""]),
    site=st.sampled_from([None, "none", "same-origin", "same-site", "cross-site"]),
    path=st.sampled_from(["/", "/features", "/_stcore/stream", "/_stcore/metrics", "/media/a.csv"]),
    method=st.sampled_from(METHODS),
    kind=st.sampled_from(["http", "websocket"]),
    key=st.sampled_from([None, "wrong", "right"]),
)
def test_what_passes_is_ours_and_has_the_cookie(
    host: str, origin: str | None, site: str | None, path: str, method: str, kind: str, key: str | None
) -> None:
    passed: list[str] = []
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["path"])

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(app, Access("127.0.0.1", 8501, TOKEN), "default-src 'none'")
    given_cookie = {"wrong": "saebench_8501=x", "right": f"saebench_8501={guard._cookie}"}.get(key or "")
    pairs = {"host": host, "origin": origin, "sec-fetch-site": site, "cookie": given_cookie}
    headers = [(name.encode(), value.encode()) for name, value in pairs.items() if value is not None]
    scope = {"type": kind, "path": path, "method": method, "query_string": b"", "headers": headers}
    asyncio.run(guard(scope, None, send))  # type: ignore[arg-type]
    ours = host in ("127.0.0.1:8501", "localhost") and origin in (None, f"http://{host}")
    if passed:
        assert ours and key == "right" and site in (None, "none", "same-origin")
        assert (path == "/_stcore/stream") == (kind == "websocket")
    else:
        assert sent
        assert sent[0].get("status", 403) in (403, 404) and sent[0].get("code", 1008) == 1008


@pytest.mark.parametrize(
    ("host", "answered", "refused"),
    [
        ("127.0.0.1", "127.0.0.1 localhost", "[::1] 10.1.2.3 box"),
        ("127.0.0.2", "127.0.0.2 127.0.0.1 localhost", "10.1.2.3"),
        ("localhost", "127.0.0.1 localhost", "box"),
        ("::1", "[::1] localhost", "127.0.0.1 box"),
        ("10.1.2.3", "10.1.2.3", "127.0.0.1 localhost 10.1.2.4 box"),
        ("Box.example", "box.example BOX.example", "example evil.box.example 10.1.2.3"),
        ("0.0.0.0", "127.0.0.1 localhost 10.1.2.3 [fd00::1]", "box evil.example 0x7f000001"),
        ("::", "[::1] [fd00::1] 10.1.2.3 localhost", "box"),
        ("", "127.0.0.1 10.1.2.3", "box"),
    ],
)
def test_the_names_that_an_address_answers_to(host: str, answered: str, refused: str) -> None:
    access = Access(host, 8501)
    assert [name for name in answered.split() if not access.answers_to(name)] == []
    assert [name for name in refused.split() if access.answers_to(name)] == []


def test_loopback_is_told_from_the_network() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost", "LocalHost")))
    assert not any(map(is_loopback, (*PRIVATE, "", "::", "::ffff:10.0.0.1", "127.1", "localhost.example")))


def test_the_printed_url_has_the_token_and_an_address_that_a_browser_opens() -> None:
    assert Access("127.0.0.1", 8501).url == "http://127.0.0.1:8501/features"
    assert Access("::1", 8501, "t").url == "http://[::1]:8501/features?token=t"
    assert Access("0.0.0.0", 80, "t").url == "http://127.0.0.1:80/features?token=t"
