"""Pages of the documentation that are made from the code when the site is built (a hook of mkdocs).

The references come from docstrings, the command parser, the settings classes and the store's schema. Some
Markdown files from outside docs/ become pages too. Nothing that this writes is committed.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import saebench as sb
from saebench.cli import app
from saebench.core.settings import field_docs
from saebench.saes.registry import ALIASES, ARCHITECTURES, architecture
from saebench.saes.spec import SaeSpec
from saebench.store import schema

ROOT = Path(__file__).parents[1]
OTHER_FILES = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "kernels.md": "kernels/saebench_kernels/NOTES.md",
    "bundled.md": "data/saebench_data/README.md",
}
"""Page -> the file of the repository that it shows."""

EQUATION = re.compile(r"\w+(\^\w+)? = ")
"""How a block of a docstring begins whose line breaks matter."""

STAGES = {
    "Activations": "harvest ModuleSource import_activations open_cache ActivationCache",
    "Training": "train sweep load SAE SparseCodes",
    "Evaluation": "evaluate EvalReport compare",
    "Feature stores": "index open_store FeatureStore export_store explain",
    "Prompts and interventions": "load_model features_of compare_prompts ablate steer Steering "
    "logit_attribution Attribution loss_effects LossEffects index_effects",
    "Dictionaries": "match Matching splits absorbed decoder_map clusters redundancy Redundancy",
    "Other libraries": "export_sae import_sae",
    "Errors": "UserError",
}
"""Heading -> public names, in the order of the Python reference; a name that is missing here comes last."""


def generated_pages() -> dict[str, str]:
    """Path in the site's sources -> Markdown of every generated page."""
    pages = {
        "reference/python.md": python_reference(),
        "reference/cli.md": cli_reference(),
        "reference/architectures.md": architecture_reference(),
        "reference/tables.md": table_reference(),
    }
    for page, source in OTHER_FILES.items():
        if (ROOT / source).exists():
            pages[page] = as_page((ROOT / source).read_text(encoding="utf-8"))
    return pages


def on_files(files: Any, config: Any) -> Any:
    """The hook: called by mkdocs with the files found in docs/."""
    from mkdocs.structure.files import File

    for path, text in generated_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def as_page(text: str) -> str:
    """Markdown of a file from outside docs/: links into docs/ stay links, other paths become code."""

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        if target.startswith(("http://", "https://", "#")):
            return match[0]
        if target.startswith("docs/"):
            return f"[{words}]({target.removeprefix('docs/')})"
        page = next((page for page, source in OTHER_FILES.items() if source == target), None)
        return f"[{words}]({page})" if page else f"{words} (`{target}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)", link, text)


# Python -------------------------------------------------------------------------------------------


def python_reference() -> str:
    """Every public name of ``saebench``, with its signature and docstring."""
    parts = [
        "# Python API",
        "Import the package with `import saebench as sb`. Each name is loaded when it is first used.",
        "This page is generated from the docstrings; `help(sb.NAME)` shows the same text. Examples in "
        "docstrings run as tests, which provide small objects `cache`, `run`, `model` and `store`.",
    ]
    grouped = {heading: names.split() for heading, names in STAGES.items()}
    known = {name for names in grouped.values() for name in names} | {"figures", "__version__"}
    if rest := [name for name in sb.__all__ if name not in known]:
        grouped["Further names"] = rest
    for heading, names in grouped.items():
        parts.append(f"## {heading}")
        for name in names:
            parts += _entry(f"sb.{name}", getattr(sb, name), level=3)
    parts += ["## Figures", markdown_of(inspect.getdoc(sb.figures) or "")]
    for name in sb.figures.__all__:
        parts += _entry(f"sb.figures.{name}", getattr(sb.figures, name), level=3)
    return "\n\n".join(parts) + "\n"


def _entry(title: str, value: Any, *, level: int) -> Iterator[str]:
    yield f"{'#' * level} `{title}`"
    if not inspect.isclass(value) or dataclass_like(value):
        yield f"```python\n{signature(title.removeprefix('sb.'), value)}\n```"
    yield markdown_of(inspect.getdoc(value) or "")
    if inspect.isclass(value) and not issubclass(value, Exception):
        for name, member in public_members(value):
            text = inspect.getdoc(member) or ""
            if text.startswith("Deprecated name"):
                continue
            call = name if isinstance(member, property) else signature(name, member)
            yield f"{'#' * (level + 1)} `{title.rpartition('.')[2]}.{name}`"
            yield f"```python\n{call}\n```"
            yield markdown_of(text)


def dataclass_like(value: Any) -> bool:
    """Whether people construct the class themselves; others are made by functions."""
    return value is sb.SparseCodes


def public_members(value: type) -> list[tuple[str, Any]]:
    """The public methods and properties that saebench defines, in the order of the source."""
    found = {}
    for base in reversed(value.__mro__):
        if base.__module__.startswith("saebench"):
            for name, member in vars(base).items():
                callable_ = member.__func__ if isinstance(member, classmethod | staticmethod) else member
                if not name.startswith("_") and (
                    isinstance(member, property) or inspect.isfunction(callable_)
                ):
                    found[name] = member if isinstance(member, property) else callable_
    return list(found.items())


def signature(name: str, function: Any) -> str:
    """``name(parameters) -> type``, over several lines when it is long."""
    try:
        made = inspect.signature(function)
    except (TypeError, ValueError):
        return name
    parameters = [_parameter(p) for p in made.parameters.values() if p.name not in ("self", "cls")]
    star = next((i for i, p in enumerate(_shown(made)) if p.kind is p.KEYWORD_ONLY), None)
    if star is not None and not any(p.kind is p.VAR_POSITIONAL for p in made.parameters.values()):
        parameters.insert(star, "*")
    result = made.return_annotation
    end = ")" if result is made.empty else f") -> {_type(result)}"
    line = f"{name}({', '.join(parameters)}{end}"
    if len(line) <= 90:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + end


def _shown(made: inspect.Signature) -> list[inspect.Parameter]:
    return [p for p in made.parameters.values() if p.name not in ("self", "cls")]


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = stars + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_type(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        shown = "..." if "<" in repr(parameter.default) else repr(parameter.default)
        text += f" = {shown}"
    return text


def _type(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.strip("'\"")


def markdown_of(docstring: str) -> str:
    """Markdown of one of our docstrings: sections become lists, examples code, the rest stays."""
    out: list[str] = []
    section = False
    for block in re.split(r"\n\s*\n", docstring):
        head, _, body = block.partition("\n")
        if match := re.fullmatch(r"(Args|Attributes|Raises|Returns|Settings):", head):
            section = True
            out += [f"**{match[1]}**", _items(body)]
        elif head.startswith(">>>"):
            out.append(f"```pycon\n{block}\n```")
        elif section and head.startswith("    "):
            out.append(_items(block))
        elif head.startswith("    ") or EQUATION.match(head):
            out.append(f"```text\n{textwrap.dedent(block)}\n```")
        else:
            section = False
            out.append(_prose(block))
    return "\n\n".join(out)


def _items(body: str) -> str:
    """The entries ``name: text`` of a section as a list."""
    entries: list[str] = []
    for line in textwrap.dedent(body).splitlines():
        if line.startswith(" ") and entries:
            entries[-1] += " " + line.strip()
        else:
            entries.append(line.strip())
    lines = []
    for entry in entries:
        name, colon, text = entry.partition(": ")
        known = colon and re.fullmatch(r"[\w*, .]+", name)
        lines.append(f"- `{name}`: {_prose(text)}" if known else f"- {_prose(entry)}")
    return "\n".join(lines)


def _prose(text: str) -> str:
    """Text in which only backticks mean something."""
    parts = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("`") else re.sub(r"([*<>|\[\]])", r"\\\1", part) for part in parts)


# Commands -----------------------------------------------------------------------------------------


def commands() -> list[tuple[str, ...]]:
    """The words of every command, such as ("train",) and ("cache", "info"), in the order of --help."""
    found: list[tuple[str, ...]] = []
    tree = app.build(())
    for name in tree:
        if not name.startswith("-"):
            inner = [inner for inner in tree[name] if not inner.startswith("-")]
            found += [(name, one) for one in inner] or [(name,)]
    return found


def cli_reference() -> str:
    """Every command with its flags, types and defaults."""
    parts = [
        "# Commands",
        "This page is generated from the command parser; `saebench COMMAND --help` shows the same.",
        "Flags, `--config file.toml`, keyword arguments in Python and the settings saved beside every result "
        "have the same names, with `-` or `_` between words. Flags win over the file. A number may be "
        "written `2e6` or `2_000_000`. Results go to standard output (`--json` for programs), progress goes "
        "to standard error (`--quiet` for none).",
        "| exit code | meaning |\n|---|---|\n| 0 | done |\n| 2 | you must change something: one sentence on "
        "standard error says what |\n| 1 | a bug in saebench |",
    ]
    for words in commands():
        command = app.build(words)
        for word in words:
            command = command[word]
        parts += [f"## `saebench {' '.join(words)}`", _prose(str(command.help or ""))]
        arguments = [a for a in command.assemble_argument_collection() if a.show]
        parts.append(_flags(arguments))
        if words == ("train",):
            parts.append(
                "Each architecture adds flags of its own: see [Settings of the architectures]"
                "(architectures.md), or `saebench train --sae NAME --help`."
            )
    return "\n\n".join(parts) + "\n"


def _flags(arguments: Sequence[Any]) -> str:
    rows = []
    for argument in arguments:
        default = argument.field_info.default
        negative = default is True  # what is on by default is switched off with --no-...
        named = ", ".join(f"`{name}`" for name in argument.names if name.startswith("--no-") == negative)
        required = default is inspect.Parameter.empty
        shown = "required" if required else _default(default)
        rows.append((named or f"`{argument.name}`", shown, _prose(argument.parameter.help or "")))
    return table(("flag", "default", "meaning"), rows)


def _default(value: Any) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else ""
    if isinstance(value, tuple | list):
        return " ".join(f"`{one}`" for one in value)
    return f"`{value}`"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace(" | ", " or ") for cell in line) + " |"
        for line in lines
    )


# Architectures ------------------------------------------------------------------------------------


def architecture_reference() -> str:
    """The equations of every architecture and the settings that only it has."""
    common = {field.name for field in fields(SaeSpec)}
    parts = [
        "# Settings of the architectures",
        "This page is generated from the code of the architectures. All of them take these settings:",
        _settings(SaeSpec, common),
    ]
    for name in ARCHITECTURES:
        sae_class = architecture(name)
        also = "".join(f" (`{alias}`)" for alias, target in ALIASES.items() if target == name)
        parts += [f"## `{name}`{also}", markdown_of(inspect.getdoc(inspect.getmodule(sae_class)) or "")]
        parts.append(markdown_of(inspect.getdoc(sae_class) or ""))
        own = {field.name for field in fields(sae_class.Spec)} - common
        parts.append(_settings(sae_class.Spec, own) if own else "It has no settings of its own.")
    return "\n\n".join(parts) + "\n"


def _settings(spec: Any, names: set[str]) -> str:
    docs = field_docs(spec)
    rows = [
        (f"`--{field.name.replace('_', '-')}`", _default(field.default), _prose(docs.get(field.name, "")))
        for field in fields(spec)
        if field.name in names
    ]
    return table(("flag", "default", "meaning"), rows)


# The store's tables -------------------------------------------------------------------------------


def table_reference() -> str:
    """Every table and column of a feature store, from schema.py."""
    parts = [
        "# Tables of a feature store",
        f"This page is generated from `saebench/store/schema.py`, format {schema.FORMAT_VERSION}. The "
        "[store format](../formats/store.md) says which file holds which table. Types are DuckDB's.",
    ]
    files = {
        "The SAE file": schema.SAE_TABLES,
        "The text file": schema.TEXT_TABLES,
        "The text file of units": schema.UNIT_TABLES,
        **{f"The extra file `{name}`": tables for name, tables in schema.EXTRA_TABLES.items()},
    }
    for title, tables in files.items():
        parts.append(f"## {title}")
        if title.startswith("The extra"):
            parts.append("It also has a `meta` table.")
        for one in tables.values():
            parts += [f"### `{one.name}`{'' if one.name != 'meta' else f' of {title.lower()}'}"]
            parts.append("Sorted by " + ", ".join(f"`{name}`" for name in one.order) + ".")
            rows = [(f"`{c.name}`", f"`{c.type}`", _prose(c.help)) for c in one.columns]
            parts.append(table(("column", "type", "meaning"), rows))
    rows = [(f"`{name}`", str(number)) for name, number in schema.GROUPS.items()]
    parts += ["## Numbers that stand for names", "Groups of examples (`example.grp`):"]
    parts.append(table(("group", "number"), rows))
    for title, known in (
        ("Kinds of histograms (`hist.kind`)", schema.HIST_KINDS),
        ("Roles of tokens (`feature_token.role`)", schema.TOKEN_ROLES),
        ("Kinds of neighbors (`neighbor.kind`)", schema.NEIGHBOR_KINDS),
    ):
        parts += [f"{title}:", table(("name", "number"), [(f"`{n}`", str(v)) for n, v in known.items()])]
    grid = ", ".join(f"{q:g}" for q in schema.QUANTILE_GRID)
    parts.append(f"The quantiles in `quantile.qs`: {grid}.")
    return "\n\n".join(parts) + "\n"
