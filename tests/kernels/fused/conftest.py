import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Memory that nothing has written to holds NaN or the largest integers: it cannot pass for a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
