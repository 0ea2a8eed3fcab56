"""Write the full Alpaca data set (52,002 records) as one JSON file for ``--data_path``.

Alpaca (``tatsu-lab/alpaca``) may be used for non-commercial purposes only (CC BY-NC 4.0), so it is
never shipped here: it comes from the Hub, or with ``--from_file`` from a copy that is already
there.
"""

import argparse
import json
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from preparing import PreparationError, exit_code_of, say, write_json

NAME = "tatsu-lab/alpaca"
COLUMNS = ("instruction", "input", "output")
LICENCE_NOTE = "Alpaca's licence is CC BY-NC 4.0: non-commercial use only."


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=LICENCE_NOTE)
    parser.add_argument("--output", type=Path, default=Path("data.json"))
    parser.add_argument(
        "--from_file", type=Path, help="a local alpaca_data.json, instead of the Hub"
    )
    return parser


def read_hub() -> Iterable[dict[str, Any]]:
    """Return Alpaca's rows from the Hub.

    Raises:
        PreparationError: the Hub cannot be reached or does not give it.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants

    try:
        # A host without address is found here at once; datasets would retry for half a minute.
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
        return load_dataset(NAME, split="train")
    except (DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise PreparationError(
            f"{NAME} could not be loaded from the Hub ({reason}); where there is no network, give "
            "a local copy: --from_file alpaca_data.json"
        ) from error


def read_file(path: Path) -> Iterable[dict[str, Any]]:
    """Return the rows of a local copy.

    Raises:
        PreparationError: it is missing or not a JSON list of objects.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PreparationError(f"--from_file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PreparationError(f"--from_file {path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise PreparationError(f"--from_file {path} is not a list of records")
    return rows


def select_columns(rows: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    """Keep Alpaca's three columns of every row.

    Raises:
        PreparationError: a row lacks one, with its number, or there is none.
    """
    records = []
    for number, row in enumerate(rows, start=1):
        missing = [name for name in COLUMNS if name not in row]
        if missing:
            raise PreparationError(
                f"record {number} has no column {missing[0]}, this is not Alpaca"
            )
        records.append({name: row[name] for name in COLUMNS})
    if not records:
        raise PreparationError("the source holds no records")
    return records


def prepare(options: argparse.Namespace) -> None:
    """Read Alpaca and write it."""
    rows = read_hub() if options.from_file is None else read_file(options.from_file)
    records = select_columns(rows)
    write_json(options.output, records)
    say(f"{options.output}: {len(records)} records. {LICENCE_NOTE}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    options = build_parser().parse_args(argv)
    return exit_code_of(lambda: prepare(options))


if __name__ == "__main__":
    sys.exit(main())
