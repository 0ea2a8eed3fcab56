"""A short slice of the fuzzers, and that they see what they look for."""

import tempfile
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.fuzz.__main__ import choose_cases
from tests.fuzz.cases import FAILURES, Case
from tests.fuzz.groups import GROUPS
from tests.fuzz.harness import Fuzzer, judge
from tests.fuzz.sandbox import Outcome, close_scratch, open_scratch
from tests.support.rank_pool import start_forkserver

SEED, CASES_OF_A_GROUP = 20261130, 1
SENTENCE = "--max_steps is x, but it must be a whole number.\n"
TRACEBACK = "Traceback (most recent call last):\n  File\nKeyError: 'step'\n"


def test_a_slice_of_all_cases_ends_in_a_sentence_or_changes_nothing():
    """Run in a process forked from one that has imported everything, so that it may fork."""
    start_forkserver()
    context = get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_failures, args=(sender,))
    process.start()
    sender.close()
    failures = receiver.recv()
    process.join()
    assert not failures, "\n".join(failures)


def _send_failures(sender):
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        open_scratch(scratch)
        results = Fuzzer(scratch).run(choose_cases(GROUPS, SEED, CASES_OF_A_GROUP))
        sender.send([result.as_line() for result in results if result.verdict in FAILURES])
    finally:
        close_scratch(scratch)


def test_the_same_seed_gives_the_same_cases():
    cases = choose_cases(GROUPS, SEED)
    names = [(case.group, case.name, case.base) for case in cases]
    assert len(set(names)) == len(names) >= 2000
    assert names == [(case.group, case.name, case.base) for case in choose_cases(GROUPS, SEED)]
    assert names != [(case.group, case.name, case.base) for case in choose_cases(GROUPS, SEED + 1)]


@pytest.mark.parametrize(
    ("verdict", "code", "stderr", "changes"),
    [
        ("refused", 2, SENTENCE, {}),
        ("refused", 3, "UserWarning: x\n  warnings.warn(x)\n" + SENTENCE, {}),
        ("silent", 2, "", {}),
        ("silent", 2, SENTENCE * 2, {}),
        ("wrote", 2, SENTENCE, {"written": "config.json"}),
        ("traceback", 1, TRACEBACK, {}),
        ("traceback", 2, TRACEBACK, {}),
        ("other", 1, SENTENCE, {}),
        ("other", -11, "", {}),
        ("hang", -9, "", {"is_hang": True}),
        ("taken", 0, "", {"expected": "refused"}),
        ("accepted", 0, "", {"expected": "any", "loss": 2.0}),
        ("accepted", 0, "", {"loss": 1.0}),
        ("changed", 0, "", {"loss": 1.0001}),
        ("changed", 0, "", {"loss": float("nan")}),
    ],
)
def test_what_each_end_is_called(verdict, code, stderr, changes, tmp_path):
    if "written" in changes:
        (tmp_path / changes["written"]).touch()
    case = Case("group", "name", "evaluate", expected=changes.get("expected", "same"))
    stdout = f'{{"loss": {changes.get("loss", 1.0)}}}'.replace("nan", "NaN")
    outcome = Outcome(code, stdout, stderr, changes.get("is_hang", False), 1.0)
    assert judge(case, outcome, tmp_path, lambda: 1.0) == verdict
