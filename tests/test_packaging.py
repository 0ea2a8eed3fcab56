"""What `pip install .` asks for agrees with what is pinned, and with what the code imports."""

import ast
import importlib
import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {
    extra: [Requirement(line) for line in lines]
    for extra, lines in PROJECT["optional-dependencies"].items()
}
# Imported where they are used, with a sentence where they are missing; each has its extra or its
# own way to be installed.
OPTIONAL = {"grouped_gemm", "megablocks", "megablocks_ops", "scattermoe", "stk", "triton"}
OPTIONAL |= {"mlflow", "trackio", "wandb"}
ONLY_FOR_TYPES = {"_typeshed"}


def read_lines(name: str) -> list[Requirement]:
    """Return the requirements of a file, without those of the file it includes."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-r ")]


def test_every_pinned_version_lies_within_its_range():
    ranges = {r.name: r.specifier for r in (*NEEDED, *sum(EXTRAS.values(), []))}
    for pinned in read_lines("requirements.txt"):
        (pin,) = pinned.specifier
        assert pin.operator == "==", pinned
        assert ranges[pinned.name].contains(pin.version), pinned


def test_what_the_tests_run_with_lies_within_its_range():
    for needed in NEEDED:
        assert needed.specifier.contains(importlib.metadata.version(needed.name)), needed


def test_every_range_has_both_ends():
    for requirement in (*NEEDED, *EXTRAS["trackers"]):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">=", "<"}, requirement


@pytest.mark.parametrize(
    ("extra", "file"),
    [("dev", "requirements-dev.txt"), ("kernels", "requirements-kernels.txt")],
)
def test_an_extra_says_what_its_file_says(extra, file):
    wanted = {r.name: (str(r.specifier), r.url) for r in EXTRAS[extra]}
    assert {r.name: (str(r.specifier), r.url) for r in read_lines(file)}.items() <= wanted.items()


def test_what_is_imported_is_asked_for():
    asked = {canonicalize_name(requirement.name) for requirement in NEEDED}
    by_module = importlib.metadata.packages_distributions()
    for path in (ROOT / "megablocks_utils").rglob("*.py"):
        for name in imported_modules(ast.parse(path.read_text())) - OPTIONAL - ONLY_FOR_TYPES:
            names = {canonicalize_name(found) for found in by_module.get(name, [name])}
            assert names & asked, f"{path.relative_to(ROOT)} imports {name}"


def imported_modules(tree: ast.AST) -> set[str]:
    """Return the top modules that are neither ours nor Python's."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    tops = {name.partition(".")[0] for name in names}
    return tops - sys.stdlib_module_names - {"megablocks_utils"}


def test_console_script_and_package_data_are_there():
    module, _, function = PROJECT["scripts"]["megablocks-utils"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    for pattern in PYPROJECT["tool"]["setuptools"]["package-data"]["megablocks_utils"]:
        assert list((ROOT / "megablocks_utils").glob(pattern)), pattern
