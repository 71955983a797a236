"""Integrity rules of a store: SQL queries that return the rows that break them.

The first column of each query has the features (or contexts, tokens) that break the rule. On an intact store
a query returns no rows. ``$name`` is a parameter from the meta table. ``{some}`` selects the features whose
tables are computed again from the activations: all of them, or a fixed sample in a very large store.
``{few}`` selects fewer, for rules whose cost grows with the square of the number of features.
"""

from __future__ import annotations

from dataclasses import dataclass

from saebench.store.schema import (
    DECILES,
    DENSE_ABOVE,
    FEATURES_PER_TOKEN,
    GROUP_NEAR_MISS,
    GROUP_NEGATIVE,
    GROUP_RANDOM,
    GROUP_TOP,
    HIST_BINS,
    LABELS_PER_FEATURE,
    NEIGHBORS_PER_FEATURE,
    QUANTILE_GRID,
    TOKENS_PER_FEATURE,
)


@dataclass(frozen=True)
class Rule:
    """``query`` returns what breaks the rule. It needs the tables ``tables``; without them it is skipped."""

    broken: str
    tables: frozenset[str]
    query: str


def rule(tables: str, broken: str, query: str) -> Rule:
    """A Rule whose tables are named in one text, separated by spaces."""
    return Rule(broken, frozenset(tables.split()), query)


def differs(stored: str, computed: str) -> str:
    """SQL: the two differ by more than rounding to FLOAT explains; NULL differs from a number."""
    close = f"abs({stored} - {computed}) <= 1e-5 * (abs({computed}) + 1e-5)"
    return f"NOT coalesce({close}, {stored} IS NULL AND {computed} IS NULL)"


_DECILES = f"grp BETWEEN {DECILES[0]} AND {DECILES[-1]}"
_SILENT = f"grp IN ({GROUP_NEAR_MISS}, {GROUP_NEGATIVE})"
_ROLES = "(VALUES (-1), (0), (1)) roles(role)"
_FIRED_TOKENS = (
    "SELECT feature, tokens[pos + 1] AS token, count(*) AS n FROM sae.act JOIN txt.context USING (ctx) "
    "WHERE {some} GROUP BY ALL"
)
_EVIDENCE = "n * ln(lift)"

_BEFORE = "lag(feature) OVER () AS feature_0, lag(ctx) OVER () AS ctx_0, lag(pos) OVER () AS pos_0"

SAE_RULES = (
    rule("feature", "the feature table has not exactly one row for each latent, in order",
         "SELECT rowid FROM sae.feature WHERE feature <> rowid UNION ALL SELECT count(*) FROM "
         "sae.feature HAVING count(*) <> $d_sae"),
    rule("act", "the number of activations is not the one recorded",
         "SELECT count(*) FROM sae.act HAVING count(*) <> $n_activations"),
    rule("act", "activations are not sorted by feature, context and position, each once",
         f"SELECT feature FROM (SELECT feature, ctx, pos, {_BEFORE} FROM sae.act) WHERE feature_0 IS NOT "
         "NULL AND (feature, ctx, pos) <= (feature_0, ctx_0, pos_0)"),
    rule("act", "activations are zero or not finite",
         "SELECT feature FROM sae.act WHERE value = 0 OR NOT isfinite(value)"),
    rule("act feature", "n_act is not the number of activations",
         "SELECT feature FROM sae.feature FULL JOIN (SELECT feature, count(*) AS n FROM sae.act GROUP "
         "BY feature) USING (feature) WHERE coalesce(n_act, -1) <> coalesce(n, 0)"),
    rule("feature", "density, dead or dense does not follow from n_act",
         "SELECT feature FROM sae.feature WHERE abs(density - n_act / $n_tokens) > 1e-12 OR dead <> "
         f"(n_act = 0) OR dense <> (density > {DENSE_ABOVE})"),
    rule("act feature", "max_act, mean_act or std_act does not follow from the activations",
         "SELECT feature FROM sae.feature LEFT JOIN (SELECT feature, max(value) AS high, "
         "avg(value::DOUBLE) AS mean, stddev_pop(value::DOUBLE) AS std FROM sae.act GROUP BY feature) "
         f"USING (feature) WHERE {differs('max_act', 'coalesce(high, 0)')} OR "
         f"{differs('mean_act', 'coalesce(mean, 0)')} OR abs(std_act - coalesce(std, 0)) > 1e-4 * "
         "(abs(mean_act) + std_act + 1e-5)"),
    rule("act feature", "skew or kurtosis does not follow from the activations",
         "SELECT feature FROM sae.feature JOIN (SELECT feature, avg(pow(value - m, 2)) AS v, avg(pow(value "
         "- m, 3)) AS s, avg(pow(value - m, 4)) AS k, any_value(m) AS m FROM (SELECT feature, "
         "value::DOUBLE AS value, avg(value::DOUBLE) OVER (PARTITION BY feature) AS m FROM sae.act WHERE "
         "{some}) GROUP BY feature) USING (feature) WHERE v > 1e-10 * m * m AND (abs(skew - s / pow(v, "
         "1.5)) > 1e-4 * (1 + abs(skew)) OR abs(kurtosis - (k / (v * v) - 3)) > 1e-4 * (1 + "
         "abs(kurtosis)))"),
    rule("act feature", "a quantile in the feature table does not follow from the activations",
         "SELECT feature FROM sae.feature JOIN (SELECT feature, quantile_cont(value::DOUBLE, [0.1, 0.25, "
         "0.5, 0.75, 0.9, 0.99]) AS q FROM sae.act WHERE {some} GROUP BY feature) USING (feature) WHERE "
         + " OR ".join(differs(name, f"q[{i}]")
                       for i, name in enumerate(("p10", "p25", "p50", "p75", "p90", "p99"), 1))),
    rule("act quantile feature", "the quantiles of a feature do not follow from its activations",
         "SELECT feature FROM (SELECT feature FROM sae.feature WHERE n_act > 0 AND {some}) LEFT JOIN "
         f"sae.quantile USING (feature) LEFT JOIN (SELECT feature, quantile_cont(value::DOUBLE, "
         f"{list(QUANTILE_GRID)}) AS q FROM sae.act WHERE {{some}} GROUP BY feature) USING (feature) WHERE "
         f"coalesce(len(qs), 0) <> {len(QUANTILE_GRID)} OR "
         + " OR ".join(differs(f"qs[{i}]", f"q[{i}]") for i in range(1, len(QUANTILE_GRID) + 1))),
    rule("hist feature", "histograms do not add up to n_act",
         "SELECT feature FROM sae.feature LEFT JOIN (FROM sae.hist WHERE kind = 0) USING (feature) WHERE "
         "coalesce(list_sum(counts), 0) <> n_act OR (n_act > 0 AND len(counts) <> $bins)"),
    rule("act hist", "a histogram's bins are not those of the activations",
         "SELECT DISTINCT feature FROM (SELECT feature, least(floor((value::DOUBLE - lo) / (hi::DOUBLE "
         f"- lo) * {HIST_BINS}), {HIST_BINS - 1})::INTEGER AS bin, count(*) AS n, any_value(counts) AS "
         "counts FROM sae.act JOIN (FROM sae.hist WHERE kind = 0) USING (feature) WHERE {some} GROUP BY "
         "feature, bin) WHERE n <> coalesce(counts[bin + 1], 0)"),
    rule("act hist", "a histogram of logarithms is not that of the activations",
         "SELECT feature FROM (SELECT feature, count(*) AS n, log10(min(value::DOUBLE)) AS low, "
         "log10(max(value::DOUBLE)) AS high FROM sae.act WHERE value > 0 AND {some} GROUP BY feature) FULL "
         "JOIN (FROM sae.hist WHERE kind = 1 AND {some}) USING (feature) WHERE list_sum(counts) IS DISTINCT "
         "FROM n OR NOT coalesce(abs(lo - low) < 1e-5 * (1 + abs(low)) AND abs(hi - high) < 1e-5 * (1 + "
         "abs(high)), false)"),
    rule("act hist", "the bins of a histogram of logarithms are not those of the activations",
         "SELECT feature FROM (SELECT feature, bin, count(*) AS n, any_value(counts) AS counts FROM (SELECT "
         "feature, counts, CASE WHEN hi > lo THEN greatest(0, least(floor((log10(value::DOUBLE) - lo) / (hi "
         f"- lo) * {HIST_BINS}), {HIST_BINS - 1}))::INTEGER ELSE 0 END AS bin FROM sae.act JOIN (FROM "
         "sae.hist WHERE kind = 1) USING (feature) WHERE value > 0 AND {some}) GROUP BY feature, bin) GROUP "
         "BY feature HAVING sum(abs(n - coalesce(counts[bin + 1], 0))) > 4 + 0.01 * sum(n)"),
    rule("feature position", "profiles of positions do not add up to n_act",
         "SELECT feature FROM sae.feature LEFT JOIN sae.position USING (feature) WHERE "
         "coalesce(list_sum(counts), 0) <> n_act"),
    rule("act position", "the profile of positions is not that of the activations",
         "SELECT feature FROM (SELECT feature, list(n ORDER BY bucket) AS n, list(bucket ORDER BY bucket) "
         "AS buckets FROM (SELECT feature, pos * len(counts) // $ctx_len AS bucket, count(*) AS n FROM "
         "sae.act JOIN sae.position USING (feature) WHERE {some} GROUP BY ALL) GROUP BY feature) FULL JOIN "
         "(FROM sae.position WHERE {some}) USING (feature) WHERE list_filter(counts, lambda c: c > 0) IS "
         "DISTINCT FROM n OR list_transform(buckets, lambda b: counts[b + 1]) IS DISTINCT FROM n"),
    rule("act feature context", "mean_pos or first_pos_share does not follow from the activations",
         "SELECT feature FROM sae.feature JOIN (SELECT feature, avg(pos) AS mean, avg((pos = "
         "list_position(kept, true) - 1)::INTEGER) AS first FROM sae.act JOIN txt.context USING (ctx) WHERE "
         f"{{some}} GROUP BY feature) USING (feature) WHERE {differs('mean_pos', 'mean')} OR "
         f"{differs('first_pos_share', 'first')}"),
    rule("act example", "an example is not among the activations, or has another value there",
         "SELECT e.feature FROM sae.example e LEFT JOIN sae.act a USING (feature, ctx, pos) WHERE "
         f"coalesce(a.value, 0) IS DISTINCT FROM e.value OR (e.value = 0) <> ({_SILENT})"),
    rule("act example", "the top examples are not the maxima of the contexts with the largest activations",
         "SELECT feature FROM (SELECT feature, max(high, $examples) AS best FROM (SELECT feature, ctx, "
         "max(value) AS high FROM sae.act WHERE {some} GROUP BY feature, ctx) GROUP BY feature) LEFT "
         "JOIN (SELECT feature, list(value ORDER BY rank) AS shown FROM sae.example WHERE grp = "
         f"{GROUP_TOP} GROUP BY feature) USING (feature) WHERE shown IS DISTINCT FROM best"),
    rule("feature example", "there are too few or too many random examples",
         "SELECT feature FROM sae.feature LEFT JOIN (SELECT feature, count(*) AS n, count(DISTINCT "
         f"(ctx, pos)) AS m FROM sae.example WHERE grp = {GROUP_RANDOM} GROUP BY feature) USING "
         "(feature) WHERE coalesce(n, 0) <> least(n_act, $examples) OR n <> m"),
    rule("feature example", "a decile has too few or too many examples, or one of them twice",
         "SELECT feature FROM (SELECT feature, d, (n_act * d + 9) // 10 - (n_act * (d - 1) + 9) // 10 AS "
         f"there FROM sae.feature, range({DECILES[0]}, {DECILES[-1] + 1}) t(d)) LEFT JOIN (SELECT feature, "
         "grp AS d, count(*) AS n, count(DISTINCT (ctx, pos)) AS m FROM sae.example GROUP BY ALL) USING "
         "(feature, d) WHERE coalesce(n, 0) <> least(there, ($examples + 4) // 5) OR n <> m"),
    rule("act example", "an example is in a decile that its activation does not belong to",
         "SELECT feature FROM sae.example JOIN (SELECT feature, ctx, pos, rank() OVER (PARTITION BY feature "
         "ORDER BY value) - 1 AS low, count(*) OVER (PARTITION BY feature, value) AS same, count(*) OVER "
         f"(PARTITION BY feature) AS n FROM sae.act WHERE {{some}}) USING (feature, ctx, pos) WHERE "
         f"{_DECILES} AND NOT grp BETWEEN low * 10 // n + 1 AND (low + same - 1) * 10 // n + 1"),
    rule("feature example", "the weights of examples do not add up to the firings",
         f"SELECT feature FROM sae.feature JOIN (SELECT feature, {_DECILES} AS d, sum(weight) AS total "
         f"FROM sae.example WHERE {_DECILES} OR grp = {GROUP_RANDOM} GROUP BY ALL) USING (feature) WHERE "
         "NOT coalesce(abs(total - n_act) <= 1e-6 * n_act, false) UNION ALL SELECT feature FROM sae.example "
         f"WHERE (weight IS NULL) = ({_DECILES} OR grp = {GROUP_RANDOM})"),
    rule("example", "an example without firings has activations, is listed twice, or there are too many",
         f"SELECT feature FROM sae.example WHERE {_SILENT} GROUP BY feature, grp HAVING count(*) > "
         "$examples OR count(*) <> count(DISTINCT (ctx, pos)) OR max(coalesce(list_max(list_transform(acts, "
         "lambda a: abs(a))), 0)) > 0"),
    rule("act example context", "a near miss is on a token that the feature never fires on",
         f"SELECT e.feature FROM sae.example e JOIN txt.context c USING (ctx) ANTI JOIN ({_FIRED_TOKENS}) f "
         f"ON e.feature = f.feature AND c.tokens[e.pos + 1] = f.token WHERE e.grp = {GROUP_NEAR_MISS} AND "
         "{e.some}"),
    rule("example context", "an example is at a place of which the cache keeps no row",
         "SELECT feature FROM sae.example JOIN txt.context USING (ctx) WHERE NOT coalesce(kept[pos + 1], "
         "false)"),
    rule("example context", "examples of one document are in two folds, or in none",
         "SELECT min(feature) FROM sae.example GROUP BY doc HAVING count(DISTINCT fold) <> 1 OR count(*) <> "
         "count(fold) OR max(fold) > 1"),
    rule("example context", "the window of an example is not that of its context",
         "SELECT feature FROM sae.example LEFT JOIN txt.context c USING (ctx) WHERE "
         "coalesce(example.tokens <> c.tokens[start + 1 : start + len(example.tokens)] OR "
         "len(example.tokens) <> least($window, n_tokens) OR len(acts) <> len(example.tokens) OR "
         "acts[pos - start + 1] <> value OR doc <> docs[pos + 1], true)"),
    rule("act example", "an activation in the window of an example is not the stored one",
         "SELECT any_value(feature) FROM (SELECT id, feature, n, a.value <> acts[a.pos - start + 1] AS "
         "wrong FROM (SELECT rowid AS id, feature, ctx, start, acts, len(list_filter(acts, lambda a: a <> "
         "0)) AS n FROM sae.example) e JOIN sae.act a USING (feature, ctx) WHERE a.pos BETWEEN start AND "
         "start + len(acts)::INTEGER - 1) GROUP BY id HAVING count(*) <> any_value(n) OR bool_or(wrong)"),
    rule("act context", "an activation is outside the contexts",
         "SELECT feature FROM sae.act LEFT JOIN txt.context USING (ctx) WHERE pos >= coalesce(n_tokens, "
         "0)"),
    rule("act unit", "an activation is outside the units, or where the cache has no row",
         "SELECT feature FROM sae.act LEFT JOIN txt.unit USING (ctx) WHERE NOT coalesce(kept[pos + 1], "
         "false)"),
    rule("act feature context", "n_ctx_act is not the number of contexts in which the feature fires",
         "SELECT feature FROM sae.feature JOIN (SELECT feature, count(DISTINCT ctx) AS n FROM sae.act "
         "WHERE {some} GROUP BY feature) USING (feature) WHERE n_ctx_act <> n"),
    rule("act feature context", "n_doc_act is not the number of documents in which the feature fires",
         "SELECT feature FROM sae.feature JOIN (SELECT feature, count(DISTINCT docs[pos + 1]) AS n FROM "
         "sae.act JOIN txt.context USING (ctx) WHERE {some} GROUP BY feature) USING (feature) WHERE "
         "n_doc_act <> n"),
    rule("act feature_token context", "the tokens of a feature are not those on which it fires",
         "WITH counted AS (SELECT feature, role, tokens[pos + 1 + role] AS token, count(*) AS n FROM "
         f"sae.act JOIN txt.context USING (ctx), {_ROLES} WHERE {{some}} AND tokens[pos + 1 + role] IS NOT "
         "NULL GROUP BY ALL), ranked AS (SELECT *, row_number() OVER (PARTITION BY feature, role ORDER BY n "
         "DESC, token) - 1 AS rank FROM counted) SELECT DISTINCT feature FROM (SELECT * FROM ranked WHERE "
         f"rank < {TOKENS_PER_FEATURE}) r FULL JOIN (SELECT feature, role, rank, token, n FROM "
         "sae.feature_token WHERE {some}) t USING (feature, role, rank) WHERE r.token IS DISTINCT FROM "
         "t.token OR r.n IS DISTINCT FROM t.n"),
    rule("feature feature_token context", "shares of tokens do not follow from their counts",
         "WITH total AS (SELECT role, tokens[p + 1 + role] AS token, count(*) AS n FROM (SELECT tokens, "
         f"unnest(range(n_tokens)) AS p, unnest(kept) AS k FROM txt.context), {_ROLES} WHERE k GROUP BY "
         "ALL) SELECT feature FROM sae.feature_token f JOIN sae.feature USING (feature) LEFT JOIN total t "
         f"USING (role, token) WHERE {differs('p_token_given_fire', '(f.n / n_act)')} OR "
         f"{differs('p_fire_given_token', '(f.n / t.n)')} OR "
         f"{differs('lift', '((f.n / n_act) / (t.n / $n_tokens))')}"),
    rule("feature feature_token token", "top_token is not the first of the feature's tokens",
         "SELECT feature FROM sae.feature LEFT JOIN (SELECT * FROM sae.feature_token JOIN txt.token "
         "USING (token) WHERE rank = 0 AND role = 0) USING (feature) WHERE top_token IS DISTINCT FROM text "
         f"OR {differs('top_token_share', 'p_token_given_fire')} OR "
         f"{differs('top_token_p_fire', 'p_fire_given_token')}"),
    rule("feature token_feature token", "shares of a token's features do not follow from their counts",
         "SELECT feature FROM sae.token_feature f LEFT JOIN sae.feature USING (feature) LEFT JOIN txt.token "
         f"t USING (token) WHERE {differs('p_token_given_fire', '(f.n / n_act)')} OR "
         f"{differs('p_fire_given_token', '(f.n / t.n)')} OR "
         f"{differs('lift', '((f.n / n_act) / (t.n / $n_tokens))')}"),
    rule("token_feature", "the features of a token are not in order",
         f"SELECT feature FROM (SELECT feature, rank, {_EVIDENCE} AS e, row_number() OVER w - 1 AS place, "
         f"lag({_EVIDENCE}) OVER w AS before FROM sae.token_feature WINDOW w AS (PARTITION BY token ORDER "
         f"BY rank)) WHERE place <> rank OR rank >= {FEATURES_PER_TOKEN} OR e > before + 1e-5 * (1 + "
         "abs(before))"),
    rule("act feature token_feature token context", "the features of a token are not those that fire on it",
         f"WITH fired AS (SELECT f.*, (f.n / n_act) / (t.n / $n_tokens) AS lift FROM ({_FIRED_TOKENS}) f "
         "JOIN sae.feature USING (feature) JOIN txt.token t USING (token)), shown AS (SELECT token, "
         f"count(*) AS size, min({_EVIDENCE}) AS least FROM sae.token_feature GROUP BY token) SELECT "
         "feature FROM (SELECT * FROM sae.token_feature WHERE {some}) l FULL JOIN fired r USING (token, "
         f"feature) LEFT JOIN shown USING (token) WHERE (l.token IS NULL AND (coalesce(size, 0) < "
         f"{FEATURES_PER_TOKEN} OR r.n * ln(r.lift) > least + 1e-5 * (1 + "
         "abs(least)))) OR (l.token IS NOT NULL AND l.n IS "
         "DISTINCT FROM r.n)"),
    rule("act feature feature_label context document", "the labels of a feature are not those it fires in",
         "WITH counted AS (SELECT feature, label, count(*) AS n FROM sae.act JOIN txt.context USING (ctx) "
         "JOIN txt.document ON doc = docs[pos + 1] WHERE {some} AND label IS NOT NULL GROUP BY ALL), best "
         f"AS (SELECT feature, max(n, {LABELS_PER_FEATURE}) AS best FROM counted GROUP BY feature), shown "
         "AS (SELECT feature, list(n ORDER BY rank) AS shown FROM sae.feature_label WHERE {some} GROUP BY "
         "feature) SELECT feature FROM best FULL JOIN shown USING (feature) WHERE best IS DISTINCT FROM "
         "shown UNION ALL SELECT feature FROM sae.feature_label s LEFT JOIN counted c USING (feature, "
         f"label) JOIN sae.feature USING (feature) WHERE {{some}} AND (s.n IS DISTINCT FROM c.n OR "
         f"{differs('p_label_given_fire', '(s.n / n_act)')})"),
    rule("feature logit token", "logits are not finite, not ordered, or name no token",
         "SELECT feature FROM (SELECT l.*, t.text, lag(l.value) OVER (PARTITION BY feature, sign ORDER "
         "BY rank) AS before FROM sae.logit l LEFT JOIN txt.token t USING (token)) WHERE NOT "
         "isfinite(value) OR text IS NULL OR sign * value > sign * before"),
    rule("feature logit token", "logit_top or logit_max is not the most promoted token's",
         "SELECT feature FROM sae.feature LEFT JOIN (SELECT feature, text, value FROM sae.logit JOIN "
         "txt.token USING (token) WHERE sign = 1 AND rank = 0) USING (feature) WHERE logit_top IS DISTINCT "
         "FROM text OR logit_max IS DISTINCT FROM value"),
    rule("feature neighbor", "neighbors are not ordered, or not other latents of this SAE",
         "SELECT feature FROM (SELECT *, lag(score) OVER w AS before, row_number() OVER w - 1 AS place FROM "
         "sae.neighbor WINDOW w AS (PARTITION BY kind, feature ORDER BY rank)) WHERE feature = other OR "
         "feature >= $d_sae OR other >= $d_sae OR NOT coalesce(score BETWEEN -1 AND 1, false) OR score > "
         f"before OR place <> rank OR rank >= {NEIGHBORS_PER_FEATURE} OR kind > 3 OR (n_both IS NULL) <> "
         "(kind < 2)"),
    rule("feature neighbor", "a feature lacks neighbors by direction",
         "SELECT feature FROM (SELECT feature, kind FROM sae.feature, range(2) kinds(kind) WHERE kind = 0 "
         "OR enc_norm IS NOT NULL) LEFT JOIN "
         "(SELECT feature, kind, count(*) AS n FROM sae.neighbor GROUP BY ALL) USING (feature, kind) WHERE "
         f"coalesce(n, 0) <> least({NEIGHBORS_PER_FEATURE}, $d_sae - 1)"),
    rule("feature neighbor", "dec_nn or dec_max_cos is not the first neighbor",
         "SELECT feature FROM sae.feature LEFT JOIN (SELECT * FROM sae.neighbor WHERE kind = 0 AND rank = "
         "0) USING (feature) WHERE dec_nn IS DISTINCT FROM other OR dec_max_cos IS DISTINCT FROM score"),
    rule("act feature neighbor", "features do not fire together as often, or as alike, as is said",
         "WITH pairs AS (SELECT a.feature, b.feature AS other, count(*) AS n, sum(a.value::DOUBLE * "
         "b.value) AS product FROM sae.act a JOIN sae.act b USING (ctx, pos) WHERE {a.few} AND a.feature <> "
         "b.feature GROUP BY ALL), measured AS (SELECT p.*, n / (x.n_act + y.n_act - n) AS jaccard, "
         "(product / $n_tokens - x.density * x.mean_act * y.density * y.mean_act) / (sqrt(x.density * "
         "(x.std_act::DOUBLE ** 2 + x.mean_act::DOUBLE ** 2) - (x.density * x.mean_act) ** 2) * "
         "sqrt(y.density * (y.std_act::DOUBLE ** 2 + y.mean_act::DOUBLE ** 2) - (y.density * y.mean_act) ** "
         "2)) AS correlation FROM pairs p JOIN sae.feature x USING (feature) JOIN sae.feature y ON "
         "y.feature = other) SELECT l.feature FROM (FROM sae.neighbor WHERE kind > 1 AND {few}) l LEFT JOIN "
         "measured r USING (feature, other) WHERE n_both > coalesce(n, 0) OR ($pair_tokens = $n_tokens AND "
         "(n_both <> n OR abs(score - CASE kind WHEN 2 THEN jaccard ELSE correlation END) > 1e-3))"),
    rule("act act_by_ctx", "activations by context are not the activations",
         "SELECT n FROM (SELECT count(*) AS n, sum(hash(feature, ctx, pos, value)) AS h FROM sae.act) l "
         "FULL JOIN (SELECT count(*) AS n, sum(hash(feature, ctx, pos, value)) AS h FROM (SELECT ctx, pos, "
         "unnest(features) AS feature, unnest(acts) AS value FROM sae.act_by_ctx)) r USING (n) WHERE l.h IS "
         "DISTINCT FROM r.h"),
    rule("act_by_ctx", "activations by context are not sorted by context and position",
         "SELECT ctx FROM (SELECT *, lag(ctx) OVER () AS ctx_0, lag(pos) OVER () AS pos_0 FROM "
         "sae.act_by_ctx) WHERE (ctx_0 IS NOT NULL AND (ctx, pos) <= (ctx_0, pos_0)) OR "
         "len(features) <> len(acts)"),
    rule("train_metric", "a metric of the training is there twice for one step",
         "SELECT step FROM sae.train_metric GROUP BY step, name HAVING count(*) > 1"),
)  # fmt: skip

TEXT_RULES = (
    rule("token", "tokens are not numbered 0, 1, 2, ...",
         "SELECT rowid FROM txt.token WHERE token <> rowid"),
    rule("token", "occurrences of tokens do not add up to the rows of the cache",
         "SELECT sum(n) FROM txt.token HAVING sum(n) <> $n_tokens"),
    rule("context", "contexts are not numbered 0, 1, 2, ... up to the number recorded",
         "SELECT rowid FROM txt.context WHERE ctx <> rowid UNION ALL SELECT count(*) FROM txt.context "
         "HAVING count(*) <> $n_contexts"),
    rule("context", "contexts have another length than recorded",
         "SELECT ctx FROM txt.context WHERE len(tokens) <> n_tokens OR len(docs) <> n_tokens OR len(kept) "
         "<> n_tokens"),
    rule("unit", "units are not numbered 0, 1, 2, ... up to the number recorded",
         "SELECT rowid FROM txt.unit WHERE ctx <> rowid UNION ALL SELECT count(*) FROM txt.unit "
         "HAVING count(*) <> $n_contexts"),
    rule("unit", "the rows of the units do not add up to the rows of the cache",
         "SELECT ctx FROM txt.unit WHERE len(kept) <> n_positions UNION ALL SELECT sum(len(list_filter(kept, "
         "lambda k: k))) AS n FROM txt.unit HAVING n <> $n_tokens"),
    rule("context token", "tokens occur more or less often than is said",
         "SELECT token FROM txt.token LEFT JOIN (SELECT token, count(*) AS m FROM (SELECT unnest(tokens) AS "
         "token, unnest(kept) AS k FROM txt.context) WHERE k GROUP BY token) USING (token) WHERE n <> "
         "coalesce(m, 0)"),
    rule("context token", "contexts have tokens outside the vocabulary",
         "SELECT ctx FROM txt.context WHERE list_max(tokens) >= (SELECT count(*) FROM txt.token)"),
    rule("context document", "contexts have documents that are not listed",
         "SELECT ctx FROM txt.context WHERE list_max(docs) >= (SELECT count(*) FROM txt.document)"),
)  # fmt: skip
