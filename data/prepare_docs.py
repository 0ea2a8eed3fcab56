"""Make questions and answers from the documentation that every Python installation carries.

The standard library's source files are parsed, never imported. Every public function, class and
method with a docstring gives one record: the question names it and shows its signature, the answer
is the docstring's first paragraph. Modules are split, not records: what is held out comes from
modules that training never sees. Same Python, same files.
"""

import argparse
import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from preparing import CACHE, exit_code_of, say, write_json

SKIPPED_PACKAGES = {"ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test"}
SKIPPED_PACKAGES |= {"tests", "turtledemo", "this", "antigravity"}
SHORTEST_ANSWER, LONGEST_ANSWER = 20, 320
LONGEST_SIGNATURE = 160
HELD_OUT_SHARE = 10
"""One module of this many is held out."""

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
KINDS = {ast.FunctionDef: "function", ast.AsyncFunctionDef: "coroutine", ast.ClassDef: "class"}


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=CACHE,
        help="folder for docs_train.json and docs_held_out.json (default data/.cache)",
    )
    return parser


def module_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and file of every public module of the standard library, in order of name."""
    named = []
    for path in root.rglob("*.py"):
        parts = list(path.relative_to(root).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if parts and not any(p in SKIPPED_PACKAGES or p.startswith("_") for p in parts):
            named.append((".".join(parts), path))
    yield from sorted(named)


def documented_objects(tree: ast.AST, prefix: str) -> Iterator[tuple[str, Documented]]:
    """Yield qualified name and node of all public functions, classes and methods below ``tree``."""
    for node in getattr(tree, "body", []):
        if not isinstance(node, Documented) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        yield name, node
        if isinstance(node, ast.ClassDef):
            yield from documented_objects(node, name)


def make_record(name: str, node: Documented, is_method: bool) -> dict[str, str] | None:
    """Return the record of one object, or None if it has no fitting docstring."""
    paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
    answer = " ".join(paragraph.split())
    signature = name
    if not isinstance(node, ast.ClassDef):
        signature = f"{name}({ast.unparse(node.args)})"
    fits = SHORTEST_ANSWER <= len(answer) <= LONGEST_ANSWER and answer.endswith(".")
    if not fits or len(signature) > LONGEST_SIGNATURE:
        return None
    kind = "method" if is_method else KINDS[type(node)]
    return {"instruction": f"What does the Python {kind} `{signature}` do?", "output": answer}


def module_records(name: str, path: Path) -> list[dict[str, str]]:
    """Return the records of one module, in the order of its source."""
    tree = ast.parse(path.read_bytes())
    records = []
    for qualified_name, node in documented_objects(tree, name):
        is_method = qualified_name.count(".") > name.count(".") + 1
        record = make_record(qualified_name, node, is_method)
        if record is not None:
            records.append(record)
    return records


def is_held_out(module: str) -> bool:
    """Say on which side a module stands: a function of its top-level name alone."""
    digest = hashlib.sha256(module.split(".")[0].encode()).digest()
    return digest[0] % HELD_OUT_SHARE == 0


def collect(root: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training and held-out records, no answer or question twice."""
    train: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    seen: set[str] = set()
    for name, path in module_files(root):
        for record in module_records(name, path):
            if record["output"] in seen:
                continue
            seen.add(record["output"])
            (held_out if is_held_out(name) else train).append(record)
    return train, held_out


def prepare(output: Path) -> None:
    """Write ``docs_train.json`` and ``docs_held_out.json``."""
    train, held_out = collect(Path(sysconfig.get_paths()["stdlib"]))
    for name, records in (("docs_train.json", train), ("docs_held_out.json", held_out)):
        write_json(output / name, records)
        say(f"{output / name}: {len(records)} records")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    options = build_parser().parse_args(argv)
    return exit_code_of(lambda: prepare(options.output))


if __name__ == "__main__":
    sys.exit(main())
