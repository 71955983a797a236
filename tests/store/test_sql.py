"""A user's SQL is answered or raises a UserError; it cannot change the store or reach other files."""

from __future__ import annotations

import pytest

from saebench.core.errors import UserError
from saebench.core.files import sha256_file
from saebench.store import open_store
from saebench.store.sql import LONGEST_QUERY
from tests.store.small_store import D_SAE, build_small_store


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A store of two SAEs."""
    path = build_small_store(tmp_path_factory.mktemp("pair") / "store")
    return build_small_store(path, name="second", seed=1)


@pytest.fixture(scope="module")
def store(pair):
    with open_store(pair) as opened:
        yield opened


@pytest.mark.parametrize(
    ("query", "answer"),
    [
        ("SELECT count(*) FROM feature", D_SAE),
        ("FROM feature SELECT max(feature);", D_SAE - 1),
        ("WITH a AS (SELECT count(*) AS n FROM sae.act) SELECT n FROM a", "n_activations"),
        ("SELECT count(*) FROM txt.context c, unnest(c.tokens) -- a comment; with a semicolon", None),
        ("SELECT sum(range) FROM range(4)", 6),
        ("SELECT count(*) FROM sae2.feature", D_SAE),
        ("SELECT text FROM token WHERE token = 1", " the"),
        ("SELECT 'ATTACH x; COPY y' AS \"INSERT\"", "ATTACH x; COPY y"),
    ],
)
def test_sql_query_returns_expected_rows(store, query, answer):
    value = store.sql(query).iloc[0, 0]
    assert value == (store.info()["n_activations"] if answer == "n_activations" else answer or value)


def test_sql_describe_is_allowed(store):
    assert "feature" in store.sql("DESCRIBE feature")["column_name"].tolist()
    assert "density" in store.sql("SUMMARIZE feature")["column_name"].tolist()
    listed = store.sql("SHOW ALL TABLES")
    assert {"sae", "sae2", "txt"} == set(listed["database"])


def test_sql_values_are_bound_as_parameters(store):
    hostile = "'; DROP TABLE feature; --"
    assert store.sql("SELECT ? AS x", [hostile])["x"].tolist() == [hostile]
    assert store.sql("SELECT feature FROM feature WHERE feature = ?", [3])["feature"].tolist() == [3]


@pytest.mark.parametrize("limit", [0, 1, 7, D_SAE - 1, D_SAE, 1000])
def test_sql_rows_are_limited(store, limit):
    found = store.sql("SELECT feature FROM feature ORDER BY feature", limit=limit)
    assert found["feature"].tolist() == list(range(min(limit, D_SAE)))
    assert found.attrs["more"] == (limit < D_SAE)
    assert (found["feature"] - 100 < 0).all()
    long = store.sql("SELECT range FROM range(100000000000)", limit=limit + 3000)
    assert long["range"].tolist() == list(range(limit + 3000))
    assert long.attrs["more"]


REFUSED = [
    ("ATTACH 'other.duckdb'", "ATTACH is none"),
    ("ATTACH '{other}' AS other", "ATTACH is none"),
    ("DETACH sae", "DETACH is none"),
    ("COPY feature TO 'stolen.csv'", "COPY is none"),
    ("COPY (SELECT 1) TO 'stolen.parquet'", "COPY is none"),
    ("EXPORT DATABASE 'stolen'", "EXPORT is none"),
    ("IMPORT DATABASE 'stolen'", "is none"),
    ("INSTALL httpfs", "LOAD is none"),
    ("LOAD httpfs", "LOAD is none"),
    ("PRAGMA database_list", "PRAGMA is none"),
    ("CALL pragma_version()", "CALL is none"),
    ("SET enable_external_access = true", "SET is none"),
    ("SET threads = 64", "SET is none"),
    ("RESET threads", "SET is none"),
    ("USE txt", "SET is none"),
    ("BEGIN", "TRANSACTION is none"),
    ("CHECKPOINT", "is none"),
    ("VACUUM", "VACUUM is none"),
    ("INSERT INTO feature SELECT * FROM feature", "INSERT is none"),
    ("UPDATE act SET value = 0", "UPDATE is none"),
    ("DELETE FROM act", "DELETE is none"),
    ("CREATE TABLE x (a INT)", "CREATE is none"),
    ("CREATE TEMP TABLE x (a INT)", "CREATE is none"),
    ("CREATE MACRO f() AS 1", "CREATE is none"),
    ("DROP TABLE act", "DROP is none"),
    ("ALTER TABLE act ADD COLUMN x INT", "ALTER is none"),
    ("EXPLAIN ANALYZE SELECT 1", "EXPLAIN is none"),
    ("PREPARE x AS SELECT 1", "PREPARE is none"),
    ("WITH gone AS (DELETE FROM act RETURNING *) FROM gone", "DELETE is none"),
    ("WITH more AS (INSERT INTO act VALUES (1, 2, 3, 4) RETURNING *) FROM more", "INSERT is none"),
    ("SELECT 1; SELECT 2", "holds 2 statements"),
    ("SELECT 1; DROP TABLE act", "holds 2 statements"),
    ("", "holds no statement"),
    ("-- nothing", "holds no statement"),
    ("SELECT * FROM read_csv('/etc/passwd')", "'read_csv' is not for stores"),
    ("SELECT * FROM READ_TEXT('/etc/passwd')", "'read_text' is not for stores"),
    ("SELECT * FROM read_blob('/etc/passwd')", "'read_blob' is not for stores"),
    ("SELECT * FROM '/etc/passwd'", "does not exist"),
    ("SELECT * FROM '/etc/*.csv'", "Permission Error: Cannot access file"),
    ("SELECT * FROM \"{other}\"", "not answered: (Permission|Catalog) Error"),
    ("SELECT * FROM glob('/etc/*')", "'glob' is not for stores"),
    ("SELECT (SELECT count(*) FROM glob('/*'))", "'glob' is not for stores"),
    ("SELECT 1 WHERE EXISTS (FROM sniff_csv('/etc/passwd'))", "'sniff_csv' is not for stores"),
    ("SELECT * FROM range((SELECT count(*) FROM glob('/*')))", "'glob' is not for stores"),
    ("WITH a AS (FROM glob('/*')) FROM a UNION ALL FROM a", "'glob' is not for stores"),
    ("DESCRIBE SELECT * FROM read_csv('/etc/passwd')", "'read_csv' is not for stores"),
    ("SUMMARIZE FROM read_csv('/etc/passwd')", "'read_csv' is not for stores"),
    ("SELECT * FROM query('SELECT 1')", "'query' is not for stores"),
    ("SELECT * FROM json_execute_serialized_sql('x')", "is not for stores"),
    ("SELECT * FROM enable_logging()", "is not for stores"),
    ("SELECT * FROM duckdb_secrets()", "is not for stores"),
    ("SELECT getenv('HOME')", "'getenv' is not for stores"),
    ("SELECT main.getenv('HOME')", "'getenv' is not for stores"),
    ("SELECT upper(GETENV('HOME'))", "'getenv' is not for stores"),
    ("SELECT repeat('x', 3000000000)", "'repeat' is not for stores"),
    ("SELECT list_resize([1], 3000000000)", "'list_resize' is not for stores"),
    ("SELECT 'x'.repeat(3000000000)", "'repeat' is not for stores"),
    ("SELECT * FROM secret_frame", "does not exist"),
    ("SELECT nope FROM feature", "Binder Error"),
    ("SELEC 1", "Parser Error: syntax error"),
    ("SELECT 'x'::INT", "not answered"),
    ("SELECT ?", "not answered"),
    ("SELECT '\ud800'", "half a character"),
    ("SELECT '" + "x" * LONGEST_QUERY + "'", "characters; it may have 20,000 at most"),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _unharmed(pair):
    before = {path: sha256_file(path) for path in pair.rglob("*") if path.is_file()}
    yield
    assert {path: sha256_file(path) for path in pair.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A database with one table, outside the store."""
    import duckdb

    path = tmp_path_factory.mktemp("other") / "other.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE single AS SELECT 42 AS secret")
    return path


@pytest.mark.parametrize(("query", "sentence"), REFUSED, ids=[query[:40] for query, _ in REFUSED])
def test_forbidden_sql_raises_user_error(store, other, query, sentence, tmp_path, monkeypatch):
    import pandas as pd

    monkeypatch.chdir(tmp_path)
    secret_frame = pd.DataFrame({"a": [1]})
    with pytest.raises(UserError, match=sentence) as refused:
        store.sql(query.replace("{other}", str(other)))
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    assert len(secret_frame) == 1
    assert store.sql("SELECT count(*) FROM sae.feature").iloc[0, 0] == D_SAE


def test_connection_refuses_what_parser_check_misses(store):
    """DuckDB also refuses what the check of the parsed query might miss."""
    import duckdb

    connection = store._cross_sae.console._connection
    for query in (
        "SELECT * FROM read_csv('/etc/passwd')", "COPY sae.feature TO 'stolen.csv'", "ATTACH 'x.duckdb'",
        "DELETE FROM sae.act", "DROP TABLE sae2.act", "SET enable_external_access = true", "SET threads = 64",
        "LOAD httpfs", "SELECT * FROM glob('/etc/*')",
    ):  # fmt: skip
        with pytest.raises(duckdb.Error):
            connection.cursor().execute(query)


def test_endless_sql_query_times_out(pair):
    with open_store(pair) as store:
        store.time_limit = 0.2
        with pytest.raises(UserError, match=r"took longer than 0\.2 s and was stopped"):
            store.sql("SELECT count(*) FROM range(100000000000) a, range(1000000) b")
        store.time_limit = 60
        assert store.sql("SELECT 1 AS one")["one"].tolist() == [1]


def test_sql_memory_is_limited(store):
    query = "SELECT current_setting('memory_limit'), current_setting('temp_directory')"
    assert store._cross_sae.console._connection.execute(query).fetchall() == [("1.0 GiB", "")]


def test_negative_sql_limit_is_refused(store):
    with pytest.raises(UserError, match="limit is -1"):
        store.sql("SELECT 1", limit=-1)
