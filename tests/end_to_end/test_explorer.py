from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from saebench.core.formatting import visible
from saebench.store.query import open_store
from tests.end_to_end.conftest import Visitor
from tests.end_to_end.serving import settle


def heading(page: Page, text: str) -> None:
    """Wait for the page with this title."""
    expect(page.locator("h1")).to_have_text(text)
    settle(page)


def exact(page: Page, tile: str) -> float:
    name = page.locator("dt", has_text=re.compile(f"^{tile}$"))
    return float(name.locator("xpath=following-sibling::dd[1]").get_attribute("data-exact") or "nan")


def column(page: Page, table: str, label: str) -> list[str]:
    """The texts of one column of a table, read off the page."""
    root = page.get_by_role("table", name=table, exact=True)
    labels = [text.strip("▲▼ ") for text in root.locator("th").all_inner_texts()]
    return root.locator(f"tbody td:nth-child({labels.index(label) + 1})").all_inner_texts()


def test_the_feature_page_shows_the_numbers_of_the_store(visitor: Visitor, small_store: Path) -> None:
    page = visitor.go("feature?f=3")
    with open_store(small_store) as store:
        row, tokens, examples = store.feature(3), store.tokens(3), store.examples(3, group="top")
        near, bins = store.neighbors(3), store.histogram(3)
    heading(page, "Feature 3")
    for tile, name in {
        "Activation density": "density",
        "Active tokens": "n_act",
        "Max activation": "max_act",
        "Mean activation": "mean_act",
        "Contexts": "n_ctx_act",
        "Token entropy": "entropy_tok",
    }.items():
        assert math.isclose(exact(page, tile), row[name], rel_tol=1e-9), tile
    values = [float(v.get_attribute("data-exact") or "nan") for v in page.locator("li .value").all()]
    assert values == pytest.approx(examples["value"].tolist(), rel=1e-9)
    assert column(page, "Tokens it fires on", "token") == [visible(t, spaces="edges") for t in tokens["text"]]
    assert column(page, "Tokens it fires on", "count") == [f"{n:,}" for n in tokens["n"]]
    assert column(page, "Similar features", "feature") == [str(n) for n in near["other"].head(10)]
    bars = page.get_by_role("figure").locator(".bar")
    expect(bars).to_have_count(len(bins))
    assert [int(bar.get_attribute("data-size") or -1) for bar in bars.all()] == bins["count"].tolist()
    expect(
        page.get_by_role("figure", name=re.compile(f"^Histogram of {row['n_act']:,} activations"))
    ).to_be_attached()


def test_the_examples_show_the_text_of_the_store(visitor: Visitor, small_store: Path) -> None:
    page = visitor.go("feature?f=0&window=0")
    with open_store(small_store) as store:
        examples = store.examples(0, group="top").to_dict("records")
    shown = [text.text_content() for text in page.locator("li .text").all()]
    assert shown == ["".join(map(visible, row["pieces"])) for row in examples]
    for line, row in zip(page.locator("li").all(), examples, strict=True):
        assert line.locator(".t").count() == sum(act > 0 for act in row["acts"])
    page.locator("li .t").first.hover()
    expect(page.get_by_role("tooltip")).to_have_text(
        page.locator("li .t").first.get_attribute("data-act") or ""
    )


def test_a_row_leads_to_its_feature_and_back_returns(visitor: Visitor, small_store: Path) -> None:
    page = visitor.go("features?dead=hide")
    heading(page, "Features")
    page.get_by_role("link", name="density", exact=True).click()
    expect(page).to_have_url(re.compile(r"sort=density&desc=1"))
    settle(page)
    with open_store(small_store) as store:
        listed = store.features(flags={"dead": False}, order_by="density", descending=True)[
            "feature"
        ].tolist()
    assert column(page, "Features", "feature") == [str(feature) for feature in listed]
    page.get_by_role("table", name="Features", exact=True).locator("tbody tr").nth(1).locator("td").nth(
        5
    ).click()
    heading(page, f"Feature {listed[1]}")
    assert page.url.endswith(f"/feature?sae=small&dead=hide&sort=density&desc=1&f={listed[1]}")
    page.go_back()
    heading(page, "Features")
    assert page.url.endswith("/features?sae=small&dead=hide&sort=density&desc=1")
    assert column(page, "Features", "feature") == [str(feature) for feature in listed]
    page.go_back()
    expect(page.locator("th[aria-sort]")).to_contain_text("feature")


def test_arrow_keys_step_through_the_filtered_sorted_list(visitor: Visitor, small_store: Path) -> None:
    with open_store(small_store) as store:
        listed = store.features(flags={"dense": True}, order_by="max_act", descending=True)[
            "feature"
        ].tolist()
    page = visitor.go(f"feature?f={listed[0]}&dense=only&sort=max_act&desc=1")
    for key, place in [("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)]:
        expect(page.get_by_role("button", name=re.compile("^Next"))).to_be_enabled()
        page.keyboard.press(key)
        heading(page, f"Feature {listed[place]}")
    page.go_back()
    heading(page, f"Feature {listed[2]}")
    page.get_by_role("table", name="Similar features", exact=True).get_by_role("link").first.click()
    with open_store(small_store) as store:
        heading(page, f"Feature {store.neighbors(listed[2])['other'].iloc[0]}")


@pytest.mark.parametrize(
    "path",
    [
        "features?sae=small&q=o&density=-2..-0.3&max=1..&dead=hide&sort=mean_act",
        "feature?sae=small&sort=density&desc=1&group=random&window=8&f=2",
        "?sae=small",
    ],
)
def test_a_deep_link_gives_the_same_page_again(visitor: Visitor, path: str) -> None:
    def seen(page: Page) -> list[str]:
        return page.locator("[data-testid=stMain] :is(h1, h2, h3, table, dl, ol)").all_inner_texts()

    page = visitor.go(path)
    first = seen(page)
    assert page.url.endswith(f"/{path}")
    assert len(first) > 1
    page.reload()
    page.wait_for_selector("h1")
    settle(page)
    expect(page.locator("h1")).to_have_text(first[0])
    assert seen(page) == first
    assert page.url.endswith(f"/{path}")


def test_the_text_filter_narrows_the_table(visitor: Visitor, small_store: Path) -> None:
    page = visitor.go("features")
    page.get_by_label("Search", exact=True).fill("script")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("q=script"))
    settle(page)
    with open_store(small_store) as store:
        assert column(page, "Features", "feature") == [
            str(f) for f in store.features(text="script")["feature"]
        ]


def test_hostile_tokens_are_only_text(visitor: Visitor) -> None:
    page = visitor.go("")
    count = "document.querySelectorAll('script').length"
    scripts = page.evaluate(count)
    for path in ["features", *(f"feature?f={feature}&window=0" for feature in (0, 11))]:
        visitor.go(path)
        assert page.evaluate(count) == scripts
        inside = page.locator(":is(td, li, dd) :is(script, img, b, em, strong, iframe, svg)")
        assert inside.count() == 0, path
        assert page.locator('a[href^="javascript"]').count() == 0
    page = visitor.go("feature?f=99999&sae=small&q=<img src=x onerror=alert(1)>")
    expect(page.get_by_role("alert")).to_contain_text("feature 99999 is not in")
    page = visitor.go("feature?sae=<img src=x onerror=alert(1)>![](http://192.0.2.1/x)")
    expect(page.get_by_role("alert")).to_contain_text("<img src=x onerror=alert(1)>![](http://192.0.2.1/x)")


def test_no_page_is_wider_than_a_phone(visitor: Visitor) -> None:
    visitor.page.set_viewport_size({"width": 390, "height": 844})
    for path in ("", "features", "feature?f=3"):
        page = visitor.go(path)
        main = page.locator("[data-testid=stMain]")
        assert main.evaluate("node => node.scrollWidth <= node.clientWidth"), path
