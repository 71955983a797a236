"""Prompt, Token, Context and Steer in a browser."""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest
from playwright.sync_api import Page, expect

from saebench.core.formatting import visible
from saebench.store.query import open_store
from tests.app.live_world import World
from tests.end_to_end.conftest import Visitor
from tests.end_to_end.serving import settle
from tests.end_to_end.test_explorer import column, heading

TEXT = "The Congress of the United States"
PROMPT = f"prompt?sae=tiny&text={TEXT.replace(' ', '+')}"
GRID = "Features by tokens"
COUNT = "document.querySelectorAll('script').length"


def text_of(page: Page, name: str) -> str:
    return page.get_by_role("group", name=name, exact=True).text_content() or ""


def test_a_cell_selects_its_feature_and_back_clears_it(asker: Visitor) -> None:
    page = asker.go(PROMPT)
    grid = page.get_by_role("table", name=GRID, exact=True)
    cell = grid.locator("td.cell a").nth(2)
    found = re.fullmatch(r"feature (\d+) on .* \((\d+)\): .*", cell.get_attribute("aria-label") or "")
    assert found
    feature, pos = found.groups()
    cell.click()
    expect(page).to_have_url(re.compile(re.escape(f"/{PROMPT}&f={feature}&at={pos}") + "$"))
    settle(page)
    expect(grid.locator("tbody tr").first.locator("th a").first).to_have_text(feature)
    expect(page.locator(".legend .name")).to_have_text(f"Feature {feature}")
    expect(page.locator(".text .current")).to_have_count(1)
    assert page.locator(".text .t.on").count() >= 1
    page.go_back()
    expect(page.locator(".legend")).to_have_count(0)
    settle(page)
    grid.locator("tbody tr").first.locator("th a").first.click()
    expect(page.locator("h1")).to_contain_text("Feature")


def test_tokens_are_selected_by_click_and_arrow_keys(asker: Visitor) -> None:
    page = asker.go(PROMPT)
    tokens = page.get_by_role("group", name="Tokens of the text", exact=True).locator("a.t")
    tokens.nth(2).click()
    expect(page).to_have_url(re.compile("&at=2$"))
    settle(page)
    tokens.nth(2).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("&at=3$"))
    settle(page)
    expect(tokens.nth(3)).to_have_attribute("aria-current", "true")
    assert tokens.evaluate_all("all => all.filter(one => one.tabIndex === 0).length") == 1


@pytest.mark.parametrize(
    "path",
    [
        f"{PROMPT}&by=sum&at=3&cut=-0.5&bos=1&pin=2&f=5",
        f"{PROMPT}&text2=the+price+of+corn&f=5",
        "token?sae=tiny&t=%23265&by=lift",
        "context?sae=tiny&c=2&pos=4&f1=3&f2=7",
        f"steer?sae=tiny&text={TEXT.replace(' ', '+')}&f=5&strength=4%2C30&new=4",
    ],
)
def test_a_deep_link_gives_the_same_page_again(asker: Visitor, path: str) -> None:
    def seen(page: Page) -> list[str]:
        return page.locator("[data-testid=stMain] :is(h1, h2, h3, table, dl, p, .text)").all_inner_texts()

    def press(page: Page) -> None:
        if path.startswith("steer"):
            page.get_by_role("button", name="Steer", exact=True).click()
            page.get_by_role("table", name="All strengths", exact=True).wait_for()
            settle(page)

    page = asker.go(path)
    press(page)
    first = seen(page)
    assert page.url.endswith(f"/{path}")
    page.reload()
    page.wait_for_selector("h1")
    settle(page)
    press(page)
    assert seen(page) == first
    assert page.url.endswith(f"/{path}")


HOSTILE = "</script><img src=x onerror=alert(1)>שלום 👧\u202e&lt;*x*"


@pytest.mark.parametrize("page_name", ["prompt", "steer"])
def test_hostile_text_is_only_text(asker: Visitor, page_name: str) -> None:
    text = HOSTILE
    page = asker.go("token")
    scripts = page.evaluate(COUNT)
    asker.go(f"{page_name}?text={quote(text)}&text2={quote(text)}&f=3&strength=9&new=3")
    if page_name == "steer":
        page.get_by_role("button", name="Steer", exact=True).click()
        page.get_by_role("table", name="The next token", exact=True).wait_for()
        settle(page)
        assert text_of(page, "Text without steering").startswith(visible(text))
    else:
        shown = text_of(page, "Tokens of the text").replace("◌", "").replace("␣", " ")
        assert shown == visible(text)
    assert page.evaluate(COUNT) == scripts
    assert page.locator(".root :is(script, img, b, em, strong, iframe, svg)").count() == 0


def test_an_example_leads_to_its_context_and_other_features(asker: Visitor, world: World) -> None:
    with open_store(world.store) as store:
        feature = int(store.features(order_by="n_act", descending=True, limit=1)["feature"][0])
        example = store.examples(feature, "top").iloc[0]
        context = store.context(int(example["ctx"]))
        firing = store.firing_at(int(example["ctx"]), int(example["pos"]))
    page = asker.go(f"feature?f={feature}")
    page.locator(".origin a").first.click()
    heading(page, f"Context {example['ctx']}")
    assert text_of(page, "Text of the context") == "".join(map(visible, context["pieces"]))
    assert page.get_by_role("group", name="Text of the context", exact=True).locator(".t.on").count() >= 1
    on = "Features on the selected token"
    assert column(page, on, "feature") == [str(one) for one in firing["feature"]]
    other = int(firing[firing["feature"] != feature]["feature"].iloc[0])
    row = page.get_by_role("table", name=on, exact=True).locator(
        "tr", has=page.get_by_role("link", name=str(other), exact=True)
    )
    row.get_by_role("link", name="show", exact=True).click()
    expect(page).to_have_url(re.compile(f"f1={feature}&f2={other}$"))
    settle(page)
    expect(page.locator(".legend .name")).to_have_text([f"Feature {feature}", f"Feature {other}"])
    page.get_by_role("link", name=f"Remove feature {feature}", exact=True).click()
    expect(page.locator(".legend .name")).to_have_text([f"Feature {other}"])
    settle(page)
    page.keyboard.press("ArrowRight")
    heading(page, f"Context {example['ctx'] + 1}")
    page.go_back()
    heading(page, f"Context {example['ctx']}")


def test_a_heading_sorts_the_features_of_a_token(asker: Visitor, world: World) -> None:
    with open_store(world.store) as store:
        token = store.find_tokens(limit=1).iloc[0]
        listed = store.features_on(int(token["token"]), order_by="lift")["feature"].tolist()
    page = asker.go("token")
    page.get_by_role("table", name="The most frequent tokens", exact=True).get_by_role("link").first.click()
    expect(page).to_have_url(re.compile(f"t=%23{token['token']}$"))
    settle(page)
    page.get_by_role("link", name="lift", exact=True).click()
    expect(page.locator("th[aria-sort]")).to_contain_text("lift")
    settle(page)
    assert column(page, "Features that fire on it", "feature") == [str(one) for one in listed]


def test_steering_can_be_stopped(asker: Visitor) -> None:
    page = asker.go(f"steer?text={quote(TEXT)}&f=5&new=50&strength=1,2,3,4,5,6,7,8,9,10,11,12")
    page.get_by_role("button", name="Steer", exact=True).click()
    page.get_by_role("button", name="Stop steering", exact=True).click()
    expect(page.get_by_role("button", name="Steer", exact=True)).to_be_enabled()
    expect(page.get_by_text("Press Steer to run")).to_be_visible()


def test_no_page_is_wider_than_a_phone(asker: Visitor) -> None:
    asker.page.set_viewport_size({"width": 390, "height": 844})
    for path in (
        f"{PROMPT}&f=5",
        f"{PROMPT}&text2=corn",
        "token?t=h",
        "context?f1=3&f2=7&pos=4",
        "steer?f=3",
    ):
        page = asker.go(path)
        main = page.locator("[data-testid=stMain]")
        assert main.evaluate("node => node.scrollWidth <= node.clientWidth"), path


def test_a_page_without_its_run_says_what_to_do(visitor: Visitor) -> None:
    page = visitor.go(f"prompt?text={quote(TEXT)}")
    expect(page.get_by_text("--run DIR")).to_be_visible()
