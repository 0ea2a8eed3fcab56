"""The commands behind one word: the same as each module, and a sentence for what is none."""

import runpy
import subprocess
import sys

import pytest

from megablocks_utils.__main__ import COMMANDS, main
from megablocks_utils.errors import ConfigurationError

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "
CALL = "from megablocks_utils.__main__ import run; run()"


def call(*words: str) -> subprocess.CompletedProcess:
    """Call the console script where importing torch is an error."""
    command = [sys.executable, "-c", WITHOUT_TORCH + CALL, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_help_lists_every_command_without_torch():
    answer = call("--help")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert all(f"  {name} " in answer.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "seen"),
    [([], "no command is given"), (["train", "--help"], "the command is train")],
    ids=["none", "unknown"],
)
def test_what_is_no_command_is_refused(words, seen):
    with pytest.raises(ConfigurationError) as refusal:
        main(words)
    wanted = f"{seen}, but it must be plan, merge, export, evaluate, report or tune."
    assert (str(refusal.value), refusal.value.exit_code) == (wanted, 2)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_answers_as_its_module_does(name, monkeypatch, capsys):
    """Help, and the refusal of an option that no command has."""
    for word in ("--help", "--no_such_option"):
        answers = []
        for module, words in (("__main__", [name, word]), (name, [word])):
            monkeypatch.setattr(sys, "argv", [module, *words])
            monkeypatch.delitem(sys.modules, f"megablocks_utils.{module}", raising=False)
            with pytest.raises(SystemExit) as end:
                runpy.run_module(f"megablocks_utils.{module}", run_name="__main__")
            answers.append((end.value.code, *capsys.readouterr()))
        assert answers[0] == answers[1]
        assert answers[0][0] == (0 if word == "--help" else 2)
        assert "Traceback" not in answers[0][2]
