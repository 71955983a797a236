"""The tables of a feature store, format 2: names, types and descriptions of all columns.

There are three kinds of DuckDB files. An *SAE file* holds what one SAE does on one text; a *text file* holds
the contexts and tokens, and is shared by all SAEs indexed over that text; an *extra* holds what was derived
from an SAE file after indexing, and is added, replaced and removed separately. Identifiers in SQL come from
this module only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from saebench.core.errors import UserError

FORMAT_VERSION = 2

DENSE_ABOVE = 0.1
"""A latent that fires on more than this fraction of the tokens is dense; one that never fires is dead."""

EXCLUSIVE_ABOVE = 0.7
"""A latent of a crosscoder is exclusive to a site that has more than this share of its decoder norm."""

HIST_BINS = 40
POSITION_BUCKETS = 16
TOKENS_PER_FEATURE = 32
FEATURES_PER_TOKEN = 32
LABELS_PER_FEATURE = 8
LOGITS_PER_SIGN = 10
NEIGHBORS_PER_FEATURE = 16

QUANTILE_GRID = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 0.9999, 1)
"""The quantiles stored for each latent; closer together at large activations."""

GROUP_TOP, GROUP_RANDOM, GROUP_NEAR_MISS, GROUP_NEGATIVE = 0, 20, 30, 31
DECILES = range(1, 11)
GROUPS = {
    "top": GROUP_TOP, **{f"decile-{number}": number for number in DECILES}, "random": GROUP_RANDOM,
    "near-miss": GROUP_NEAR_MISS, "negative": GROUP_NEGATIVE,
}  # fmt: skip
"""Name -> stored number of a group of examples."""

HIST_KINDS = {"value": 0, "log10": 1}
TOKEN_ROLES = {"active": 0, "previous": -1, "next": 1}
NEIGHBOR_KINDS = {"decoder": 0, "encoder": 1, "cofire": 2, "correlation": 3}


@dataclass(frozen=True)
class Column:
    name: str
    type: str
    help: str


@dataclass(frozen=True)
class Table:
    """A table and the file it lives in: "sae", "text", or an extra's name. Rows are stored in the order of
    ``order``."""

    name: str
    file: str
    order: tuple[str, ...]
    columns: tuple[Column, ...]

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]

    def create(self) -> str:
        """The CREATE TABLE statement. No keys: DuckDB's indexes slow loading and must fit in memory."""
        columns = ", ".join(f"{column.name} {column.type}" for column in self.columns)
        return f"CREATE TABLE {self.name} ({columns})"


def _table(name: str, file: str, order: str, *columns: tuple[str, str, str]) -> Table:
    return Table(name, file, tuple(order.split()), tuple(Column(*column) for column in columns))


FEATURE = _table(
    "feature", "sae", "feature",
    ("feature", "UINTEGER", "number of the latent, 0 to d_sae - 1"),
    ("n_act", "BIGINT", "tokens on which it fires"),
    ("density", "DOUBLE", "n_act / n_tokens, exact"),
    ("max_act", "FLOAT", "largest activation; 0 when dead, like the other statistics of activations"),
    ("mean_act", "FLOAT", "mean over the tokens on which it fires"),
    ("std_act", "FLOAT", "standard deviation (population) over the tokens on which it fires"),
    ("skew", "FLOAT", "skewness of its activations; 0 when they are all equal"),
    ("kurtosis", "FLOAT", "excess kurtosis of its activations; 0 when they are all equal"),
    ("p10", "FLOAT", "10% quantile of its activations, linear between neighbors"),
    ("p25", "FLOAT", "25% quantile of its activations"),
    ("p50", "FLOAT", "median of its activations"),
    ("p75", "FLOAT", "75% quantile of its activations"),
    ("p90", "FLOAT", "90% quantile of its activations"),
    ("p99", "FLOAT", "99% quantile of its activations"),
    ("n_ctx_act", "BIGINT", "contexts in which it fires"),
    ("n_doc_act", "BIGINT", "documents in which it fires"),
    ("top_token", "VARCHAR", "text of the token on which it fires most often"),
    ("top_token_share", "FLOAT", "share of its firings that fall on top_token"),
    ("top_token_p_fire", "FLOAT", "share of top_token's occurrences on which it fires"),
    ("entropy_tok", "FLOAT", "entropy in bits of the token it fires on; 0 when it fires on one token only"),
    ("mean_pos", "FLOAT", "mean position in the context of its firings"),
    ("first_pos_share", "FLOAT", "share of its firings on the first token of a context that the cache keeps"),
    ("logit_top", "VARCHAR", "text of the token whose logit it raises most"),
    ("logit_max", "FLOAT", "change of that logit per unit of activation"),
    ("logit_kurtosis", "FLOAT", "excess kurtosis of its effects on all logits; high if it affects few"),
    ("enc_norm", "FLOAT", "norm of its encoder direction"),
    ("b_enc", "FLOAT", "its encoder bias"),
    ("dec_norm", "FLOAT", "norm of its decoder row"),
    ("enc_dec_cos", "FLOAT", "cosine of its encoder and decoder directions; NULL if their widths differ"),
    ("dec_max_cos", "FLOAT", "cosine with the nearest decoder row of another latent"),
    ("dec_nn", "UINTEGER", "the latent with that nearest decoder row"),
    ("dead", "BOOLEAN", "fires on no token"),
    ("dense", "BOOLEAN", f"fires on more than {DENSE_ABOVE:.0%} of the tokens"),
)  # fmt: skip

ACT = _table(
    "act", "sae", "feature ctx pos",
    ("feature", "UINTEGER", "latent"),
    ("ctx", "UINTEGER", "context; the row of the cache when it has no contexts"),
    ("pos", "UINTEGER", "position in the context, 0-based"),
    ("value", "FLOAT", "activation, never 0"),
)  # fmt: skip

HIST = _table(
    "hist", "sae", "feature kind",
    ("feature", "UINTEGER", "latent; dead ones have no row"),
    ("kind", "UTINYINT", "0: activations; 1: log10 of the positive ones, from the smallest to the largest"),
    ("lo", "FLOAT", "left edge of the first bin: 0, or the smallest activation when that is negative"),
    ("hi", "FLOAT", "right edge of the last bin: the largest activation, or 0 when that is negative"),
    ("counts", "UINTEGER[]", f"activations in each of {HIST_BINS} bins of equal width"),
)  # fmt: skip

QUANTILE = _table(
    "quantile", "sae", "feature",
    ("feature", "UINTEGER", "latent; dead ones have no row"),
    ("qs", "FLOAT[]", "quantiles of its activations at schema.QUANTILE_GRID, linear between neighbors"),
)  # fmt: skip

POSITION = _table(
    "position", "sae", "feature",
    ("feature", "UINTEGER", "latent; dead ones have no row"),
    ("counts", "UINTEGER[]", f"firings in each of up to {POSITION_BUCKETS} parts of the context"),
)  # fmt: skip

EXAMPLE = _table(
    "example", "sae", "feature grp rank",
    ("feature", "UINTEGER", "latent"),
    ("grp", "UTINYINT", "0: the largest activation of each of the contexts with the largest activations; "
     "1 to 10: firings from each decile of its activations, 1 the smallest; 20: random firings; 30: windows "
     "without firings around a token that it fires on elsewhere; 31: random windows without firings"),
    ("rank", "UINTEGER", "rank in its group"),
    ("ctx", "UINTEGER", "context"),
    ("pos", "UINTEGER", "position"),
    ("value", "FLOAT", "activation there; 0 in groups 30 and 31"),
    ("doc", "UINTEGER", "document"),
    ("fold", "UTINYINT", "fold of the document: 0 to explain with, 1 to score on"),
    ("weight", "DOUBLE", "number of firings that it represents: the weights of group 20 add up to n_act, "
     "and so do those of the deciles together; NULL in groups that are not samples of the firings"),
    ("start", "UINTEGER", "position of the window's first token"),
    ("tokens", "UINTEGER[]", "token ids of the window"),
    ("acts", "FLOAT[]", "activation at each token of the window; 0 also where the cache has no row"),
)  # fmt: skip

FEATURE_TOKEN = _table(
    "feature_token", "sae", "feature role rank",
    ("feature", "UINTEGER", "latent"),
    ("role", "TINYINT", "0: the token it fires on; -1: the one before it; 1: the one after it"),
    ("rank", "UINTEGER", "rank by n, largest first"),
    ("token", "UINTEGER", "token id"),
    ("n", "BIGINT", "times it fires with the token in that role"),
    ("p_token_given_fire", "DOUBLE", "n / n_act"),
    ("p_fire_given_token", "DOUBLE", "n / rows of the cache with the token in that role"),
    ("lift", "DOUBLE", "p_token_given_fire / share of these rows"),
)  # fmt: skip

TOKEN_FEATURE = _table(
    "token_feature", "sae", "token rank",
    ("token", "UINTEGER", "token id"),
    ("rank", "UINTEGER", "rank by n * log(lift), largest first: often on this token, and less on others"),
    ("feature", "UINTEGER", "latent"),
    ("n", "BIGINT", "times it fires on the token"),
    ("p_token_given_fire", "DOUBLE", "n / n_act"),
    ("p_fire_given_token", "DOUBLE", "n / times the token occurs in the cache"),
    ("lift", "DOUBLE", "p_token_given_fire / share of the token in the cache"),
)  # fmt: skip

FEATURE_LABEL = _table(
    "feature_label", "sae", "feature rank",
    ("feature", "UINTEGER", "latent"),
    ("rank", "UINTEGER", "rank by n, largest first"),
    ("label", "VARCHAR", "label of documents"),
    ("n", "BIGINT", "times it fires in documents with the label"),
    ("p_label_given_fire", "DOUBLE", "n / n_act"),
    ("lift", "DOUBLE", "p_label_given_fire / share of the label's rows in the cache"),
)  # fmt: skip

LOGIT = _table(
    "logit", "sae", "feature sign rank",
    ("feature", "UINTEGER", "latent"),
    ("sign", "TINYINT", "+1 promoted, -1 suppressed"),
    ("rank", "UINTEGER", "rank, largest effect first"),
    ("token", "UINTEGER", "token id"),
    ("value", "FLOAT", "change of its logit per unit of activation, before the scale of the final norm"),
)  # fmt: skip

NEIGHBOR = _table(
    "neighbor", "sae", "kind feature rank",
    ("feature", "UINTEGER", "latent"),
    ("kind", "UTINYINT", "0: decoder rows, 1: encoder directions, 2: firing together, 3: correlation. Rows "
     "of a crosscoder are compared in units of each site's standard deviation"),
    ("rank", "UINTEGER", "rank, nearest first"),
    ("other", "UINTEGER", "the other latent"),
    ("score", "FLOAT", "cosine (kinds 0, 1); tokens on which both fire / either fires (2); correlation of "
     "the activations over tokens (3)"),
    ("n_both", "UINTEGER", "tokens on which both fire, among the pair_tokens compared (kinds 2 and 3)"),
)  # fmt: skip

ACT_BY_CTX = _table(
    "act_by_ctx", "sae", "ctx pos",
    ("ctx", "UINTEGER", "context"),
    ("pos", "UINTEGER", "position"),
    ("features", "UINTEGER[]", "latents that fire there, ascending"),
    ("acts", "FLOAT[]", "their activations"),
)  # fmt: skip

TRAIN_METRIC = _table(
    "train_metric", "sae", "step name",
    ("step", "BIGINT", "training step"),
    ("name", "VARCHAR", "name of the metric"),
    ("value", "DOUBLE", "its value"),
)  # fmt: skip

SAE_META = _table(
    "meta", "sae", "key",
    ("key", "VARCHAR", "name"),
    ("value", "VARCHAR", "JSON"),
)  # fmt: skip

TEXT_META = Table("meta", "text", ("key",), SAE_META.columns)

TOKEN = _table(
    "token", "text", "token",
    ("token", "UINTEGER", "token id"),
    ("bytes", "BLOB", "its exact bytes, which may be part of a character"),
    ("text", "VARCHAR", "its bytes as text; bytes that are not a whole character as \\x.."),
    ("n", "BIGINT", "rows of the cache with this token"),
)  # fmt: skip

CONTEXT = _table(
    "context", "text", "ctx",
    ("ctx", "UINTEGER", "context"),
    ("n_tokens", "UINTEGER", "tokens in it, without padding"),
    ("tokens", "UINTEGER[]", "token ids"),
    ("docs", "UINTEGER[]", "document of each token"),
    ("kept", "BOOLEAN[]", "whether the cache has a row for the token"),
)  # fmt: skip

DOCUMENT = _table(
    "document", "text", "doc",
    ("doc", "UINTEGER", "document"),
    ("label", "VARCHAR", "its label in the text, or NULL"),
)  # fmt: skip

UNIT = _table(
    "unit", "text", "ctx",
    ("ctx", "UINTEGER", "unit"),
    ("n_positions", "UINTEGER", "positions in it"),
    ("kept", "BOOLEAN[]", "whether the cache has a row for each position"),
    ("unit_values", "DOUBLE[]", "its values in the unit columns that the meta table names"),
    ("row_values", "DOUBLE[]", "values of its rows in the row columns that the meta table names: all of the "
     "first row, then of the second, ..."),
)  # fmt: skip

SAE_TABLES = {
    table.name: table
    for table in (
        SAE_META, FEATURE, HIST, QUANTILE, POSITION, EXAMPLE, ACT, ACT_BY_CTX, FEATURE_TOKEN, TOKEN_FEATURE,
        FEATURE_LABEL, LOGIT, NEIGHBOR, TRAIN_METRIC,
    )
}  # fmt: skip
TEXT_TABLES = {table.name: table for table in (TEXT_META, TOKEN, CONTEXT, DOCUMENT)}
UNIT_TABLES = {table.name: table for table in (TEXT_META, UNIT)}
"""What a text file has if the cache has units of another modality than text."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known ones, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there is {', '.join(known)}"


def one_of(known: Mapping[str, int], name: str, what: str) -> int:
    """The stored number of a name.

    Raises:
        UserError: there is no such name.
    """
    if name not in known:
        raise UserError(f"{name!r} is not a {what}; {nearest(name, known)}")
    return known[name]


# Extras: files beside the SAE file, one per name, each attached under its name (extras.py)

EXPLANATION = _table(
    "explanation", "explanations", "feature provider model",
    ("feature", "UINTEGER", "latent"),
    ("provider", "VARCHAR", "what made it: rules, hf or openai"),
    ("model", "VARCHAR", "the language model; empty for rules"),
    ("prompt", "VARCHAR", "version of the prompts, or of the grammar of rules"),
    ("text", "VARCHAR", "the explanation; NULL unless status is ok"),
    ("rule", "VARCHAR", "the same rule as JSON, which can be evaluated (explaining/grammar.py)"),
    ("status", "VARCHAR", "ok, few (too few firings to explain), failed, refused or unparsed"),
    ("reason", "VARCHAR", "why there is no explanation, one sentence"),
    ("n_train", "BIGINT", "firings in the documents from which explanations are made"),
    ("n_test", "BIGINT", "firings in the documents on which they are scored"),
    ("tokens", "BIGINT", "tokens of prompts and answers of the language model for it"),
)  # fmt: skip

EXPL_SCORE = _table(
    "expl_score", "explanations", "feature provider model scorer",
    ("feature", "UINTEGER", "latent"),
    ("provider", "VARCHAR", "as in explanation"),
    ("model", "VARCHAR", "as in explanation"),
    ("scorer", "VARCHAR", "rule, best token, shuffled; detection, fuzzing"),
    ("value", "DOUBLE", "F1 of rules, balanced accuracy of detection and fuzzing; NULL with status failed"),
    ("ci_lo", "DOUBLE", "2.5% quantile of value over resampled documents"),
    ("ci_hi", "DOUBLE", "97.5% quantile"),
    ("precision", "DOUBLE", "tp / (tp + fp)"),
    ("recall", "DOUBLE", "tp / (tp + fn)"),
    ("auc", "DOUBLE", "area under the ROC curve, where the model gives probabilities"),
    ("tp", "BIGINT", "true positives: tokens of test documents, or examples"),
    ("fp", "BIGINT", "false positives"),
    ("fn", "BIGINT", "false negatives"),
    ("tn", "BIGINT", "true negatives"),
    ("n_failed", "BIGINT", "questions without an answer, which the counts leave out"),
    ("rule", "VARCHAR", "the rule that was scored, JSON"),
)  # fmt: skip

EXPL_ITEM = _table(
    "expl_item", "explanations", "feature provider model scorer rank",
    ("feature", "UINTEGER", "latent"),
    ("provider", "VARCHAR", "as in explanation"),
    ("model", "VARCHAR", "as in explanation"),
    ("scorer", "VARCHAR", "detection or fuzzing"),
    ("rank", "UINTEGER", "number of the question"),
    ("doc", "UINTEGER", "document of the example"),
    ("ctx", "UINTEGER", "context"),
    ("start", "UINTEGER", "position of the first token shown"),
    ("n_shown", "UINTEGER", "tokens shown"),
    ("marked", "UINTEGER[]", "positions that were marked in it"),
    ("truth", "BOOLEAN", "whether it fires there (detection), or at what was marked (fuzzing)"),
    ("verdict", "BOOLEAN", "the model's answer; NULL when there is none"),
    ("probability", "DOUBLE", "the model's probability of yes, where it gives one"),
    ("status", "VARCHAR", "ok, failed, refused or unparsed"),
)  # fmt: skip

EXPLAINED = _table(
    "explained", "explanations", "feature",
    ("feature", "UINTEGER", "latent; those without a scored explanation have no row"),
    ("explanation", "VARCHAR", "its explanation with the highest score"),
    ("explanation_score", "DOUBLE", "F1 of a rule, 2 x balanced accuracy - 1 of a text; held out"),
)  # fmt: skip

EFFECT = _table(
    "effect", "effects", "feature",
    ("feature", "UINTEGER", "latent; those that fire in no context of the sample have no row"),
    ("loss_effect", "DOUBLE", "mean change of the model's loss when it is ablated; nats per token"),
    ("kl", "DOUBLE", "mean KL divergence of the predictions without it from those with it; nats per token"),
    ("loss_effect_n", "BIGINT", "contexts in which it was ablated; with none, loss_effect is NULL"),
    ("loss_estimate", "DOUBLE", "loss_effect to first order, by gradient x activation"),
    ("loss_estimate_n", "BIGINT", "contexts that the estimate is a mean over"),
)  # fmt: skip

CROSSCODER = _table(
    "crosscoder", "sites", "feature",
    ("feature", "UINTEGER", "latent of a crosscoder"),
    ("norm_share", "FLOAT", "share of the last site in its decoder norm, each site in units of its standard "
     "deviation; with two sites 0: it writes the first only, 1: the last only; NULL if it writes nothing"),
    ("main_site", "VARCHAR", "site with the largest share of its decoder norm"),
    ("main_share", "FLOAT", "share of that site"),
    ("exclusive", "BOOLEAN", f"whether main_share is more than {EXCLUSIVE_ABOVE}; otherwise it is shared"),
    ("site_cos", "FLOAT", "cosine of its decoder rows at the first and last site; NULL if widths differ"),
)  # fmt: skip

SITE_NORM = _table(
    "site_norm", "sites", "feature site",
    ("feature", "UINTEGER", "latent of a crosscoder"),
    ("site", "UINTEGER", "number of the site, in the order of the crosscoder"),
    ("name", "VARCHAR", "name of the site"),
    ("norm", "FLOAT", "norm of its decoder row at the site / standard deviation of the site's rows"),
    ("share", "FLOAT", "norm / sum of the norms at all sites; NULL if they are all 0"),
)  # fmt: skip

EXTRA_TABLES: dict[str, dict[str, Table]] = {
    "explanations": {table.name: table for table in (EXPLAINED, EXPLANATION, EXPL_SCORE, EXPL_ITEM)},
    "effects": {table.name: table for table in (EFFECT,)},
    "sites": {table.name: table for table in (CROSSCODER, SITE_NORM)},
}
"""Name of an extra -> its tables. Each also has a meta table, which names its origin."""

FEATURE_EXTRAS = {"explanations": EXPLAINED, "effects": EFFECT, "sites": CROSSCODER}
"""Extra -> its table with at most one row per feature; its columns are joined to the feature table."""


def extra_of(column: str) -> str | None:
    """The extra that a column comes from; None for columns of the feature table itself."""
    if column in FEATURE.names:
        return None
    return next((name for name, table in FEATURE_EXTRAS.items() if column in table.names), None)


def feature_column(name: str) -> Column:
    """The column ``name`` of the feature table, or of an extra that is joined to it.

    Raises:
        UserError: there is none; the nearest names are offered.
    """
    known = {column.name: column for table in FEATURE_EXTRAS.values() for column in table.columns}
    known |= {column.name: column for column in FEATURE.columns}
    if name in known:
        return known[name]
    raise UserError(f"{name!r} is not a column of the feature table; {nearest(name, known)}")
