"""Features, feature and lists in a browser, over a store in which every text is hostile."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import BrowserContext, Page, expect

from saebench.store.query import open_store
from tests.end_to_end.conftest import Visitor
from tests.end_to_end.serving import served, settle
from tests.end_to_end.test_explorer import column, heading
from tests.store.rich_store import HOSTILE, build_rich_store


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_rich_store(tmp_path_factory.mktemp("rich") / "store")


@pytest.fixture(scope="module")
def rich_address(store_path: Path) -> Iterator[str]:
    with served(store_path) as address:
        yield address


@pytest.fixture
def rich(context: BrowserContext, rich_address: str) -> Iterator[Visitor]:
    visitor = Visitor(context.new_page(), rich_address)
    visitor.watch()
    try:
        yield visitor
    finally:
        visitor.page.close()
    assert (visitor.foreign, visitor.errors, visitor.dialogs) == ([], [], [])


PATHS = [
    "features?sae=small&q=onerror&score=0.1..&columns=feature,skew,explanation,label&sort=skew&desc=1",
    "features?sae=small&bookmarked=1&among=3,5,7",
    "feature?sae=small&group=tenths&hist=log10&role=next&near=correlation&colors=sqrt&above=10&lines=1"
    "&distinct=1&open=explanations,verdicts,where&f=3",
    "feature?sae=small&window=0&bin=30&f=0",
    "lists?sae=small&part=comments",
]


def seen(page: Page) -> list[str]:
    return page.locator("[data-testid=stMain] :is(h1, h3, table, dl, ol, article)").all_inner_texts()


@pytest.mark.parametrize("path", PATHS)
def test_a_deep_link_gives_the_same_page_again(rich: Visitor, path: str) -> None:
    page = rich.go(path)
    first = seen(page)
    assert page.url.endswith(f"/{path.replace(',', '%2C')}") or page.url.endswith(f"/{path}")
    assert len(first) > 1
    page.reload()
    page.wait_for_selector("h1")
    settle(page)
    assert seen(page) == first


def test_a_click_on_a_bar_shows_its_examples_and_back_leads_back(rich: Visitor, store_path: Path) -> None:
    page = rich.go("feature?f=3")
    before = page.locator("li .value").all_inner_texts()
    page.get_by_role("figure", name=re.compile("^Histogram")).locator("a.bar").last.click()
    expect(page).to_have_url(re.compile(r"bin=39"))
    settle(page)
    with open_store(store_path) as store:
        drawn = store.examples_in_bin(3, 39, n=20)["value"]
    values = [float(v.get_attribute("data-exact") or "nan") for v in page.locator("li .value").all()]
    assert values == pytest.approx(drawn.tolist())
    expect(page.locator("a.bar[aria-current]")).to_have_count(1)
    page.go_back()
    expect(page).not_to_have_url(re.compile("bin="))
    settle(page)
    assert page.locator("li .value").all_inner_texts() == before


def test_keys_select_examples_label_and_bookmark(rich: Visitor, store_path: Path) -> None:
    page = rich.go("feature?f=8")
    lines = page.locator("li:not(.title)").filter(has=page.locator(".value"))
    page.keyboard.press("j")
    page.keyboard.press("j")
    expect(lines.nth(1)).to_have_class(re.compile("now"))
    page.keyboard.press("k")
    expect(lines.nth(0)).to_have_class(re.compile("now"))
    page.keyboard.press("l")
    field = page.get_by_label("Label", exact=True)
    expect(field).to_be_focused()
    page.keyboard.type("jolly blue kx")
    page.keyboard.press("Enter")
    expect(page.locator("bdi.label")).to_have_text("jolly blue kx")
    heading(page, "Feature 8")
    page.locator("h1").click()
    page.keyboard.press("b")
    expect(page.get_by_role("button", name=re.compile("^Bookmarked"))).to_be_visible()
    settle(page)
    page.keyboard.press("x")
    expect(page).to_have_url(re.compile(r"f=\d+$"))
    settle(page)
    with open_store(store_path) as store:
        assert store.annotations.label(8) == "jolly blue kx"
        assert 8 in store.annotations.bookmarks()["feature"].tolist()
        store.annotations.set_label(8, "")
        store.annotations.bookmark(8, False)


def test_selected_rows_go_to_a_list_a_file_and_the_url(
    rich: Visitor, store_path: Path, tmp_path: Path
) -> None:
    page = rich.go("features?dead=hide&sort=max_act&desc=1")
    boxes = page.get_by_role("table", name="Features", exact=True).locator("tbody input[type=checkbox]")
    listed = [int(box.get_attribute("value") or -1) for box in boxes.all()]
    boxes.nth(1).click()
    boxes.nth(4).click(modifiers=["Shift"])
    expect(page.get_by_text("4 selected")).to_be_visible()
    settle(page)
    assert page.url.endswith("features?dead=hide&sort=max_act&desc=1")
    with page.expect_download() as made:
        page.get_by_role("button", name="Parquet", exact=True).click()
    made.value.save_as(tmp_path / "some.parquet")
    assert pd.read_parquet(tmp_path / "some.parquet")["feature"].tolist() == listed[1:5]
    page.get_by_role("button", name="Add to list", exact=True).click()
    field = page.get_by_role("combobox", name="List", exact=True)
    field.fill("four")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Add", exact=True).click()
    settle(page)
    with open_store(store_path) as store:
        assert store.annotations.list_features("four") == listed[1:5]
        store.annotations.remove_list("four")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Show only these", exact=True).click()
    expect(page).to_have_url(re.compile("among="))
    expect(boxes).to_have_count(4)
    assert [int(f) for f in column(page, "Features", "feature")] == [f for f in listed if f in listed[1:5]]


def test_a_list_is_renamed_edited_and_saved_as_html(rich: Visitor, store_path: Path, tmp_path: Path) -> None:
    with open_store(store_path) as store:
        store.annotations.add_to_list("<s>old</s>", [1, 2, 3])
    page = rich.go("lists")
    page.get_by_role("link", name="<s>old</s>", exact=True).click()
    field = page.get_by_label("Name", exact=True)
    expect(field).to_have_value("<s>old</s>")
    with page.expect_download() as made:
        page.get_by_role("button", name="Save as one HTML page", exact=True).click()
    made.value.save_as(tmp_path / "page.html")
    written = (tmp_path / "page.html").read_text("utf-8")
    assert 'id="f2"' in written and "<img" not in written
    page.get_by_role("checkbox", name="row 2", exact=True).check()
    page.get_by_role("button", name="Remove selected (1)", exact=True).click()
    expect(page.get_by_role("checkbox", name="row 2", exact=True)).to_have_count(0)
    field.fill("<s>new</s>")
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="<s>new</s>", exact=True)).to_be_visible()
    settle(page)
    with open_store(store_path) as store:
        assert store.annotations.list_features("<s>new</s>") == [1, 3]
        store.annotations.remove_list("<s>new</s>")


def test_saved_views_open(rich: Visitor) -> None:
    page = rich.go("features")
    page.get_by_role("button", name="Saved views", exact=True).click()
    page.get_by_role("link", name=re.compile("^<img")).click()
    expect(page).to_have_url(re.compile("q=a.*sort=max_act&desc=1"))
    settle(page)


def test_hostile_annotations_and_explanations_are_only_text(rich: Visitor) -> None:
    page = rich.go("")
    count = "document.querySelectorAll('script').length"
    scripts = page.evaluate(count)
    everything = "open=explanations,verdicts,where"
    for path in (
        "features",
        f"feature?f=3&{everything}",
        "feature?f=5&near=cofire",
        "lists",
        "lists?part=labels",
        "lists?part=comments",
        "lists?part=bookmarks",
    ):
        rich.go(path)
        assert page.evaluate(count) == scripts
        inside = page.locator(
            ":is(td, li, dd, bdi, article, h3, p) :is(script, img, b, em, strong, iframe, u)"
        )
        assert inside.count() == 0, path
        assert page.locator('a[href^="javascript"]').count() == 0
    page = rich.go("feature?f=3")
    for popover in ("Lists", "Comments"):
        page.get_by_role("button", name=re.compile(f"^{popover}")).click()
        settle(page)
        assert page.evaluate(count) == scripts
        assert page.locator("[data-testid=stPopoverBody] :is(script, img, b, strong, i, u)").count() == 0
        page.keyboard.press("Escape")
    page = rich.go(f"lists?list={HOSTILE.replace('&', '%26')}")
    expect(page.get_by_label("Name", exact=True)).to_have_value(HOSTILE)
    assert page.evaluate(count) == scripts


def test_no_page_is_wider_than_a_phone(rich: Visitor) -> None:
    rich.page.set_viewport_size({"width": 390, "height": 844})
    for path in (
        "features",
        "feature?f=3&open=explanations,verdicts,where&group=tenths",
        "lists",
        "lists?part=comments",
    ):
        page = rich.go(path)
        main = page.locator("[data-testid=stMain]")
        assert main.evaluate("node => node.scrollWidth <= node.clientWidth"), path


def test_a_store_that_is_deleted_while_open_gives_an_error(
    context: BrowserContext, store_path: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(store_path, tmp_path / "store"))
    with served(own) as address:
        visitor = Visitor(context.new_page(), address)
        visitor.watch()
        page = visitor.go("features")
        shutil.rmtree(own)
        page.get_by_role("link", name="density", exact=True).click()
        expect(page.get_by_role("alert")).to_contain_text("not a feature store")
        settle(page)
        assert len(column(page, "Features", "feature")) == 24
        page.close()
    assert (visitor.errors, visitor.dialogs) == ([], [])
