"""The rules of the house, checked from the syntax tree: imports run one way, rooms stay small.

One test a rule, and each names every offender at once.
"""

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.house_figures import (
    Function,
    Module,
    find_arrows,
    find_circles,
    imported_names,
    read_modules,
)

ROOT = Path(__file__).parents[1]
MODULES = read_modules(ROOT / "megablocks_utils")
SCRIPTS = [
    Module(path.stem, path.stem, path.read_text(), ast.parse(path.read_text()))
    for path in sorted(ROOT.glob("train_*.py"))
]
# A room may import the rooms of the lines above its own; never its neighbours. A folder within a
# room is a room of its own, and a file at the top is one too.
ORDER = (
    ("byte_units", "dtypes", "errors", "families", "files"),
    ("config",),
    ("planning.model", "processes"),
    ("planning.memory",),
    ("planning.speed",),
    ("planning.launcher", "planning.report"),
    ("planning",),
    ("mesh", "quantization"),
    ("kernels",),
    ("kernels.fused",),
    ("kernels.backends",),
    ("kernels.tuning",),
    ("kernels.selection",),
    ("kernels.probing",),
    ("moe",),
    ("checkpoint",),
    ("attention", "training.data", "training.report"),
    ("ep_workarounds", "shard_moe_utils"),
    ("ep_implementation", "experts_interface", "fsdp", "lora"),
    ("merge", "export", "report", "tune"),
    ("training.step", "training.resume"),
    ("training.evaluation",),
    ("training",),
    ("rehearsal", "evaluate"),
    ("plan",),
    ("__main__", "__init__"),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
DOOR = (*ORDER[0], "config", "planning", "merge", "export", "report", "tune", "plan", "__main__")
HEAVY = {"torch", "transformers", "accelerate", "peft", "datasets", "numpy"}
LAYER = ("moe", "kernels")
FRAMEWORKS = {"transformers", "accelerate", "peft"}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_SCRIPT_LINES = 300, 60, 80
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:home|mnt|root|Users|work)/(?!somebody\b)\w+")


def in_rooms(rooms: Iterable[str]) -> list[Module]:
    """Return the files of rooms and of the rooms within them."""
    wanted = tuple(rooms)
    found = [
        m for m in MODULES if m.room in wanted or m.room.startswith(tuple(f"{r}." for r in wanted))
    ]
    assert {module.room.partition(".")[0] for module in found} == set(wanted)
    return found


def offenders(modules: Iterable[Module], rule) -> list[str]:
    """Return what a rule finds in each file, with its name."""
    return [f"{module.name}: {found}" for module in modules for found in rule(module)]


def imported_tops(module: Module) -> set[str]:
    """Return the top packages that are imported when the code runs: not those for types alone."""
    blocks = [
        n
        for n in ast.walk(module.tree)
        if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)
    ]
    only_types = {id(node) for block in blocks for node in block.body}
    nodes = (node for node in ast.walk(module.tree) if id(node) not in only_types)
    names = [name for node in nodes for name in imported_names(node)]
    return {name.partition(".")[0] for name in names}


def check_none(found: Iterable[str]) -> None:
    """Fail with every offender on a line of its own."""
    lines = list(found)
    assert not lines, "\n".join(["", *lines])


def wrong_words(module: Module) -> Iterator[str]:
    """Yield every print, global and broad except with its line."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            yield f"{node.lineno}: print"
        if isinstance(node, ast.Global):
            yield f"{node.lineno}: global"
        if isinstance(node, ast.ExceptHandler):
            caught = getattr(node.type, "elts", [node.type])
            names = {getattr(kind, "id", "everything") for kind in caught}
            if None in caught or names & {"Exception", "BaseException"}:
                yield f"{node.lineno}: broad except"


def undocumented(module: Module) -> Iterator[str]:
    """Yield the module and its public functions and classes that have no docstring."""
    if module.tree.body and ast.get_docstring(module.tree) is None:
        yield "the module"
    yield from _undocumented_in(module.tree)


def _undocumented_in(node: ast.AST, prefix: str = "") -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.ClassDef) or child.name.startswith("_"):
            continue
        if ast.get_docstring(child) is None:
            yield prefix + child.name
        if isinstance(child, ast.ClassDef):
            yield from _undocumented_in(child, f"{prefix}{child.name}.")


def oversized(module: Module) -> Iterator[str]:
    """Yield a file or functions with too many lines; of a Triton kernel its body counts.

    Triton takes no arguments in classes, and its constants must be arguments.
    """
    num_lines = len(module.text.splitlines())
    if num_lines > MAX_FILE_LINES:
        yield f"{num_lines} lines"
    for node in ast.walk(module.tree):
        if isinstance(node, Function):
            size = node.end_lineno - _first_line(node) + 1
            if size > MAX_FUNCTION_LINES:
                yield f"{node.name}: {size}"


def _first_line(node: Function) -> int:
    is_kernel = any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)
    return node.body[0].lineno if is_kernel else node.lineno


def relative_imports(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{node.lineno}: relative import"


def wrong_arrows(arrows: dict[str, set[str]]) -> list[str]:
    """Return the imports between rooms that go against the order."""
    return [
        f"{room} imports {other}"
        for room, others in sorted(arrows.items())
        for other in sorted(others)
        if LEVEL.get(other, len(ORDER)) >= LEVEL.get(room, -1)
    ]


def test_every_room_has_its_place_in_the_order():
    assert {module.room for module in MODULES} == set(LEVEL)


def test_imports_run_one_way():
    arrows = find_arrows(MODULES)
    check_none(offenders(MODULES, relative_imports))
    check_none(wrong_arrows(arrows))
    check_none(find_circles(arrows))


def test_a_file_name_occurs_once():
    names = Counter(module.name.rpartition(".")[2] for module in MODULES)
    check_none(name for name, times in names.items() if times > 1 and name != "__init__")


def test_files_and_functions_stay_small():
    check_none(offenders(MODULES, oversized))


def test_no_print_global_or_broad_except():
    check_none(offenders([*MODULES, *SCRIPTS], wrong_words))


def test_docstrings():
    check_none(offenders(MODULES, undocumented))


def test_the_layer_knows_no_frameworks():
    check_none(offenders(in_rooms(LAYER), lambda m: imported_tops(m) & FRAMEWORKS))


def test_the_door_needs_no_torch():
    """Nor what it imports when it is imported, so that a bad option is answered at once."""
    check_none(offenders(in_rooms(DOOR), lambda m: imported_tops(m) & HEAVY))


def test_scripts_are_tables_of_contents():
    sizes = {module.name: len(module.text.splitlines()) for module in SCRIPTS}
    assert sizes and {name: n for name, n in sizes.items() if n >= MAX_SCRIPT_LINES} == {}


def test_no_file_names_a_folder_of_one_machine():
    answer = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if answer.returncode:
        pytest.skip("this is no git checkout")
    paths = [ROOT / name for name in answer.stdout.split("\0") if name]
    texts = {path: path.read_bytes().decode(errors="replace") for path in paths if path.is_file()}
    check_none(
        f"{path.relative_to(ROOT)}: {found}"
        for path, text in texts.items()
        for found in MACHINE_PATH.findall(text)
    )


def module(code: str, name: str = "mesh.a") -> Module:
    return Module(name, name.rpartition(".")[0] or name, code, ast.parse(code))


def test_the_order_is_seen():
    training, mesh = module("", "training.x"), module("", "mesh.y")
    for code in (
        "from megablocks_utils.training import x",
        "import megablocks_utils.training.x",
        "from megablocks_utils.training.x import y",
        "def f():\n from megablocks_utils import training",
    ):
        arrows = find_arrows([training, module(code)])
        assert wrong_arrows(arrows) == ["mesh imports training"], code
    assert wrong_arrows(find_arrows([mesh, module("import megablocks_utils.mesh.y")])) == []
    rooms = [module("import megablocks_utils.mesh.a", "training.x"), module("", "mesh.a")]
    assert wrong_arrows(find_arrows(rooms)) == []
    neighbour = module("from megablocks_utils.lora import x", "fsdp.a")
    assert wrong_arrows(find_arrows([neighbour, module("", "lora.x")])) == ["fsdp imports lora"]
    inner = module("from megablocks_utils.training import x", "training.step.a")
    arrows = find_arrows(
        [module("from megablocks_utils.training.step import a", "training.x"), inner]
    )
    assert wrong_arrows(arrows) == ["training.step imports training"]
    assert sorted(find_circles(arrows)) == ["training", "training.step"]


def test_the_other_rules_are_seen():
    code = "def f():\n global a\n try:\n  print(1)\n except (OSError, Exception):\n  pass"
    assert sorted(wrong_words(module(code))) == ["2: global", "4: print", "5: broad except"]
    assert [*wrong_words(module("try:\n a\nexcept:\n b"))] == ["3: broad except"]
    assert [*wrong_words(module("try:\n a\nexcept ValueError:\n b"))] == []
    code = "class A:\n 'd'\n def f(self): ...\n def _g(self): ...\ndef h(): ...\nclass _B: ..."
    assert [*undocumented(module(code))] == ["the module", "A.f", "h"]
    assert [*oversized(module("def f():\n" + " a\n" * 60))] == ["f: 61"]
    assert [*oversized(module("def f():\n" + " a\n" * 59))] == []
    assert [*oversized(module("a\n" * 301))] == ["301 lines"]
    kernel = "@triton.jit\ndef f(" + "a,\n" * 50 + "):\n"
    assert [*oversized(module(kernel + " a\n" * 60))] == []
    assert [*oversized(module(kernel + " a\n" * 61))] == ["f: 61"]
    code = "import torch.nn\nif TYPE_CHECKING:\n import numpy\ndef f():\n from peft import x"
    assert imported_tops(module(code)) == {"torch", "peft"}
    below_root, inside = "cd /{}/x", "network/{}/x"
    assert MACHINE_PATH.search(below_root.format("home"))
    assert not MACHINE_PATH.search(inside.format("home"))
