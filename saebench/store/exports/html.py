"""Export of ``features.html``: one page that shows features as the explorer does, without server or network.

Everything is in the one file; it has no script, and its policy forbids the browser any request. Texts are
escaped, numbers are formatted here, nothing else enters the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core import formatting
from saebench.core.errors import UserError
from saebench.core.files import write_bytes_atomic
from saebench.core.formatting import visible
from saebench.store.exports.markup import bar, short, shown, table, token
from saebench.store.exports.style import STYLE
from saebench.store.readers.sae import sites_text
from saebench.store.schema import DECILES

if TYPE_CHECKING:
    import pandas as pd

    from saebench.store.query import FeatureStore

number, share = partial(formatting.number, padded=False), partial(formatting.share, padded=False)

PAGE = "features.html"
MOST_FEATURES = 200
SHOWN_TOKENS, SHOWN_NEIGHBORS = 12, 10
HEADINGS = {
    "top": "Top activations",
    "random": "Random firings",
    **{
        f"decile-{number}": f"Decile {number} of its activations (10: largest)"
        for number in reversed(DECILES)
    },
    "near-miss": "No firing, on a token that it fires on elsewhere",
    "negative": "No firing, anywhere",
}
"""Group of examples -> its heading, in the order of the page."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 460, 150, 34, 20, 8


def check(store: FeatureStore, features: list[int] | None) -> None:
    n = store.info()["d_sae"] if features is None else len(features)
    if n > MOST_FEATURES:
        raise UserError(
            f"{n:,} features are more than the {MOST_FEATURES} of one page; "
            "name some with --features or --list"
        )


def write(store: FeatureStore, features: list[int] | None, directory: Path) -> tuple[str, ...]:
    wanted = list(range(store.info()["d_sae"])) if features is None else features
    write_bytes_atomic(directory / PAGE, page(store, wanted).encode())
    return ()


def page(store: FeatureStore, features: Sequence[int]) -> str:
    """The whole page."""
    info = store.info()
    named = store.annotations.labels()
    labels = dict(zip(named["feature"].tolist(), named["label"].tolist(), strict=True))
    rows = {feature: store.feature(feature) for feature in features}
    title = f"Feature {features[0]}" if len(features) == 1 else f"{len(features)} features"
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="referrer" content="no-referrer">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{shown(f'{title} of {store.sae}')}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n",
        _header(info),
        _index(rows, labels) if len(rows) > 1 else "",
        *(_article(store, row, labels.get(feature), rows) for feature, row in rows.items()),
        "<footer>Made by saebench store export.</footer>\n</body>\n</html>\n",
    ]
    return "".join(parts)


def _header(info: dict[str, Any]) -> str:
    sites = sites_text(info)
    facts = [
        f"{info['sae']}, {info['d_sae']:,} features, k {info['k']}",
        f"{sites} of {info['model']}" if info["model"] else sites,
        f"{info['n_tokens']:,} tokens" + (f" of {info['text']}" if info["text"] else ""),
    ]
    return f'<header><h1>{shown(info["name"])}</h1><p class="facts">{shown(" · ".join(facts))}</p></header>\n'


def _index(rows: dict[int, dict[str, Any]], labels: dict[int, str]) -> str:
    lines = [
        (
            f'<a href="#f{feature}">{feature}</a>',
            token(row["top_token"]),
            share(row["density"]),
            number(row["max_act"]),
            shown(labels.get(feature, "")),
        )
        for feature, row in rows.items()
    ]
    return table(("feature", "top token", "density", "largest", "label"), lines, left=(0, 1, 4))


def _article(
    store: FeatureStore, row: dict[str, Any], label: str | None, rows: dict[int, dict[str, Any]]
) -> str:
    feature = row["feature"]
    badges = "".join(f'<span class="badge">{flag}</span>' for flag in ("dead", "dense") if row[flag])
    name = f'<span class="label">{shown(label)}</span>' if label else ""
    explained = f'<p class="facts">{shown(row["explanation"])}</p>' if row.get("explanation") else ""
    return (
        f'<article id="f{feature}"><div class="title"><h2>Feature {feature}</h2>{badges}{name}</div>\n'
        f'{explained}{_statistics(store, row)}<div class="columns"><div>{_examples(store, row)}</div>\n'
        f"<div>{_histogram(store, row)}{_logits(store, feature)}{_tokens(store, row)}"
        f"{_neighbors(store, feature, rows)}</div></div></article>\n"
    )


def _statistics(store: FeatureStore, row: dict[str, Any]) -> str:
    tiles = [
        ("Density", share(row["density"]), f"{row['n_act']:,} tokens"),
        ("Largest", number(row["max_act"]), f"99% below {number(row['p99'])}"),
        ("Mean", number(row["mean_act"]), f"± {number(row['std_act'])}, median {number(row['p50'])}"),
        ("Encoder · decoder", number(row["enc_dec_cos"]), "cosine of the two"),
    ]
    if store.has("context"):
        tiles.insert(1, ("Contexts", f"{row['n_ctx_act']:,}", f"{row['n_doc_act']:,} documents"))
        if not row["dead"]:
            top = f"top token {share(row['top_token_share'])}"
            tiles.append(("Token entropy", f"{number(row['entropy_tok'])} bits", top))
    cells = (
        f'<div><dt>{name}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="more">{escape(more)}</dd></div>'
        for name, value, more in tiles
    )
    return f"<dl>{''.join(cells)}</dl>\n"


def _examples(store: FeatureStore, row: dict[str, Any]) -> str:
    if not store.has("context"):
        return _missing("Examples", store, "context")
    if row["dead"]:
        return '<h3>Examples</h3><p class="note">It fires on no token of the text.</p>'
    frame = store.examples(row["feature"])
    parts = []
    for group, heading in HEADINGS.items():
        chosen = frame[frame["group"] == group].to_dict("records")
        items = "".join(_example(example, row["max_act"]) for example in chosen)
        if group == "top":
            parts.append(f"<h3>{heading}</h3><ol>{items}</ol>\n")
        elif chosen:
            parts.append(f"<details><summary>{heading}</summary><ol>{items}</ol></details>\n")
    return "".join(parts)


def _example(example: dict[str, Any], scale: float) -> str:
    peak = example["pos"] - example["start"]
    spans = []
    for at, (piece, act) in enumerate(zip(example["pieces"], example["acts"], strict=True)):
        text = shown(piece)
        if act:
            level = min(abs(act) / scale, 1) if scale > 0 else 0.0
            kind = "t" + (" cold" if act < 0 else "") + (" peak" if at == peak else "")
            text = f'<span class="{kind}" style="--a:{level:.0%}" title="{number(act)}">{text}</span>'
        elif at == peak:
            text = f'<span class="peak">{text}</span>'
        spans.append(text)
    before = '<span class="cut">…</span>' if example["start"] > 0 else ""
    label = example["label"] if isinstance(example["label"], str) else ""
    origin = visible(label, spaces="edges")
    origin = f"{origin} · context {example['ctx']}, position {example['pos']}".removeprefix(" · ")
    return (
        f'<li><div class="value">{number(example["value"])}</div><div>'
        f'<div class="text">{before}{"".join(spans)}</div>'
        f'<div class="origin">{escape(origin)}</div></div></li>\n'
    )


def _histogram(store: FeatureStore, row: dict[str, Any]) -> str:
    if row["dead"]:
        return ""
    bins = store.histogram(row["feature"])
    lo, hi = float(bins["lo"].iloc[0]), float(bins["hi"].iloc[-1])
    tallest = math.log10(max(int(bins["count"].max()), 10)) + 0.2
    inner, base = WIDTH - LEFT, HEIGHT - BOTTOM
    step = inner / len(bins)

    def height(count: float) -> float:
        """Of a bar, in pixels; one token is still seen."""
        return base * (math.log10(count) + 0.2) / (tallest + 0.2)

    marks = []
    for power in range(int(tallest) + 1):
        y = base - height(10**power)
        marks.append(
            f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(10**power)}</text>'
        )
    bars = [
        f'<rect x="{LEFT + at * step:.2f}" y="{base - height(count):.2f}" width="{step * 0.92:.2f}" '
        f'height="{height(count):.2f}"><title>{count:,} tokens from {number(left)} to {number(right)}'
        "</title></rect>"
        for at, (left, right, count) in enumerate(bins.itertuples(index=False, name=None))
        if count
    ]
    ends = [
        f'<text x="{x}" y="{HEIGHT - 5}" text-anchor="{anchor}">{number(value)}</text>'
        for x, anchor, value in ((LEFT, "start", lo), (WIDTH, "end", hi))
    ]
    middle = f'<text x="{LEFT + inner / 2:.0f}" y="{HEIGHT - 5}" text-anchor="middle">activation</text>'
    described = f"Histogram of {int(bins['count'].sum()):,} activations from {number(lo)} to {number(hi)}"
    return (
        f'<h3>Activations</h3><svg viewBox="0 {-TOP} {WIDTH} {HEIGHT + TOP}" role="img" '
        f'aria-label="{described}">'
        f"{''.join([*marks, *bars, *ends, middle])}</svg>"
        '<p class="note">Number of tokens, on a logarithmic scale.</p>\n'
    )


def _logits(store: FeatureStore, feature: int) -> str:
    title = "Effect on the next token"
    if not store.has("logit"):
        return _missing(title, store, "logit")
    logits = store.logits(feature)
    most = float(logits["value"].abs().max()) if len(logits) else 1.0
    tables = []
    for sign, name, kind in ((1, "promoted", "bar"), (-1, "suppressed", "bar cold")):
        lines = [
            (token(text), bar(number(value), abs(value) / (most or 1), kind))
            for text, value in logits[logits["sign"] == sign][["text", "value"]].itertuples(index=False)
        ]
        tables.append(table((name, "logit"), lines, left=(0,)))
    return f'<h3>{title}</h3><div class="pair"><div>{tables[0]}</div><div>{tables[1]}</div></div>\n'


def _tokens(store: FeatureStore, row: dict[str, Any]) -> str:
    title = "Tokens it fires on"
    if not store.has("feature_token"):
        return _missing(title, store, "feature_token")
    if row["dead"]:
        return ""
    lines = [
        (
            token(t.text),
            f"{t.n:,}",
            bar(share(t.p_token_given_fire), t.p_token_given_fire),
            bar(share(t.p_fire_given_token), t.p_fire_given_token),
        )
        for t in store.tokens(row["feature"]).head(SHOWN_TOKENS).itertuples()
    ]
    return (
        f"<h3>{title}</h3>{table(('token', 'times', 'of its firings', 'of the token'), lines, left=(0,))}\n"
    )


def _neighbors(store: FeatureStore, feature: int, rows: dict[int, dict[str, Any]]) -> str:
    kinds = {
        "decoder": ("Nearest decoder directions", "cosine"),
        "cofire": ("Fires together with", "jaccard"),
    }
    parts = []
    for kind, (title, score) in kinds.items():
        near: pd.DataFrame = store.neighbors(feature, kind).head(SHOWN_NEIGHBORS)
        lines = [
            _neighbor(int(other), value, rows.get(other) or store.feature(other), rows)
            for other, value in near.iloc[:, :2].itertuples(index=False)
        ]
        if lines:
            heads = ("feature", score, "density", "top token")
            parts.append(f"<h3>{title}</h3>{table(heads, lines, left=(0, 3))}\n")
    return "".join(parts)


def _neighbor(
    other: int, score: float, row: dict[str, Any], rows: dict[int, dict[str, Any]]
) -> tuple[str | tuple[str, str], ...]:
    name = f'<a href="#f{other}">{other}</a>' if other in rows else str(other)
    return name, bar(number(score), max(score, 0)), share(row["density"]), token(row["top_token"])


def _missing(title: str, store: FeatureStore, table: str) -> str:
    reason = store.why_missing(table)
    return f'<h3>{title}</h3><p class="note">{shown(reason[:1].upper() + reason[1:])}.</p>\n'
