"""The shared and exclusive features of a crosscoder in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, expect

from tests.end_to_end.conftest import Visitor
from tests.end_to_end.serving import served, settle
from tests.store.two_sided import build_two_sided


@pytest.fixture
def visitor(
    tmp_path: Path, tiny_model_folder: Path, tiny_text: Path, context: BrowserContext
) -> Iterator[Visitor]:
    with served(build_two_sided(tmp_path, tiny_model_folder, tiny_text).store) as address:
        visitor = Visitor(context.new_page(), address)
        visitor.watch()
        try:
            yield visitor
        finally:
            visitor.page.close()
    assert (visitor.foreign, visitor.errors, visitor.dialogs) == ([], [], [])


def test_a_bar_of_norm_shares_lists_its_features_and_one_leads_to_its_sites(visitor: Visitor) -> None:
    page = visitor.go("compare?sae=crosscoder")
    expect(page.get_by_role("heading", name="Shared and exclusive features")).to_be_visible()
    page.locator("a[href*='norm=']").last.click()
    settle(page)
    assert "norm=0.95..1" in page.url and "dead=hide" in page.url
    page.locator("td a[href*='f=1']").first.click()
    settle(page)
    expect(page.get_by_role("table", name="Decoder norm at each site")).to_contain_text("100%")
