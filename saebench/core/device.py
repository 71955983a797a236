"""The choice of the device to compute on."""

from __future__ import annotations

import torch

from saebench.core.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device called ``name``: 'auto' is the first GPU if there is one, else the CPU.

    A GPU given by its number becomes torch's current device.

    Raises:
        UserError: an unknown name, or a GPU that torch does not see.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device; use auto, cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # kernels are launched, and graphs captured, on the current one
    return device
