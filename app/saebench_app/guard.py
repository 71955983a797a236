"""The gate in front of the server: it refuses a request before Streamlit or a page sees anything of it.

Streamlit's own options do not suffice: ``server.allowedHosts`` covers its websocket only, and HTTP paths
answer any Host and Origin. This ASGI middleware decides for both, in this order: the Host is one of ours, the
Origin is ours, the browser does not say that another site asks, the token is right, and the path is one
that the pages need.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, quote, urlencode

from saebench_app.access import Access

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
"""As the ASGI specification has them."""

HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:@/?#\[\]]+)(:[0-9]{1,5})?")
READ = ("GET", "HEAD")
PAGES = re.compile(r"/([a-z]*/?|index\.html|manifest\.json|favicon\.png)|/static/.+|/media/[^/]+")
PROBES = re.compile(r"/_stcore/(health|host-config)")
UPLOADS = re.compile(r"/_stcore/upload_file/[^/]+/[^/]+")
STREAM = "/_stcore/stream"

WRONG_HOST = "The explorer does not answer to this name; open the URL that saebench explore printed."
WRONG_ORIGIN = "The explorer answers only its own pages; open the URL that saebench explore printed."
NO_TOKEN = (
    "This explorer needs its token: open the URL that saebench explore printed, or, after that, paste "
    "this address into the address bar."
)
NO_PATH = "The explorer has nothing here; open the URL that saebench explore printed."

ALWAYS = [
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
]
NOT_KEPT = (b"cache-control", b"no-store")
INLINE_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def content_policy(index: str) -> str:
    """The Content-Security-Policy: pages load and send nothing elsewhere, and are in no frame.

    ``index`` is the HTML that all pages begin with. Of scripts inside pages, only its own ones run, so
    text that became markup would still not be a script. Scripts of components arrive as ``blob:``. Plotly's
    scatter plots of many points compile functions at run time, which needs 'unsafe-eval'.
    """
    scripts = [
        base64.b64encode(hashlib.sha256(one.encode()).digest()) for one in INLINE_SCRIPT.findall(index)
    ]
    hashes = "".join(f" 'sha256-{one.decode()}'" for one in scripts)
    return (
        f"default-src 'none'; script-src 'self' 'unsafe-eval' blob:{hashes}; "
        "style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src blob:; "
        "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


@dataclass(frozen=True)
class Refusal:
    """``sentence`` tells nothing about the store, nor whether it exists."""

    status: int
    sentence: str


class Headers:
    """The headers of a request; one may be given several times."""

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        self._pairs = [(name.lower().decode("latin-1"), value.decode("latin-1")) for name, value in pairs]

    def all(self, name: str) -> list[str]:
        return [value for given, value in self._pairs if given == name]

    def get(self, name: str, default: str = "") -> str:
        return next(iter(self.all(name)), default)


class Guard:
    """ASGI middleware; see the module. ``policy`` is the Content-Security-Policy of every answer."""

    def __init__(self, app: ASGIApp, access: Access, policy: str) -> None:
        self._app = app
        self._headers = [(b"content-security-policy", policy.encode()), *ALWAYS]
        self._access = access
        self._cookie = secrets.token_urlsafe(32)
        """What the token is exchanged for; the token itself stays in no browser."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope["headers"])
        refusal = self._refusal(scope, headers)
        if scope["type"] == "websocket":
            if refusal:
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self._app(scope, receive, send)
            return
        send = self._with_headers(send)
        given = [value for name, value in _query(scope) if name == "token"] if self._access.token else []
        if given and (refusal is None or refusal.sentence == NO_TOKEN):
            refusal = self._wrong(given) or _no_path(scope)
            if refusal is None:
                await self._exchange(scope, headers, send)
                return
        if refusal:
            await _answer(send, refusal.status, f"{refusal.sentence}\n")
            return
        await self._app(scope, receive, send)

    def _with_headers(self, send: Send) -> Send:
        """``send``, with our headers on every answer and without leave for other origins."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = [pair for pair in message["headers"] if not _is_replaced(pair[0].lower())]
                cached = any(name.lower() == b"cache-control" for name, _ in given)
                message["headers"] = [*given, *self._headers, *([] if cached else [NOT_KEPT])]
            await send(message)

        return send_with_headers

    def _refusal(self, scope: Scope, headers: Headers) -> Refusal | None:
        hosts = headers.all("host")
        match = HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None or not self._access.answers_to(match[1]):
            return Refusal(403, WRONG_HOST)
        if not _is_ours(scope, headers, hosts[0]):
            return Refusal(403, WRONG_ORIGIN)
        if self._access.token and not self._has_cookie(headers):
            return Refusal(403, NO_TOKEN)
        return _no_path(scope)

    def _has_cookie(self, headers: Headers) -> bool:
        pairs = [pair.strip() for line in headers.all("cookie") for pair in line.split(";")]
        wanted = f"{self._access.cookie}={self._cookie}"
        return any([_equal(pair, wanted) for pair in pairs])

    def _wrong(self, given: list[str]) -> Refusal | None:
        assert self._access.token is not None
        right = all([_equal(token, self._access.token) for token in given])
        return None if right else Refusal(403, NO_TOKEN)

    async def _exchange(self, scope: Scope, headers: Headers, send: Send) -> None:
        """Give the cookie, and lead to the same address without the token."""
        rest = urlencode([pair for pair in _query(scope) if pair[0] != "token"])
        clean = quote(scope["path"]) + (f"?{rest}" if rest else "")
        cookie = f"{self._access.cookie}={self._cookie}; Path=/; HttpOnly; SameSite=Strict"
        # The cookie would be missing after a redirect of a link on another site's page: there, the answer
        # itself leads on, and the next request is one of our own page.
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            await _answer(send, 200, "", {"set-cookie": cookie, "refresh": f"0; url={clean}"})
        else:
            await _answer(send, 303, "", {"set-cookie": cookie, "location": clean})


def _is_ours(scope: Scope, headers: Headers, host: str) -> bool:
    """Whether no page of another site asks, as far as the browser says."""
    origins = headers.all("origin")
    if origins and origins != [f"http://{host}"]:
        return False
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return True
    # A link on another page may open one of ours, in a window of its own.
    followed = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
    return followed and scope["type"] == "http" and scope["method"] == "GET"


def _no_path(scope: Scope) -> Refusal | None:
    """The refusal of what no page needs: metrics, sign-in, the interface for agents, unknown methods."""
    path = scope["path"]
    if scope["type"] == "websocket":
        served = path == STREAM
    elif scope["method"] in READ:
        served = bool(PAGES.fullmatch(path) or PROBES.fullmatch(path))
    else:
        served = scope["method"] in ("PUT", "DELETE") and bool(UPLOADS.fullmatch(path))
    return None if served else Refusal(404, NO_PATH)


def _is_replaced(name: bytes) -> bool:
    """Whether a header of an answer is ours, or would give leave to other origins."""
    ours = (b"content-security-policy", *(name for name, _ in ALWAYS))
    return name in ours or name.startswith(b"access-control-")


def _query(scope: Scope) -> list[tuple[str, str]]:
    return parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)


def _equal(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())


async def _answer(send: Send, status: int, text: str, headers: dict[str, str] | None = None) -> None:
    body = text.encode()
    more = {"content-type": "text/plain; charset=utf-8", "content-length": str(len(body)), **(headers or {})}
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in more.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
