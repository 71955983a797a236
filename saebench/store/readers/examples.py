"""ExampleReader: examples of a feature in their text, stored ones and ones drawn from all activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from saebench.core.errors import UserError
from saebench.store.connection import StoreConnection
from saebench.store.readers.activations import ActivationReader
from saebench.store.readers.summaries import SummaryReader
from saebench.store.readers.texts import TextReader
from saebench.store.schema import GROUPS, HIST_BINS, nearest
from saebench.store.windows import BEFORE

if TYPE_CHECKING:
    import pandas as pd

ROUNDING = 1e-6
"""The edges of a bin of logarithms were rounded to float32; this much wider, they hold the bin's values."""


class ExampleReader:
    """Owns the table example."""

    def __init__(
        self,
        connection: StoreConnection,
        texts: TextReader,
        activations: ActivationReader,
        summaries: SummaryReader,
    ) -> None:
        self._connection, self._texts = connection, texts
        self._activations, self._summaries = activations, summaries

    def examples(self, feature: int, group: str | None = None) -> pd.DataFrame:
        """Stored examples, one per row, by group and rank.

        Columns group, rank, ctx, pos, value, doc, fold, weight, label, start, tokens, pieces, acts.
        ``group`` 'top' holds the largest activation of each of the contexts with the largest activations,
        'random' firings drawn uniformly, 'decile-1' to 'decile-10' firings drawn from each decile of its
        activations (1 has the smallest), 'near-miss' and 'negative' windows in which it does not fire.
        ``weight`` is the number of firings that an example represents; ``fold``, 0 or 1, is that of the
        document. ``tokens``, ``pieces`` and ``acts`` are lists over the window, which begins at position
        ``start``; joined, the pieces are the decoded window. Without a text, ``tokens`` is empty, the pieces
        name the unit ("unit 17") and its positions, and ``label`` has the user's columns.

        >>> bool((store.examples(3, "top")["value"] <= store.feature(3)["max_act"]).all())
        True

        Raises:
            UserError: no such feature or group.
        """
        if group is not None and group not in GROUPS:
            raise UserError(f"{group!r} is not a group of examples; {nearest(group, GROUPS)}")
        import pandas as pd

        values, condition = [self._connection.require_feature(feature)], ""
        if group is not None:
            values, condition = [*values, GROUPS[group]], " AND grp = ?"
        rows = self._connection.columns(
            "SELECT grp, rank, ctx, pos, value, doc, fold, weight, start, tokens, acts FROM sae.example "
            f"WHERE feature = ?{condition} ORDER BY grp, rank",
            values,
        )
        names = {number: name for name, number in GROUPS.items()}
        tokens = [list(map(int, one)) for one in rows["tokens"]]
        acts = [one.tolist() for one in rows["acts"]]
        docs = [None if pd.isna(doc) else int(doc) for doc in rows["doc"]]
        found = self._texts.labels_of({doc for doc in docs if doc is not None})
        labels = [None if doc is None else found.get(doc) for doc in docs]
        pieces = [self._texts.pieces(one) for one in tokens]
        if not self._connection.has("token"):
            places = list(zip(rows["ctx"].tolist(), rows["pos"].tolist(), strict=True))
            acts = [one or [value] for one, value in zip(acts, rows["value"].tolist(), strict=True)]
            labels = self._texts.unit_labels(places)
            starts = zip(places, rows["start"].tolist(), acts, strict=True)
            pieces = [self._texts.modality.pieces(ctx, start, len(one)) for (ctx, _), start, one in starts]
        return pd.DataFrame(
            {
                "group": [names[number] for number in rows["grp"].tolist()],
                **{name: rows[name] for name in ("rank", "ctx", "pos", "value", "doc", "fold", "weight")},
                "label": labels,
                "start": rows["start"],
                "tokens": tokens,
                "pieces": pieces,
                "acts": acts,
            }
        )

    def examples_between(
        self, feature: int, lo: float, hi: float, *, n: int = 20, seed: int = 0, window: int | None = None
    ) -> pd.DataFrame:
        """Examples drawn at random from the activations between ``lo`` and ``hi``, both included.

        Columns rank, ctx, pos, value, doc, label, start, tokens, pieces, acts, as in ``examples``; largest
        activation first. The same seed draws the same ones.

        >>> bar = store.histogram(0).iloc[-1]
        >>> drawn = store.examples_between(0, bar["lo"], bar["hi"], n=3)
        >>> bool(drawn["value"].between(bar["lo"], bar["hi"]).all())
        True

        Args:
            window: tokens shown around each; by default as many as in stored examples.

        Raises:
            UserError: no such feature, or ``lo`` above ``hi``.
        """
        width = self._width(window)
        drawn = self._activations.draw(feature, lo, hi, n=n, seed=seed)
        return self._with_windows(int(feature), drawn, width)

    def examples_on(
        self, feature: int, token: int | str, *, n: int = 20, window: int | None = None
    ) -> pd.DataFrame:
        """Examples of a feature on a token, largest activation first; columns as in ``examples_between``.

        >>> token = int(store.tokens(3)["token"][0])
        >>> found = store.examples_on(3, token, n=2)
        >>> all(row.tokens[row.pos - row.start] == token for row in found.itertuples())
        True

        Args:
            token: an id, or text as in ``features_on``.
            window: tokens shown around each; by default as many as in stored examples.

        Raises:
            UserError: no such feature or token, a store without contexts, or the time limit was reached.
        """
        width = self._width(window)
        drawn = self._activations.activations(feature, token=token, limit=n, order="value")
        return self._with_windows(int(feature), drawn, width)

    def examples_in_bin(
        self, feature: int, bin: int, kind: str = "value", *, n: int = 20, seed: int = 0
    ) -> pd.DataFrame:
        """Examples drawn at random from one bin of ``histogram(feature, kind)``.

        Columns as in ``examples_between``; empty for a dead feature.

        >>> last = len(store.histogram(0)) - 1
        >>> bool(store.examples_in_bin(0, last)["value"].max() == store.feature(0)["max_act"])
        True

        Raises:
            UserError: no such feature, kind or bin.
        """
        if not 0 <= bin < HIST_BINS:
            raise UserError(f"bin {bin} is not in the histogram; it has 0 to {HIST_BINS - 1}")
        bins = self._summaries.histogram(feature, kind)
        if bins.empty:
            return self.examples_between(feature, 0.0, 0.0, n=0)
        lo, hi = float(bins["lo"][bin]), float(bins["hi"][bin])
        if kind == "log10":
            lo, hi = 10**lo * (1 - ROUNDING), 10**hi * (1 + ROUNDING)
        return self.examples_between(feature, lo, hi, n=n, seed=seed)

    def _width(self, window: int | None) -> int:
        width: int = self._connection.meta["window"] if window is None else window
        if width < 1:
            raise UserError(f"window is {width}; it must be at least 1")
        return width

    def _with_windows(self, feature: int, drawn: pd.DataFrame, width: int) -> pd.DataFrame:
        """Activations (columns ctx, pos, value) with rank, document, label and the window around each."""
        drawn.insert(0, "rank", range(len(drawn)))
        names = ("doc", "label", "start", "tokens", "pieces", "acts")
        windows: Sequence[tuple[object, ...]]
        if self._connection.has("context"):
            windows = self._windows(feature, drawn, width)
        else:
            windows = self._unit_windows(feature, drawn, width)
        for at, name in enumerate(names):
            drawn[name] = [window[at] for window in windows]
        return drawn

    def _windows(
        self, feature: int, drawn: pd.DataFrame, width: int
    ) -> list[tuple[int, str | None, int, list[int], list[str], list[float]]]:
        """For each activation: doc, label, and start, tokens, pieces and acts of the window around it."""
        places = list(zip(drawn["ctx"].tolist(), drawn["pos"].tolist(), strict=True))
        wanted = sorted({ctx for ctx, _ in places})
        contexts = self._texts.contexts(wanted)
        act = self._activations.in_contexts(feature, wanted)
        labels = self._texts.labels_of([contexts[ctx][1][pos] for ctx, pos in places])
        windows = []
        for ctx, pos in places:
            context, docs = contexts[ctx]
            start = _start(pos, len(context), width)
            tokens = context[start : start + width]
            acts = [act.get((ctx, start + at), 0.0) for at in range(len(tokens))]
            doc = docs[pos]
            windows.append((doc, labels.get(doc), start, tokens, self._texts.pieces(tokens), acts))
        return windows

    def _unit_windows(
        self, feature: int, drawn: pd.DataFrame, width: int
    ) -> list[tuple[None, str | None, int, list[int], list[str], list[float]]]:
        """The same for units that are not texts, which have neither documents nor tokens."""
        places = list(zip(drawn["ctx"].tolist(), drawn["pos"].tolist(), strict=True))
        wanted = sorted({ctx for ctx, _ in places})
        lengths, act = self._texts.lengths_of(wanted), self._activations.in_contexts(feature, wanted)
        windows = []
        for (ctx, pos), label in zip(places, self._texts.unit_labels(places), strict=True):
            start = _start(pos, lengths[ctx], width)
            acts = [act.get((ctx, at), 0.0) for at in range(start, min(start + width, lengths[ctx]))]
            pieces = self._texts.modality.pieces(ctx, start, len(acts))
            windows.append((None, label, start, list[int](), pieces, acts))
        return windows


def _start(pos: int, length: int, width: int) -> int:
    """Position of the first token of a window of ``width`` tokens around ``pos``."""
    return min(max(pos - int(width * BEFORE), 0), max(length - width, 0))
