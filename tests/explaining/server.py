"""A local chat-completions server for tests, whose answers a test chooses, malformed ones included."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler", dict[str, Any]], None]


@dataclass
class Served:
    """The address of the server, the requests it received, and the function that answers them."""

    url: str
    answer: Answer
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    served: Served
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.served.bodies.append(body)
        self.served.headers.append(dict(self.headers))
        with contextlib.suppress(ConnectionError):
            self.served.answer(self, body)

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def say(self, text: str | None, *, yes: float | None = None, **message: Any) -> None:
        import math

        choice: dict[str, Any] = {"message": {"content": text, **message}, "finish_reason": "stop"}
        if yes is not None:
            top = [{"token": " Yes", "logprob": math.log(yes)}, {"token": "no", "logprob": math.log(1 - yes)}]
            choice["logprobs"] = {"content": [{"top_logprobs": top}]}
        self.send(200, json.dumps({"choices": [choice], "usage": {"total_tokens": 50}}).encode())

    def dribble(self, *, header: bool) -> None:
        """Send an endless answer, byte by byte."""
        self.close_connection = True
        start = b"HTTP/1.1 200 OK\r\nX: " if header else b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"
        self.wfile.write(start)
        while not self.served.stopped.is_set():
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.02)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[Served]:
    served = Served("", answer)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"served": served}))
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        served.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
