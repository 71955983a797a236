"""Ways to damage a file: its bytes, values of JSON in it, and something else than a file in its place."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

RAW = ["1" * 5000, "1e999", "NaN", "-Infinity", "[" * 200_000, "[" * 300 + "]" * 300, '"\\ud800"', "", "0x1"]
"""Put into the text of a JSON file in place of a value."""
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 1.5, 2**31, 2**63, 10**30, 10**400, 1e308, "", "x", "1", "\ud800", "a\0b",
    "\n\x1b[31m", "n" * 300, "../../x", "/dev/zero", [], {}, [1], ["x"], [[1]], {"a": 1}, [None] * 3,
]  # fmt: skip
TOKENS = [
    b"null",
    b"true",
    b"-1",
    b"1e999",
    b"9" * 5000,
    b"[" * 3000,
    b"{}",
    b'"',
    b"\xff\xfe",
    b"'",
    b"\0",
    b"nan",
]

Damage = Callable[[random.Random, Path], str]


def flip(rng: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 3, 20])):
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"flip {at}"


def cut(rng: random.Random, path: Path) -> str:
    data = path.read_bytes()
    at = rng.choice([0, 1, len(data) - 1, rng.randrange(len(data))])
    path.write_bytes(data[:at])
    return f"cut at {at}"


def zero(rng: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    size = rng.choice([1, 16, 512, 4096])
    data[at : at + size] = bytes(len(data[at : at + size]))
    path.write_bytes(data)
    return f"zero {size} at {at}"


def double(rng: random.Random, path: Path) -> str:
    data = path.read_bytes()
    start, end = sorted(rng.choices(range(len(data) + 1), k=2))
    path.write_bytes(data[:end] + data[start:end][:10_000] + data[end:])
    return f"double {start} to {end}"


def insert(rng: random.Random, path: Path) -> str:
    data = path.read_bytes()
    at, token = rng.randrange(len(data) + 1), rng.choice(TOKENS)
    path.write_bytes(data[:at] + token + data[at + rng.choice([0, 1, 4]) :])
    return f"insert {token[:10]!r} at {at}"


def noise(rng: random.Random, path: Path) -> str:
    path.write_bytes(rng.randbytes(rng.choice([1, 8, 100, 5000])))
    return "noise"


def utf16(rng: random.Random, path: Path) -> str:
    path.write_bytes(path.read_bytes().decode("latin-1").encode("utf-16"))
    return "utf-16"


def instead(rng: random.Random, path: Path) -> str:
    """Something else than a file."""
    path.unlink()
    what = rng.choice(["nothing", "directory", "pipe", "device", "loop", "full directory"])
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "loop":
        path.symlink_to(path.name)
    elif what != "nothing":
        path.mkdir()
        if what == "full directory":
            (path / "x").write_bytes(b"x")
    return what


def json_value(rng: random.Random, path: Path) -> str:
    """Change one value of a JSON file, or of one line of a file of JSON lines."""
    text = path.read_text("utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" or path.name == "journal.json" else [text]
    number = rng.randrange(len(lines))
    lines[number] = change(rng, json.loads(lines[number]))
    path.write_text("\n".join(lines) + "\n", "utf-8", errors="surrogatepass")
    return f"line {number}: {lines[number][:60]!r}"


def change(rng: random.Random, value: Any) -> str:
    places: list[tuple[Any, Any]] = []

    def walk(parent: Any) -> None:
        for key in parent if isinstance(parent, dict) else range(len(parent)):
            places.append((parent, key))
            if isinstance(parent[key], dict | list):
                walk(parent[key])

    if isinstance(value, dict | list):
        walk(value)
    how = rng.choice(["value", "value", "raw", "delete", "add", "key", "twice", "swap", "whole"])
    if how == "whole" or not places:
        return json.dumps(rng.choice(VALUES))
    parent, key = rng.choice(places)
    mark = "MARK-OF-DAMAGE"
    if how == "value":
        parent[key] = rng.choice(VALUES)
    elif how == "swap":
        other, name = rng.choice(places)
        parent[key], other[name] = json.loads(json.dumps([other[name], parent[key]]))
    elif how == "delete":
        del parent[key]
    elif how == "raw":
        parent[key] = mark
        return json.dumps(value).replace(f'"{mark}"', rng.choice(RAW), 1)
    elif isinstance(parent, dict) and how == "twice":
        parent[mark] = 1
        return json.dumps(value).replace(mark, json.dumps(key)[1:-1], 1)
    elif isinstance(parent, dict):
        parent[rng.choice(["x", "n" * 300, "\ud800", "", "a/b"])] = parent.pop(key) if how == "key" else 1
    else:
        parent.append(rng.choice(VALUES))
    return json.dumps(value)


def tensor_header(rng: random.Random, path: Path) -> str:
    """Change one value in the header of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = change(rng, json.loads(data[8 : 8 + size])).encode("utf-8", "surrogatepass")
    header = header.ljust(size)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    return f"header {header[:60]!r}"


def array_header(rng: random.Random, path: Path) -> str:
    """Change the description in the header of a .npy file."""
    data = path.read_bytes()
    rows = rng.choice(["-1", "9" * 30, "True", "1.5", "'x'"])
    said = rng.choice(
        [
            f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, 3)}}",
            "{'descr': '|O', 'fortran_order': False, 'shape': (20, 3)}",
            "{'descr': [('a', '<f4'), ('a', '<f4')], 'fortran_order': False, 'shape': (20, 3)}",
            "{'descr': '<f4', 'fortran_order': 'x', 'shape': ()}", "(" * 5000, "[" * 90 + "]" * 90, "{}", "1",
        ]
    )  # fmt: skip
    header = said.encode().ljust(200) + b"\n"
    path.write_bytes(
        data[:6] + b"\x01\x00" + (len(header) % 65536).to_bytes(2, "little") + header + data[128:]
    )
    return f"header {said[:50]}"


BYTES: list[Damage] = [flip, flip, cut, zero, double, insert, insert, noise, utf16, instead]
OF_KIND: dict[str, list[Damage]] = {
    ".json": [json_value], ".jsonl": [json_value], ".safetensors": [tensor_header], ".npy": [array_header],
}  # fmt: skip


def damage(rng: random.Random, path: Path) -> str:
    """Damage the file in one way; returns what was done."""
    of_kind = OF_KIND.get(path.suffix)
    if of_kind and rng.random() < 0.5:
        return rng.choice(of_kind)(rng, path)
    return rng.choice(BYTES)(rng, path)


def remove(path: Path) -> None:
    """Remove whatever is at ``path``."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
