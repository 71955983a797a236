"""Faithfulness metrics on a model small enough to compute every number by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saebench.core.codes import SparseCodes
from saebench.core.errors import UserError
from saebench.evaluation import faithfulness
from saebench.evaluation.faithfulness import Contexts, faithfulness_metrics

D_IN, VOCAB, HOOK = 6, 11, "middle"


class TinyModel:
    """Embedding -> hook -> causal running mean -> unembedding. Records the activations after the hook."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.W_E = torch.randn(VOCAB, D_IN, generator=g)
        self.W_U = torch.randn(D_IN, VOCAB, generator=g)
        self.seen: list[Tensor] = []

    def hooked(self, tokens_BT: Tensor) -> Tensor:
        return self.W_E[tokens_BT.long()]

    def after(self, x_BTD: Tensor) -> Tensor:
        steps = torch.arange(1, x_BTD.shape[1] + 1)[:, None]
        return (x_BTD + x_BTD.cumsum(1) / steps) @ self.W_U

    def logits(
        self, tokens_BT: Tensor, *, edit: dict[str, Callable[[Tensor], Tensor]] | None = None
    ) -> Tensor:
        x_BTD = self.hooked(tokens_BT)
        if edit is not None:
            x_BTD = edit[HOOK](x_BTD)
        self.seen.append(x_BTD)
        return self.after(x_BTD)


class Map:
    """An SAE whose reconstruction is any function of its input (carried through the codes)."""

    d_in, d_sae = D_IN, D_IN
    W_dec = torch.eye(D_IN)

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def encode(self, x: Tensor) -> SparseCodes:
        return SparseCodes.from_topk(self.function(x), torch.arange(D_IN).expand_as(x), d_sae=D_IN)

    def __call__(self, x: Tensor) -> Tensor:
        return self.encode(x).to_dense()


def random_contexts(seed: int, n: int = 5, length: int = 7) -> Contexts:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (n,), generator=g)
    lengths[0] = length
    tokens = torch.randint(0, VOCAB, (n, length), generator=g)
    keep = torch.rand(n, length, generator=g) < 0.7
    keep[0, :] = True
    return Contexts(tokens, lengths, keep & (torch.arange(length) < lengths[:, None]))


def by_hand(model: TinyModel, contexts: Contexts, replace: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """float64 log probabilities [V] of every scored prediction, one position at a time."""
    rows = []
    for tokens, length, keep in zip(contexts.tokens_BT, contexts.length_B, contexts.keep_BT, strict=True):
        x = model.hooked(tokens[None]).clone()
        for t in range(len(tokens)):
            if keep[t]:
                x[0, t] = replace(x[0, t])
        log_p = model.after(x)[0].double().log_softmax(-1)
        rows += [log_p[t] for t in range(int(length) - 1) if keep[t]]
    return rows


def next_tokens(contexts: Contexts) -> list[int]:
    return [
        int(tokens[t + 1])
        for tokens, length, keep in zip(contexts.tokens_BT, contexts.length_B, contexts.keep_BT, strict=True)
        for t in range(int(length) - 1)
        if keep[t]
    ]


@given(seed=st.integers(0, 2**16), batch_size=st.integers(1, 6), block=st.sampled_from([1, 44, 2**25]))
@settings(deadline=None, max_examples=25)
def test_metrics_equal_reference_computed_position_by_position(
    seed: int, batch_size: int, block: int
) -> None:
    model, contexts, mean = TinyModel(seed), random_contexts(seed), torch.linspace(-1, 1, D_IN)
    sae = Map(lambda x: 0.8 * x + 0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faithfulness, "SCORED_BYTES", block)
        got = faithfulness_metrics(sae, model, HOOK, contexts.batches(batch_size), mean_activation=mean)

    target = next_tokens(contexts)

    def cross_entropy(log_p: list[Tensor]) -> float:
        return -sum(row[t].item() for row, t in zip(log_p, target, strict=True)) / len(target)

    clean = by_hand(model, contexts, lambda x: x)
    spliced = by_hand(model, contexts, lambda x: 0.8 * x + 0.1)
    zero = cross_entropy(by_hand(model, contexts, torch.zeros_like))
    assert got.n_tokens == len(target)
    assert got.ce_clean == pytest.approx(cross_entropy(clean), abs=1e-5)
    assert got.ce_spliced == pytest.approx(cross_entropy(spliced), abs=1e-5)
    assert got.ce_zero == pytest.approx(zero, abs=1e-5)
    assert got.ce_mean == pytest.approx(cross_entropy(by_hand(model, contexts, lambda x: mean)), abs=1e-5)
    kl = sum((p.exp() * (p - q)).sum().item() for p, q in zip(clean, spliced, strict=True)) / len(target)
    assert got.kl == pytest.approx(kl, abs=1e-5)
    assert got.ce_delta == got.ce_spliced - got.ce_clean
    if got.ce_zero > got.ce_clean:
        assert got.ce_loss_score == (got.ce_zero - got.ce_spliced) / (got.ce_zero - got.ce_clean)
    else:
        assert got.ce_loss_score is None


def measure(function: Callable[[Tensor], Tensor], mean: Tensor) -> faithfulness.FaithfulnessMetrics:
    contexts = random_contexts(1)
    return faithfulness_metrics(Map(function), TinyModel(), HOOK, contexts.batches(2), mean_activation=mean)


def test_perfect_reconstruction_has_no_loss_change() -> None:
    got = measure(lambda x: x, torch.zeros(D_IN))
    assert got.ce_spliced == got.ce_clean
    assert got.kl == 0
    assert got.ce_loss_score in (1, None)


def test_mean_reconstruction_equals_mean_ablation() -> None:
    mean = torch.linspace(-1, 1, D_IN)
    got = measure(lambda x: mean.expand_as(x), mean)
    assert got.ce_spliced == got.ce_mean != got.ce_zero


def test_zero_reconstruction_equals_zero_ablation() -> None:
    got = measure(torch.zeros_like, torch.ones(D_IN))
    assert got.ce_spliced == got.ce_zero
    assert got.ce_loss_score in (0, None)


def test_ce_loss_score_is_none_if_zeros_do_not_increase_loss() -> None:
    metrics = faithfulness.FaithfulnessMetrics(
        n_tokens=1, ce_clean=2.0, ce_spliced=2.5, ce_zero=2.0, ce_mean=2, kl=0.1
    )
    assert metrics.ce_loss_score is None


def test_only_kept_positions_change_and_reconstruct_gets_rows_once() -> None:
    model, contexts, rows = TinyModel(), random_contexts(3), []

    def reconstruct(x_PD: Tensor) -> Tensor:
        rows.append(x_PD)
        return x_PD + 1

    faithfulness_metrics(
        Map(lambda x: x), model, HOOK, [contexts], mean_activation=torch.zeros(D_IN), reconstruct=reconstruct
    )
    clean = model.hooked(contexts.tokens_BT)
    assert len(model.seen) == 4
    for x_BTD, replacement in zip(model.seen[1:], (clean + 1, clean * 0, clean * 0), strict=True):
        assert torch.equal(x_BTD[~contexts.keep_BT], clean[~contexts.keep_BT])
        assert torch.equal(x_BTD[contexts.keep_BT], replacement[contexts.keep_BT])
    assert torch.equal(torch.cat(rows), clean[contexts.keep_BT])


def test_contexts_without_scored_prediction_are_refused() -> None:
    one = Contexts(torch.zeros(2, 3, dtype=torch.int32), torch.tensor([1, 1]), torch.eye(2, 3) > 5)
    with pytest.raises(UserError, match="no prediction to score"):
        faithfulness_metrics(Map(lambda x: x), TinyModel(), HOOK, [one], mean_activation=torch.zeros(D_IN))


def test_model_with_nan_weights_is_refused() -> None:
    model = TinyModel()
    model.W_U[0, 0] = math.nan
    with pytest.raises(UserError, match="clean loss on these contexts is nan"):
        faithfulness_metrics(
            Map(lambda x: x), model, HOOK, [random_contexts(1)], mean_activation=torch.zeros(D_IN)
        )
