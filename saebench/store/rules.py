"""What must hold in a healthy store, as queries that return whatever breaks it.

Each query gives the offending features (or contexts, tokens) in its first column, and no row when all is
well. ``$name`` are parameters taken from the meta table; ``{some}`` picks the features whose tables are
recounted from raw activations: all of them in a store of ordinary size, a fixed sample in a very large one.
"""

from __future__ import annotations

from dataclasses import dataclass

from saebench.store.schema import DENSE_ABOVE, GROUP_RANDOM, GROUP_TOP, HIST_BINS, TOKENS_PER_FEATURE


@dataclass(frozen=True)
class Rule:
    """``query`` lists what breaks the rule; it needs the tables ``tables`` and is skipped without them."""

    broken: str
    tables: frozenset[str]
    query: str


def _rule(tables: str, broken: str, query: str) -> Rule:
    return Rule(broken, frozenset(tables.split()), query)


def _differs(stored: str, computed: str) -> str:
    """Differs by more than rounding to FLOAT explains; NULL differs from a number."""
    close = f"abs({stored} - {computed}) <= 1e-5 * (abs({computed}) + 1e-5)"
    return f"NOT coalesce({close}, {stored} IS NULL AND {computed} IS NULL)"


_BEFORE = "lag(feature) OVER () AS feature_0, lag(ctx) OVER () AS ctx_0, lag(pos) OVER () AS pos_0"

SAE_RULES = (
    _rule("feature", "the feature table has not exactly one row for each latent, in order",
          "SELECT rowid FROM sae.feature WHERE feature <> rowid UNION ALL SELECT count(*) FROM "
          "sae.feature HAVING count(*) <> $d_sae"),
    _rule("act", "the number of activations is not the one recorded",
          "SELECT count(*) FROM sae.act HAVING count(*) <> $n_activations"),
    _rule("act", "activations are not sorted by feature, context and position, each once",
          f"SELECT feature FROM (SELECT feature, ctx, pos, {_BEFORE} FROM sae.act) WHERE feature_0 IS NOT "
          "NULL AND (feature, ctx, pos) <= (feature_0, ctx_0, pos_0)"),
    _rule("act", "activations are zero or not finite",
          "SELECT feature FROM sae.act WHERE value = 0 OR NOT isfinite(value)"),
    _rule("act feature", "n_act is not the number of activations",
          "SELECT feature FROM sae.feature FULL JOIN (SELECT feature, count(*) AS n FROM sae.act GROUP "
          "BY feature) USING (feature) WHERE coalesce(n_act, -1) <> coalesce(n, 0)"),
    _rule("feature", "density, dead or dense does not follow from n_act",
          "SELECT feature FROM sae.feature WHERE abs(density - n_act / $n_tokens) > 1e-12 OR dead <> "
          f"(n_act = 0) OR dense <> (density > {DENSE_ABOVE})"),
    _rule("act feature", "max_act, mean_act or std_act does not follow from the activations",
          "SELECT feature FROM sae.feature LEFT JOIN (SELECT feature, max(value) AS high, "
          "avg(value::DOUBLE) AS mean, stddev_pop(value::DOUBLE) AS std FROM sae.act GROUP BY feature) "
          f"USING (feature) WHERE {_differs('max_act', 'coalesce(high, 0)')} OR "
          f"{_differs('mean_act', 'coalesce(mean, 0)')} OR abs(std_act - coalesce(std, 0)) > 1e-4 * "
          "(abs(mean_act) + std_act + 1e-5)"),
    _rule("act feature", "p50, p90 or p99 does not follow from the activations",
          "SELECT feature FROM sae.feature JOIN (SELECT feature, quantile_cont(value::DOUBLE, [0.5, 0.9, "
          "0.99]) AS q FROM sae.act WHERE {some} GROUP BY feature) USING (feature) WHERE "
          f"{_differs('p50', 'q[1]')} OR {_differs('p90', 'q[2]')} OR {_differs('p99', 'q[3]')}"),
    _rule("hist feature", "histograms do not add up to n_act",
          "SELECT feature FROM sae.feature LEFT JOIN sae.hist USING (feature) WHERE "
          "coalesce(list_sum(counts), 0) <> n_act OR (n_act > 0 AND len(counts) <> $bins)"),
    _rule("act hist", "a histogram's bins are not those of the activations",
          "SELECT DISTINCT feature FROM (SELECT feature, least(floor((value::DOUBLE - lo) / (hi::DOUBLE "
          f"- lo) * {HIST_BINS}), {HIST_BINS - 1})::INTEGER AS bin, count(*) AS n, any_value(counts) AS "
          "counts FROM sae.act JOIN sae.hist USING (feature) WHERE {some} GROUP BY feature, bin) WHERE "
          "n <> coalesce(counts[bin + 1], 0)"),
    _rule("act example", "an example is not among the activations, or has another value there",
          "SELECT e.feature FROM sae.example e LEFT JOIN sae.act a USING (feature, ctx, pos) WHERE "
          "a.value IS DISTINCT FROM e.value"),
    _rule("act example", "the top examples are not the largest activations of the contexts that fire hardest",
          "SELECT feature FROM (SELECT feature, max(high, $examples) AS best FROM (SELECT feature, ctx, "
          "max(value) AS high FROM sae.act WHERE {some} GROUP BY feature, ctx) GROUP BY feature) LEFT "
          "JOIN (SELECT feature, list(value ORDER BY rank) AS shown FROM sae.example WHERE grp = "
          f"{GROUP_TOP} GROUP BY feature) USING (feature) WHERE shown IS DISTINCT FROM best"),
    _rule("feature example", "there are too few or too many random examples",
          "SELECT feature FROM sae.feature LEFT JOIN (SELECT feature, count(*) AS n, count(DISTINCT "
          f"(ctx, pos)) AS m FROM sae.example WHERE grp = {GROUP_RANDOM} GROUP BY feature) USING "
          "(feature) WHERE coalesce(n, 0) <> least(n_act, $examples) OR n <> m"),
    _rule("example context", "the window of an example is not that of its context",
          "SELECT feature FROM sae.example LEFT JOIN txt.context c USING (ctx) WHERE "
          "coalesce(example.tokens <> c.tokens[start + 1 : start + len(example.tokens)] OR "
          "len(example.tokens) <> least($window, n_tokens) OR len(acts) <> len(example.tokens) OR "
          "acts[pos - start + 1] <> value OR doc <> docs[pos + 1], true)"),
    _rule("act example context", "an activation in the window of an example is not the stored one",
          "SELECT w.feature FROM (SELECT feature, ctx, unnest(range(start, start + len(acts))) AS pos, "
          "unnest(acts) AS shown FROM sae.example) w LEFT JOIN sae.act a USING (feature, ctx, pos) WHERE "
          "w.shown <> coalesce(a.value, 0)"),
    _rule("act context", "an activation lies outside the contexts",
          "SELECT feature FROM sae.act LEFT JOIN txt.context USING (ctx) WHERE pos >= coalesce(n_tokens, "
          "0)"),
    _rule("act feature context", "n_ctx_act is not the number of contexts in which the feature fires",
          "SELECT feature FROM sae.feature JOIN (SELECT feature, count(DISTINCT ctx) AS n FROM sae.act "
          "WHERE {some} GROUP BY feature) USING (feature) WHERE n_ctx_act <> n"),
    _rule("act feature context", "n_doc_act is not the number of documents in which the feature fires",
          "SELECT feature FROM sae.feature JOIN (SELECT feature, count(DISTINCT docs[pos + 1]) AS n FROM "
          "sae.act JOIN txt.context USING (ctx) WHERE {some} GROUP BY feature) USING (feature) WHERE "
          "n_doc_act <> n"),
    _rule("act feature_token context", "the tokens of a feature are not those on which it fires",
          "WITH counted AS (SELECT feature, tokens[pos + 1] AS token, count(*) AS n FROM sae.act JOIN "
          "txt.context USING (ctx) WHERE {some} GROUP BY ALL), ranked AS (SELECT *, row_number() OVER "
          "(PARTITION BY feature ORDER BY n DESC, token) - 1 AS rank FROM counted) SELECT DISTINCT "
          f"feature FROM (SELECT * FROM ranked WHERE rank < {TOKENS_PER_FEATURE}) r FULL JOIN (SELECT "
          "feature, rank, token, n FROM sae.feature_token WHERE {some}) t USING (feature, rank) WHERE "
          "r.token IS DISTINCT FROM t.token OR r.n IS DISTINCT FROM t.n"),
    _rule("feature feature_token token", "shares of tokens do not follow from their counts",
          "SELECT feature FROM sae.feature_token f JOIN sae.feature USING (feature) JOIN txt.token t "
          f"USING (token) WHERE {_differs('p_token_given_fire', '(f.n / n_act)')} OR "
          f"{_differs('p_fire_given_token', '(f.n / t.n)')} OR "
          f"{_differs('lift', '((f.n / n_act) / (t.n / $n_tokens))')}"),
    _rule("feature feature_token token", "top_token is not the first of the feature's tokens",
          "SELECT feature FROM sae.feature LEFT JOIN (SELECT * FROM sae.feature_token JOIN txt.token "
          "USING (token) WHERE rank = 0) USING (feature) WHERE top_token IS DISTINCT FROM text OR "
          f"{_differs('top_token_share', 'p_token_given_fire')}"),
    _rule("feature logit token", "logits are not finite, not ordered, or name no token",
          "SELECT feature FROM (SELECT l.*, t.text, lag(l.value) OVER (PARTITION BY feature, sign ORDER "
          "BY rank) AS before FROM sae.logit l LEFT JOIN txt.token t USING (token)) WHERE NOT "
          "isfinite(value) OR text IS NULL OR sign * value > sign * before"),
    _rule("feature logit token", "logit_top is not the most promoted token",
          "SELECT feature FROM sae.feature LEFT JOIN (SELECT feature, text FROM sae.logit JOIN txt.token "
          "USING (token) WHERE sign = 1 AND rank = 0) USING (feature) WHERE logit_top IS DISTINCT FROM "
          "text"),
    _rule("feature neighbor", "neighbours are not ordered, or not other latents of this SAE",
          "SELECT feature FROM (SELECT *, lag(cosine) OVER (PARTITION BY feature ORDER BY rank) AS "
          "before FROM sae.neighbor) WHERE feature = other OR other >= $d_sae OR NOT cosine BETWEEN -1 "
          "AND 1 OR cosine > before"),
    _rule("feature neighbor", "dec_nn or dec_max_cos is not the first neighbour",
          "SELECT feature FROM sae.feature LEFT JOIN (SELECT * FROM sae.neighbor WHERE rank = 0) USING "
          "(feature) WHERE dec_nn IS DISTINCT FROM other OR dec_max_cos IS DISTINCT FROM cosine"),
)  # fmt: skip

TEXT_RULES = (
    _rule("token", "tokens are not numbered 0, 1, 2, ...",
          "SELECT rowid FROM txt.token WHERE token <> rowid"),
    _rule("token", "occurrences of tokens do not add up to the rows of the cache",
          "SELECT sum(n) FROM txt.token HAVING sum(n) <> $n_tokens"),
    _rule("context", "contexts are not numbered 0, 1, 2, ... up to the number recorded",
          "SELECT rowid FROM txt.context WHERE ctx <> rowid UNION ALL SELECT count(*) FROM txt.context "
          "HAVING count(*) <> $n_contexts"),
    _rule("context", "contexts have another length than recorded",
          "SELECT ctx FROM txt.context WHERE len(tokens) <> n_tokens OR len(docs) <> n_tokens"),
    _rule("context token", "contexts have tokens outside the vocabulary",
          "SELECT ctx FROM txt.context WHERE list_max(tokens) >= (SELECT count(*) FROM txt.token)"),
    _rule("context document", "contexts have documents that are not listed",
          "SELECT ctx FROM txt.context WHERE list_max(docs) >= (SELECT count(*) FROM txt.document)"),
)  # fmt: skip

EXTRA_RULES: dict[str, tuple[Rule, ...]] = {
    "explanations": (
        _rule("explained", "explained features are not latents of this SAE, in order, each once",
              "SELECT feature FROM (SELECT feature, lag(feature) OVER () AS before FROM "
              "explanations.explained) WHERE feature >= $d_sae OR feature <= before"),
        _rule("explanation", "explanations are not of latents of this SAE, or one has several of one model",
              "SELECT feature FROM explanations.explanation GROUP BY feature, provider, model HAVING "
              "feature >= $d_sae OR count(*) > 1"),
        _rule("explanation", "an explanation has no text, or a missing one has one",
              "SELECT feature FROM explanations.explanation WHERE (status = 'ok') <> (text IS NOT NULL)"),
        _rule("expl_score explanation", "a score is of no explanation",
              "SELECT s.feature FROM explanations.expl_score s LEFT JOIN explanations.explanation e USING "
              "(feature, provider, model) WHERE e.status IS DISTINCT FROM 'ok'"),
        _rule("expl_score explanation", "scores of rules do not follow from their counts",
              "SELECT s.feature FROM explanations.expl_score s JOIN explanations.explanation e USING "
              "(feature, provider, model) WHERE s.rule IS NOT NULL AND (tp + fn <> n_test OR "
              f"{_differs('value', '(2 * tp / nullif(2 * tp + fp + fn, 0))')})"),
        _rule("expl_score expl_item", "scores do not follow from the verdicts",
              "SELECT feature FROM (SELECT feature, provider, model, scorer, count(*) FILTER (truth AND "
              "verdict) AS a, count(*) FILTER (NOT truth AND verdict) AS b, count(*) FILTER (truth AND NOT "
              "verdict) AS c, count(*) FILTER (NOT truth AND NOT verdict) AS d, count(*) FILTER (verdict IS "
              "NULL) AS e FROM explanations.expl_item GROUP BY ALL) FULL JOIN (FROM explanations.expl_score "
              "WHERE rule IS NULL) USING (feature, provider, model, scorer) WHERE (a, b, c, d, e) IS "
              "DISTINCT FROM (tp, fp, fn, tn, n_failed)"),
        _rule("explained", "an explanation is shown without its text or its score",
              "SELECT feature FROM explanations.explained WHERE explanation IS NULL OR NOT "
              "coalesce(isfinite(explanation_score), false)"),
    ),
    "effects": (
        _rule("effect", "features with an effect are not latents of this SAE, in order, each once",
              "SELECT feature FROM (SELECT feature, lag(feature) OVER () AS before FROM effects.effect) "
              "WHERE feature >= $d_sae OR feature <= before"),
        _rule("effect", "an effect is not finite, or is there without a context that it was measured on",
              "SELECT feature FROM effects.effect WHERE loss_effect_n < 0 OR loss_estimate_n < 1 OR "
              "loss_effect_n > loss_estimate_n OR NOT coalesce(isfinite(loss_estimate), false) OR "
              "NOT coalesce(isfinite(loss_effect) AND isfinite(kl), loss_effect_n = 0)"),
    ),
}  # fmt: skip
"""Extra -> its rules; the tables of the SAE and of its text are there too."""
