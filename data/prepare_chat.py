"""Make questions and answers from the package ``chatterbot-corpus``, each pair once.

The package's English files hold 2,026 pairs, many of them repeated (one question 121 times). Here
every question is kept once, with its first answer, and one in ten is held out, chosen by the
question's hash. The package is read where it is installed; nothing of it is copied into the
repository.
"""

import argparse
import hashlib
import sys
from pathlib import Path

from preparing import CACHE, exit_code_of, find_package, say, write_json

INSTALL = "pip install --no-deps chatterbot-corpus==1.3.3"
HELD_OUT_SHARE = 10


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=CACHE,
        help="folder for chat_train.json and chat_held_out.json (default data/.cache)",
    )
    return parser


def collect(folder: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training and held-out records, every question once."""
    import yaml

    train: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    seen: set[str] = set()
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


def prepare(output: Path) -> None:
    """Write ``chat_train.json`` and ``chat_held_out.json``."""
    folder = find_package("chatterbot_corpus", INSTALL) / "data" / "english"
    train, held_out = collect(folder)
    for name, records in (("chat_train.json", train), ("chat_held_out.json", held_out)):
        write_json(output / name, records)
        say(f"{output / name}: {len(records)} records")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    options = build_parser().parse_args(argv)
    return exit_code_of(lambda: prepare(options.output))


if __name__ == "__main__":
    sys.exit(main())
