"""One output folder has one live run, and all hosts of it see the same folder."""

import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megablocks_utils.config import parse_args
from megablocks_utils.errors import CheckpointError, ConfigurationError, UserError
from megablocks_utils.processes import claim_file, output_claim
from megablocks_utils.processes.claim_file import CLAIM_NAME, Claim, build_claim, read_claim
from megablocks_utils.processes.output_claim import OutputClaim, claim_output_dir
from megablocks_utils.processes.output_folder import check_output_dir
from tests.processes.test_output_folder import (
    AGENT,
    OVERWRITE,
    RESTART,
    RESUME,
    run_config,
    save,
    snapshot,
)

HOLD = """
import sys, time
from pathlib import Path
from megablocks_utils.processes.claim_file import build_claim, write_claim
write_claim(Path(sys.argv[1]), build_claim({}))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other_run(tmp_path):
    """Another process that has the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("words", [(), RESUME, OVERWRITE])
def test_a_folder_that_a_live_run_has_is_refused_and_taken_once_it_is_dead(
    tmp_path, other_run, words
):
    save(tmp_path, "checkpoint-2")
    before = snapshot(tmp_path)
    config = run_config(tmp_path, *words)
    sentence = (
        f"--output_dir is {tmp_path}, but another run, process {other_run.pid} on "
        f"{os.uname().nodename}, is writing there; wait for its end, stop it, or choose another "
        "folder."
    )
    other_run.send_signal(signal.SIGSTOP)  # alive, if not well
    for refuse in (check_output_dir, claim_output_dir):
        with pytest.raises(ConfigurationError) as caught:
            refuse(config)
        assert str(caught.value) == sentence
    assert snapshot(tmp_path) == before
    other_run.kill()
    other_run.wait()
    if words:
        claim = claim_output_dir(config)
        assert read_claim(tmp_path).pid == os.getpid()
        claim.release(is_done=True)
        assert not (tmp_path / CLAIM_NAME).exists()


def elsewhere(folder: Path, **changes: object) -> Claim:
    """Write the claim of a run on another host."""
    claim = replace(build_claim({}), host="node7", machine="another", pid=11, **changes)
    assert claim_file.write_claim(folder, claim)
    return claim


def test_a_run_on_another_host_is_alive_while_it_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(claim_file, "_SILENT_S", 1.5)
    claim = elsewhere(tmp_path)
    monkeypatch.setattr(
        time, "sleep", lambda _: claim_file.update_claim(tmp_path, replace(claim, beat=1))
    )
    with pytest.raises(ConfigurationError, match="another run, process 11 on node7, is writing"):
        OutputClaim(tmp_path)
    assert read_claim(tmp_path).key == claim.key
    monkeypatch.undo()
    # No clock of this machine: the file's time against that of another file beside it.
    os.utime(tmp_path / CLAIM_NAME, (1, 1))
    started_s = time.monotonic()
    OutputClaim(tmp_path).release(is_done=True)
    assert time.monotonic() - started_s < 1


def test_a_run_elsewhere_that_falls_silent_is_waited_out(tmp_path, monkeypatch):
    monkeypatch.setattr(claim_file, "_SILENT_S", 1.0)
    elsewhere(tmp_path)
    started_s = time.monotonic()
    held = OutputClaim(tmp_path)
    assert 0.5 < time.monotonic() - started_s < 5
    held.release(is_done=True)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"run_id": "none", "agent": "/tmp/a", "host": "h"}', b"\xff"]
)
def test_what_is_no_claim_is_taken(tmp_path, monkeypatch, content):
    monkeypatch.setattr(claim_file, "_UNFINISHED_S", 0.1)
    (tmp_path / CLAIM_NAME).write_bytes(content)
    OutputClaim(tmp_path).release(is_done=True)
    assert list(tmp_path.iterdir()) == []


def test_a_claim_that_is_a_link_is_not_written_through(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "target").write_text("mine")
    (tmp_path / "out" / CLAIM_NAME).symlink_to(tmp_path / "target")
    OutputClaim(tmp_path / "out").release(is_done=False)
    assert (tmp_path / "target").read_text() == "mine"
    assert not (tmp_path / "out" / CLAIM_NAME).is_symlink()


def test_a_live_claim_of_the_same_torchrun_is_its_own(tmp_path, other_run):
    claim = read_claim(tmp_path)
    mine = build_claim(AGENT)
    assert claim_file.update_claim(tmp_path, replace(claim, run_id=mine.run_id, agent=mine.agent))
    check_output_dir(run_config(tmp_path), RESTART)
    OutputClaim(tmp_path, RESTART).release(is_done=True)


def _race(folder: str, barrier, answers) -> None:
    barrier.wait()
    try:
        claim = OutputClaim(Path(folder))
    except ConfigurationError as error:
        answers.put(str(error))
    else:
        answers.put("")
        barrier.wait()
        claim.release(is_done=True)
        return
    barrier.wait()


@pytest.mark.parametrize("dead", [False, True], ids=["no claim", "a dead claim"])
def test_of_runs_that_start_together_one_has_the_folder(tmp_path, dead):
    context = multiprocessing.get_context("fork")
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        if dead:
            claim_file.write_claim(folder, replace(build_claim({}), pid=2**22 + 1))
        barrier, answers = context.Barrier(4), context.Queue()
        runs = [
            context.Process(target=_race, args=(str(folder), barrier, answers)) for _ in range(4)
        ]
        for run in runs:
            run.start()
        said = [answers.get(timeout=30) for _ in runs]
        for run in runs:
            run.join()
        assert said.count("") == 1, said
        assert all("another run, process " in text for text in said if text)
        assert list(folder.iterdir()) == []


def test_a_run_notices_that_its_folder_was_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(output_claim, "_BEAT_S", 0.05)
    held = OutputClaim(tmp_path)
    first = read_claim(tmp_path)
    _wait_for(lambda: read_claim(tmp_path).beat > first.beat)
    (tmp_path / CLAIM_NAME).unlink()  # by hand: it comes back
    _wait_for(lambda: (tmp_path / CLAIM_NAME).exists())
    held.check()
    other = replace(first, key="other", pid=5, host="node7")
    (tmp_path / "other").write_bytes(other.as_bytes())
    (tmp_path / "other").replace(tmp_path / CLAIM_NAME)
    with pytest.raises(CheckpointError, match="taken over by another run, process 5 on node7"):
        _wait_for(held.check)
    held.release(is_done=True)
    assert read_claim(tmp_path).key == "other"


def _wait_for(condition) -> None:
    last_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < last_s
        time.sleep(0.02)


def _claim_on(rank, folder, own_folder, hosts):
    """Claim a folder; a rank of `own_folder` has another disk under that name."""
    os.chdir(own_folder if rank in hosts else folder)
    name = type("Name", (), {"nodename": f"node{rank}"})
    os.uname, uname = (lambda: name), os.uname
    output_claim._SHARED_S = 0.5
    try:
        claim = claim_output_dir(parse_args(["--output_dir", "a/out"], entry_point="fsdp2"))
    except UserError as error:
        return str(error)
    finally:
        os.uname = uname
        os.chdir("/")
    if claim:
        claim.release(is_done=True)
    return "claimed"


@pytest.mark.parametrize("hosts", [(), (1,)], ids=["shared", "own disk"])
def test_a_folder_that_a_host_does_not_share_is_refused(ranks2, tmp_path, monkeypatch, hosts):
    folders = [tmp_path / name for name in ("shared", "own")]
    for folder in folders:
        folder.mkdir()
    answers = ranks2.run(_claim_on, *folders, hosts)
    if not hosts:
        assert answers == ["claimed"] * 2
        assert snapshot(tmp_path / "shared").keys() > {str(tmp_path / "shared" / "a" / "out")}
        return
    assert (
        answers
        == [
            "--output_dir is a/out, but node1 does not see what rank 0 on node0 writes there; all "
            "hosts write their parts of a checkpoint into one folder, so it must be one that they "
            "share."
        ]
        * 2
    )
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


LINKED = ("metrics.jsonl", "loss.png", ".model-being-written", ".claim.json", "runs")


def test_links_in_the_folder_are_not_written_through(tmp_path, capsys):
    folder, target = tmp_path / "out", tmp_path / "target"
    folder.mkdir()
    target.write_text("mine")
    for name in LINKED:
        (folder / name).symlink_to(target)
    config = run_config(folder, "--report_to", "tensorboard")
    claim_output_dir(config, {}).release(is_done=True)
    assert list(folder.iterdir()) == []
    assert target.read_text() == "mine"
    assert capsys.readouterr().err.count("was a link and is written anew") == 4


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "checkpoint-latest", CLAIM_NAME])
def test_what_only_bears_the_name_of_our_file_is_refused(tmp_path, name):
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / name)
        with pytest.raises(ConfigurationError) as caught:
            claim_output_dir(run_config(tmp_path, *OVERWRITE), {})
        assert f"{name} in it is no regular file" in str(caught.value)
        mode = os.lstat(tmp_path / name).st_mode
        (os.rmdir if stat.S_ISDIR(mode) else os.unlink)(tmp_path / name)


def test_a_claim_is_as_long_for_every_count():
    claim = build_claim({})
    contents = [replace(claim, beat=beat, state=state).as_bytes()
                for beat, state in ((0, "live"), (10**11, "over"))]  # fmt: skip
    assert len(contents[0]) == len(contents[1])
    assert json.loads(contents[1])["beat"] == "100000000000"
