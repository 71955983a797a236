"""The diagnosis of a cache equals float64 numpy on planted data, and says what is off."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import saebench as sb
from saebench.activations import diagnosis as module
from saebench.activations.diagnosis import NORMS, advice, diagnose, largest_norm

TYPES = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}


def planted(n: int, d: int, seed: int, *, outliers: float = 0.0) -> torch.Tensor:
    """Rows with a mean, dimensions of different variance, and with ``outliers`` a few of huge norm."""
    rng = np.random.default_rng(seed)
    x_ND = rng.normal(size=(n, d)) * np.exp(rng.normal(size=d)) + 3 * rng.normal(size=d)
    x_ND[:: max(1, n // 3)] += outliers
    return torch.from_numpy(x_ND)


def expected(x_ND: torch.Tensor, bits: int) -> dict[str, Any]:
    """The diagnosis of a site from its definition, in float64."""
    x = x_ND.double().numpy()
    norm = np.sqrt((x**2).sum(1))
    square = (x - x.mean(0)) ** 2
    rows, dimensions = np.sort(square.sum(1))[::-1], np.sort(square.sum(0))[::-1]
    total = square.sum()
    massive = norm > 10 * np.median(norm)
    others = x[~massive]
    ulp = [2.0 ** (math.floor(math.log2(abs(v))) - bits) if v else 0.0 for v in x.flatten()]
    return {
        "norm": dict(zip(NORMS, np.quantile(norm, [0, 0.01, 0.5, 0.99, 0.999, 1]), strict=True)),
        "top_rows": rows[: max(1, round(len(x) / 1000))].sum() / total,
        "top_dimension": dimensions[0] / total,
        "top_10_dimensions": dimensions[:10].sum() / total,
        "fvu_floor": sum(u * u for u in ulp) / 12 / total,
        "massive_rows": massive.mean(),
        "massive_variance": 1 - ((others - others.mean(0)) ** 2).sum() / total if massive.any() else 0.0,
    }


def of(x_ND: torch.Tensor) -> dict[str, Any]:
    found = diagnose({"a": x_ND}, {"a": largest_norm(x_ND)}, torch.zeros(len(x_ND), dtype=torch.bool), None)
    return dict(found["sites"]["a"])


@given(
    st.integers(20, 3000),
    st.integers(1, 20),
    st.integers(0, 99),
    st.sampled_from(sorted(TYPES, key=str)),
    st.sampled_from([0.0, 50.0, 3000.0]),
)
@settings(max_examples=60, deadline=None)
def test_all_rows_of_a_small_cache_give_the_numbers_of_their_definitions(
    n: int, d: int, seed: int, dtype: torch.dtype, outliers: float
) -> None:
    x_ND = planted(n, d, seed, outliers=outliers).to(dtype)
    assume(len(x_ND.unique(dim=0)) > n / 2)  # rounding has not made the rows equal
    found, wanted = of(x_ND), expected(x_ND, TYPES[dtype])
    assert found["norm"] == pytest.approx(wanted["norm"], rel=1e-5)
    for name in wanted.keys() - {"norm"}:
        assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5)


def test_sample_of_a_large_cache_is_even_and_misses_no_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_ROWS", 512)
    x_ND = planted(50_000, 8, 0)
    positions = torch.arange(50_000) % 97  # a fixed step of 97 or 98 would meet few of them
    index_M = module._sample(50_000, 8)
    assert len(index_M) == 512 and (np.diff(index_M) > 0).all()
    assert len(positions[torch.from_numpy(index_M)].unique()) > 90
    found, wanted = of(x_ND.float()), expected(x_ND.float(), 23)
    assert found["norm"]["max"] == pytest.approx(wanted["norm"]["max"], rel=1e-5)
    assert found["norm"]["50%"] == pytest.approx(wanted["norm"]["50%"], rel=0.05)
    assert found["top_dimension"] == pytest.approx(wanted["top_dimension"], rel=0.1)
    assert found["fvu_floor"] == pytest.approx(wanted["fvu_floor"], rel=0.1)


def test_a_massive_row_that_the_sample_misses_is_noticed_by_the_largest_norm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SAMPLE_ROWS", 512)
    x_ND = planted(50_000, 8, 0).float()
    missed = next(i for i in range(50_000) if i not in set(module._sample(50_000, 8)))
    x_ND[missed] = 1e5
    assert of(x_ND)["massive_rows"] == 0 and of(x_ND)["massive_variance"] > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floor_is_the_fvu_of_rounding(dtype: torch.dtype) -> None:
    x_ND = planted(2000, 30, 1) + 200
    stored_ND = x_ND.to(dtype)
    error = (x_ND - stored_ND.double()).square().sum() / (x_ND - x_ND.mean(0)).square().sum()
    assert of(stored_ND)["fvu_floor"] == pytest.approx(float(error), rel=0.05)


@pytest.mark.parametrize("x_ND", [torch.zeros(5, 3), torch.full((4, 2), 1e30), torch.ones(1, 1)])
def test_rows_without_variance_or_with_huge_values_give_no_shares(x_ND: torch.Tensor) -> None:
    found = of(x_ND)
    assert found["top_rows"] is None and found["fvu_floor"] is None
    assert found["norm"]["max"] == (None if x_ND.max() > 1e20 else pytest.approx(float(x_ND[0].norm())))
    assert advice({"sites": {"a": found}, "sample_rows": {"a": 5000}}, of_text=True) == []


def test_advice_is_given_only_where_something_is_off(
    tmp_path: Path, make_cache: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    make_cache(tmp_path / "fine", planted(2000, 16, 0).float())
    assert capsys.readouterr().err == ""
    make_cache(tmp_path / "sinks", planted(2000, 16, 0, outliers=900.0).float())
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "0.20% of the rows at imported have a norm above 10 times" in said
    far_ND = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)) + 50
    far_ND[::1000] += 80.0  # not massive, but far from the others
    make_cache(tmp_path / "far", far_ND)
    assert "0.1% of the rows at imported hold" in capsys.readouterr().err
    make_cache(tmp_path / "offset", planted(2000, 16, 0).float() + 3000, dtype="bf16")
    assert "use --dtype fp32" in capsys.readouterr().err


def test_manifest_keeps_the_diagnosis_and_the_hash_leaves_it_out(tiny_cache: sb.ActivationCache) -> None:
    found = tiny_cache.manifest["diagnosis"]
    documents = {int(doc): bool(tiny_cache.held_out[i]) for i, doc in enumerate(tiny_cache.doc)}
    assert found["n_documents"] == len(documents)
    assert found["held_out_documents"] == pytest.approx(sum(documents.values()) / len(documents), rel=1e-5)
    assert found["held_out_rows"] == pytest.approx(float(tiny_cache.held_out.float().mean()), rel=1e-5)
    for hook in tiny_cache.hooks:
        assert found["sites"][hook]["norm"] == pytest.approx(
            expected(tiny_cache.activations(hook), 23)["norm"], rel=1e-5
        )
    raw = tiny_cache._manifest.raw
    before = tiny_cache.hash
    without = {name: value for name, value in raw.items() if name != "diagnosis"}
    tiny_cache._manifest.raw.clear()
    tiny_cache._manifest.raw.update(without)
    try:
        assert tiny_cache.hash == before
        assert tiny_cache.diagnosis == found  # computed again, as for a cache of an older version
    finally:
        raw["diagnosis"] = found
