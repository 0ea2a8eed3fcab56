"""Print the size of the house: rooms, lines, functions, imports, words of docs, tests.

    python -m tests.house_figures [CHECKOUT]

CHECKOUT is the root of another checkout of this project, to compare with; nothing is written there.
"""

import ast
import os
import statistics
import subprocess
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

__all__ = ["Function", "Module", "find_arrows", "find_circles", "floors"]
__all__ += ["imported_names", "read_modules"]

PACKAGE = "megablocks_utils"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """Hold one file of the package.

    Attributes:
        name: dotted, below the package.
        room: its folder, dotted; the name itself for a file at the top.
        text: its source.
        tree: its syntax tree.
    """

    name: str
    room: str
    text: str
    tree: ast.Module = field(repr=False)

    def imports(self) -> Iterator[str]:
        """Yield what it imports, dotted."""
        for node in ast.walk(self.tree):
            yield from imported_names(node)

    def function_lines(self) -> list[int]:
        """Return the length of each function, without its decorators."""
        nodes = (node for node in ast.walk(self.tree) if isinstance(node, Function))
        return [node.end_lineno - node.lineno + 1 for node in nodes]

    def comment_lines(self) -> int:
        """Return how many lines have a comment."""
        tokens = tokenize.generate_tokens(StringIO(self.text).readline)
        return sum(token.type == tokenize.COMMENT for token in tokens)


def imported_names(node: ast.AST) -> list[str]:
    """Return what a node imports, dotted: of a `from` import, each name behind its module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def read_modules(folder: Path) -> list[Module]:
    """Read every file below the folder of a package."""
    modules = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        room = ".".join(parts[:-1]) or parts[0]
        text = path.read_text(encoding="utf-8")
        modules.append(Module(".".join(parts), room, text, ast.parse(text)))
    return modules


def find_arrows(modules: Sequence[Module]) -> dict[str, set[str]]:
    """Return each room's imports of other rooms."""
    rooms = {module.name.removesuffix(".__init__"): module.room for module in modules}
    arrows: dict[str, set[str]] = {room: set() for room in rooms.values()}
    rooms |= {room: room for room in arrows}
    for module in modules:
        for name in module.imports():
            room = _find_room(name, rooms)
            if room not in (None, module.room):
                arrows[module.room].add(room)
    return arrows


def _find_room(name: str, rooms: Mapping[str, str]) -> str | None:
    """Return the room of an imported name, which may lie within a module."""
    package, *parts = name.split(".")
    if package != PACKAGE:
        return None
    starts = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((rooms[start] for start in starts if start in rooms), None)


def find_circles(arrows: Mapping[str, set[str]]) -> list[str]:
    """Return the rooms that import themselves through others."""
    return [room for room in arrows if room in _reachable(room, arrows)]


def _reachable(room: str, arrows: Mapping[str, set[str]]) -> set[str]:
    seen, pending = set(), list(arrows[room])
    while pending:
        other = pending.pop()
        if other not in seen:
            seen.add(other)
            pending += arrows[other]
    return seen


def floors(arrows: Mapping[str, set[str]]) -> dict[str, int]:
    """Return how many rooms stand below each other down to each one, itself included.

    Rooms of a circle stand on one floor.
    """
    heights: dict[str, int] = {}

    def height(room: str) -> int:
        if room not in heights:
            below = [o for o in _reachable(room, arrows) if room not in _reachable(o, arrows)]
            heights[room] = 1 + max((height(other) for other in below), default=0)
        return heights[room]

    for room in arrows:
        height(room)
    return heights


def describe_rooms(modules: Sequence[Module]) -> list[str]:
    """Return a table of files, lines and functions by room."""
    lines = [
        "| room | files | lines | comments | functions | median | p90 | max |",
        "|---" * 8 + "|",
    ]
    rooms = defaultdict(list)
    for module in modules:
        rooms[module.room].append(module)
    for room, members in [*sorted(rooms.items()), ("all", list(modules))]:
        sizes = sorted(size for module in members for size in module.function_lines()) or [0]
        num_lines = sum(len(module.text.splitlines()) for module in members)
        comments = sum(module.comment_lines() for module in members)
        p90 = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
        cells = [room, len(members), num_lines, comments, len(sizes)]
        cells += [f"{statistics.median(sizes):g}", p90, sizes[-1]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def describe_imports(modules: Sequence[Module]) -> list[str]:
    """Return how many rooms, floors and arrows there are, and what is on each floor."""
    arrows = find_arrows(modules)
    heights = floors(arrows)
    num_arrows = sum(map(len, arrows.values()))
    lines = [f"{len(arrows)} rooms, {max(heights.values())} floors, {num_arrows} arrows"]
    lines.append(f"rooms in circles: {', '.join(find_circles(arrows)) or 'none'}")
    for floor in range(1, max(heights.values()) + 1):
        rooms = sorted(room for room, height in heights.items() if height == floor)
        lines.append(f"{floor}: {', '.join(rooms)}")
    return lines


def describe_names(modules: Sequence[Module]) -> list[str]:
    """Return the names that more than one file has, and the classes that are defined twice."""
    files = Counter(module.name.rpartition(".")[2] for module in modules)
    classes = Counter(
        node.name
        for module in modules
        for node in module.tree.body
        if isinstance(node, ast.ClassDef)
    )
    return [
        f"{kind} more than once: {', '.join(sorted(repeated)) or 'none'}"
        for kind, names in (("file names", files), ("classes", classes))
        for repeated in [[n for n, times in names.items() if times > 1 and n != "__init__"]]
    ]


def describe_docs(root: Path) -> list[str]:
    """Return the words of README and docs."""
    paths = [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]
    words = {path: len(path.read_text(encoding="utf-8").split()) for path in paths}
    lines = [f"{path.relative_to(root)}: {number}" for path, number in words.items()]
    return [*lines, f"docs/: {sum(n for path, n in words.items() if path.parent != root)}"]


def describe_tests(root: Path) -> list[str]:
    """Return how many tests pytest collects, by folder, and what it cannot collect."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1"}
    answer = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    folders: Counter[str] = Counter()
    for line in answer.stdout.splitlines():
        path, _, number = line.rpartition(": ")
        if path.endswith(".py") and number.isdecimal():
            folders["/".join(path.split("/")[:2])] += int(number)
    lines = [f"{folder}: {number}" for folder, number in sorted(folders.items())]
    errors = [line for line in answer.stdout.splitlines() if line.startswith("ERROR ")]
    return [*lines, f"all: {folders.total()}", *errors]


def main(argv: Sequence[str]) -> None:
    """Print all of it for a checkout."""
    root = Path(argv[0] if argv else Path(__file__).parents[1])
    modules = read_modules(root / PACKAGE)
    parts = {
        "Rooms": describe_rooms(modules),
        "Imports": describe_imports(modules),
        "Names": describe_names(modules),
        "Words of docs": describe_docs(root),
        "Tests": describe_tests(root),
    }
    for title, lines in parts.items():
        sys.stdout.write("\n".join([f"## {title}", *lines, "", ""]))


if __name__ == "__main__":
    main(sys.argv[1:])
