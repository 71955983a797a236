import pytest
import torch


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


@pytest.fixture(scope="session")
def files_of():
    """``files_of(run)``: the bytes of every file but the one with times."""
    apart = ("sessions.jsonl", ".lock")

    def read(run):
        files = (p for p in sorted(run.rglob("*")) if p.is_file() and p.name not in apart)
        return {str(p.relative_to(run)): p.read_bytes() for p in files}

    return read
