"""Reading and replacing tensors inside any torch module, with forward hooks on its submodules.

A `Site` is the output or the input of one submodule. `parse_site` reads its name:

    encoder.layers.3.mlp        output of the module at that path ("" is the whole module)
    encoder.layers.3.mlp:in     its first tensor argument
    encoder.lstm:0              entry 0 of the tuple that it returns; a key for a mapping (:last_hidden_state)

`ModuleSites` holds the sites of one module under the names that its user gives them:

    named = {"a": parse_site("layers.0"), "b": parse_site("layers.1:in")}
    sites = ModuleSites(module, named, name="my model")   # name is for error sentences
    values = sites.read(lambda: module(batch))            # {"a": tensor, "b": tensor}; stops after the last
    values = sites.read(lambda: module(batch), stop=False)  # the whole pass: finds a module that runs twice
    with sites.editing({"a": lambda x: 0 * x}):           # x is replaced by what the function returns
        out = module(batch)
    with sites.tracking() as values:                      # tensors that torch.autograd.grad takes
        loss = module(batch).sum()

A value is the tensor itself, not a copy, unless a later module changes it in place: then the forward pass
runs again and that value is copied from then on.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from saebench.core.errors import UserError

EditFunction = Callable[[Tensor], Tensor]
_Replace = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Site:
    """A tensor at the output or input of the submodule ``path``.

    Args:
        path: the submodule, as in ``named_modules``; "" is the module itself.
        side: "out" or "in" (the first positional argument that is a tensor, else the first keyword).
        entry: which entry of a tuple or mapping; None takes the only tensor beside None and caches.
        part: a function that gives a view of part of the tensor, for projections that are fused.
        scale: the site's value is this multiple of the tensor.
        shared: at an input, what lies beside the module reads the same tensor (a skip connection) and
            belongs to the site: an edit changes the tensor in place.
    """

    path: str
    side: Literal["out", "in"] = "out"
    entry: int | str | None = None
    part: Callable[[Tensor], Tensor] | None = None
    scale: float = 1.0
    shared: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The site's value, given the tensor at the module."""
        value = tensor if self.part is None else self.part(tensor)
        return value if self.scale == 1.0 else value * self.scale

    def put(self, tensor: Tensor, new: Tensor) -> Tensor | None:
        """The tensor at the module when the site's value is ``new``; None when it was changed in place."""
        if self.scale != 1.0:
            new = new / self.scale
        if self.part is None and not self.shared:
            return new
        changed = tensor if self.shared else tensor.clone()
        (changed if self.part is None else self.part(changed)).copy_(new)
        return None if self.shared else changed


def parse_site(text: str) -> Site:
    """The `Site` that a name such as 'layers.3.mlp', 'layers.3.mlp:in' or 'lstm:0' stands for."""
    path, _, which = text.partition(":")
    if which in ("", "out"):
        return Site(path)
    if which == "in":
        return Site(path, "in")
    return Site(path, entry=int(which) if which.isdecimal() else which)


class ModuleSites:
    """Sites of ``module`` by name. ``name`` is what error sentences call the module.

    Raises:
        UserError: a path that is not a submodule, with the nearest ones.
    """

    def __init__(self, module: nn.Module, sites: Mapping[str, Site], *, name: str) -> None:
        self.name = name
        self._sites = dict(sorted(sites.items(), key=lambda item: not item[1].shared))  # shared come first
        self._modules = {key: find_module(module, site.path, name) for key, site in self._sites.items()}
        self._order = list(sites)
        self._copied: set[str] = set()

    def read(self, run: Callable[[], object], *, stop: bool = True) -> dict[str, Tensor]:
        """The value at every site in one forward pass, which ``run`` makes.

        With ``stop`` the pass ends when the last site has its value. ``run`` is called a second time when a
        value was changed in place after its site.

        Raises:
            UserError: a module that did not run or ran more than once, or a site that is not one tensor.
        """
        while True:
            found, versions = self._read_once(run, stop)
            changed = {key for key, version in versions.items() if found[key]._version != version}
            if not changed:
                return {key: found[key] for key in self._order}
            self._copied |= changed

    def _read_once(self, run: Callable[[], object], stop: bool) -> tuple[dict[str, Tensor], dict[str, int]]:
        found: dict[str, Tensor] = {}
        versions: dict[str, int] = {}

        def keep(key: str, site: Site, tensor: Tensor) -> None:
            if key in found:
                raise UserError(
                    f"{_where(key, site)} ran more than once in one forward pass of {self.name}; "
                    "choose a site whose module runs once"
                )
            value = site.of(tensor)
            if key in self._copied or value.is_inference():  # inference tensors do not count their changes
                value = value.clone() if site.scale == 1.0 else value
            else:
                versions[key] = value._version
            found[key] = value
            if stop and len(found) == len(self._sites):
                raise _Stop

        with self._hooks(keep), contextlib.suppress(_Stop):
            run()
        self._require_all(self._sites, found)
        return found, versions

    def _require_all(self, sites: Mapping[str, Site], found: Collection[str]) -> None:
        for key, site in sites.items():
            if key not in found:
                raise UserError(
                    f"{_where(key, site)} did not run in a forward pass of {self.name}; choose another site"
                )

    @contextlib.contextmanager
    def editing(self, edits: Mapping[str, EditFunction]) -> Iterator[None]:
        """While it is open, the value at each site of ``edits`` is replaced by what its function returns.

        Raises:
            UserError: on leaving it, when the module of an edit did not run.
        """
        done: set[str] = set()

        def edit(key: str, site: Site, tensor: Tensor) -> Tensor | None:
            if key not in edits:
                return None
            done.add(key)
            value = site.of(tensor)
            return site.put(tensor, edits[key](value).to(value))

        with self._hooks(edit):
            yield
        self._require_all({key: self._sites[key] for key in edits}, done)

    @contextlib.contextmanager
    def tracking(self) -> Iterator[dict[str, Tensor]]:
        """While it is open, a forward pass stores the value at each site as a tensor of the autograd graph.

        Only what reads the site depends on its tensor, as with an edit. Gradients must be enabled.
        """
        found: dict[str, Tensor] = {}

        def track(key: str, site: Site, tensor: Tensor) -> Tensor | None:
            value = site.of(tensor)
            if not value.is_floating_point():
                found[key] = value
                return None
            if site.shared:  # the tensor itself, so that all its readers count
                found[key] = value if value.requires_grad else value.requires_grad_()
                return None
            found[key] = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
            return site.put(tensor, found[key].clone())  # a copy, so that no later module changes it in place

        with self._hooks(track):
            yield found

    @contextlib.contextmanager
    def _hooks(self, function: Callable[[str, Site, Tensor], Tensor | None]) -> Iterator[None]:
        """Calls ``function`` with name, site and tensor; a tensor that it returns takes the place of that."""
        with contextlib.ExitStack() as stack:
            for key, site in self._sites.items():
                handle = self._register(key, site, function)
                stack.callback(handle.remove)
            yield

    def _register(self, key: str, site: Site, function: Callable[[str, Site, Tensor], Tensor | None]) -> Any:
        module = self._modules[key]

        def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
            tensor, replace = _entry(output, site, key)
            new = function(key, site, tensor)
            return None if new is None else replace(new)

        def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tensor, replace = _argument(args, kwargs, site, key)
            new = function(key, site, tensor)
            return None if new is None else replace(new)

        if site.side == "in":
            return module.register_forward_pre_hook(on_input, with_kwargs=True)
        return module.register_forward_hook(on_output)


class _Stop(BaseException):
    """Ends a forward pass. It is not an Exception, so that no module catches it."""


def find_module(module: nn.Module, path: str, name: str) -> nn.Module:
    """The submodule at ``path``; raises a UserError with the nearest paths when there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        near = difflib.get_close_matches(path, [known for known, _ in module.named_modules() if known], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"{name} has no module {path!r}{hint}") from None


def _where(key: str, site: Site) -> str:
    return f"the module {site.path or 'itself'} of site {key}" if key != site.path else f"the module {key}"


def _entry(output: Any, site: Site, key: str) -> tuple[Tensor, _Replace]:
    """The tensor of ``output`` that ``site`` means, and the function that gives the output with another."""
    if isinstance(output, Tensor) and site.entry in (None, 0):
        return output, lambda new: new
    entries: dict[int | str, Any] = {}
    if isinstance(output, Mapping):
        entries = dict(output)
    elif isinstance(output, tuple | list):
        entries = dict(enumerate(output))
    which = site.entry
    if which is None:
        found = [name for name, value in entries.items() if _holds_tensors(value)]
        if len(found) != 1:
            choices = " or ".join(f"{site.path}:{name}" for name in found)
            raise UserError(
                f"{_where(key, site)} returns {type(output).__name__} with {len(found)} entries that hold "
                f"tensors, and a site is one; {f'name it {choices}' if found else 'choose another site'}"
            )
        which = found[0]
    tensor = entries.get(which)
    if not isinstance(tensor, Tensor):
        raise UserError(
            f"{_where(key, site)} returns {type(output).__name__} whose entry {which} is "
            f"{type(tensor).__name__}, not a tensor; choose another site"
        )
    return tensor, lambda new: _with_entry(output, which, new)


def _holds_tensors(value: Any) -> bool:
    """False for None, numbers, strings and the key/value caches of transformers, which are objects."""
    if isinstance(value, tuple | list):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)


def _with_entry(output: Any, which: int | str, new: Tensor) -> Any:
    if isinstance(output, Mapping):
        changed = copy.copy(output)
        changed[which] = new  # type: ignore[index]
        return changed
    items = [new if place == which else value for place, value in enumerate(output)]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def _argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], site: Site, key: str
) -> tuple[Tensor, Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The first tensor argument, and the function that gives the arguments with another."""
    place = next((place for place, value in enumerate(args) if isinstance(value, Tensor)), None)
    if place is not None:
        return args[place], lambda new: ((*args[:place], new, *args[place + 1 :]), kwargs)
    named = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
    if named is not None:
        return kwargs[named], lambda new: (args, {**kwargs, named: new})
    raise UserError(f"{_where(key, site)} is called without a tensor; choose another site")
