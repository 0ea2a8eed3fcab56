"""Secrets reach no record, no log and no message."""

import shlex
from dataclasses import asdict

import pytest

from megablocks_utils import plan
from megablocks_utils.config import parse_args
from megablocks_utils.config.entry_points import parse_known_args
from megablocks_utils.config.record import format_config
from megablocks_utils.config.secrets import (
    find_secrets,
    is_secret_name,
    redact_record,
    redact_text,
    redact_words,
)
from megablocks_utils.processes.entry_point import run_entry_point
from megablocks_utils.training.report.run_record import build_provenance
from tests.planning.cases import MIXTRAL

SECRET = "s3cr3t-" + "x" * 20


def test_names_of_secrets():
    words = "hub_token --hub-token HF_TOKEN WANDB_API_KEY AWS_SECRET_ACCESS_KEY password hubtoken"
    assert [name for name in words.split() if not is_secret_name(name)] == []
    words = "max_tokens tokenizer average_tokens_across_devices keyboard monkey author path keys"
    assert [name for name in words.split() if is_secret_name(name)] == []


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--hub_token", SECRET, "--seed", "1"], "--hub_token REDACTED --seed 1"),
        ([f"--hub_token={SECRET}", "x"], "--hub_token=REDACTED x"),
        (["--hub-token", SECRET, SECRET], "--hub-token REDACTED REDACTED"),
        ([f"WANDB_API_KEY={SECRET}"], "WANDB_API_KEY=REDACTED"),
        (["--data_path", f"https://me:{SECRET}@host/a.json"], "--data_path https://REDACTED@host/a.json"),
        (["--data_path", f"https://host/a?sig={SECRET}&b=1"], "--data_path 'https://host/a?sig=REDACTED&b=1'"),
        (["--x", "hf_" + "a1" * 17], "--x REDACTED"),
        (["--max_steps", "10", "--lora_r=4"], "--max_steps 10 --lora_r=4"),
    ],
)  # fmt: skip
def test_command_lines(words, shown):
    assert redact_words(words) == shlex.split(shown)
    assert build_provenance(["train.py", *words])["command"] == f"train.py {shown}"


def test_the_working_folder_is_no_secret():
    """Every shell has PWD, which records' paths begin with; other names with it are passwords."""
    environ = {"PWD": "/data/a-project", "DB_PWD": SECRET}
    assert find_secrets([], environ) == (SECRET,)


def test_records_and_texts():
    record = {
        "hub_token": SECRET,
        "a": [{"password": SECRET, "n": 1}],
        "b": ("x", SECRET),
    }
    assert redact_record(record, [SECRET]) == {
        "hub_token": "REDACTED", "a": [{"password": "REDACTED", "n": 1}],
        "b": ("x", "REDACTED"),
    }  # fmt: skip
    environ = {"HF_TOKEN": SECRET, "KEY": "short", "HOME": "/there"}
    secrets = find_secrets(["--password", SECRET + "2", "--api_key=" + SECRET + "3"], environ)
    assert set(secrets) == {SECRET, SECRET + "2", SECRET + "3"}
    assert secrets[-1] == SECRET  # the shortest last, which is part of the others
    assert redact_text(f"Bearer {SECRET} in short", secrets) == "Bearer REDACTED in short"
    untouched = asdict(parse_args(["--data_path", "user/set@main"], entry_point="fsdp2"))
    assert redact_record(untouched) == untouched


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", SECRET],
        [f"--hub_token={SECRET}"],
        ["--hub_tokem_key", SECRET],
        [f"hub_token={SECRET}"],
        ["--hub_token", SECRET, "--hub_token", f"{SECRET}2"],
        ["--config", "{folder}/twice.yaml"],
        ["--config", "{folder}/list.yaml"],
        ["--model_name_or_path", f"https://me:{SECRET}@host/model", "--ep_size", "x"],
        ["--data_path", f"https://me:{SECRET}@host/a.json", "--dtype", "x"],
        ["--dtype", SECRET],  # found by the variable
    ],
)
@pytest.mark.parametrize("entry_point", ["fsdp1", "fsdp2"])
def test_errors_do_not_show_them(tmp_path, monkeypatch, capsys, entry_point, words):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    (tmp_path / "twice.yaml").write_text("hub_token: abc-1\nhub-token: abc-2\n")
    (tmp_path / "list.yaml").write_text("hub_token: [abc-1, abc-2]\n")

    def main(argv: list[str]) -> None:
        _config, leftovers = parse_known_args(argv, entry_point=entry_point)
        if entry_point == "fsdp1":
            from megablocks_utils.training.trainer_arguments import parse_trainer_flags

            parse_trainer_flags(leftovers)
        else:
            parse_args(argv, entry_point=entry_point)

    argv = [word.format(folder=tmp_path) for word in words]
    is_good = words[0] == "--hub_token" and len(words) == 2 or words[0].startswith("--hub_token=")
    if is_good and entry_point == "fsdp1":
        return
    with pytest.raises(SystemExit) as caught:
        run_entry_point(main, argv)
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert said.count("\n") == 1
    assert SECRET not in said and "abc-" not in said


def test_plans_and_option_files_do_not_hold_them(tmp_path, capsys):
    config, leftovers = parse_known_args(
        ["--hub_token", SECRET, "--run_name", "x"], entry_point="fsdp1"
    )
    text = format_config(config, leftovers)
    assert SECRET not in text and "hub_token" not in text and "run_name: x" in text
    words = [str(MIXTRAL), "--gpus", "8", "--gpu", "h100-80g", "--entry_point", "fsdp1"]
    plan.main([*words, "--hub_token", SECRET, "--json", str(tmp_path / "plan.json")])
    assert SECRET not in capsys.readouterr().out + (tmp_path / "plan.json").read_text()
