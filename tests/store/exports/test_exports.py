"""Exports equal the store, are written completely or not at all, and escape hostile text."""

from __future__ import annotations

import html.parser
import json
import re

import numpy as np
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file

from saebench.core.errors import UserError
from saebench.store import export_store, open_store
from saebench.store.exports import delphi, parquet
from saebench.store.schema import SAE_TABLES, TEXT_TABLES
from tests.store.small_store import D_SAE, HOOK, N_CONTEXTS, VOCAB, build_small_store

SOME = [17, 0, 3]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = build_small_store(tmp_path_factory.mktemp("exported") / "store")
    with open_store(path) as opened:
        opened.annotations.set_label(3, "</title><script>alert(1)</script>")
        opened.annotations.add_to_list("mine", SOME)
        yield opened


def rows_of(store, table, file):
    alias = "sae" if file == "sae" else "txt"
    return store._connection.rows(f"SELECT * FROM {alias}.{table}")


# Parquet


@pytest.mark.parametrize("features", [(), SOME])
def test_parquet_export_equals_tables(store, tmp_path, monkeypatch, features):
    monkeypatch.setattr(parquet, "ROW_GROUP", 50)
    made = export_store(store=store.path, out=tmp_path / "out", features=features)
    names = set()
    for file, tables in (("sae", SAE_TABLES), ("text", TEXT_TABLES)):
        for name, table in tables.items():
            if name not in store.tables:
                continue
            file_name = f"{'txt_' if file == 'text' and name == 'meta' else ''}{name}.parquet"
            names.add(file_name)
            written = pyarrow.parquet.read_table(tmp_path / "out" / file_name)
            wanted = rows_of(store, name, file)
            if features and "feature" in table.names:
                wanted = [row for row in wanted if row[table.names.index("feature")] in features]
            assert written.column_names == table.names
            assert [tuple(row.values()) for row in written.to_pylist()] == wanted
            order = [tuple(row[column] for column in table.order) for row in written.to_pylist()]
            assert order == sorted(order) or "sign" in table.order
    assert set(made.files) == names
    assert made.n_features == (len(features) or D_SAE)
    metadata = pyarrow.parquet.ParquetFile(tmp_path / "out" / "act.parquet").metadata
    assert metadata.row_group(0).column(0).compression == "ZSTD"


# delphi


def read_as_delphi_does(path, module):
    """The files as delphi.latents.loader.TensorBuffer reads them: latent -> (locations, activations)."""
    found, tokens = {}, []
    for file in sorted((path / module).glob("*.safetensors"), key=lambda f: int(f.stem.split("_")[0])):
        split = load_file(file)
        locations = split["locations"].astype(np.int64)
        locations[:, 2] += int(file.stem.split("_")[0])
        order = np.argsort(locations[:, 2], kind="stable")
        tokens.append(split["tokens"].astype(np.int64))
        assert split["activations"].dtype == np.float16
        for latent in np.unique(locations[:, 2]):
            mine = order[locations[order, 2] == latent]
            found[int(latent)] = locations[mine], split["activations"][mine]
    assert all((each == tokens[0]).all() for each in tokens)
    return found, tokens[0]


@pytest.mark.parametrize("features", [(), SOME])
def test_delphi_export_has_all_activations(store, tmp_path, features):
    export_store(store=store.path, out=tmp_path / "out", format="delphi", features=features)
    found, tokens = read_as_delphi_does(tmp_path / "out", HOOK)
    wanted = {i: store.activations(i) for i in features or range(D_SAE)}
    assert set(found) == {i for i, acts in wanted.items() if len(acts)}
    for latent, (locations, activations) in found.items():
        acts = wanted[latent]
        assert locations[:, :2].tolist() == acts[["ctx", "pos"]].to_numpy().tolist()
        assert (activations == acts["value"].to_numpy().astype(np.float16)).all()
    for ctx in range(N_CONTEXTS):
        own = store.context(ctx)["tokens"]
        assert tokens[ctx, : len(own)].tolist() == own
        assert not tokens[ctx, len(own) :].any()
    config = json.loads((tmp_path / "out" / HOOK / "config.json").read_text())
    assert config["model_name"] == "small"
    assert config["ctx_len"] == config["cache_ctx_len"] == tokens.shape[1]


def test_delphi_files_cover_each_latent_once(store, tmp_path, monkeypatch):
    monkeypatch.setattr(delphi, "SPLITS", 7)
    export_store(store=store.path, out=tmp_path / "out", format="delphi")
    edges = sorted(tuple(map(int, file.stem.split("_"))) for file in tmp_path.rglob("*.safetensors"))
    assert len(edges) == 7
    assert [i for first, last in edges for i in range(first, last + 1)] == list(range(D_SAE))


@pytest.mark.parametrize("hook", ["blocks.2.hook_resid_post", "../../etc/passwd", "a/b", "..", ""])
def test_hook_name_cannot_escape_export_folder(hook):
    name = delphi.module_name(hook)
    assert re.fullmatch(r"\w[\w.-]*", name)


# Neuronpedia


KEYS = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
    "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson", "neg_str",
    "neg_values", "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_values",
    "freq_hist_data_bar_heights", "logits_hist_data_bar_heights", "logits_hist_data_bar_values",
    "n_prompts_total", "n_tokens_in_prompt", "dataset", "decoder_weights_dist", "activations",
}  # fmt: skip
"""Of NeuronpediaDashboardFeature.to_dict in SAEDashboard."""


@pytest.mark.parametrize("features", [(), SOME])
def test_neuronpedia_json_equals_store(store, tmp_path, features):
    export_store(store=store.path, out=tmp_path / "out", format="neuronpedia", features=features)
    batch = json.loads((tmp_path / "out" / "batch-0.json").read_text("utf-8"))
    assert set(batch) == {"model_id", "layer", "sae_set", "features"}
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("small", 0, "small")
    assert [feature["feature_index"] for feature in batch["features"]] == list(features or range(D_SAE))
    for written in batch["features"]:
        i = written["feature_index"]
        assert set(written) == KEYS
        logits = store.logits(i)
        for sign, name in ((1, "pos"), (-1, "neg")):
            own = logits[logits["sign"] == sign]
            assert written[f"{name}_str"] == own["text"].tolist()
            assert written[f"{name}_values"] == own["value"].tolist()
        bins = store.histogram(i)
        assert written["frac_nonzero"] == store.feature(i)["density"]
        assert written["freq_hist_data_bar_heights"] == bins["count"].tolist()
        assert written["freq_hist_data_bar_values"] == ((bins["lo"] + bins["hi"]) / 2).tolist()
        near = store.neighbors(i, "correlation").head(10)
        assert written["correlated_features_indices"] == near["other"].tolist()
        assert written["correlated_features_pearson"] == near["score"].tolist()
        assert written["n_prompts_total"] == N_CONTEXTS
        stored = store.examples(i)
        firing = stored[stored["group"].astype(str).str.match("top|decile")]
        order = firing["group"].map(lambda g: 0 if g == "top" else 11 - int(g.removeprefix("decile-")))
        firing = firing.loc[order.sort_values(kind="stable").index]
        examples = written["activations"]
        assert [example["values"] for example in examples] == firing["acts"].tolist()
        assert [example["tokens"] for example in examples] == firing["pieces"].tolist()
        for example, group, value in zip(examples, firing["group"], firing["value"], strict=True):
            assert set(example) == {"bin_min", "bin_max", "bin_contains", "tokens", "values"}
            assert example["bin_min"] <= value <= example["bin_max"]
            assert (example["bin_min"] == example["bin_contains"] == -1) == (group == "top")
        shares = {example["bin_min"]: example["bin_contains"] for example in examples} | {-1: 0}
        assert len(examples) == 0 or sum(shares.values()) == pytest.approx(1)


# HTML


VOID = {"meta", "rect", "line"}


class Reader(html.parser.HTMLParser):
    """Parses a page into elements with their attributes, and its text."""

    def __init__(self):
        super().__init__()
        self.elements, self.text, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def page(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("html") / "out"
    made = export_store(store=store.path, out=out, format="html")
    assert made.files == ("features.html",)
    return (out / "features.html").read_text("utf-8")


ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "p", "a", "article", "div",
    "span", "dl", "dt", "dd", "ol", "li", "details", "summary", "svg", "rect", "line", "text", "table",
    "thead", "tbody", "tr", "th", "td", "code", "footer",
}  # fmt: skip


def test_html_page_has_no_requests_and_no_scripts(page):
    reader = read(page)
    assert {tag for tag, _ in reader.elements} <= ALLOWED
    for tag, attributes in reader.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert not {"src", "srcset", "action", "data"} & set(attributes)
        assert tag != "a" or re.fullmatch(r"#f\d+", attributes["href"])
        assert re.fullmatch(r"(--[aw]:[\d.]+%)?", attributes.get("style", ""))
    assert not re.search(r"https?:|url\(|@import|javascript:(?!x\))", page)
    (policy,) = [a["content"] for t, a in reader.elements if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'")


def test_html_page_escapes_hostile_text(page):
    reader = read(page)
    text = "".join(reader.text)
    assert "<img src=x onerror=alert(1)>" in text
    assert "<img" not in page
    assert page.count("<script") == page.count("</script") == 0
    assert "</title><script>alert(1)</script>" in text
    assert "1862 <b>Lincoln</b>" in text
    assert "&amp;lt;" in page  # the token &lt;, not the character
    assert "⟨U+202E⟩evil" in text
    assert not re.search("[\u202e\u2066-\u2069\x00-\x08]", page)


def test_html_page_equals_store(store, page):
    text = "".join(read(page).text)
    for i in range(D_SAE):
        assert f"Feature {i}" in text
    links = {a["href"] for t, a in read(page).elements if t == "a"}
    targets = {f"#{a['id']}" for t, a in read(page).elements if t == "article"}
    assert links <= targets == {f"#f{i}" for i in range(D_SAE)}
    titles = [a["title"] for t, a in read(page).elements if t == "span" and "title" in a]
    shown = sum(sum(act != 0 for act in acts) for i in range(D_SAE) for acts in store.examples(i)["acts"])
    assert len(titles) == shown
    bars = sum((store.histogram(i)["count"] > 0).sum() for i in range(D_SAE))
    assert sum(t == "rect" for t, _ in read(page).elements) == bars


def test_html_page_shows_explanation_if_stored(store, tmp_path, monkeypatch):
    from saebench.store.query import FeatureStore

    plain = FeatureStore.feature
    monkeypatch.setattr(FeatureStore, "feature", lambda s, i: plain(s, i) | {"explanation": "fires on <b>"})
    export_store(store=store.path, out=tmp_path / "out", format="html", features=[3])
    assert '<p class="facts">fires on &lt;b&gt;</p>' in (tmp_path / "out" / "features.html").read_text(
        "utf-8"
    )


def test_html_page_of_one_feature_and_of_ordered_list(store, tmp_path):
    export_store(store=store.path, out=tmp_path / "one", format="html", features=[3])
    one = (tmp_path / "one" / "features.html").read_text("utf-8")
    assert one.count("<article") == 1
    assert "<title>Feature 3 of small</title>" in one
    export_store(store=store.path, out=tmp_path / "mine", format="html", list="mine")
    mine = (tmp_path / "mine" / "features.html").read_text("utf-8")
    assert re.findall(r'<article id="f(\d+)"', mine) == [str(i) for i in SOME]


def test_html_page_of_store_without_text(textless_store, tmp_path):
    export_store(store=textless_store, out=tmp_path / "out", format="html", features=["0-2"])
    text = "".join(read((tmp_path / "out" / "features.html").read_text("utf-8")).text)
    assert "The cache was imported without tokens and contexts." in text


# All


@pytest.mark.parametrize("format", ["parquet", "html", "delphi", "neuronpedia"])
def test_export_twice_gives_identical_bytes(store, tmp_path, format):
    for name in "ab":
        export_store(store=store.path, out=tmp_path / name, format=format, features=[1, 2])
    (tmp_path / "empty").mkdir()
    made = export_store(store=store.path, out=tmp_path / "empty", format=format, features=["1,2"])
    for file in made.files:
        contents = {(tmp_path / name / file).read_bytes() for name in ("a", "b", "empty")}
        assert len(contents) == 1
    assert made.bytes == sum((tmp_path / "a" / file).stat().st_size for file in made.files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "empty"]


@pytest.mark.parametrize("format", ["parquet", "html", "delphi", "neuronpedia"])
def test_export_to_full_disk_leaves_no_files(store, tmp_path, monkeypatch, format):
    import errno

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for place in ("pyarrow.parquet.ParquetWriter.write_batch", "safetensors.numpy.save_file",
                  "saebench.store.exports.html.write_bytes_atomic",
                  "saebench.store.exports.neuronpedia.write_json_atomic"):  # fmt: skip
        monkeypatch.setattr(place, full)
    with pytest.raises(UserError, match="no space left while writing"):
        export_store(store=store.path, out=tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"features": [D_SAE]}, f"feature {D_SAE} is not in the SAE; it has 0 to {D_SAE - 1}"),
        ({"features": ["1,x"]}, "'x' names no features; write them like 3,17,40-49"),
        ({"features": ["5-2"]}, "write the smaller number first"),
        ({"features": ["0-99999999"]}, "feature 99999999 is not in the SAE"),
        ({"features": ["-3"]}, "names no features"),
        ({"features": [1], "list": "mine"}, "both features and the list 'mine'"),
        ({"list": "other"}, "there is no list 'other'; there is mine"),
        ({"sae": "smal"}, "did you mean small"),
        ({"format": "csv"}, "--format csv is not a form of store exports; there is parquet, html"),
        ({"store": "nowhere"}, "not a feature store"),
    ],
)
def test_invalid_input_raises_user_error_and_writes_nothing(store, tmp_path, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        export_store(**{"store": store.path, "out": tmp_path / "out", **settings})
    assert list(tmp_path.iterdir()) == []


def test_export_into_nonempty_directory_is_refused(store, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty \(it holds notes.txt\); choose another --out"):
        export_store(store=store.path, out=tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a file has that name"):
        export_store(store=store.path, out=tmp_path / "file")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("format", ["delphi", "neuronpedia"])
def test_export_that_needs_text_is_refused_without_it(textless_store, tmp_path, format):
    with pytest.raises(UserError, match=r"has no table 'context'.*imported without tokens"):
        export_store(store=textless_store, out=tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


def test_html_page_over_size_limit_is_refused(store, tmp_path, monkeypatch):
    monkeypatch.setattr("saebench.store.exports.html.MOST_FEATURES", 5)
    with pytest.raises(UserError, match="24 features are more than the 5 of one page; name some with"):
        export_store(store=store.path, out=tmp_path / "out", format="html")


def test_export_command_writes_files(store, tmp_path, capsys):
    from saebench.cli import main

    words = ["store", "export", str(store.path), "--format", "html", "--features", "3,5-6", "9"]
    assert main([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["format"], said["sae"], said["n_features"]) == ("html", "small", 4)
    assert said["files"] == ["features.html"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_vocabulary_has_hostile_tokens():
    assert {b"</script>", b"<img src=x onerror=alert(1)>", b"&lt;"} <= set(VOCAB)
