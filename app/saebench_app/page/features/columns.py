"""The columns that the table of features can have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import streamlit as st

from saebench.store.schema import feature_column
from saebench_app.session import Here
from saebench_app.view import LABEL

Kind = Literal["id", "token", "text", "count", "share", "number", "density", "size", "feature"]


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        name: the column of the store.
        label: its heading.
        needs: the table of the store that it is made from.
        default: whether it is shown unless the URL names other columns.
    """

    name: str
    label: str
    kind: Kind
    needs: str = "feature"
    default: bool = True

    @property
    def help(self) -> str:
        return "the name that a person gave it" if self.name == LABEL else feature_column(self.name).help


COLUMNS = (
    Column("feature", "feature", "id"),
    Column(LABEL, "label", "text"),
    Column("top_token", "top token", "token", "token"),
    Column("top_token_share", "top-token share", "share", "token"),
    Column("top_token_p_fire", "selectivity", "share", "token"),
    Column("logit_top", "promoted token", "token", "logit"),
    Column("density", "density", "density"),
    Column("max_act", "max act", "size"),
    Column("mean_act", "mean act", "number"),
    Column("explanation_score", "score", "number", "explained"),
    Column("loss_effect", "loss effect", "number", "effect"),
    Column("n_act", "active tokens", "count"),
    Column("n_ctx_act", "contexts", "count", "context"),
    Column("n_doc_act", "documents", "count", "document"),
    Column("entropy_tok", "token entropy", "number", "token"),
    Column("dec_max_cos", "max cosine", "number"),
    Column("dec_nn", "nearest feature", "feature"),
    Column("enc_dec_cos", "enc-dec cosine", "number"),
    Column("main_site", "main site", "text", "crosscoder"),
    Column("main_share", "main-site share", "share", "crosscoder", default=False),
    Column("norm_share", "norm share", "share", "crosscoder"),
    Column("site_cos", "site cosine", "number", "crosscoder", default=False),
    Column("explanation", "explanation", "text", "explained"),
    Column("skew", "skew", "number", default=False),
    Column("kurtosis", "kurtosis", "number", default=False),
    Column("std_act", "std", "number", default=False),
    Column("p10", "p10", "number", default=False),
    Column("p25", "p25", "number", default=False),
    Column("p50", "median", "number", default=False),
    Column("p75", "p75", "number", default=False),
    Column("p90", "p90", "number", default=False),
    Column("p99", "p99", "number", default=False),
    Column("mean_pos", "mean position", "number", "position", default=False),
    Column("first_pos_share", "first-token share", "share", "position", default=False),
    Column("logit_max", "max logit", "number", "logit", default=False),
    Column("logit_kurtosis", "logit kurtosis", "number", "logit", default=False),
    Column("enc_norm", "encoder norm", "number", default=False),
    Column("b_enc", "encoder bias", "number", default=False),
    Column("dec_norm", "decoder norm", "number", default=False),
    Column("kl", "KL when ablated", "number", "effect", default=False),
    Column("loss_effect_n", "contexts ablated", "count", "effect", default=False),
    Column("loss_estimate", "loss estimate", "number", "effect", default=False),
    Column("loss_estimate_n", "contexts estimated", "count", "effect", default=False),
)
SORTABLE = tuple(column.name for column in COLUMNS if column.name != LABEL)


def choose_columns(here: Here) -> None:
    view = here.view
    popover = st.popover("Columns", key="columns-open", on_change="rerun")
    if not popover.open:
        return
    with popover:
        possible = {column.name: column for column in available(here)}
        st.session_state["columns"] = [column.name for column in shown_columns(here)]

        def apply() -> None:
            wanted = st.session_state["columns"]
            own = [column.name for column in default_columns(here)]
            here.show(replace(view, columns=() if wanted == own else tuple(wanted)))

        st.multiselect(
            "Columns of the table",
            list(possible),
            format_func=lambda name: possible[name].label,
            key="columns",
            on_change=apply,
        )
        st.caption("Columns are shown in the order of selection; with none, the default ones.")


def default_columns(here: Here) -> list[Column]:
    return [column for column in available(here) if column.default and (column.name != LABEL or here.names)]


def available(here: Here) -> list[Column]:
    return [column for column in COLUMNS if column.needs in here.store.tables]


def shown_columns(here: Here) -> list[Column]:
    """The columns that the URL names; the number of the feature is always first."""
    named = {column.name: column for column in available(here)}
    wanted = [named[name] for name in here.view.columns if name in named]
    if not wanted:
        return default_columns(here)
    return [named["feature"], *(column for column in wanted if column.name != "feature")]
