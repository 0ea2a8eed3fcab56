"""Make questions and answers from the package ``chatterbot-corpus``, each pair once.

The package's English files hold 2,026 pairs, many of them repeated (one question 121 times). Here every
question is kept once, with its first answer, and one in ten is held out, chosen by the question's
hash. The package is read where it is installed; nothing of it is copied into the repository.
"""

import argparse
import hashlib
import importlib.util
import sys
from pathlib import Path

from prepare_docs import write_json

PACKAGE = "chatterbot-corpus"
INSTALL = f"pip install --no-deps {PACKAGE}==1.3.3"
HELD_OUT_SHARE = 10


class PreparationError(Exception):
    """Report in one sentence why the data cannot be built."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("data/.cache"),
        help="folder for chat_train.json and chat_held_out.json (default data/.cache)",
    )
    return parser


def find_corpus() -> Path:
    """Return the folder of the English files.

    Raises:
        PreparationError: the package is not installed.
    """
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise PreparationError(f"the package {PACKAGE} is not installed; run: {INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "data" / "english"


def collect(folder: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training and held-out records, every question once."""
    import yaml

    train, held_out, seen = [], [], set()
    for path in sorted(folder.glob("*.yml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for question, *answers in content["conversations"]:
            question = str(question).strip()
            if not answers or question.lower() in seen:
                continue
            seen.add(question.lower())
            record = {"instruction": question, "output": str(answers[0]).strip()}
            digest = hashlib.sha256(question.lower().encode()).digest()
            (train if digest[0] % HELD_OUT_SHARE else held_out).append(record)
    return train, held_out


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    from rich.console import Console

    options = build_parser().parse_args(argv)
    try:
        train, held_out = collect(find_corpus())
    except PreparationError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(str(error), markup=False)
        return 2
    for name, records in (("chat_train", train), ("chat_held_out", held_out)):
        write_json(options.output / f"{name}.json", records)
        Console(soft_wrap=True).print(f"{options.output / name}.json: {len(records)} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
