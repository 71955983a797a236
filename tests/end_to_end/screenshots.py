"""Pictures of the explorer: ``python tests/end_to_end/screenshots.py STORE OUTDIR [FEATURE]``.

Each page at 1366x900 and, with ``-390`` in the name, at the width of a telephone; ``-dark`` on a dark screen.
With ``--docs`` only the light ones at 1366x900, in few colors: the pictures of the documentation, which are
kept in docs/images/explorer.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).parents[2]
TEXT = "The Congress of the United States has passed a bill to raise the pay of our soldiers."
TOKEN = " Congress"
QUERY = "SELECT top_token, count(*) AS n FROM feature GROUP BY ALL ORDER BY n DESC LIMIT 20"
SIZES = {"": (1366, 900), "-390": (390, 844)}
SCHEMES = ("light", "dark")
BUTTONS = {"map": "Draw the map", "compare": "Match the features", "steer": "Steer"}
"""Page -> the button that makes what it shows."""
LONGEST_JOB = 300_000
"""In milliseconds."""
COLORS = 96
"""Of a picture of the documentation: few enough for a file below 150 KB."""


def pages(feature: int) -> dict[str, str]:
    """Name of the picture -> the URL of its page."""
    return {
        "features": "features?dead=hide&dense=hide&sort=max_act&desc=1",
        "feature": f"feature?f={feature}",
        "store": "",
        "prompt": f"prompt?{urlencode({'text': TEXT, 'f': feature})}",
        "token": f"token?{urlencode({'t': TOKEN})}",
        "context": f"context?c=3&f1={feature}",
        "compare": "compare",
        "map": "map",
        "steer": f"steer?{urlencode({'text': TEXT, 'f': feature})}",
        "explain": "explain",
        "train": "train",
        "lists": "lists",
        "sql": f"sql?{urlencode({'query': QUERY})}",
    }


def showcase_feature(store: Path) -> int:
    """The feature with the largest activation, of those that are not dense."""
    from saebench.store.query import open_store

    with open_store(store) as opened:
        listed = opened.features(flags={"dense": False}, order_by="max_act", descending=True, limit=1)
    return int(listed["feature"].iloc[0])


def take(store: Path, out: Path, feature: int | None = None, *, docs: bool = False) -> list[Path]:
    """Write the pictures of ``store`` into ``out``."""
    from tests.end_to_end.serving import browser, served

    feature = showcase_feature(store) if feature is None else feature
    out.mkdir(parents=True, exist_ok=True)
    taken = []
    with served(store) as address, browser() as chromium:
        for scheme in SCHEMES[:1] if docs else SCHEMES:
            for suffix, (width, height) in list(SIZES.items())[: 1 if docs else None]:
                context = chromium.new_context(
                    viewport={"width": width, "height": height}, color_scheme=scheme
                )
                page = context.new_page()
                for name, path in pages(feature).items():
                    page.goto(f"{address}/{path}")
                    if name == "sql":  # a link does not run its query
                        page.get_by_role("button", name="Run", exact=True).click()
                    draw(page, BUTTONS.get(name))
                    taken.append(out / f"{name}{suffix}{'-dark' if scheme == 'dark' else ''}.png")
                    page.screenshot(path=taken[-1])
                    if docs:
                        reduce_colors(taken[-1])
                context.close()
    return taken


def draw(page: Page, button: str | None) -> None:
    """Wait until the page is drawn, with the result of its job if it has one."""
    from playwright.sync_api import Error

    from tests.end_to_end.serving import settle

    page.wait_for_selector("h1")
    for _ in range(4):  # loading the model takes longer on a busy machine
        with contextlib.suppress(Error):
            settle(page)
            break
    start = page.get_by_role("button", name=button, exact=True) if button else None
    if start is not None and start.count():
        start.click()
        stop = page.get_by_test_id("stMain").get_by_role("button", name="Stop")
        stop.wait_for()
        stop.wait_for(state="detached", timeout=LONGEST_JOB)
        settle(page)
    page.wait_for_timeout(500)  # plots and fonts fade in


def reduce_colors(picture: Path) -> None:
    from PIL import Image

    with Image.open(picture) as image:
        few = image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    few.save(picture, optimize=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("feature", type=int, nargs="?")
    parser.add_argument("--docs", action="store_true")
    given = parser.parse_args()
    for picture in take(given.store, given.out, given.feature, docs=given.docs):
        print(picture)
