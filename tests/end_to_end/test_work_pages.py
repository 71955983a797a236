"""Store, Compare, Map, Explain, Train and SQL in a browser."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from saebench.store.query import open_store
from tests.app.two_saes import METRICS, build_two, write_metrics
from tests.end_to_end.conftest import Visitor
from tests.end_to_end.serving import served, settle

SELECT = "SELECT+feature,+max_act+FROM+feature+ORDER+BY+max_act+DESC+LIMIT+3"
PATHS = {
    "Store": "",
    "Compare": "compare?sae=small&a=other&b=small&fa=3&fb=5",
    "Map": "map?sae=small&among=1%2C5&color=max_act",
    "Explain": "explain?sae=small&by=feature&up=1",
    "Train": "train?sae=small&of=other&measures=fvu%2Cl0&log=1",
    "SQL": f"sql?sae=small&query={SELECT}&rows=100",
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_two(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def going_on(two: Path) -> Path:
    """A run in training, beside the finished ones."""
    run = two.parent / "runs" / "zz-now"
    write_metrics(run, 1)
    return run


@pytest.fixture(scope="module")
def two_address(two: Path, going_on: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    before = os.environ.get("SAEBENCH_CACHE")
    os.environ["SAEBENCH_CACHE"] = str(tmp_path_factory.mktemp("kept"))
    try:
        with served(two) as address:
            yield address
    finally:
        os.environ.pop("SAEBENCH_CACHE")
        if before is not None:
            os.environ["SAEBENCH_CACHE"] = before


@pytest.fixture
def guest(context: BrowserContext, two_address: str) -> Iterator[Visitor]:
    """A visitor to the store of two SAEs; it must see no error, dialog or request to another machine."""
    guest = Visitor(context.new_page(), two_address)
    guest.watch()
    try:
        yield guest
    finally:
        guest.page.close()
    assert (guest.foreign, guest.errors, guest.dialogs) == ([], [], [])


def seen(page: Page) -> list[str]:
    shown = ":is(h1, h2, h3, table, dl, ol, p[role])"
    drawn = "[data-testid=stDataFrame] *"  # on a canvas, with a table for screen readers that comes later
    return page.locator(f"[data-testid=stMain] {shown}:not({drawn})").all_inner_texts()


@pytest.mark.parametrize("title", PATHS)
def test_a_deep_link_gives_the_same_page_again(guest: Visitor, title: str) -> None:
    path = PATHS[title]
    page = guest.go(path)
    expect(page.locator("h1")).to_have_text(title)
    first = seen(page)
    assert len(first) > 1
    assert page.locator("[data-testid=stException]").count() == 0
    page.reload()
    page.wait_for_selector("h1")
    settle(page)
    assert seen(page) == first
    assert page.url == f"{guest.address}/{path}"


def test_hostile_texts_are_only_texts(guest: Visitor) -> None:
    page = guest.go("")
    count = "document.querySelectorAll('script').length"
    scripts = page.evaluate(count)
    image = "%3Cimg+src=x+onerror=alert(1)%3E"
    hostile = f"SELECT+'{image}'+AS+%22%3Cscript%3Ealert(2)%3C/script%3E%22,+text+FROM+token"
    for path in [
        *PATHS.values(),
        f"sql?query={hostile}",
        f"sql?query={image}",
        f"compare?a={image}",
        "train?of=%3Cb%3Ex",
        "map?color=%3Cb%3E&method=%3Cb%3E",
        f"explain?who={image}&by=%3Cb%3E",
    ]:
        guest.go(path)
        assert page.evaluate(count) == scripts, path
        assert page.locator(":is(td, li, dd, p) :is(script, img, iframe)").count() == 0, path
        assert page.locator("[data-testid=stException]").count() == 0, path


def test_a_map_is_drawn_and_a_selection_becomes_a_list(guest: Visitor, two: Path) -> None:
    page = guest.go("map")
    page.get_by_role("button", name="Draw the map", exact=True).click()
    plot = page.locator(".js-plotly-plot .nsewdrag")
    plot.wait_for(timeout=60_000)
    settle(page)
    box = plot.bounding_box()
    assert box is not None
    left, top, right, bottom = 4, 4, box["width"] - 4, box["height"] - 4
    page.mouse.move(box["x"] + left, box["y"] + top)
    page.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom), (left, top)):
        page.mouse.move(box["x"] + x, box["y"] + y, steps=8)
    page.mouse.up()
    expect(page).to_have_url(re.compile("among="))
    settle(page)
    with open_store(two) as store:
        everything = store.features(order_by="density", descending=True)["feature"].tolist()
    cells = page.get_by_role("table", name="Selected features", exact=True).locator("tbody td:first-child")
    expect(cells).to_have_text([str(feature) for feature in everything])
    page.get_by_test_id("stMain").get_by_role("link", name="Open in Features", exact=True).click()
    expect(page.locator("h1")).to_have_text("Features")
    assert "among=" in page.url
    page.go_back()
    expect(page.locator("h1")).to_have_text("Map")
    expect(cells).to_have_count(len(everything))


def test_features_are_matched_and_a_pair_stands_side_by_side(guest: Visitor, two: Path) -> None:
    page = guest.go("compare?a=small&b=other")
    page.get_by_role("button", name="Match the features", exact=True).click()
    pairs = page.get_by_role("table", name="Pairs", exact=True)
    pairs.wait_for(timeout=60_000)
    settle(page)
    numbers = [
        (row.locator("td").nth(1).inner_text(), row.locator("td").nth(4).inner_text())
        for row in pairs.locator("tbody tr").all()
    ]
    with open_store(two, "small") as one, open_store(two, "other") as other:
        fire = [set(map(str, store.features(flags={"dead": False})["feature"])) for store in (one, other)]
    at = next(at for at, (a, b) in enumerate(numbers) if a in fire[0] and b in fire[1])
    fa, fb = numbers[at]
    pairs.locator("tbody tr").nth(at).click()
    expect(page).to_have_url(re.compile(rf"fa={fa}&fb={fb}$"))
    settle(page)
    for feature, sae in ((fa, "small"), (fb, "other")):
        link = page.get_by_test_id("stMain").get_by_role(
            "link", name=f"Feature {feature} of {sae}", exact=True
        )
        expect(link).to_be_visible()
    expect(page.locator("ol")).to_have_count(2)
    link.click()
    expect(page.locator("h1")).to_have_text(f"Feature {fb}")
    page.go_back()
    expect(page.locator("h1")).to_have_text("Compare")
    pairs.get_by_role("link", name="small", exact=True).click()
    expect(page).to_have_url(re.compile("rank=a"))


def test_the_check_of_a_store_ends_with_its_result(guest: Visitor) -> None:
    page = guest.go("")
    page.get_by_role("button", name="Check the store", exact=True).click()
    expect(page.get_by_role("button", name="Check again", exact=True)).to_be_visible(timeout=60_000)
    expect(page.get_by_text("No damage was found (generation 2")).to_be_visible()


def test_curves_grow_while_a_run_is_trained(guest: Visitor, going_on: Path) -> None:
    page = guest.page
    page.goto(f"{guest.address}/train?of=zz-now")  # the page of a run in training never settles
    page.wait_for_selector("table")
    last = page.get_by_role("table", name="Last step", exact=True).locator("tbody tr").first
    expect(last).to_contain_text("running")
    expect(last.locator("td").nth(2)).to_have_text("1")
    write_metrics(going_on, 3)
    expect(last.locator("td").nth(2)).to_have_text(str(METRICS[2]["step"]), timeout=30_000)
    expect(page.locator(".js-plotly-plot")).to_have_count(3)


def test_sql_is_asked_with_the_keyboard_and_cannot_write(guest: Visitor, two: Path, tmp_path: Path) -> None:
    def digests() -> list[str]:
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(two.rglob("*.duckdb"))]

    before, out = digests(), tmp_path / "stolen.csv"
    page = guest.go("sql")
    question = page.get_by_role("textbox", name="Query", exact=True)
    question.fill("SELECT count(*) AS n FROM act")
    question.press("Control+Enter")
    expect(page).to_have_url(re.compile("query=SELECT"))
    expect(page.get_by_text("1 row.")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV", exact=True).click()
    with open_store(two) as store:
        n = store.info()["n_activations"]
    assert Path(download.value.path()).read_text() == f"n\n{n}\n"
    for attack in (
        f"COPY act TO '{out}'",
        f"ATTACH '{out}' AS x",
        "SELECT * FROM read_csv('/etc/passwd')",
        "DELETE FROM act",
    ):
        question.fill(attack)
        page.get_by_role("button", name="Run", exact=True).click()
        expect(page.get_by_role("alert")).to_be_visible()
        settle(page)
        assert "root:" not in (page.get_by_test_id("stMain").text_content() or "")
    assert not out.exists()
    assert digests() == before
    page.go_back()
    expect(page.get_by_role("textbox", name="Query", exact=True)).to_have_value(
        "SELECT * FROM read_csv('/etc/passwd')"
    )


def test_no_page_is_wider_than_a_phone(guest: Visitor) -> None:
    guest.page.set_viewport_size({"width": 390, "height": 844})
    for title, path in PATHS.items():
        page = guest.go(path)
        main = page.locator("[data-testid=stMain]")
        assert main.evaluate("node => node.scrollWidth <= node.clientWidth"), title


def test_a_deleted_store_gives_an_error(context: BrowserContext, tmp_path: Path) -> None:
    import shutil

    store = build_two(tmp_path)
    with served(store) as address:
        visitor = Visitor(context.new_page(), address)
        visitor.go("compare")
        shutil.rmtree(store)
        for path in ("", PATHS["SQL"]):
            page = visitor.go(path)
            expect(page.get_by_role("alert").first).to_contain_text("not a feature store")
            assert page.locator("[data-testid=stException]").count() == 0
        visitor.page.close()
