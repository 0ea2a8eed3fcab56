"""Alpaca from a local copy, and one sentence where there is none."""

import json
import socket

import pytest

ROW = {"instruction": "a", "input": "", "output": "b", "text": "dropped"}


def test_a_local_copy_is_reduced_to_its_three_columns(script, tmp_path, capsys):
    (tmp_path / "in.json").write_text(json.dumps([ROW, {**ROW, "output": "Größe"}]))
    options = ["--from_file", str(tmp_path / "in.json"), "--output", str(tmp_path / "out.json")]
    assert script("prepare_alpaca").main(options) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "a", "input": "", "output": "Größe"},
    ]
    assert capsys.readouterr().out == (
        f"{tmp_path}/out.json: 2 records. "
        "Alpaca's licence is CC BY-NC 4.0: non-commercial use only.\n"
    )


WRONG = [
    ("", "--from_file {} is not JSON: Expecting value: line 1 column 1 (char 0)"),
    ("{}", "--from_file {} is not a list of records"),
    ("[1]", "--from_file {} is not a list of records"),
    ("[]", "the source holds no records"),
    (json.dumps([ROW, {"instruction": "a"}]), "record 2 has no column input, this is not Alpaca"),
]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_a_bad_copy_is_refused_and_nothing_written(script, tmp_path, capsys, content, message):
    path = tmp_path / "in.json"
    path.write_text(content)
    output = tmp_path / "out.json"
    options = ["--from_file", str(path), "--output", str(output)]
    assert script("prepare_alpaca").main(options) == 2
    assert capsys.readouterr().err == message.format(path) + "\n"
    assert not output.exists()


def test_a_missing_copy_is_named(script, tmp_path, capsys):
    assert script("prepare_alpaca").main(["--from_file", f"{tmp_path}/no.json"]) == 2
    assert capsys.readouterr().err == (
        f"--from_file {tmp_path}/no.json cannot be read: No such file or directory\n"
    )


def test_no_network_is_said_in_one_sentence(script, tmp_path, capsys, monkeypatch):
    def getaddrinfo(host, port):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert script("prepare_alpaca").main(["--output", f"{tmp_path}/out.json"]) == 2
    assert capsys.readouterr().err == (
        "tatsu-lab/alpaca could not be loaded from the Hub ([Errno -2] Name or service not known); "
        "where there is no network, give a local copy: --from_file alpaca_data.json\n"
    )
