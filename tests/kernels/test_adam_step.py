"""The fused optimizer step against the eager one, with everything around Adam."""

import pytest
import torch

from saebench_kernels.adam_step import adam_step_eager, adam_step_fused, normalize_rows_, project_rows_
from tests.kernels.fused.problems import DEVICE

SHAPES = ((40, 12), (40,), (40, 12), (12,))


def _parameters():
    generator = torch.Generator().manual_seed(0)
    out = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in SHAPES]
    normalize_rows_(out[2])
    return out


def _optimizer(parameters):
    return torch.optim.Adam(parameters, lr=0.0, eps=6.25e-10, fused=True)


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("grad_clip", [0.0, 1e-3, 1e3])
def test_fused_step_equals_the_eager_one(grad_clip, project):
    sides = [(step, _optimizer(_parameters())) for step in (adam_step_eager, adam_step_fused)]
    is_finite = torch.ones((), dtype=torch.bool, device=DEVICE)
    how = {"lr": 1e-2, "grad_clip": grad_clip, "project": project, "is_finite": is_finite}
    for seed in range(5):
        norms = []
        for step, optimizer in sides:
            generator = torch.Generator().manual_seed(seed + 1)
            parameters = optimizer.param_groups[0]["params"]
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(DEVICE)
            norms.append(step(optimizer, unit_rows=parameters[2], **how))
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    (_, eager), (step, fused) = sides
    fused_parameters = fused.param_groups[0]["params"]
    for mine, theirs in zip(fused_parameters, eager.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        state, other = fused.state[mine], eager.state[theirs]
        assert state["step"] == other["step"] == 5
        torch.testing.assert_close(state["exp_avg_sq"], other["exp_avg_sq"], rtol=1e-5, atol=1e-9)
    before = [parameter.detach().clone() for parameter in fused_parameters]
    fused_parameters[0].grad[0, 0] = torch.nan
    step(fused, unit_rows=fused_parameters[2], **how)
    assert not is_finite and fused.state[fused_parameters[3]]["step"] == 5
    assert all(torch.equal(mine, old) for mine, old in zip(fused_parameters, before, strict=True))


def test_projected_gradient_is_orthogonal_to_unit_rows():
    generator = torch.Generator().manual_seed(0)
    grad_MD, rows_MD = (torch.randn(40, 12, generator=generator) for _ in range(2))
    normalize_rows_(rows_MD)
    torch.testing.assert_close(rows_MD.norm(dim=1), torch.ones(40))
    project_rows_(grad_MD, rows_MD)
    assert (grad_MD * rows_MD).sum(1).abs().max() < 1e-6


def test_rows_of_zeros_stay_when_normalized():
    rows_MD = torch.zeros(3, 4)
    normalize_rows_(rows_MD)
    assert not rows_MD.any()
