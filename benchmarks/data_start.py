"""How long data takes until its first batch, and what it holds in memory: first and later starts.

    PYTHONPATH=. python -m benchmarks.data_start

Alpaca records of random words, 10 million tokens. Each start is a process of its own, as one rank
of a run; later starts find the tokens in the cache. Prints Markdown. With --tokens fewer of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from benchmarks.harness.report import markdown_table, say

STARTS = {"first": (), "second": (), "second, rows of 4096": ("4096",)}
TOKENS_PER_WORD = 6  # of the tokenizer of the tests


def write_data(path: Path, num_tokens: int) -> None:
    """Write records of 20 to 400 words until there are about so many tokens."""
    generator, left = Random(0), num_tokens
    words = ["".join(generator.choices("abcdefghij", k=5)) for _ in range(1000)]
    with path.open("w") as file:
        while left > 0:
            answer = generator.choices(words, k=generator.randrange(20, 400))
            file.write(json.dumps({"instruction": "Say it.", "output": " ".join(answer)}) + "\n")
            left -= TOKENS_PER_WORD * len(answer)


def start(path: str, packing_length: str | None = None) -> None:
    """Load the data as a rank does, build its first step, and print what that took."""
    from megablocks_utils.config import DataConfig, OptimConfig, RunConfig
    from megablocks_utils.training.data.examples import load_examples
    from megablocks_utils.training.data.schedule import Schedule
    from tests.support.tiny_tokenizer import tiny_tokenizer

    data = DataConfig(
        (path,), packing_length=None if packing_length is None else int(packing_length)
    )
    tokenizer, before, started_s = tiny_tokenizer(), _memory(), time.perf_counter()
    examples = load_examples(data, tokenizer)
    schedule = Schedule(RunConfig(data=data, optim=OptimConfig(max_steps=10**6)), examples, 0, 1)
    next(schedule.plans())
    taken_s, after = time.perf_counter() - started_s, _memory()
    grown = {name: after[name] - before[name] for name in before}
    found = {"s": taken_s, "tokens": int(examples.lengths.sum()), **grown}
    sys.stdout.write(json.dumps(found) + "\n")


def _memory() -> dict[str, int]:
    """Return this process's resident bytes: its own, and those of files, which ranks share."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {name: int(found[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


def main() -> None:
    """Measure the starts one after the other, and print them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=10_000_000)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data.jsonl")
        write_data(path, options.tokens)
        for name, words in STARTS.items():
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.data_start", "--start", str(path), *words],
                env={**os.environ, "HF_DATASETS_CACHE": folder},
                capture_output=True,
                text=True,
                check=True,
            )
            found = json.loads(done.stdout)
            per_token = [found[name] / found["tokens"] for name in ("RssAnon", "RssFile")]
            rows.append([name, f"{found['tokens']:,}", f"{found['s']:.2f} s"])
            rows[-1] += [f"{cost:.2f}" for cost in per_token]
    header = [
        "start",
        "tokens",
        "until the first batch",
        "own bytes a token",
        "shared bytes a token",
    ]
    say(markdown_table(header, rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--start"]:
        start(*sys.argv[2:])
    else:
        main()
