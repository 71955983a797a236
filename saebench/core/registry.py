"""Implementations by name: those that come with saebench, and those that other installed packages add.

A package adds one with an entry point, for example in its pyproject.toml::

    [project.entry-points."saebench.architectures"]
    my-sae = "my_package.my_sae:MySAE"

Entry points are read only when a name is asked for that saebench does not have, or when all names are listed,
and an implementation is imported only when it is used. A name of saebench's own always means saebench's: an
entry point of that name is ignored with a warning, and so is a second one of the same name.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from saebench.core.errors import UserError


@dataclass(frozen=True, eq=False)
class Registry:
    """The implementations of one kind."""

    kind: str
    """What a name stands for, with its article: "an SAE architecture"."""
    group: str
    """Entry-point group with which packages add to it."""
    built_in: Mapping[str, str]
    """Name -> "module:attribute", or "module" where the module itself is the implementation."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other accepted names -> names."""

    def names(self) -> list[str]:
        """All names: saebench's own, then those of other packages."""
        return [*self.built_in, *self.plugins]

    def canonical(self, name: str, *, flag: str | None = None) -> str:
        """The name that ``name`` or its alias stands for; nothing is imported.

        Raises:
            UserError: there is no such implementation; the sentence names ``flag``, if given.
        """
        name = self.aliases.get(name, name)
        if name not in self.built_in and name not in self.plugins:
            said = repr(name) if flag is None else f"{flag} {name}"
            raise UserError(f"{said} is not {self.kind}; there is {', '.join(self.names())}")
        return name

    def load(self, name: str) -> Any:
        """Import the implementation called ``name``.

        Raises:
            UserError: there is no such implementation, or the package that adds it is broken.
        """
        name = self.canonical(name)
        if name in self.built_in:
            return metadata.EntryPoint(name, self.built_in[name], self.group).load()
        plugin = self.plugins[name]
        try:
            return plugin.load()
        except Exception as error:  # whatever another package raises while it is imported
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"{name!r} of the package {package_of(plugin)} cannot be imported ({cause}); "
                "update that package or uninstall it"
            ) from error

    @functools.cached_property
    def plugins(self) -> dict[str, metadata.EntryPoint]:
        """Name -> entry point of another package."""
        found: dict[str, metadata.EntryPoint] = {}
        for plugin in _entry_points(self.group):
            name = plugin.name
            taken = "saebench" if name in self.built_in or name in self.aliases else None
            if name in found:
                taken = f"the package {package_of(found[name])}"
            if taken is None:
                found[name] = plugin
            else:
                warnings.warn(
                    f"{self.kind} {name!r} of the package {package_of(plugin)} is ignored: "
                    f"{taken} has one of that name",
                    stacklevel=2,
                )
        return found


def package_of(plugin: metadata.EntryPoint) -> str:
    """Name and version of the installed package that has the entry point."""
    return f"{plugin.dist.name} {plugin.dist.version}" if plugin.dist else "?"


def _entry_points(group: str) -> list[metadata.EntryPoint]:
    """Entry points of ``group`` of all installed packages; a package with damaged metadata is left out."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for package in metadata.distributions():
        try:
            # Of a package that is on the path twice, the first is the one that is imported.
            found.setdefault(str(package.name), [one for one in package.entry_points if one.group == group])
        except Exception as error:  # metadata is made by others
            where = getattr(package, "_path", package)
            warnings.warn(f"the metadata of a package cannot be read ({where}): {error}", stacklevel=3)
    return [one for name in sorted(found) for one in found[name]]
