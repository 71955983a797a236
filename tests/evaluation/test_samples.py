"""Choice of the rows and contexts to measure on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.core.errors import UserError
from saebench.evaluation import samples
from saebench.evaluation.samples import (
    cache_contexts,
    choose_rows,
    first_rows,
    mean_training_activation,
    row_batches,
)


class RowsInMemory(SimpleNamespace):
    """The parts of an ActivationCache that these functions read."""

    path = "cache"

    def __init__(self, *, n_contexts: int, ctx_len: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        length = torch.randint(1, ctx_len + 1, (n_contexts,), generator=g)
        real = torch.arange(ctx_len) < length[:, None]
        kept = real & (torch.rand(n_contexts, ctx_len, generator=g) < 0.7)
        kept[0, 0] = True
        ctx, pos = kept.nonzero(as_tuple=True)
        held_out_context = torch.rand(n_contexts, generator=g) < 0.4
        held_out_context[0] = True
        super().__init__(
            n_rows=len(ctx),
            ctx=ctx.int(),
            pos=pos.int(),
            held_out=held_out_context[ctx],
            context_tokens=torch.randint(0, 99, (n_contexts, ctx_len), generator=g, dtype=torch.int32),
            context_len=length.int(),
            rows=torch.randn(len(ctx), 3, generator=g).bfloat16(),
        )

    def activations(self, hook: str) -> torch.Tensor:
        return self.rows

    verified = activations

    def d_in(self, hook: str) -> int:
        return 3


@given(
    seed=st.integers(0, 2**16),
    n_contexts=st.integers(1, 12),
    ctx_len=st.integers(1, 6),
    tokens=st.integers(1, 30),
    rows=st.sampled_from(["held-out", "all"]),
    size=st.integers(1, 9),
)
@settings(deadline=None, max_examples=60)
def test_cache_contexts_keep_exactly_positions_of_chosen_rows(
    seed: int, n_contexts: int, ctx_len: int, tokens: int, rows: str, size: int
) -> None:
    cache = RowsInMemory(n_contexts=n_contexts, ctx_len=ctx_len, seed=seed)
    row_N = choose_rows(cache, rows=rows, tokens=tokens)
    allowed = [n for n in range(cache.n_rows) if rows == "all" or cache.held_out[n]]
    assert row_N.tolist() == allowed[:tokens]

    contexts = cache_contexts(cache, row_N)
    numbers = sorted({int(cache.ctx[n]) for n in row_N})
    assert torch.equal(contexts.tokens_BT, cache.context_tokens[numbers])
    assert torch.equal(contexts.length_B, cache.context_len[numbers])
    kept = {(numbers[b], t) for b, t in contexts.keep_BT.nonzero().tolist()}
    assert kept == {(int(cache.ctx[n]), int(cache.pos[n])) for n in row_N}
    assert sum(len(batch) for batch in contexts.batches(size)) == len(contexts)

    batches = list(row_batches(cache, "h", row_N, size=size))
    assert torch.equal(torch.cat(batches), cache.rows[row_N])
    assert max(len(batch) for batch in batches) <= size


@given(st.lists(st.booleans(), max_size=40), st.booleans(), st.integers(1, 50), st.integers(1, 9))
def test_first_rows_do_not_depend_on_piece_size(
    mask: list[bool], wanted: bool, limit: int, piece: int
) -> None:
    held_out_N = torch.tensor(mask, dtype=torch.bool)
    expected = [n for n, held_out in enumerate(mask) if held_out == wanted][:limit]
    assert first_rows(held_out_N, wanted, limit=limit, piece=piece).tolist() == expected


def test_mean_activation_uses_only_training_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = RowsInMemory(n_contexts=40, ctx_len=9, seed=3)
    training = cache.rows[~cache.held_out]
    mean = mean_training_activation(cache, "h", size=7)
    torch.testing.assert_close(mean, training.float().mean(0))
    monkeypatch.setattr(samples, "MEAN_ROWS", 5)
    torch.testing.assert_close(mean_training_activation(cache, "h", size=2), training[:5].float().mean(0))
    cache.held_out[:] = True
    assert mean_training_activation(cache, "h") is None


def test_training_row_that_is_not_finite_is_refused() -> None:
    cache = RowsInMemory(n_contexts=40, ctx_len=9, seed=3)
    cache.rows[(~cache.held_out).nonzero()[2], 1] = torch.nan
    with pytest.raises(UserError, match="training rows of cache at h hold NaN"):
        mean_training_activation(cache, "h")


def test_cache_without_held_out_rows_is_refused_unless_rows_all() -> None:
    cache = RowsInMemory(n_contexts=4, ctx_len=9, seed=3)
    cache.held_out[:] = False
    with pytest.raises(UserError, match=r"rows of cache is held out from training; .* add --rows all"):
        choose_rows(cache, rows="held-out", tokens=5)
    assert choose_rows(cache, rows="all", tokens=5).tolist() == [0, 1, 2, 3, 4]


def test_imported_cache_without_tokens_is_refused() -> None:
    cache = SimpleNamespace(path="cache", ctx=None, pos=None, context_tokens=None, context_len=None)
    with pytest.raises(UserError, match="cache was imported without tokens"):
        cache_contexts(cache, torch.arange(3))
