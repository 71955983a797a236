"""Hostile pages, stores and links against the explorer, in Chromium.

A page of another site, of another port of this machine, and of a site whose name leads to this machine (DNS
rebinding) tries every request that a browser offers. Then pages are opened whose every text and parameter is
an injection. A failure is: data that a foreign page read, a script that ran, a request to another machine of
the browser or of the server, or an error on a page.
"""

from __future__ import annotations

import contextlib
import http.server
import importlib
import os
import pkgutil
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

import torch

from saebench.store.query import open_store
from tests.end_to_end.serving import CHROMIUM, browser, served, settle
from tests.store.small_store import VOCAB, SmallCache, build_store, small_options, small_sae
from tests.torture.outcome import Outcome

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FOREIGN = "attacker.test"
"""A name of the attacker that leads to this machine."""
PAYLOADS = [
    "<script>ran()</script>",
    "</script><script>ran()</script>",
    "<img src=x onerror=ran()>",
    "<svg onload=ran()>",
    "<iframe srcdoc='<script>parent.ran()</script>'></iframe>",
    "<a href='javascript:ran()'>x</a>",
    "<input autofocus onfocus=ran()>",
    "<details open ontoggle=ran()>",
    "[x](javascript:ran())",
    f"![x](http://{FOREIGN}/leak)",
    f"<img src=http://{FOREIGN}/leak>",
    f"<style>@import 'http://{FOREIGN}/leak'</style>",
    f"<meta http-equiv=refresh content='0;url=http://{FOREIGN}/leak'>",
    f"<base href=http://{FOREIGN}/>",
    f"<form action=http://{FOREIGN}/leak><button>x</button></form>",
    "{{constructor.constructor('ran()')()}}",
    "${ran()}",
    "$\\href{javascript:ran()}{x}$ :material/home: :red[x]",
    "'-ran()-'",
    '" onmouseover=ran() x="',
    "javascript:ran()",
    "\u202e<img src=x onerror=ran()>\u2066",
    "<math><mi xlink:href='javascript:ran()'>x</mi></math>",
]
VALUES = [
    "", "0", "-1", "99999999999", "1e999", "nan", "..", "-inf..inf", "#0", "#", "1,2,3,x", "\x00", "\ufffd",
    "(" * 500, "a" * 5000, "../../etc/passwd", "%00",
]  # fmt: skip
ATTACK = Path(__file__).with_name("attack.js").read_text("utf-8")
RECORDER = """
import sys
def record(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        if not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost"): return
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        address = arguments[0]
        if address in (None, "", "localhost", b"localhost", "127.0.0.1", "::1"): return
    else: return
    with open(FILE, "a") as file: file.write(f"{event} {address}\\n")
sys.addaudithook(record)
"""


def run(folder: Path, seed: int, seconds: float) -> Outcome:
    """See the module; ``folder`` gets the store."""
    outcome = Outcome("hostile pages", "page")
    if CHROMIUM is None:
        outcome.notes["skipped: no chromium (apt-get install chromium)"] = 1
        return outcome
    draw, end = random.Random(seed), time.monotonic() + seconds
    store = hostile_store(folder / "store", draw)
    with recorded(folder) as attempts, served(store) as address:
        flag = f"--host-resolver-rules=MAP {FOREIGN} 127.0.0.1"
        with browser(flag) as chromium:
            _attack(chromium, address, outcome)
            _visit(chromium, address, store, draw, end, outcome)
        outcome.failures += [f"the server asked another machine: {one}" for one in attempts()]
    return outcome


@contextlib.contextmanager
def recorded(folder: Path) -> Iterator[Any]:
    """Processes that are started meanwhile note what leaves this machine; gives a function that lists it."""
    place, file = folder / "recorder", folder / "attempts.txt"
    place.mkdir()
    (place / "sitecustomize.py").write_text(f"FILE = {str(file)!r}\n{RECORDER}")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(place), *([before] if before else [])])
    try:
        yield lambda: file.read_text().splitlines() if file.exists() else []
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def hostile_store(path: Path, draw: random.Random) -> Path:
    """A store whose tokens, titles, labels, comments, lists and views are injections."""
    payloads = draw.sample(PAYLOADS, len(PAYLOADS))
    vocab = [payloads[at % len(payloads)].encode() + bytes([65 + at]) for at in range(len(VOCAB))]
    cache = SmallCache()
    cache.vocab = lambda: vocab  # type: ignore[method-assign]
    cache.doc_labels = lambda: payloads[:4]  # type: ignore[method-assign]
    W_U_DV = torch.randn(12, len(vocab), generator=torch.Generator().manual_seed(1))
    name = payloads[4].replace("/", "")[:60]
    options = small_options(name=name)
    build_store(path, small_sae(), cache, options, W_U_DV=W_U_DV)
    with open_store(path) as opened:
        notes = opened.annotations
        for feature, payload in enumerate(payloads[:22]):
            notes.set_label(feature, payload, author=payload)
            notes.comment(feature, payload, author=payload)
            notes.add_to_list(payload, [feature, 3])
            notes.save_view(payload, urlencode({"q": payload}))
            notes.bookmark(feature)
    return path


# Pages of others


def _attack(chromium: Browser, address: str, outcome: Outcome) -> None:
    port, elsewhere = urlsplit(address).port, _Elsewhere()
    hosts = [f"http://127.0.0.1:{port}", f"http://localhost:{port}"]
    rebound = f"http://{FOREIGN}:{port}"
    origins = {
        f"http://{FOREIGN}:{elsewhere.port}": [*hosts, rebound],
        f"http://127.0.0.1:{elsewhere.port}": [*hosts, rebound],
        rebound: [*hosts, rebound],
    }
    with elsewhere:
        for origin, bases in origins.items():
            context = chromium.new_context()
            page = context.new_page()
            victim = context.new_page()  # what a visit leaves in the browser must not help
            victim.goto(f"{address}/features")
            victim.wait_for_selector("h1")
            page.route(f"{rebound}/attack", lambda route: route.fulfill(body="", content_type="text/html"))
            page.goto(f"{origin}/attack")
            targets = [
                {
                    "url": f"{base}{path}",
                    "image": f"{base}/favicon.png",
                    "script": f"{base}/static/js/index.js",
                    "stream": f"{base}/_stcore/stream",
                }
                for base in bases
                for path in ("/features", "/_stcore/health", "/_stcore/host-config", "/_stcore/metrics")
            ]
            for name, got in page.evaluate(ATTACK, targets).items():
                outcome.attempts += 1
                outcome.count("requests of foreign pages")
                if got is not None:
                    outcome.failures.append(f"{origin}: {name}: {got[:80]!r}")
            for frame in page.frames[1:]:
                with contextlib.suppress(Exception):  # a frame that went away
                    if frame.locator("[data-testid=stApp]").count():
                        outcome.failures.append(f"{origin}: {frame.url} is shown in a frame")
            context.close()


class _Elsewhere(http.server.ThreadingHTTPServer):
    """A server of the attacker: an empty page at every path."""

    def __init__(self) -> None:
        class Empty(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Empty)
        self.port = self.server_address[1]

    def __enter__(self) -> _Elsewhere:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *arguments: object) -> None:
        self.shutdown()
        self.server_close()


# Hostile stores and links


def _visit(
    chromium: Browser, address: str, store: Path, draw: random.Random, end: float, outcome: Outcome
) -> None:
    context = chromium.new_context()
    ran: list[str] = []
    context.expose_function("ran", lambda: ran.append("a script of the store or link"))
    page = context.new_page()
    page.on("dialog", lambda dialog: (ran.append("a dialog"), dialog.dismiss()))
    page.on("request", lambda request: _is_here(request.url, address) or ran.append(request.url))
    page.on("websocket", lambda one: _is_here(one.url, address) or ran.append(one.url))
    for url in _links(store, draw):
        if time.monotonic() > end and outcome.notes.get("pages opened", 0) >= 3:
            break
        outcome.attempts += 1
        outcome.count("pages opened")
        problems = _open(page, f"{address}/{url}") + ran
        outcome.failures += [f"{url[:300]}: {one}" for one in problems]
        ran.clear()
    context.close()


def _is_here(url: str, address: str) -> bool:
    start = (f"{address}/", f"blob:{address}/", "data:", "about:", f"ws{address.removeprefix('http')}/")
    return url.startswith(start)


def _open(page: Page, url: str) -> list[str]:
    """What is wrong with the page at ``url``."""
    try:
        page.goto(url)
        page.wait_for_selector("h1, [role=alert]", timeout=20_000)
        settle(page)
        for one in page.locator("[data-testid=stPopover] button").all()[:2]:
            one.click(timeout=2_000)
        settle(page)
    except Exception as error:  # a page that does not come up, which no link may cause
        return [f"it does not come up: {str(error).splitlines()[0]}"]
    text = page.locator("body").inner_text()
    problems = ["an exception"] if page.locator("[data-testid=stException]").count() else []
    return problems + ["a traceback"] * ("Traceback (most recent" in text)


def _links(store: Path, draw: random.Random) -> Iterator[str]:
    """Every page once as it is, then pages with hostile parameters, for ever."""
    import saebench_app.page
    from saebench_app.url import Query, parameters

    def known(query: type[Query]) -> list[str]:
        below = [name for one in query.__subclasses__() for name in known(one)]
        return [*parameters(query), *below]

    names = sorted({*known(Query), "token", "embed", "embed_options", "sae"})
    modules = pkgutil.iter_modules(saebench_app.page.__path__, "saebench_app.page.")
    pages = [importlib.import_module(module.name).PATH for module in modules]
    yield from draw.sample([f"{page}?f=3" for page in pages], len(pages))
    while True:
        chosen = draw.sample(names, draw.randint(1, 5))
        values = [draw.choice(PAYLOADS if draw.random() < 0.6 else VALUES) for _ in chosen]
        if draw.random() < 0.5:
            chosen, values = [*chosen, "f"], [*values, str(draw.randrange(24))]
        yield f"{draw.choice(pages)}?{urlencode(list(zip(chosen, values, strict=True)))}"
