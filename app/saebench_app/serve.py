"""The process of the server: ``python -m saebench_app.serve STORE [RUN ...]``, Streamlit behind a `Guard`.

The first line of standard input is JSON, the fields of `Access`: unlike arguments and variables of the
environment, it is seen by this process alone. The process ends when standard input does, so when whoever
started it has ended.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from streamlit import App, config, file_util

from saebench_app.access import EVERY_ADDRESS, Access
from saebench_app.guard import Guard, Receive, Scope, Send, content_policy
from saebench_app.lifeline import end_after, until_closed
from saebench_app.offline import stay_offline

MAIN = Path(__file__).with_name("main.py")
NEEDED = ("duckdb", "pandas", "pyarrow", "saebench_app.page.features", "saebench_app.page.feature")

SETTINGS: dict[str, Any] = {
    # No request to other machines. A banner would ask one for this machine's external address.
    "browser.gatherUsageStats": False,
    "logger.hideWelcomeMessage": True,
    "server.headless": True,
    "server.showEmailPrompt": False,
    # Nothing is served or trusted that no page needs.
    "client.allowedOrigins": [],
    "global.developmentMode": False,
    "server.baseUrlPath": "",
    "server.corsAllowedOrigins": [],
    "server.enableAgentApi": False,
    "server.enableCORS": True,
    "server.enableStaticServing": False,
    "server.enableXsrfProtection": True,
    "server.fileWatcherType": "none",
    "server.maxUploadSize": 50,
    "server.runOnSave": False,
    "server.scriptHealthCheckEnabled": False,
    "server.sslCertFile": None,
    "server.sslKeyFile": None,
    "server.trustedUserHeaders": {},
    "server.xsrfCookieSameSite": "strict",
    # All pages have the same style, without links to other sites or the inside of errors.
    "client.showErrorDetails": "none",
    "client.showErrorLinks": "false",
    "client.toolbarMode": "viewer",
    "global.disableWidgetStateDuplicationWarning": True,
    "logger.level": "warning",
    "theme.light.primaryColor": "#1f6fb2",
    "theme.dark.primaryColor": "#5aa9e6",
    "theme.baseFontSize": 15,
    "theme.paddingTop": "2.2rem",
    "theme.headingFontSizes": ["1.7rem", "1.35rem", "1.1rem", "1rem", "1rem", "1rem"],
}


class Explorer(App):
    """The app of Streamlit, behind the `Guard`."""

    def __init__(self, access: Access) -> None:
        super().__init__(MAIN)
        index = Path(file_util.get_static_dir(), "index.html").read_text("utf-8")
        self._guard = Guard(super().__call__, access, content_policy(index))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guard(scope, receive, send)


def read_ahead() -> None:
    """Import what the first page needs while the browser is starting."""
    for name in NEEDED:
        importlib.import_module(name)


def main() -> None:
    stay_offline()
    with open(0, "rb", buffering=0, closefd=False) as start:
        access = Access(**json.loads(start.readline()))
    end_after(lambda: until_closed(0), signal.SIGTERM)
    # The server stops in order, then gives the signal on to this handler, which lets atexit stop the jobs.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    # Files that any directory may hold would change settings, and be asked for every 0.2 s.
    config.get_config_files = lambda file_name: []
    app = Explorer(access)
    threading.Thread(target=read_ahead, daemon=True).start()
    address = "0.0.0.0" if access.host in EVERY_ADDRESS[:1] else access.host
    app.run(config={**SETTINGS, "server.address": address, "server.port": access.port})


if __name__ == "__main__":
    main()
