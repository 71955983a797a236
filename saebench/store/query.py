"""FeatureStore: read-only access to one SAE of a feature store, for pages and notebooks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Concatenate, ParamSpec, TypeVar

from saebench.core.deprecation import renamed
from saebench.core.refusals import system_refusals
from saebench.store import publish
from saebench.store.annotations import Annotations
from saebench.store.connection import StoreConnection
from saebench.store.readers.activations import ActivationReader
from saebench.store.readers.cross_sae import CrossSaeReader
from saebench.store.readers.examples import ExampleReader
from saebench.store.readers.explanations import ExplanationReader
from saebench.store.readers.features import FeatureReader
from saebench.store.readers.sae import SaeReader
from saebench.store.readers.summaries import SummaryReader
from saebench.store.readers.texts import TextReader

ReaderT = TypeVar("ReaderT")
P = ParamSpec("P")
T = TypeVar("T")


@system_refusals()
def open_store(path: str | Path, sae: str | None = None) -> FeatureStore:
    """Open one SAE of a feature store for reading; by default the first.

    A reader sees one generation as long as it is open, also when others are published.

    >>> with sb.open_store(store.path) as opened:
    ...     opened.saes == store.saes
    True

    Raises:
        UserError: no store at ``path``, a newer format, an unknown ``sae``, or a damaged file.
    """
    return FeatureStore(StoreConnection.open(Path(path), sae))


def _method_of(
    reader: str, method: Callable[Concatenate[ReaderT, P], T]
) -> Callable[Concatenate[FeatureStore, P], T]:
    """A method of FeatureStore that calls ``method`` of its reader; same name, signature and docstring."""

    @functools.wraps(method)
    def call(self: FeatureStore, /, *args: P.args, **keywords: P.kwargs) -> T:
        return method(getattr(self, reader), *args, **keywords)

    call.__module__, call.__qualname__ = __name__, f"FeatureStore.{method.__name__}"
    return call


class FeatureStore:
    """One SAE of a store. Answers are pandas DataFrames unless stated; safe to use from several threads.

    Each method belongs to a reader, which owns the tables that it reads (saebench/store/readers).

    Attributes:
        path: directory of the store.
        sae: name of the SAE that is open.
        saes: names of all SAEs of the store.
        generation: number of the generation that is open.
        tables: names of the tables that exist, of the SAE, of its text and of its extras.
    """

    def __init__(self, connection: StoreConnection) -> None:
        self._connection = connection
        self.path, self.sae, self.saes = connection.path, connection.sae, connection.saes
        self.generation, self.tables = connection.manifest.generation, connection.tables
        self._sae = SaeReader(connection)
        self._features = FeatureReader(connection)
        self._texts = TextReader(connection)
        self._summaries = SummaryReader(connection, self._texts)
        self._activations = ActivationReader(connection, self._texts)
        self._examples = ExampleReader(connection, self._texts, self._activations, self._summaries)
        self._explanations = ExplanationReader(connection)
        self._cross_sae = CrossSaeReader(connection)

    def close(self) -> None:
        """Close the files. A generation without readers is deleted when later ones are published."""
        self._cross_sae.close()
        self._connection.close()

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r}, sae={self.sae!r}, generation={self.generation})"

    @property
    def time_limit(self) -> float:
        """Seconds after which a search, a scan or a user's SQL is stopped; 5 by default."""
        return self._connection.time_limit

    @time_limit.setter
    def time_limit(self, seconds: float) -> None:
        self._connection.time_limit = seconds

    # The SAE as a whole

    info = _method_of("_sae", SaeReader.info)
    train_metrics = _method_of("_sae", SaeReader.train_metrics)
    metrics_wide = _method_of("_sae", SaeReader.metrics_wide)
    train_course = renamed("train_course", metrics_wide)

    def newer_generation(self) -> int | None:
        """Number of the generation that replaced the open one; None if it is still the current one.

        It may be lower, when the store was deleted and made again.

        >>> store.newer_generation() is None
        True
        """
        current = publish.read_manifest(self.path)
        return None if current == self._connection.manifest else current.generation

    @property
    def annotations(self) -> Annotations:
        """The users' annotations of this SAE: labels, bookmarks, comments, lists, saved views."""
        meta = self._connection.meta
        return Annotations(self.path, meta["sae_hash"], d_sae=meta["d_sae"])

    # The feature table

    @property
    def feature_columns(self) -> list[str]:
        """Names of the columns of the feature table, including those of the extras that exist."""
        return self._features.columns

    features = _method_of("_features", FeatureReader.features)
    count_features = _method_of("_features", FeatureReader.count_features)
    neighbors_in_order = _method_of("_features", FeatureReader.neighbors_in_order)
    neighbours_in_order = renamed("neighbours_in_order", neighbors_in_order)
    feature = _method_of("_features", FeatureReader.feature)

    # One feature

    histogram = _method_of("_summaries", SummaryReader.histogram)
    quantiles = _method_of("_summaries", SummaryReader.quantiles)
    positions = _method_of("_summaries", SummaryReader.positions)
    tokens = _method_of("_summaries", SummaryReader.tokens)
    labels = _method_of("_summaries", SummaryReader.labels)
    logits = _method_of("_summaries", SummaryReader.logits)
    neighbors = _method_of("_summaries", SummaryReader.neighbors)
    site_norms = _method_of("_summaries", SummaryReader.site_norms)
    examples = _method_of("_examples", ExampleReader.examples)
    examples_between = _method_of("_examples", ExampleReader.examples_between)
    examples_in_bin = _method_of("_examples", ExampleReader.examples_in_bin)
    examples_on = _method_of("_examples", ExampleReader.examples_on)
    activations = _method_of("_activations", ActivationReader.activations)
    explanations = _method_of("_explanations", ExplanationReader.explanations)
    explanation_scores = _method_of("_explanations", ExplanationReader.explanation_scores)
    explanation_items = _method_of("_explanations", ExplanationReader.explanation_items)

    # Tokens and contexts

    @property
    def vocab(self) -> list[bytes]:
        """Every token's exact bytes; empty in a store without text."""
        return self._texts.vocab

    find_tokens = _method_of("_texts", TextReader.find_tokens)
    features_on = _method_of("_summaries", SummaryReader.features_on)
    context = _method_of("_texts", TextReader.context)
    context_features = _method_of("_activations", ActivationReader.context_features)
    firing_at = _method_of("_activations", ActivationReader.firing_at)

    # Explanations of all features

    explained_by = _method_of("_explanations", ExplanationReader.explained_by)
    explanation_outcomes = _method_of("_explanations", ExplanationReader.explanation_outcomes)
    explanation_summary = _method_of("_explanations", ExplanationReader.explanation_summary)
    all_explanations = _method_of("_explanations", ExplanationReader.all_explanations)
    all_explanation_scores = _method_of("_explanations", ExplanationReader.all_explanation_scores)

    # Several SAEs, SQL

    def beside(self, sae: str) -> FeatureStore:
        """Another SAE of the same generation, to be closed separately.

        Raises:
            UserError: no such SAE, or a damaged file.
        """
        return FeatureStore(self._connection.beside(sae))

    compare = _method_of("_cross_sae", CrossSaeReader.compare)
    same_firings = _method_of("_cross_sae", CrossSaeReader.same_firings)
    sql = _method_of("_cross_sae", CrossSaeReader.sql)

    # Tables as a whole

    has = _method_of("_connection", StoreConnection.has)
    why_missing = _method_of("_connection", StoreConnection.why_missing)
    require = _method_of("_connection", StoreConnection.require)
    require_feature = _method_of("_connection", StoreConnection.require_feature)
    arrow = _method_of("_connection", StoreConnection.arrow)
    record_batches = _method_of("_connection", StoreConnection.record_batches)
