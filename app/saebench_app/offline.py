"""Keep a process of the explorer on this machine: it connects to no other one, and looks up no name."""

from __future__ import annotations

import ipaddress
import os
import sys
from typing import Any

HUB = "HF_HUB_OFFLINE"
CONNECTS = ("socket.connect", "socket.sendto", "socket.sendmsg")
LOOKS_UP = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")


def stay_offline() -> None:
    """Refuse, from now on and whichever library asks, what would leave this machine.

    With 0 in the environment variable HF_HUB_OFFLINE, which asks for downloads of models, nothing is refused.
    """
    if os.environ.setdefault(HUB, "1") not in ("0", ""):
        sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in CONNECTS:
        address = arguments[1]
        if isinstance(address, tuple) and not _is_here(address[0]):
            raise ConnectionRefusedError(f"the explorer makes no connection to {address[0]}")
    elif event in LOOKS_UP and not _is_here(arguments[0]):
        raise ConnectionRefusedError(f"the explorer does not look up {arguments[0]!r}")


def _is_here(host: object) -> bool:
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(str(name))
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
