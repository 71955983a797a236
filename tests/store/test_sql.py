"""A user's SQL is answered or raises a UserError; it cannot change the store or reach other files."""

from __future__ import annotations

import pytest

from saebench.core.errors import UserError
from saebench.core.files import sha256_file
from saebench.store import open_store
from saebench.store.publish import read_manifest
from saebench.store.sql_process import Console
from saebench.store.sql_rules import LONGEST_QUERY
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
    ("SELECT * FROM '/etc/passwd'", "has no table '/etc/passwd'"),
    ("SELECT * FROM '/etc/*.csv'", "has no table"),
    ("SELECT * FROM \"{other}\"", "has no table"),
    ("FROM duckdb_databases", "has no table 'duckdb_databases'"),
    ("FROM pragma_database_list", "has no table"),
    ("SELECT name, setting FROM pg_settings", "has no table"),
    ("FROM pg_catalog.pg_settings", "has no table"),
    ("FROM sqlite_master", "has no table"),
    ("FROM system.main.duckdb_logs", "has no table"),
    ("DESCRIBE duckdb_databases", "has no table"),
    ("SHOW duckdb_databases", "has no table"),
    ("SUMMARIZE duckdb_databases", "has no table"),
    ("SELECT (SELECT path FROM duckdb_databases LIMIT 1)", "has no table"),
    ("SELECT 1 WHERE 1 IN (SELECT 1 FROM duckdb_logs)", "has no table"),
    ("FROM feature SEMI JOIN duckdb_databases ON true", "has no table"),
    ("FROM feature LIMIT (SELECT count(*) FROM duckdb_databases)", "has no table"),
    ("FROM feature ORDER BY (SELECT count(*) FROM duckdb_databases)", "has no table"),
    ("UNPIVOT duckdb_databases ON path", "has no table"),
    ("WITH pg_settings AS (FROM pg_settings) FROM pg_settings", "WITH cannot define 'pg_settings'"),
    ("FROM duckdb_databases, (WITH DuckDB_Databases AS (SELECT 1) SELECT 1)", "WITH cannot define"),
    ("WITH RECURSIVE t AS (SELECT path FROM duckdb_databases UNION ALL FROM t) FROM t", "has no table"),
    ("SHOW variables", "has no table 'variables'"),
    ("SELECT * FROM duckdb_settings()", "'duckdb_settings' is not for stores"),
    ("SELECT * FROM pragma_database_size()", "is not for stores"),
    ("SELECT * FROM query_table('duckdb_databases')", "'query_table' is not for stores"),
    ("SELECT * FROM histogram('duckdb_databases', 'path')", "'histogram' is not for stores"),
    ("SELECT current_setting('temp_directory')", "'current_setting' is not for stores"),
    ("SELECT json_serialize_plan('FROM duckdb_settings()')", "is not for stores"),
    ("SELECT get_block_size('sae')", "'get_block_size' is not for stores"),
    ("SELECT pg_get_viewdef(1)", "is not for stores"),
    ("SELECT sleep_ms(1)", "'sleep_ms' is not for stores"),
    ("SELECT pg_sleep(1)", "'pg_sleep' is not for stores"),
    ("SELECT write_log('x')", "'write_log' is not for stores"),
    ("SELECT list_transform([1], lambda x: current_setting('threads'))", "is not for stores"),
    ("SELECT sum(n_act) FILTER (current_setting('threads') = '1') FROM feature", "is not for stores"),
    ("SELECT uper('x')", "the function 'uper' is not for stores; did you mean upper?"),
    ("FROM featuer", "has no table 'featuer'; did you mean feature?"),
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
    ("SELECT * FROM secret_frame", "has no table 'secret_frame'"),
    ("SELECT " + "(" * 5000 + "1" + ")" * 5000, "depth limit"),
    ("SELECT '" + "x" * 1000 + "'::INT", "Could not convert"),
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


def test_connection_refuses_what_parser_check_misses(pair):
    """DuckDB also refuses what the check of the parsed query might miss."""
    import duckdb

    console = Console()
    manifest = read_manifest(pair)
    files = {
        f"sae{n}": (str(pair / one.file.path), one.file.sha256) for n, one in enumerate(manifest.saes, 1)
    }
    assert (
        console.answer({"open": {"store": str(pair), "files": files, "search_path": "sae1.main"}}, b"")[0]
        == {}
    )
    connection = console._connection
    for query in (
        "SELECT * FROM read_csv('/etc/passwd')", "COPY sae1.feature TO 'stolen.csv'", "ATTACH 'x.duckdb'",
        "DELETE FROM sae1.act", "DROP TABLE sae2.act", "SET enable_external_access = true",
        "SET threads = 64", "LOAD httpfs", "SELECT * FROM glob('/etc/*')", "SELECT * FROM 'x.parquet'",
        "COPY (SELECT 1) TO '/dev/stdout'",
        "CREATE PERSISTENT SECRET s (TYPE http)", "EXPORT DATABASE 'x'", "SELECT getenv('HOME')",
    ):  # fmt: skip
        with pytest.raises(duckdb.Error):
            connection.cursor().execute(query)
    settings = "SELECT current_setting('memory_limit'), current_setting('temp_directory')"
    assert connection.execute(settings).fetchall() == [("1.0 GiB", "")]
    connection.close()


def test_endless_sql_query_times_out(pair):
    with open_store(pair) as store:
        store.time_limit = 0.2
        for query in (
            "SELECT count(*) FROM range(100000000000) a, range(1000000) b",
            "SELECT length(bitstring('1', 2000000000))",
            "SELECT length(replace(replace(repeat('a', 10000), 'a', repeat('b', 9999)), 'b', 'cc')) FROM act",
            "SELECT levenshtein(repeat('a', 100000), repeat('b', 100000))",
            "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t",
        ):
            with pytest.raises(UserError, match=r"took longer than 0\.2 s and was stopped"):
                store.sql(query)
        store.time_limit = 60
        assert store.sql("SELECT 1 AS one")["one"].tolist() == [1]


def test_negative_sql_limit_is_refused(store):
    with pytest.raises(UserError, match="limit is -1"):
        store.sql("SELECT 1", limit=-1)
