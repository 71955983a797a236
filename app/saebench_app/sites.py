"""The sites that an SAE reads and writes, as the pages name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def site_label(name: str, info: Mapping[str, Any]) -> str:
    """A site, with the model that it is in where there are several (site '1:S' is S of the second)."""
    models = info.get("models", [])
    number, _, site = name.partition(":")
    return f"{site} of {models[int(number)]}" if models and number.isdigit() and site else name


def reads(info: Mapping[str, Any]) -> str:
    """What the SAE reads."""
    return ", ".join(site_label(site["name"], info) for site in info["sites"])


def writes(info: Mapping[str, Any]) -> str:
    """What the SAE reconstructs."""
    return ", ".join(site_label(site["name"], info) for site in info["targets"])
