"""The training order: every row once per epoch, no held-out row, independent of how it is read."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.activations.loader import Loader
from saebench.activations.shuffle import RowOrder, permutation
from saebench.core.errors import UserError
from saebench.core.prefetch import prefetch


@st.composite
def orders(draw):
    n = draw(st.integers(1, 200))
    held_out = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    held_out[draw(st.integers(0, n - 1))] = False
    order = RowOrder(
        held_out,
        seed=draw(st.integers(0, 5)),
        row_bytes=8,
        block_rows=draw(st.integers(1, 17)),
        window_blocks=draw(st.integers(1, 9)),
    )
    return order, np.flatnonzero(~held_out)


@given(orders(), st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_epoch_visits_every_training_row_exactly_once(case, epoch):
    order, train_rows = case
    assert order.n_rows == len(train_rows)
    rows = order.rows(epoch * order.n_rows, (epoch + 1) * order.n_rows)
    assert (np.sort(rows) == train_rows).all()


@given(orders(), st.integers(0, 500), st.lists(st.integers(0, 90), max_size=8))
@settings(max_examples=200, deadline=None)
def test_rows_do_not_depend_on_the_requested_range(case, start, sizes):
    order, _ = case
    parts, position = [], start
    for size in sizes:
        parts.append(order.rows(position, position + size))
        position += size
    assert (np.concatenate([[], *parts]) == order.rows(start, position)).all()


@given(orders(), st.integers(0, 400))
@settings(max_examples=200, deadline=None)
def test_window_reads_only_its_blocks(case, position):
    order, _ = case
    span = order.span_at(position)
    assert span.start <= position < span.stop
    announced = {row for first, end in order.prepare(span) for row in range(first, end)}
    assert set(order.rows(span.start, span.stop).tolist()) <= announced
    assert span.stop - span.start <= order.block_rows * order.window_blocks


def test_table_memory_is_bounded_for_large_caches(monkeypatch):
    monkeypatch.setattr("saebench.activations.shuffle.MOST_BLOCKS", 10)
    for n in (1, 9, 10, 11, 995):
        order = RowOrder(np.zeros(n, bool), seed=0, row_bytes=1 << 20)
        assert order.n_blocks <= 10
        assert (np.sort(order.rows(0, n)) == np.arange(n)).all()


@pytest.mark.parametrize("scan_rows", [1, 2, 3, 7, 1000])
def test_kept_ranges_do_not_depend_on_scan_size(monkeypatch, scan_rows):
    held_out = np.random.default_rng(0).random(500) < 0.3
    monkeypatch.setattr("saebench.activations.shuffle._SCAN_ROWS", scan_rows)
    order = RowOrder(held_out, seed=0, row_bytes=4, block_rows=500, window_blocks=1)
    assert (np.sort(order.rows(0, order.n_rows)) == np.flatnonzero(~held_out)).all()


def test_permutation_equals_recorded_values():
    assert permutation(8, 0, 0, "blocks").tolist() == [7, 4, 5, 1, 6, 0, 3, 2]
    assert (np.sort(permutation(10_007, 3)) == np.arange(10_007)).all()
    assert not (permutation(100, 1) == permutation(100, 2)).all()


def test_one_window_is_a_uniform_shuffle():
    """The mean position of each row over 400 epochs is within 5 standard errors of the middle."""
    order = RowOrder(np.zeros(50, bool), seed=0, row_bytes=8, block_rows=7, window_blocks=100)
    places = np.array([np.argsort(order.rows(e * 50, e * 50 + 50)) for e in range(400)])
    error = np.sqrt((50**2 - 1) / 12 / 400)
    assert (np.abs(places.mean(axis=0) - 24.5) < 5 * error).all()


@pytest.fixture(scope="module")
def cache(make_cache, tmp_path_factory):
    array = torch.randn(1_000, 6, generator=torch.Generator().manual_seed(0))
    return make_cache(tmp_path_factory.mktemp("loader") / "cache", array, dtype="bf16")


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("prefetch", [0, 1, 4])
@pytest.mark.parametrize("batch_size", [1, 64, 333, 2_000])
def test_iterate_equals_batch(cache, prefetch, batch_size, device):
    sizes = {"batch_size": batch_size, "block_rows": 16, "window_blocks": 5}
    loader = Loader(cache, seed=3, prefetch=prefetch, device=device, **sizes)
    plain = Loader(cache, seed=3, memory_bytes=1 << 20, **sizes)
    for i, batch in enumerate(loader.iterate(2, 9), start=2):
        rows_ND = batch.activations
        assert batch.gradients is None
        assert rows_ND.dtype == torch.bfloat16
        assert rows_ND.shape == (batch_size, 6)
        assert rows_ND.device.type == device
        assert torch.equal(rows_ND.cpu(), plain.batch(i).activations)
        assert torch.equal(rows_ND.cpu(), cache.activations()[plain.rows(i)])
    assert i == 8


def test_batches_cover_the_epoch(cache):
    loader = Loader(cache, batch_size=64, seed=0)
    assert loader.n_rows == 950
    assert len(loader) == 15
    rows = torch.cat([loader.rows(i) for i in range(15)])[:950]
    assert torch.equal(rows.sort().values, torch.arange(950))
    assert not torch.equal(loader.rows(0), Loader(cache, batch_size=64, seed=1).rows(0))


@pytest.fixture(scope="module")
def with_gradients(make_cache, tmp_path_factory):
    """Row i holds i, and its gradient -i; activations are fp16, so gradients are bf16."""
    folder = tmp_path_factory.mktemp("gradients")
    names = torch.arange(200.0)[:, None].expand(-1, 6)
    np.save(folder / "g.npy", -names.numpy())
    return make_cache(folder / "cache", names, dtype="fp16", gradients=folder / "g.npy")


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_each_row_has_its_own_gradient(with_gradients, prefetch, device):
    sizes = {"batch_size": 33, "block_rows": 7, "window_blocks": 3, "prefetch": prefetch, "device": device}
    loader = Loader(with_gradients, seed=1, gradients=True, **sizes)
    plain = Loader(with_gradients, seed=1, **sizes)
    for i, batch in enumerate(loader.iterate(1, 20), start=1):
        assert (batch.activations.dtype, batch.gradients.dtype) == (torch.float16, torch.bfloat16)
        assert batch.gradients.device.type == device
        assert torch.equal(batch.activations[:, 0].cpu().long(), plain.rows(i))
        assert torch.equal(-batch.gradients.float(), batch.activations.float())
        assert torch.equal(batch.activations, plain.batch(i).activations)
        assert torch.equal(batch.gradients, loader.batch(i).gradients)
    assert i == 19


def test_gradients_are_prefetched_and_counted_in_memory(with_gradients, cache, monkeypatch):
    touched = []
    monkeypatch.setattr("saebench.activations.loader.populate", lambda rows: touched.append(rows.dtype))
    next(Loader(with_gradients, batch_size=8, seed=0, gradients=True).iterate())
    assert set(touched) == {torch.float16, torch.bfloat16}
    memory = {"batch_size": 10_000, "seed": 0, "memory_bytes": 20 * 10_000 * 6}
    Loader(with_gradients, **memory)
    with pytest.raises(UserError, match="lower --batch-size"):
        Loader(with_gradients, **memory, gradients=True)
    with pytest.raises(UserError, match=f"{cache.path} has no gradients"):
        Loader(cache, batch_size=8, seed=0, gradients=True)


def test_leaving_the_loop_ends_the_threads(cache):
    before = threading.active_count()
    batches = Loader(cache, batch_size=8, seed=0).iterate()
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_thread_exception_is_raised_after_earlier_items():
    def items():
        yield 1
        yield 2
        raise UserError("broken")

    seen = []
    with pytest.raises(UserError, match="broken"):
        seen.extend(prefetch(items(), 5))
    assert seen == [1, 2]


def test_invalid_arguments_raise_user_error(cache, make_cache, tmp_path):
    with pytest.raises(UserError, match="no hook 'nothing'"):
        Loader(cache, "nothing", batch_size=8, seed=0)
    with pytest.raises(UserError, match="lower --batch-size"):
        Loader(cache, batch_size=100_000, seed=0, memory_bytes=1 << 20)


MEMORY_SCRIPT = """
import sys, torch
import saebench as sb
from saebench.activations.loader import Loader

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

torch.set_num_threads(1)
torch.randn(1000, 10).index_select(0, torch.arange(5))
cache = sb.open_cache(sys.argv[1])
before, most = anonymous(), 0
loader = Loader(cache, batch_size=2048, seed=0, memory_bytes=64 << 20)
for i, batch in enumerate(loader.iterate(0, 60)):
    most = max(most, anonymous())
assert i == 59
print(most - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_is_bounded_on_a_cache_larger_than_memory(make_cache, tmp_path):
    """Reads a cache of 256 MiB within 64 MiB, and two batches that the allocator may keep while threads
    wait."""
    cache = make_cache(tmp_path / "cache", torch.zeros(1, 1024).expand(131_072, 1024), dtype="bf16")
    script = [sys.executable, "-c", MEMORY_SCRIPT, str(cache.path)]
    ran = subprocess.run(script, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 72 << 20, f"{int(ran.stdout) / 2**20:.0f} MiB"
