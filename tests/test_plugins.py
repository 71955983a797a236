"""Packages that add an architecture, an SAE format or a store export format with entry points."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from saebench.core.errors import UserError
from saebench.core.registry import Registry

MODULES = {
    "loud": '''
        """TopK with codes multiplied by an additional setting."""

        from dataclasses import dataclass
        from typing import Annotated, ClassVar

        from saebench.core.bounds import AtLeast
        from saebench.saes.topk import TopKSAE, TopKSpec


        @dataclass(frozen=True, kw_only=True)
        class LoudSpec(TopKSpec):
            """Settings of a loud SAE."""

            name: ClassVar[str] = "loud"

            loudness: Annotated[float, AtLeast(1)] = 2.0
            """Factor of every code."""


        class LoudSAE(TopKSAE):
            Spec = LoudSpec

            def encode_rows(self, x_ND, *, k=None):
                codes = super().encode_rows(x_ND, k=k)
                return codes.with_values(codes.values * self.spec.loudness)
        ''',
    "plain_text": '''
        """SAEs as lines of text."""

        from types import SimpleNamespace


        def convert(sae):
            return SimpleNamespace(architecture="text", note=None, lines=[f"d_sae {sae.d_sae}"])


        def write(converted, directory, sae, run):
            (directory / "sae.txt").write_text("\\n".join([*converted.lines, f"run {run.path.name}"]))


        def read(directory, *, k):
            from saebench.core.errors import UserError

            raise UserError(f"{directory} cannot be read back")
        ''',
    "counting": '''
        """A store as the number of its features."""


        def check(store, features):
            pass


        def write(store, features, directory):
            (directory / "n.txt").write_text(str(store.info()["d_sae"]))
            return ("only counted",)
        ''',
}
ENTRY_POINTS = """
    [saebench.architectures]
    loud = add_on.loud:LoudSAE
    broken = add_on.missing:SAE
    topk = add_on.loud:LoudSAE

    [saebench.formats]
    plain-text = add_on.plain_text

    [saebench.store_exports]
    counting = add_on.counting
    """


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site directory with an installed package that adds to every registry."""
    site = tmp_path_factory.mktemp("site")
    (site / "add_on").mkdir()
    (site / "add_on" / "__init__.py").touch()
    for name, source in MODULES.items():
        (site / "add_on" / f"{name}.py").write_text(textwrap.dedent(source))
    install(site, "add-on", ENTRY_POINTS)
    return site


def install(site: Path, package: str, entry_points: str) -> None:
    info = site / f"{package.replace('-', '_')}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))


def saebench_with(site: Path, *commands: list[str]) -> list[dict[str, object]]:
    """Exit code and output of each command, with ``site`` on the path."""
    program = textwrap.dedent(
        """
        import contextlib, io, json, sys
        from saebench.cli import main
        answers = []
        for words in json.loads(sys.argv[1]):
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(words)
            answers.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
        print(json.dumps(answers))
        """
    )
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(commands)],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, object]] = json.loads(done.stdout)
    return answers


def test_package_adds_working_architecture_and_formats(
    site: Path, tmp_path: Path, tiny_cache: object
) -> None:
    cache, run = str(tiny_cache.path), str(tmp_path / "run")  # type: ignore[attr-defined]
    small = ["--d-sae", "16", "--k", "2", "--tokens", "512", "--batch-size", "128", "--quiet"]
    store, theirs, counted = (str(tmp_path / name) for name in ("store", "theirs", "counted"))
    helped, trained, measured, indexed, exported, saelens, counting, refused = saebench_with(
        site,
        ["train", "--sae", "loud", "--help"],
        ["train", "--sae", "loud", "--cache", cache, "--out", run, "--loudness", "3", *small],
        ["eval", run, "--tokens", "64", "--json", "--quiet"],
        ["index", run, "--cache", cache, "--out", store, "--model", "none", "--quiet"],
        ["export", run, theirs, "--format", "plain-text"],
        ["export", run, str(tmp_path / "no"), "--format", "saelens"],
        ["store", "export", store, "--out", counted, "--format", "counting", "--json"],
        ["train", "--sae", "loud", "--cache", cache, "--out", run + "2", "--loudness", "0", *small],
    )
    assert (
        helped["code"] == 0 and "--loudness" in str(helped["out"]) and "Factor of every" in str(helped["out"])
    )
    assert trained["code"] == 0, trained
    assert json.loads((tmp_path / "run" / "sae.json").read_text())["spec"]["loudness"] == 3.0
    assert measured["code"] == 0 and json.loads(str(measured["out"]))["sae"] == "loud"
    assert indexed["code"] == 0, indexed
    assert exported["code"] == 0 and (tmp_path / "theirs" / "sae.txt").read_text() == "d_sae 16\nrun run"
    assert saelens["code"] == 2 and "SAELens has no architecture for loud" in str(saelens["err"])
    assert counting["code"] == 0 and json.loads(str(counting["out"]))["notes"] == ["only counted"]
    assert (tmp_path / "counted" / "n.txt").read_text() == "16"
    assert refused["code"] == 2 and "loudness is 0.0; it must be at least 1" in str(refused["err"])


def test_missing_package_error_lists_architectures(tmp_path: Path) -> None:
    from saebench.runs.run import load
    from saebench.saes.topk import TopKSAE, TopKSpec

    TopKSAE(TopKSpec(d_sae=8, k=2), 4).save(tmp_path)
    description = json.loads((tmp_path / "sae.json").read_text())
    (tmp_path / "sae.json").write_text(json.dumps({**description, "sae": "loud"}))
    with pytest.raises(UserError, match="'loud' is not an SAE architecture; there is topk, "):
        load(tmp_path)


def test_broken_package_is_named_and_others_still_load(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))
    registry = Registry(
        "an SAE architecture", "saebench.architectures", {"topk": "saebench.saes.topk:TopKSAE"}
    )
    assert registry.load("topk").__module__ == "saebench.saes.topk"
    with pytest.warns(UserWarning, match=r"'topk' of the package add-on 1\.5 is ignored"):
        assert registry.names() == ["topk", "loud", "broken"]
    with pytest.raises(UserError, match=r"package add-on 1\.5 cannot be imported \(ModuleNotFound"):
        registry.load("broken")
    assert issubclass(registry.load("loud"), torch.nn.Module)


def test_second_package_with_same_name_is_ignored_with_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("zebra", "ape"):
        install(tmp_path, package, f"[saebench.architectures]\nmine = {package}:SAE\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("an SAE architecture", "saebench.architectures", {})
    with pytest.warns(UserWarning, match=r"zebra 1\.5 is ignored: the package ape 1\.5 has one"):
        assert registry.plugins["mine"].value == "ape:SAE"


def test_damaged_package_metadata_gives_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "fine", "[saebench.formats]\nmine = fine\n")
    install(tmp_path, "damaged", "")
    (tmp_path / "damaged-1.5.dist-info" / "entry_points.txt").write_bytes(b"[saebench.formats]\nx\xff = y\n")
    (tmp_path / "nameless-1.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(UserWarning, match="the metadata of a package cannot be read"):
        assert Registry("a format of SAEs", "saebench.formats", {}).names() == ["mine"]


def test_built_in_names_are_found_without_reading_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("saebench.core.registry.metadata.distributions", lambda: pytest.fail("read packages"))
    registry = Registry("an SAE architecture", "g", {"mutual-choice": "m"}, {"batchtopk": "mutual-choice"})
    assert registry.canonical("batchtopk") == "mutual-choice"
