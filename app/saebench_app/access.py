"""Who may use the explorer, and for what: the names that its server answers to, the token, read-only."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass

from saebench.core.errors import UserError

READ_ONLY = "SAEBENCH_EXPLORER_READ_ONLY"
"""Environment variable of the server: 1 switches annotations, jobs and SQL off."""
EVERY_ADDRESS = ("", "0.0.0.0", "::")


@dataclass(frozen=True)
class Access:
    """``host`` and ``port`` are what the server listens on; without a ``token`` no one is asked for one."""

    host: str
    port: int
    token: str | None = None

    @property
    def url(self) -> str:
        """Where the explorer begins, with the token."""
        name = "127.0.0.1" if self.host in EVERY_ADDRESS else self.host
        token = f"?token={self.token}" if self.token else ""
        return f"http://{f'[{name}]' if ':' in name else name}:{self.port}/features{token}"

    @property
    def cookie(self) -> str:
        """The name of the cookie: browsers send it to every port of a host, so it says which one."""
        return f"saebench_{self.port}"

    def answers_to(self, name: str) -> bool:
        """Whether ``name``, of a Host header, is one of ours.

        A page of another site reaches this server under a name of its own that leads here (DNS rebinding), so
        only known names are ours. A server that listens on every address is asked for by any of them; a
        page cannot choose what an address leads to.
        """
        name = name.lower().removeprefix("[").removesuffix("]")
        if self.host in EVERY_ADDRESS:
            return name == "localhost" or _address(name) is not None
        if not is_loopback(self.host):
            return name == self.host.lower()
        return name in (self.host.lower(), "localhost", "::1" if ":" in self.host else "127.0.0.1")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on ``host``."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def read_only() -> bool:
    """Whether the explorer was started with --read-only."""
    return os.environ.get(READ_ONLY) == "1"


def refuse_if_read_only(what: str) -> None:
    """Raises UserError when the explorer is read-only; ``what``, in the plural, is off then."""
    if read_only():
        raise UserError(f"{what} are off, because the explorer was started with --read-only")
