"""``saebench explain``: explanations for the features of a store, published as an extra of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from saebench.core.errors import UserError
from saebench.core.progress import progress
from saebench.core.settings import accepts_settings, to_flat
from saebench.explaining.finished import WORK, discard, open_finished
from saebench.explaining.provider import Provider, shown_name
from saebench.explaining.settings import ExplainConfig
from saebench.explaining.tables import publish_records
from saebench.store.extras import origin
from saebench.store.feature_spec import feature_numbers

if TYPE_CHECKING:
    from saebench.store.query import FeatureStore

Record = dict[str, Any]
NOT_OF_THE_RESULT = set(
    "store features limit budget concurrency timeout retries key_env device quiet".split()
)
"""Settings that do not change the content of a record; a journal is resumed when they change."""
NOT_STORED = ("store", "features", "quiet")


class Explainer(Protocol):
    """Makes records of features; tables.py describes them."""

    version: str
    """What the records depend on, apart from settings: prompts, grammar, the hash of a model."""

    def explain(self, features: Sequence[int]) -> Iterator[Record]:
        """A record for each of ``features``, in order; it ends early when the budget is spent."""

    def finish(self, records: Sequence[Record]) -> None:
        """Add to ``records`` the scores that need all of them."""

    def forecast(self, n_features: int) -> str:
        """The expected work for so many features, in one line."""


@accepts_settings(ExplainConfig)
def explain(config: ExplainConfig) -> FeatureStore:
    """Explain features and publish the explanations in a new generation of the store, which is returned.

    Explanations of other providers, models and features are kept. A process that is killed or interrupted
    publishes nothing; the same call resumes after the last finished feature.

    >>> with sb.explain(store.path, provider="rules", limit=2, quiet=True) as explained:
    ...     found = explained.features(["feature", "explanation", "explanation_score"])
    >>> len(found) == len(store.features())
    True

    Raises:
        UserError: no such store, SAE or feature, a store without contexts, a model or server that cannot be
            had, or another process that writes the store.
    """
    from saebench.store.query import open_store

    with open_store(config.store, config.sae) as store:
        features = chosen_features(store, config)
        explainer = make_explainer(store, config)
        made_from = store.info()
        settings = to_flat(config) | {"sae": store.sae, "version": explainer.version}
        identity = [origin(made_from), {k: v for k, v in settings.items() if k not in NOT_OF_THE_RESULT}]
        with open_finished(config.store, identity) as finished:
            left = [feature for feature in features if feature not in finished.done]
            if not config.quiet:
                print(explainer.forecast(len(left)), file=sys.stderr)
            try:
                with progress(
                    "explain",
                    total=len(features),
                    unit="features",
                    initial=len(features) - len(left),
                    quiet=config.quiet,
                ) as bar:
                    for record in explainer.explain(left):
                        finished.add(record)
                        bar.update(1)
                records = [finished.done[feature] for feature in features if feature in finished.done]
                explainer.finish(records)
            except KeyboardInterrupt:
                print(f"{_kept(len(finished.done))}; run the same command again to go on", file=sys.stderr)
                raise
            if not records:
                raise UserError(
                    f"no feature could be explained with --budget {config.budget}; raise it"
                    if config.budget
                    else f"there is no feature to explain in {store.sae!r} of {config.store}"
                )
            if config.model:
                settings["model"] = shown_name(config.model)
            made_with = {name: settings[name] for name in settings if name not in NOT_STORED}
            publish_records(config.store, store.sae, made_from, records, made_with)
            if len(records) == len(features):
                discard(finished)
        sae = store.sae
    if len(records) < len(features) and not config.quiet:
        print(
            f"--budget {config.budget} tokens are spent: {len(features) - len(records):,} features are left; "
            "run the same command again to go on, answers that are kept cost nothing",
            file=sys.stderr,
        )
    return open_store(config.store, sae)


def chosen_features(store: FeatureStore, config: ExplainConfig) -> list[int]:
    """The features to explain, ascending: those named, or all that fire, or the most frequent of these.

    Raises:
        UserError: a feature that the SAE has not.
    """
    if config.features:
        return sorted(feature_numbers(config.features, store.info()["d_sae"]))
    alive = store.features(
        ["feature"], flags={"dead": False}, order_by="n_act", descending=True, limit=config.limit
    )
    return sorted(alive["feature"].tolist())


def make_explainer(store: FeatureStore, config: ExplainConfig) -> Explainer:
    """The explainer that the settings ask for.

    Raises:
        UserError: see explain.
    """
    if config.provider == "rules":
        from saebench.explaining.rules import RuleExplainer

        return RuleExplainer(store, config.seed)
    from saebench.explaining.llm import LlmExplainer

    return LlmExplainer(
        store,
        make_provider(config),
        n=config.examples,
        window=config.window,
        seed=config.seed,
        budget=config.budget,
    )


def make_provider(config: ExplainConfig) -> Provider:
    assert config.model
    if config.provider == "hf":
        from saebench.explaining.hf import HuggingFace

        return HuggingFace(config.model, config.device)
    from saebench.explaining.openai import OpenAICompatible

    return OpenAICompatible(
        config.model,
        base_url=config.base_url,
        key_env=config.key_env,
        timeout=config.timeout,
        retries=config.retries,
        concurrency=config.concurrency,
        answers=config.store / WORK / "answers",
    )


def _kept(n: int) -> str:
    return f"{n:,} feature{' is' if n == 1 else 's are'} finished and kept"
