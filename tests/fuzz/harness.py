"""Run cases and judge what came of them."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz.cases import Case, Verdict
from tests.fuzz.ground import BASES, INPUTS, build_inputs, command_words, input_path
from tests.fuzz.sandbox import Outcome, run_command

__all__ = ["Fuzzer", "Result", "judge"]

TOLERANCE = 1e-6
DOES_NOT_FIT = 3
SECONDS = 60.0
NOT_A_SENTENCE = re.compile(
    r"Warning|^\[\w+\]|^  |^W\d{4} |^\[W|^\w+: \d+/\d+ |^warning: |^micro-batches are |^Training$"
)
"""Lines of libraries, of progress and of the summary, which may stand beside the sentence."""


@dataclass(frozen=True)
class Result:
    """Hold the verdict on a case, and what it said last."""

    case: Case
    verdict: Verdict
    code: int
    seconds: float
    said: str

    def as_line(self) -> str:
        """Return it as a line of JSON."""
        facts = {
            "group": self.case.group,
            "name": self.case.name,
            "base": self.case.base,
            "verdict": self.verdict,
            "exit_code": self.code,
            "seconds": round(self.seconds, 2),
            "said": self.said,
        }
        return json.dumps(facts)


class Fuzzer:
    """Run cases in a scratch folder, on inputs that are made there first.

    Args:
        scratch: the folder.
        timeout_s: seconds after which a case hangs.
    """

    def __init__(self, scratch: Path, timeout_s: float = SECONDS) -> None:
        self._ground = scratch / "ground"
        self._work = scratch / "work"
        self._timeout_s = timeout_s
        self._wanted: dict[str, Any] = {}
        self._number = 0
        self._work.mkdir()
        build_inputs(self._ground, self._must_run)

    def run(self, cases: Sequence[Case]) -> Iterator[Result]:
        """Yield the result of each case."""
        for case in cases:
            yield self._judge(case, *self._run_case(case))

    def _must_run(self, command: str, words: Sequence[str]) -> None:
        folder = self._next_folder()
        if command == "_make":
            folder = self._ground
        outcome = run_command(command, words, folder, timeout_s=10 * self._timeout_s)
        if outcome.code != 0:
            raise RuntimeError(f"{command} {' '.join(words)}:\n{outcome.stderr}")

    def _next_folder(self) -> Path:
        self._number += 1
        return self._work / f"case-{self._number:05}"

    def _run_case(self, case: Case) -> tuple[Outcome, Path]:
        folder = self._next_folder()
        originals = {name: input_path(self._ground, name) for name in case.mutations}
        places = {name: folder / "inputs" / path.name for name, path in originals.items()}
        words = self._words(case, folder, places)
        set_up = partial(self._copy_inputs, case, places)
        outcome = run_command(
            BASES[case.base].command,
            words,
            folder,
            timeout_s=self._timeout_s,
            set_up=set_up,
            environ=case.environ,
        )
        return outcome, folder

    def _words(self, case: Case, folder: Path, places: dict[str, Path]) -> list[str]:
        paths = {name: str(places.get(name, input_path(self._ground, name))) for name in INPUTS}
        given = [word.replace("{inputs}", str(folder / "inputs")) for word in case.words]
        return command_words(BASES[case.base], given, {**paths, "out": str(folder / "out")})

    def _copy_inputs(self, case: Case, places: dict[str, Path]) -> None:
        for name, place in places.items():
            original = input_path(self._ground, name)
            place.parent.mkdir(exist_ok=True)
            if original.is_dir():
                shutil.copytree(original, place)
            else:
                shutil.copy(original, place)
            case.mutations[name](place)

    def _judge(self, case: Case, outcome: Outcome, folder: Path) -> Result:
        verdict = judge(case, outcome, folder / "out", partial(self._wanted_result, case.base))
        lines = [line for line in outcome.stderr.splitlines() if line.strip()]
        said = lines[-1] if lines else ""
        shutil.rmtree(folder, ignore_errors=True)
        return Result(case, verdict, outcome.code, outcome.seconds, said)

    def _wanted_result(self, base: str) -> Any:
        if base not in self._wanted:
            case = Case("base", base, base)
            outcome, folder = self._run_case(case)
            if outcome.code != 0:
                raise RuntimeError(f"the unmutated {base} fails:\n{outcome.stderr}")
            self._wanted[base] = BASES[base].read_result(folder / "out", outcome.stdout)
        return self._wanted[base]


def judge(case: Case, outcome: Outcome, out: Path, wanted: Callable[[], Any]) -> Verdict:
    """Say what came of a case.

    Args:
        case: what was run.
        outcome: how its process ended.
        out: its output folder or file.
        wanted: returns the result of the unmutated input.
    """
    if outcome.is_hang:
        return "hang"
    if "Traceback (most recent call last)" in outcome.stderr:
        return "traceback"
    if outcome.code in case.codes:
        return _judge_refusal(outcome, out)
    if outcome.code != 0:
        return "other"
    if case.expected == "refused":
        return "taken"
    if case.expected == "same":
        found = BASES[case.base].read_result(out, outcome.stdout)
        if not _is_same(found, wanted()):
            return "changed"
    return "accepted"


def _judge_refusal(outcome: Outcome, out: Path) -> Verdict:
    if outcome.code == DOES_NOT_FIT and outcome.stdout.strip():
        return "refused"  # a plan is a table
    lines = [line for line in outcome.stderr.splitlines() if line.strip()]
    sentences = [line for line in lines if not NOT_A_SENTENCE.search(line)]
    if len(sentences) != 1:
        return "silent"
    if out.is_dir() and any(out.iterdir()):
        return "wrote"
    return "refused"


def _is_same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and isinstance(found, float):
        return math.isclose(found, wanted, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    if isinstance(wanted, dict) and isinstance(found, dict):
        same_keys = found.keys() == wanted.keys()
        return same_keys and all(_is_same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple) and isinstance(found, list | tuple):
        return len(found) == len(wanted) and all(map(_is_same, found, wanted))
    return bool(found == wanted)
