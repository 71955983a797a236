"""What encode, decode, split and forward take: real tensors, arrays, lists, dense codes; else a sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saebench.core.errors import UserError
from saebench.saes.registry import ARCHITECTURES
from tests.formats.saelens_folders import D_IN, D_SAE, random_sae, rows

KINDS = {
    "numpy": lambda x: x.numpy(),
    "float64": lambda x: x.double(),
    "numpy float64": lambda x: x.double().numpy(),
    "list": lambda x: x.tolist(),
    "not contiguous": lambda x: x.T.contiguous().T,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_arrays_lists_and_dense_codes_give_the_same_as_tensors(name: str) -> None:
    sae = random_sae(name)
    x_ND = rows(12)
    codes, y_ND = sae.encode(x_ND), sae(x_ND)
    for kind in KINDS.values():
        torch.testing.assert_close(sae.encode(kind(x_ND)).to_dense(), codes.to_dense())
        torch.testing.assert_close(sae(kind(x_ND)), y_ND)
        torch.testing.assert_close(sae.decode(kind(codes.to_dense().detach())), y_ND, rtol=1e-4, atol=1e-5)
    half_ND = x_ND.to(torch.bfloat16)
    assert torch.equal(sae.encode(half_ND).to_dense(), sae.encode(half_ND.float()).to_dense())
    assert sae.decode(codes.to_dense().half()).dtype == torch.float32
    cube = x_ND.view(3, 4, D_IN)
    assert sae.decode(sae.encode(cube).to_dense()).shape == sae(cube).shape == (3, 4, D_IN)
    assert sae.decode(sae.encode(x_ND[0]).to_dense()).shape == sae(x_ND[0].numpy()).shape == (D_IN,)
    empty = x_ND[:0]
    assert sae.decode(sae.encode(empty).to_dense()).shape == (0, D_IN)


def test_gradients_pass_through_dense_codes() -> None:
    sae = random_sae("topk")
    dense_NM = sae.encode(rows(5)).to_dense().detach().requires_grad_()
    sae.decode(dense_NM).sum().backward()
    expected = sae.W_dec.sum(1).expand(5, -1)
    assert dense_NM.grad is not None
    torch.testing.assert_close(dense_NM.grad, expected)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("text", "x is a str; give a tensor, a numpy array or a list of numbers"),
        (None, "x is a NoneType"),
        ([[1.0], [1.0, 2.0]], "x is a list"),
        (torch.tensor(1.0), r"x has shape \(\); its last axis must be 12 wide"),
        (np.zeros((3, D_IN + 1)), r"x has shape \(3, 13\)"),
        (torch.zeros(2, D_IN, dtype=torch.complex64), "x is a complex tensor"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(value: object, said: str) -> None:
    sae = random_sae("topk")
    for call in (sae.encode, sae):
        with pytest.raises(UserError, match=said):
            call(value)


def test_codes_of_another_sae_and_wrong_widths_are_refused() -> None:
    sae, wider = random_sae("topk"), random_sae("topk", d_sae=2 * D_SAE)
    with pytest.raises(UserError, match="codes are of 80 latents and this SAE has 40"):
        sae.decode(wider.encode(rows(2)))
    with pytest.raises(UserError, match="codes has shape"):
        sae.decode(torch.zeros(2, 7))
    with pytest.raises(UserError, match="reads one site"):
        sae.split(rows(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_on_another_device_are_moved() -> None:
    sae = random_sae("topk").cuda()
    x_ND = rows(4)
    codes = sae.encode(x_ND)
    assert (
        codes.values.is_cuda and sae.decode(codes.to("cpu")).is_cuda and sae.decode(codes.to_dense()).is_cuda
    )
