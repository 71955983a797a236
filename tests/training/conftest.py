import contextlib

import pytest
import torch

from saebench.training.cuda_graph import GraphedStep


@pytest.fixture(autouse=True)
def one_thread():
    """These steps are so small that a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sparse_rows_of():
    """``sparse_rows_of(seed=...)``: [6000, 16] sparse sums of 32 unit directions, an offset, some noise."""
    atoms_MD = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    atoms_MD = torch.nn.functional.normalize(atoms_MD, dim=1)

    def draw(*, seed):
        generator = torch.Generator().manual_seed(seed)
        fires_NM = torch.rand(6000, 32, generator=generator) < 0.1
        codes_NM = fires_NM * (1 + torch.rand(6000, 32, generator=generator))
        return codes_NM @ atoms_MD + 2.0 + 0.01 * torch.randn(6000, 16, generator=generator)

    return draw


@pytest.fixture(scope="session")
def sparse_rows(sparse_rows_of):
    """[6000, 16] rows that really are sparse."""
    return sparse_rows_of(seed=0)


@pytest.fixture(scope="session")
def small_cache(make_cache, sparse_rows, tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("caches") / "sparse", sparse_rows)


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def settings(request, small_cache, tmp_path):
    """A run of 60 steps that takes about a second."""
    return {
        "cache": small_cache.path,
        "out": tmp_path / "run",
        "d_sae": 64,
        "k": 4,
        "tokens": 60 * 128,
        "batch_size": 128,
        "log_every": 7,
        "checkpoint_every": 10,
        "lr": 3e-3,
        "device": request.param,
        "quiet": True,
    }


@pytest.fixture
def around_steps(monkeypatch):
    """``around_steps(call)``: every training step is ``call(take, rows, state, progress)``, where
    ``take(rows)`` takes the step.

    A step that a GPU replays as a CUDA graph is reached too; what `SAE.loss` or `SAE.after_step` call in
    Python is not, because they run only when the graph is captured.
    """

    def patch(call, monkeypatch=monkeypatch):
        def stepping(self, rows, progress, lr, step=GraphedStep.__call__):
            return call(lambda rows: step(self, rows, progress, lr), rows, self._step.__self__, progress)

        monkeypatch.setattr(GraphedStep, "__call__", stepping)

    return patch


@pytest.fixture
def stop_after(around_steps, monkeypatch):
    """``with stop_after(n, error):`` a step after n others is computed, and ``error`` is raised before it
    counts."""

    @contextlib.contextmanager
    def stopping(n, error):
        taken = []

        def call(take, rows, state, progress):
            output = take(rows)
            taken.append(1)
            if len(taken) > n:
                raise error
            return output

        with monkeypatch.context() as patch:
            around_steps(call, patch)
            with pytest.raises(type(error)):
                yield

    return stopping


@pytest.fixture(scope="session")
def files_of():
    """``files_of(run)``: the bytes of every file but the one with times."""
    apart = ("sessions.jsonl", ".lock")

    def read(run):
        files = (p for p in sorted(run.rglob("*")) if p.is_file() and p.name not in apart)
        return {str(p.relative_to(run)): p.read_bytes() for p in files}

    return read
