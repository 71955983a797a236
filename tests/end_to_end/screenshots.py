"""Pictures of the explorer: ``python tests/end_to_end/screenshots.py STORE OUTDIR [FEATURE]``.

Each page at 1366x900 and, with ``-390`` in the name, at the width of a telephone; ``-dark`` on a dark screen.
"""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.parse import urlencode

ROOT = Path(__file__).parents[2]
TEXT = "The Congress of the United States has passed a bill to raise the pay of our soldiers."
TOKEN = " Congress"
QUERY = "SELECT top_token, count(*) AS n FROM feature GROUP BY ALL ORDER BY n DESC LIMIT 20"
SIZES = {"": (1366, 900), "-390": (390, 844)}


def take(store: Path, out: Path, feature: int | None = None) -> list[Path]:
    """Write the pictures of ``store`` into ``out``; by default of the feature that fires hardest."""
    from saebench.store.query import open_store
    from tests.end_to_end.serving import browser, served, settle

    if feature is None:
        with open_store(store) as opened:
            listed = opened.features(flags={"dense": False}, order_by="max_act", descending=True, limit=1)
        feature = int(listed["feature"].iloc[0])
    pages = {
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
    out.mkdir(parents=True, exist_ok=True)
    taken = []
    with served(store.resolve()) as address, browser() as chromium:
        for scheme in ("light", "dark"):
            for suffix, (width, height) in SIZES.items():
                context = chromium.new_context(
                    viewport={"width": width, "height": height}, color_scheme=scheme
                )
                page = context.new_page()
                for name, path in pages.items():
                    page.goto(f"{address}/{path}")
                    page.wait_for_selector("h1")
                    settle(page)
                    page.wait_for_timeout(500)  # plots and fonts fade in
                    taken.append(out / f"{name}{suffix}{'-dark' if scheme == 'dark' else ''}.png")
                    page.screenshot(path=taken[-1])
                context.close()
    return taken


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for picture in take(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:4])):
        print(picture)
