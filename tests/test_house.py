"""The rules of the house, checked from the syntax tree: imports run one way, rooms stay small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megablocks_utils"
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("train_*.py"))
# A room may import the rooms of the lines above its own, and itself; never its neighbours.
ORDER = (
    ("byte_units", "dtypes", "errors", "families", "files"),
    ("config",),
    ("planning",),
    ("processes",),
    ("mesh",),
    ("kernels",),
    ("moe",),
    ("checkpoint",),
    ("shard_moe_utils",),
    ("experts_interface", "fsdp", "lora"),
    ("merge", "export", "tune"),
    ("training",),
    ("rehearsal", "evaluate"),
    ("plan",),
    ("__init__",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
TORCH_FREE = (
    "byte_units",
    "dtypes",
    "errors",
    "families",
    "files",
    "config",
    "planning",
    "merge",
    "export",
    "tune",
    "plan",
)
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_SCRIPT_LINES = 300, 60, 80
Function = ast.FunctionDef | ast.AsyncFunctionDef


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            if node.module == "megablocks_utils":
                yield from (f"megablocks_utils.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def wrong_rooms(room: str, tree: ast.AST) -> list[str]:
    """Return the imports of a file of `room` that go against the order."""
    wrong = []
    for name in imported_names(tree):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        allowed = other == room or LEVEL.get(other, len(ORDER)) < LEVEL[room]
        if top == "megablocks_utils" and not allowed:
            wrong.append(name)
    return wrong


def wrong_words(tree: ast.AST) -> list[str]:
    """Return every print, global and broad except with its line."""
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            wrong.append(f"{node.lineno}: print")
        if isinstance(node, ast.Global):
            wrong.append(f"{node.lineno}: global")
        if isinstance(node, ast.ExceptHandler):
            caught = getattr(node.type, "elts", [node.type])
            names = {getattr(kind, "id", "everything") for kind in caught}
            if None in caught or names & {"Exception", "BaseException"}:
                wrong.append(f"{node.lineno}: broad except")
    return wrong


def undocumented(node: ast.AST, prefix: str = "") -> list[str]:
    """Return the public functions and classes in a module or class that have no docstring."""
    missing = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.ClassDef) or child.name.startswith("_"):
            continue
        if ast.get_docstring(child) is None:
            missing.append(prefix + child.name)
        if isinstance(child, ast.ClassDef):
            missing += undocumented(child, f"{prefix}{child.name}.")
    return missing


def long_functions(tree: ast.AST) -> list[str]:
    """Return functions with too many lines; of a Triton kernel, whose arguments are many, its body.

    Triton takes no arguments in classes, and its constants must be arguments.
    """
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    sizes = {node.name: node.end_lineno - _first_line(node) + 1 for node in functions}
    return [f"{name}: {size}" for name, size in sizes.items() if size > MAX_FUNCTION_LINES]


def _first_line(node: Function) -> int:
    is_kernel = any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)
    return node.body[0].lineno if is_kernel else node.lineno


def every_file(test):
    ids = [str(path.relative_to(ROOT)) for path in FILES]
    return pytest.mark.parametrize("path", FILES, ids=ids)(test)


@every_file
def test_imports_run_one_way(path):
    assert room_of(path) in LEVEL, "a new room: give it its place in ORDER"
    assert wrong_rooms(room_of(path), ast.parse(path.read_text())) == []


@every_file
def test_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert long_functions(ast.parse(text)) == []


@every_file
def test_no_print_global_or_broad_except(path):
    assert wrong_words(ast.parse(path.read_text())) == []


@every_file
def test_docstrings(path):
    tree = ast.parse(path.read_text())
    assert undocumented(tree) == []
    assert ast.get_docstring(tree) is not None or not tree.body


@pytest.mark.parametrize("room", ["moe", "kernels"])
def test_the_layer_knows_no_frameworks(room):
    files = [path for path in FILES if room_of(path) == room]
    assert files
    for path in files:
        tops = {name.partition(".")[0] for name in imported_names(ast.parse(path.read_text()))}
        assert tops & {"transformers", "accelerate", "peft"} == set(), path


@pytest.mark.parametrize("room", TORCH_FREE)
def test_the_door_needs_no_torch(room):
    files = [path for path in FILES if room_of(path) == room]
    trees = [ast.parse(path.read_text()) for path in files]
    tree = ast.Module([node for tree in trees for node in tree.body], [])
    tops = {name.partition(".")[0] for name in imported_names(tree)}
    assert tops & {"torch", "transformers", "accelerate", "peft", "datasets", "numpy"} == set()


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.name for path in SCRIPTS])
def test_scripts_are_tables_of_contents(path):
    text = path.read_text()
    assert len(text.splitlines()) < MAX_SCRIPT_LINES
    assert wrong_words(ast.parse(text)) == []


def test_the_checks_see_what_they_forbid():
    tree = ast.parse("from megablocks_utils.training import x\nimport megablocks_utils.mesh.y")
    assert wrong_rooms("mesh", tree) == ["megablocks_utils.training"]
    tree = ast.parse("from megablocks_utils import lora\nimport megablocks_utils.fsdp")
    assert wrong_rooms("fsdp", tree) == ["megablocks_utils.lora"]
    code = "def f():\n global a\n try:\n  print(1)\n except (OSError, Exception):\n  pass"
    found = sorted(wrong_words(ast.parse(code)))
    assert found == ["2: global", "4: print", "5: broad except"]
    assert wrong_words(ast.parse("try:\n a\nexcept:\n b")) == ["3: broad except"]
    assert wrong_words(ast.parse("try:\n a\nexcept ValueError:\n b")) == []
    code = "class A:\n 'd'\n def f(self): ...\n def _g(self): ...\ndef h(): ...\nclass _B: ..."
    assert undocumented(ast.parse(code)) == ["A.f", "h"]
    assert long_functions(ast.parse("def f():\n" + " a\n" * 60)) == ["f: 61"]
    assert long_functions(ast.parse("def f():\n" + " a\n" * 59)) == []
    kernel = "@triton.jit\ndef f(" + "a,\n" * 50 + "):\n"
    assert long_functions(ast.parse(kernel + " a\n" * 60)) == []
    assert long_functions(ast.parse(kernel + " a\n" * 61)) == ["f: 61"]
