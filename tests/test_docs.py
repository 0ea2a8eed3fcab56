"""The pages name what is there: files, links, headings, modules, options; and docs/ stays short."""

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megablocks_utils"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md")),
    *(ROOT / name for name in ("data/README.md", "tests/README.md")),
    *DOCS,
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
]
MAX_WORDS = 12_000
# Generated: as long as transformers' registry, and as the table of options.
UNCOUNTED = ("families.md", "options.md")
CODE = re.compile(r"`([^`\n]+)`|^(?: {4}|\t).+$|^```.*?^```", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MODULE = re.compile(r"python -m ([a-z_][\w.]*)")
FOLDERS = ("megablocks_utils", "benchmarks", "tests", "docs", "data", "examples", ".ci")
OF_A_RUN = ("data/.cache", "benchmarks/results/moe_layer_gpu.json", "docs/moe_layer.png")
# Options of other programs that the pages name.
FOREIGN_OPTIONS = frozenset(
    [
        "nproc_per_node",
        "rdzv_backend",
        "rdzv_endpoint",
        "local-ranks-filter",
        "role",
        "standalone",
        "max-restarts",
        "shutdown-timeout",
        "signals-to-handle",
        "num_processes",
        "config_file",
        "main_process_port",
        "accelerator_config",
        "dist",
        "no-deps",
        "enable-lora",
        "max-lora-rank",
        "lora-modules",
        "help",
    ]
)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def words_in_code(text: str) -> list[str]:
    """Return what stands in code: between backticks, fenced, or indented."""
    return [word for match in CODE.finditer(text) for word in re.split(r"[\s`|,;()]+", match[0])]


@cache
def file_names() -> frozenset[str]:
    tops = [ROOT / top for top in FOLDERS if (ROOT / top).is_dir()]
    found = [path for top in tops for path in top.rglob("*.py")]
    return frozenset(path.name for path in [*found, *ROOT.glob("*.py")])


def missing_paths(text: str) -> list[str]:
    """Return the repository paths in code that name nothing.

    A path begins with a folder of the repository, or with a room of the package that has a slash
    behind it; a bare `name.py` must be the name of some file.
    """
    missing = []
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    for word in words_in_code(text):
        word = re.sub(r"(::.*|[.:]+)$", "", word)
        top, slash, _ = word.partition("/")
        is_pattern = not re.fullmatch(r"[\w./-]+", word) or _has_placeholder(word, "/")
        if is_pattern or word.startswith(OF_A_RUN):
            continue
        if slash and top in FOLDERS:
            is_there = (ROOT / word).exists()
        elif slash and top in rooms:
            is_there = (PACKAGE / word).exists()
        elif not slash and re.fullmatch(r"\w+\.py", word):
            is_there = word in file_names()
        else:
            continue
        if not is_there:
            missing.append(word)
    return missing


def _has_placeholder(name: str, separator: str) -> bool:
    """Return whether a part stands for any name, as NAME in `python -m benchmarks.NAME`."""
    return any(part.isupper() for part in name.split(separator))


def headings(path: Path) -> set[str]:
    """Return the anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", read(path), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in found]
    return {re.sub(r"\s", "-", title) for title in plain}


def broken_links(path: Path) -> list[str]:
    broken = []
    for link in LINK.findall(read(path)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        is_there = target.exists() and (not anchor or anchor in headings(target))
        if not is_there:
            broken.append(link)
    return broken


def missing_modules(text: str) -> list[str]:
    names = {name for name in MODULE.findall(text) if name.partition(".")[0] in FOLDERS}
    return sorted(n for n in names if not _has_placeholder(n, ".") and not _is_module(n))


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@cache
def known_options() -> frozenset[str]:
    """Return every word that a Python file quotes or has as a field: options among them."""
    folders = (PACKAGE, ROOT / "benchmarks", ROOT / "data", ROOT / "tests")
    files = {path for folder in folders for path in folder.rglob("*.py")}
    text = "\n".join(read(path) for path in files if not path.name.startswith("test_"))
    quoted = re.findall(r"""["'](?:--)?([a-z_][\w-]+)["']""", text)
    fields = re.findall(r"^    ([a-z_]\w+): ", text, flags=re.MULTILINE)
    return frozenset(quoted) | frozenset(fields) | FOREIGN_OPTIONS


def unknown_options(text: str) -> list[str]:
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))
    return sorted(named - known_options())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_exists(path):
    text = read(path)
    assert missing_paths(text) == []
    assert broken_links(path) == []
    assert missing_modules(text) == []
    assert unknown_options(text) == []


def test_the_extending_page_names_files_for_each_kind_of_addition():
    """Two or three files each, in a table; that they exist is the test above."""
    sections = re.split(r"^## ", read(ROOT / "docs" / "extending.md"), flags=re.MULTILINE)[1:]
    titles = [section.partition("\n")[0].split()[-1] for section in sections]
    assert titles == ["family", "kernel", "format", "tracker", "axis"]
    for section in sections:
        rows = re.findall(r"^\| `([^|]+)` \|", section, flags=re.MULTILINE)
        assert 2 <= len(rows) <= 3, section


def test_troubleshooting_quotes_messages_of_the_package():
    """A long message that is quoted must share at least three words in a row with the source."""
    text = "\n".join(read(path) for path in PACKAGE.rglob("*.py"))
    text = re.sub(r"""["']\s*\n\s*f?["']""", "", text)
    source = " ".join(re.sub(r"\{[^{}]*\}", " ", text).split())
    page = read(ROOT / "docs" / "troubleshooting.md")
    cells = re.findall(r"^\| ([^|]+) \|", page, flags=re.MULTILINE)
    quotes = [quote.split() for cell in cells for quote in re.findall(r"`([^`]+)`", cell)]
    long_quotes = [words for words in quotes if len(words) >= 9]
    assert len(long_quotes) > 10
    for words in long_quotes:
        starts = range(len(words) - 2)
        assert any(" ".join(words[n : n + 3]) in source for n in starts), " ".join(words)


def test_docs_stay_short():
    counted = [path for path in DOCS if path.name not in UNCOUNTED]
    assert sum(len(read(path).split()) for path in counted) <= MAX_WORDS


def test_the_readme_has_the_commands_that_users_rely_on():
    readme = read(ROOT / "README.md")
    for command in (
        "make quickstart",
        "make test",
        "torchrun --nproc_per_node=8 train_accelerate_fsdp2.py",
        "accelerate launch --num_processes 8 --config_file accelerate.yaml train_fsdp1.py",
        "python -m megablocks_utils.plan",
        "python -m benchmarks.table",
    ):
        assert command in readme
    first_screen = "\n".join(readme.splitlines()[:20])
    assert "No GPU has run this version" in first_screen


def test_the_checks_see_what_they_forbid(tmp_path):
    text = (
        "`docs/none.md`, `mesh/none.py`, `none.py` and `megablocks_utils/mesh/`\n\n    tests/none"
    )
    assert missing_paths(text) == ["docs/none.md", "mesh/none.py", "none.py", "tests/none"]
    assert missing_paths("`config.json` `checkpoint-3/` `data/.cache` none.py") == []
    page = tmp_path / "page.md"
    page.write_text("# A b: `c`\n\n[x](#a-b-c) [y](#a) [z](page.md) [w](none.md) [v](https://a/b)")
    assert broken_links(page) == ["#a", "none.md"]
    assert missing_modules(
        "python -m benchmarks.none python -m benchmarks.none.x python -m pip"
    ) == [
        "benchmarks.none",
        "benchmarks.none.x",
    ]
    assert unknown_options("`--ep_size 3 --no_such_option`, A--b") == ["no_such_option"]
