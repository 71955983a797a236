"""Integrity rules of extras: explanations, effects, and the sites of crosscoders.

integrity.py says what the queries are.
"""

from __future__ import annotations

from saebench.store.integrity import Rule, differs, rule
from saebench.store.schema import EXCLUSIVE_ABOVE

EXTRA_RULES: dict[str, tuple[Rule, ...]] = {
    "explanations": (
        rule("explained", "explained features are not latents of this SAE, in order, each once",
             "SELECT feature FROM (SELECT feature, lag(feature) OVER () AS before FROM "
             "explanations.explained) WHERE feature >= $d_sae OR feature <= before"),
        rule("explanation", "explanations are not of latents of this SAE, or one has several of one model",
             "SELECT feature FROM explanations.explanation GROUP BY feature, provider, model HAVING "
             "feature >= $d_sae OR count(*) > 1"),
        rule("explanation", "an explanation has no text, or a missing one has one",
             "SELECT feature FROM explanations.explanation WHERE (status = 'ok') <> (text IS NOT NULL)"),
        rule("expl_score explanation", "a score is of no explanation",
             "SELECT s.feature FROM explanations.expl_score s LEFT JOIN explanations.explanation e USING "
             "(feature, provider, model) WHERE e.status IS DISTINCT FROM 'ok'"),
        rule("expl_score explanation", "scores of rules do not follow from their counts",
             "SELECT s.feature FROM explanations.expl_score s JOIN explanations.explanation e USING "
             "(feature, provider, model) WHERE s.rule IS NOT NULL AND (tp + fn <> n_test OR "
             f"{differs('value', '(2 * tp / nullif(2 * tp + fp + fn, 0))')})"),
        rule("expl_score expl_item", "scores do not follow from the verdicts",
             "SELECT feature FROM (SELECT feature, provider, model, scorer, count(*) FILTER (truth AND "
             "verdict) AS a, count(*) FILTER (NOT truth AND verdict) AS b, count(*) FILTER (truth AND NOT "
             "verdict) AS c, count(*) FILTER (NOT truth AND NOT verdict) AS d, count(*) FILTER (verdict IS "
             "NULL) AS e FROM explanations.expl_item GROUP BY ALL) FULL JOIN (FROM explanations.expl_score "
             "WHERE rule IS NULL) USING (feature, provider, model, scorer) WHERE (a, b, c, d, e) IS "
             "DISTINCT FROM (tp, fp, fn, tn, n_failed)"),
        rule("explained", "an explanation is shown without its text or its score",
             "SELECT feature FROM explanations.explained WHERE explanation IS NULL OR NOT "
             "coalesce(isfinite(explanation_score), false)"),
    ),
    "effects": (
        rule("effect", "features with an effect are not latents of this SAE, in order, each once",
             "SELECT feature FROM (SELECT feature, lag(feature) OVER () AS before FROM effects.effect) "
             "WHERE feature >= $d_sae OR feature <= before"),
        rule("effect", "an effect is not finite, or is there without a context that it was measured on",
             "SELECT feature FROM effects.effect WHERE loss_effect_n < 0 OR loss_estimate_n < 1 OR "
             "loss_effect_n > loss_estimate_n OR NOT coalesce(isfinite(loss_estimate), false) OR "
             "NOT coalesce(isfinite(loss_effect) AND isfinite(kl), loss_effect_n = 0)"),
    ),
    "sites": (
        rule("crosscoder", "the sites are not those of each latent of this SAE, in order, each once",
             "SELECT rowid FROM sites.crosscoder WHERE feature <> rowid UNION ALL SELECT count(*) FROM "
             "sites.crosscoder HAVING count(*) <> $d_sae"),
        rule("site_norm", "a latent does not have a decoder norm at each site, in order",
             "SELECT feature FROM sites.site_norm GROUP BY feature HAVING list(site ORDER BY rowid) <> "
             "range(len($targets)) OR list(name ORDER BY site) <> list_transform($targets, lambda t: "
             "struct_extract(t, 'name')) "
             "UNION ALL SELECT count(DISTINCT feature) FROM sites.site_norm HAVING count(DISTINCT feature) "
             "<> $d_sae"),
        rule("site_norm", "a decoder norm of a site is not finite, or shares do not follow from the norms",
             "SELECT feature FROM (SELECT *, sum(norm) OVER (PARTITION BY feature) AS total FROM "
             "sites.site_norm) WHERE NOT coalesce(isfinite(norm) AND norm >= 0, false) OR "
             f"{differs('share', '(norm / nullif(total, 0))')}"),
        rule("crosscoder site_norm", "the sites of a latent do not follow from its decoder norms",
             "SELECT feature FROM sites.crosscoder FULL JOIN (SELECT feature, arg_max(share, site) AS last, "
             "max(share) AS most, list(name) FILTER (share = best) AS names FROM (SELECT *, max(share) OVER "
             "(PARTITION BY feature) AS best FROM sites.site_norm) GROUP BY feature) USING (feature) WHERE "
             "norm_share IS DISTINCT FROM last OR main_share IS DISTINCT FROM most OR exclusive IS DISTINCT "
             f"FROM coalesce(most > {EXCLUSIVE_ABOVE}::FLOAT, false) OR NOT coalesce(list_contains(names, "
             "main_site), most IS NULL AND main_site IS NULL)"),
    ),
}  # fmt: skip
"""Extra -> its rules; the tables of the SAE and of its text are there too."""
