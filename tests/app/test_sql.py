from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from saebench.store.query import open_store
from saebench_app.page.sql import EXAMPLES
from tests.app.conftest import shown, url

Visit = Callable[..., AppTest]

ATTACKS = [
    "ATTACH '/etc/passwd' AS x",
    "COPY feature TO 'out.csv'",
    "COPY (SELECT 1) TO PROGRAM 'id'",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_parquet('*')",
    "SELECT * FROM glob('/*')",
    "DROP TABLE feature",
    "DELETE FROM act",
    "UPDATE feature SET n_act = 0",
    "INSERT INTO act VALUES (0, 0, 0, 1)",
    "CREATE TABLE t (a INT)",
    "EXPORT DATABASE 'x'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "PRAGMA database_list",
    "SELECT 1; DROP TABLE act",
    "SELECT getenv('HOME')",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "WITH x AS (SELECT * FROM read_blob('/etc/passwd')) SELECT * FROM x",
    "CALL pragma_version()",
    "SELECT repeat('x', 1000000000)",
    "SELECT",
    "SELECT * FROM nothing",
    "x" * 20_001,
]


def digest(store: Path) -> dict[str, str]:
    files = [path for path in sorted(store.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def ask(app: AppTest, query: str) -> AppTest:
    """Type a query and run it."""
    return app.text_area(key="query").set_value(query).run()


def run(app: AppTest) -> AppTest:
    """Run the query of the link, as a person does."""
    next(button for button in app.button if button.label == "Run").click()
    return app.run()


def test_a_link_carries_a_query_but_does_not_run_it(visit: Visit, small_store: Path) -> None:
    app = visit(small_store, "sql", query="SELECT 1 AS one")
    for query in ("SELECT 1 AS one", "SELECT 2 AS two", "DROP TABLE act"):
        app.query_params["query"] = query
        app.run()
        assert shown(app, "waiting") is not None
        assert shown(app, "refused") is None
        assert not app.dataframe
        assert app.text_area(key="query").value == query
        app.selectbox(key="rows").set_value(100).run()  # this is not Run
        assert not app.dataframe
    app.query_params["query"] = "SELECT 1 AS one"
    assert run(app.run()).dataframe[0].value["one"].tolist() == [1]
    app.query_params["query"] = "SELECT 2 AS two"
    assert not app.run().dataframe
    app.query_params["query"] = "SELECT 1 AS one"  # Back, to what was run before
    assert app.run().dataframe[0].value["one"].tolist() == [1]
    assert not visit(small_store, "sql", query="SELECT 1 AS one").dataframe  # another session


def test_every_forbidden_query_gives_an_error_and_changes_nothing(visit: Visit, small_store: Path) -> None:
    before = digest(small_store)
    app = visit(small_store, "sql")
    for attack in ATTACKS:
        ask(app, attack)
        assert not app.exception, attack
        refused = shown(app, "refused")
        assert refused is not None, attack
        assert refused["kind"] == "error"
        assert refused["text"].endswith(".")
        assert "root:" not in refused["text"]
        assert not app.dataframe
    assert digest(small_store) == before


def test_a_query_shows_the_rows_of_the_store(visit: Visit, small_store: Path) -> None:
    query = "SELECT feature, n_act FROM feature ORDER BY n_act DESC, feature"
    app = run(visit(small_store, "sql", query=query))
    assert not app.exception
    with open_store(small_store) as store:
        expected = store.features(["feature", "n_act"], order_by="n_act", descending=True)
    shown_rows = app.dataframe[0].value
    assert shown_rows["feature"].tolist() == expected["feature"].tolist()
    assert shown_rows["n_act"].tolist() == expected["n_act"].tolist()
    assert app.text_area(key="query").value == query


def test_a_query_goes_into_the_url_and_its_rows_are_limited(visit: Visit, small_store: Path) -> None:
    app = visit(small_store, "sql")
    assert shown(app, "empty") is not None
    app.selectbox(key="rows").set_value(100).run()
    app.text_area(key="query").set_value("SELECT * FROM range(5000)").run()
    assert url(app) == {"sae": "small", "query": "SELECT * FROM range(5000)", "rows": "100"}
    assert len(app.dataframe[0].value) == 100
    assert any("first 100 rows; there are more" in caption.value for caption in app.caption)
    app.selectbox(key="rows").set_value(10_000).run()
    assert len(app.dataframe[0].value) == 5000


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_query_runs(visit: Visit, small_store: Path, name: str) -> None:
    app = run(visit(small_store, "sql", query=EXAMPLES[name]))
    assert not app.exception
    assert shown(app, "refused") is None
    assert len(app.dataframe) == 1


def test_columns_of_every_type_are_shown(visit: Visit, small_store: Path) -> None:
    query = (
        "SELECT bytes, text AS t, text AS t, [1, 2] AS l, {'a': 1} AS s, NULL AS n, DATE '2000-01-01' AS d, "
        "'<img src=x onerror=alert(1)>' AS \"<b>\", 1::HUGEINT AS h, 'nan'::DOUBLE AS f, true AS b, "
        "INTERVAL 1 DAY AS i FROM token"
    )
    app = run(visit(small_store, "sql", query=query))
    assert not app.exception
    shown_rows = app.dataframe[0].value
    assert len(shown_rows.columns) == 12
    assert len(set(shown_rows.columns)) == 12
    assert "⟨U+202E⟩evil" in shown_rows["t"].tolist()


def test_a_query_that_takes_too_long_is_stopped(
    visit: Visit, small_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saebench.store.connection.StoreConnection.time_limit", 0.2)
    query = "SELECT count(*) FROM range(100000000) a, range(100000) b WHERE hash(a.range + b.range) = 1"
    app = run(visit(small_store, "sql", query=query))
    refused = shown(app, "refused")
    assert refused is not None
    assert "took longer than 0.2 s" in refused["text"]
