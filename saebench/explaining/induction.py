"""Search for a rule that holds where a latent fires: a short OR of ANDs, found on the training fold.

Terms are found one after the other. For a term, all single atoms are scored by counting over the firings and
over all rows. The best ones are extended by a second and a third atom, which are scored by counting over the
rows where the first atoms hold. The score is F1 on the training fold minus a penalty for length.

Shapes: F firings, R rows, V tokens of the vocabulary, U different tokens, A classes, P positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saebench.explaining.grammar import CLASSES, OFFSETS, VERSION, Atom, Rule
from saebench.explaining.token_index import Rows, TokenIndex
from saebench.store.folds import TRAIN

Numbers = NDArray[Any]

MOST_TERMS = 3
MOST_ATOMS = 3
MOST_TOKENS = 64
COVER = 0.9
"""Fraction of the firings that the smallest set of tokens must cover."""
ATOM_PENALTY = 0.01
TOKEN_PENALTY = 0.002
LEAST_GAIN = 0.01
"""F1 that a further term must add, after the penalty for its length."""
STARTS = 5
MOST_FIRINGS = 20_000
MOST_ROWS = 30_000
"""If there are more firings or rows, the search uses a sample; a term that is found is counted exactly."""


@dataclass(frozen=True)
class Candidate:
    """Atoms of a further term, with the objective and the recall that the rule would have with it."""

    objective: float
    atoms: tuple[Atom, ...]
    recall: float


@dataclass(frozen=True)
class Counts:
    """The rows over which a further atom is counted; each represents ``weight`` rows."""

    row_R: Rows | None
    """None: all rows of the fold except ``without_R``."""
    without_R: Rows
    weight: float


@dataclass(frozen=True)
class PartialRule:
    """Counts for the terms found so far: rows where they hold, firings among these, and all firings."""

    n_true: int
    n_said: int
    n_firings: int

    def f1(self, n_true: Numbers, n_said: Numbers) -> Numbers:
        """F1 with a further term that holds at ``n_said`` more rows, ``n_true`` of them firings."""
        f1: Numbers = 2 * (self.n_true + n_true) / (self.n_said + np.maximum(n_said, n_true) + self.n_firings)
        return f1


class Induction:
    """Finds rules on one text; counts that do not depend on the latent are computed once."""

    def __init__(self, index: TokenIndex) -> None:
        self.index = index
        train = index.rows[TRAIN]
        self.base_V = {offset: index.counts(TRAIN, offset).astype(np.float64) for offset in OFFSETS}
        self.some_R = _thinned(train, 3 * MOST_ROWS)
        self._whole_kinds: dict[int, tuple[Numbers, dict[tuple[str, int], Numbers]]] = {}
        self._fires_N = np.zeros(index.n_rows, dtype=bool)
        self._said_N = np.zeros(index.n_rows, dtype=bool)
        last = int(index.pos_N.max(initial=0))
        self._base_P = np.bincount(index.pos_N[train], minlength=last + 1).astype(np.float64)
        self._n_repeated = float(index.repeated_N[train].sum())

    def rule(self, firing_F: Rows) -> Rule:
        """The rule for a latent that fires on the rows ``firing_F`` (ascending) of the training fold."""
        self._fires_N[firing_F] = True
        terms: list[tuple[Atom, ...]] = []
        said_R: Rows = np.empty(0, dtype=np.int64)
        left_F, best = firing_F, 0.0
        while len(terms) < MOST_TERMS and len(left_F):
            partial = PartialRule(len(firing_F) - len(left_F), len(said_R), len(firing_F))
            atoms = self._term(left_F, said_R, partial)
            if atoms is None:
                break
            new_R = self.index.rows_of_term(list(atoms), TRAIN)
            new_R = new_R[~self._said_N[new_R]]
            n_true = partial.n_true + int(self._fires_N[new_R].sum())
            n_said = partial.n_said + len(new_R)
            objective = 2 * n_true / (n_said + len(firing_F)) - sum(map(_length, [*terms, atoms]))
            if terms and objective < best + LEAST_GAIN:
                break
            terms.append(atoms)
            said_R, best = np.concatenate([said_R, new_R]), objective
            self._said_N[new_R] = True
            left_F = left_F[~self._said_N[left_F]]
        self._fires_N[firing_F] = False
        self._said_N[said_R] = False
        return {"version": VERSION, "any": [{"all": list(atoms)} for atoms in terms]}

    def best_token(self, firing_F: Rows) -> Rule:
        """The single token whose presence predicts these firings best."""
        token_U, n_U = np.unique(self.index.token_N[0][firing_F], return_counts=True)
        f1_U = 2 * n_U / (self.base_V[0][token_U] + len(firing_F))
        best = [{"at": 0, "in": [int(token_U[f1_U.argmax()])]}]
        return {"version": VERSION, "any": [{"all": best}]}

    def _term(self, left_F: Rows, said_R: Rows, partial: PartialRule) -> tuple[Atom, ...] | None:
        """The best further term for the firings ``left_F``, on which no term so far holds."""
        sample_F = _thinned(left_F, MOST_FIRINGS)
        weight = len(left_F) / len(sample_F)
        singles = self._atoms(sample_F, weight, Counts(None, said_R, 1.0), partial, ())
        found = list(singles)
        beam = sorted(singles, key=lambda f: -f.objective)[:STARTS]
        beam += sorted(singles, key=lambda f: (-round(f.recall, 3), -f.objective))[:2]
        for _ in range(MOST_ATOMS - 1):
            longer = [
                extended
                for start in {str(start.atoms): start for start in beam}.values()
                for extended in self._extensions(start.atoms, sample_F, weight, said_R, partial)
            ]
            found += longer
            beam = sorted(longer, key=lambda f: -f.objective)[:2]
        found.sort(key=lambda f: (-round(f.objective, 9), len(f.atoms), str(f.atoms)))
        return found[0].atoms if found else None

    def _extensions(
        self, atoms: tuple[Atom, ...], sample_F: Rows, weight: float, said_R: Rows, partial: PartialRule
    ) -> list[Candidate]:
        here_F = sample_F
        for atom in atoms:
            here_F = here_F[self.index.holds(atom, here_F)]
        if not len(here_F):
            return []
        row_R, stands_for = self._where(atoms)
        row_R = row_R[~self._said_N[row_R]] if len(said_R) else row_R
        return self._atoms(here_F, weight, Counts(row_R, said_R, stands_for), partial, atoms)

    def _where(self, atoms: tuple[Atom, ...]) -> tuple[Rows, float]:
        """Rows at which all ``atoms`` hold (all or a sample), and how many rows each represents."""
        all_R = self.index.rows[TRAIN]
        first = next((atom for atom in atoms if "in" in atom or "word" in atom), None)
        if first is not None:
            all_R = self.index.rows_of_term([first], TRAIN)
        row_R = self.some_R if first is None else _thinned(all_R, 3 * MOST_ROWS)
        stands_for = len(all_R) / max(len(row_R), 1)
        for atom in atoms:
            row_R = row_R[self.index.holds(atom, row_R)]
        thin = _thinned(row_R, MOST_ROWS)
        return thin, stands_for * len(row_R) / max(len(thin), 1)

    def _atoms(
        self, firing_F: Rows, weight: float, counts: Counts, partial: PartialRule, before: tuple[Atom, ...]
    ) -> list[Candidate]:
        """The best atoms of each kind to add to ``before``; each firing represents ``weight`` firings."""
        found: list[Candidate] = []
        n_left = weight * len(firing_F)

        def add(atom: Atom, n_true: float, n_said: float) -> None:
            term = (*before, atom)
            f1 = partial.f1(np.array(n_true), np.array(n_said))
            found.append(Candidate(float(f1) - _length(term), term, n_true / n_left))

        for offset in OFFSETS:
            if any(atom.get("at") == offset for atom in before):
                continue
            base_V = self._base(counts, offset)
            times_V = np.bincount(self.index.token_N[offset][firing_F], minlength=len(base_V))[:-1]
            token_U = np.flatnonzero(times_V)
            n_U = times_V[token_U] * weight
            if not len(token_U):
                continue
            said_U = np.maximum(base_V[token_U], n_U)
            self._sets(add, offset, token_U, n_U, said_U, partial, n_left)
            n_A = n_U @ self.index.classes_VA[token_U]
            said_A, said_of = self._base_kinds(counts, offset, base_V)
            best = int(partial.f1(n_A, said_A).argmax())
            if n_A[best]:
                add({"at": offset, "is": list(CLASSES)[best]}, n_A[best], said_A[best])
            for (kind, length), (number_V, values) in self.index.categories.items():
                true = np.bincount(number_V[token_U], weights=n_U, minlength=len(values))
                said = said_of[kind, length]
                true[0] = 0
                best = int(partial.f1(true, said).argmax())
                if true[best]:
                    add({"at": offset, kind: values[best]}, true[best], said[best])
        self._positions(add, firing_F, weight, counts, partial, before)
        return found

    def _sets(self, add, offset, token_U, n_U, said_U, partial, n_left) -> None:  # type: ignore[no-untyped-def]
        """Add two sets of tokens: the one with the best F1, in order of precision, and the smallest one that
        covers the fraction COVER of the firings."""
        for order, chosen in (
            (np.lexsort((token_U, -n_U, -n_U / said_U)), None),
            (np.lexsort((token_U, -n_U)), COVER * n_left),
        ):
            order = order[:MOST_TOKENS]
            true, said = np.cumsum(n_U[order]), np.cumsum(said_U[order])
            if chosen is None:
                size = int((partial.f1(true, said) - TOKEN_PENALTY * np.arange(len(order))).argmax()) + 1
            else:
                size = min(int(np.searchsorted(true, chosen - 1e-9)) + 1, len(order))
            tokens = sorted(order[:size], key=lambda u: (-n_U[u], token_U[u]))
            add({"at": offset, "in": [int(token_U[u]) for u in tokens]}, true[size - 1], said[size - 1])

    def _positions(self, add, firing_F, weight, counts, partial, before) -> None:  # type: ignore[no-untyped-def]
        if not any("position" in atom for atom in before):
            base_P = self._base_positions(counts)
            n_P = np.bincount(self.index.pos_N[firing_F], minlength=len(base_P)) * weight
            upto_true, upto_said = np.cumsum(n_P), np.cumsum(base_P)
            for kind, true, said in (
                ("first", upto_true, upto_said),
                ("last", upto_true[-1] - upto_true, upto_said[-1] - upto_said),
                ("one", n_P, base_P),
            ):
                at = int(partial.f1(true, said).argmax())
                if true[at]:
                    bounds = {"first": [0, at], "last": [at + 1, None], "one": [at, at]}[kind]
                    add({"position": bounds}, true[at], said[at])
        if not any("repeated" in atom for atom in before):
            n = float(self.index.repeated_N[firing_F].sum()) * weight
            if n:
                add({"repeated": True}, n, self._base_repeated(counts))

    def _base(self, counts: Counts, offset: int) -> Numbers:
        token_N, n = self.index.token_N[offset], len(self.index.vocab) + 1
        if counts.row_R is not None:
            return np.bincount(token_N[counts.row_R], minlength=n) * counts.weight
        if not len(counts.without_R):
            return self.base_V[offset]
        base_V: Numbers = self.base_V[offset] - np.bincount(token_N[counts.without_R], minlength=n)
        return base_V

    def _base_kinds(
        self, counts: Counts, offset: int, base_V: Numbers
    ) -> tuple[Numbers, dict[tuple[str, int], Numbers]]:
        """How many rows have a token of each class, and of each value of each category."""
        whole = base_V is self.base_V[offset]
        if whole and offset in self._whole_kinds:
            return self._whole_kinds[offset]
        some = np.flatnonzero(base_V)
        n_some = base_V[some]
        kinds = (
            n_some @ self.index.classes_VA[some],
            {
                key: np.bincount(number_V[some], weights=n_some, minlength=len(values))
                for key, (number_V, values) in self.index.categories.items()
            },
        )
        if whole:
            self._whole_kinds[offset] = kinds
        return kinds

    def _base_positions(self, counts: Counts) -> Numbers:
        pos_N, n = self.index.pos_N, len(self._base_P)
        if counts.row_R is not None:
            return np.bincount(pos_N[counts.row_R], minlength=n) * counts.weight
        base_P: Numbers = self._base_P - np.bincount(pos_N[counts.without_R], minlength=n)
        return base_P

    def _base_repeated(self, counts: Counts) -> float:
        repeated_N = self.index.repeated_N
        if counts.row_R is not None:
            return float(repeated_N[counts.row_R].sum() * counts.weight)
        return self._n_repeated - float(repeated_N[counts.without_R].sum())


def _length(atoms: tuple[Atom, ...]) -> float:
    """The penalty for the length of a term."""
    tokens = sum(len(atom["in"]) - 1 for atom in atoms if "in" in atom)
    return ATOM_PENALTY * len(atoms) + TOKEN_PENALTY * tokens


def _thinned(row_R: Rows, most: int) -> Rows:
    """All rows, or ``most`` of them, evenly spaced."""
    if len(row_R) <= most:
        return row_R
    return row_R[(np.arange(most) * len(row_R)) // most]
