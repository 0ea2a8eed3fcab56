"""Files are complete or not there at all."""

import errno
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megablocks_utils import files
from megablocks_utils.files import (
    finite_or_none,
    publish_file,
    remove_path,
    write_json_atomically,
    write_pointer,
)


def test_a_failing_block_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="^torn$"), publish_file(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("torn")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_the_name_changes_only_when_the_block_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with publish_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_unwritable_payload_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        write_json_atomically(tmp_path / "a.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_json_is_strict_where_numbers_are_not_finite(tmp_path):
    payload = {"a": math.nan, "b": [1.5, math.inf], "c": {"d": (-math.inf, 2)}, "e": "x"}
    expected = {"a": None, "b": [1.5, None], "c": {"d": [None, 2]}, "e": "x"}
    assert finite_or_none(payload) == expected
    write_json_atomically(tmp_path / "a.json", payload)
    assert json.loads((tmp_path / "a.json").read_text()) == expected


def refuse(number: int, kinds=lambda *paths: True):
    """Return a stand-in of a system call that fails where `kinds` says so."""

    def replacement(call):
        def run(*args, **kwargs):
            if kinds(*args):
                raise OSError(number, os.strerror(number))
            return call(*args, **kwargs)

        return run

    return replacement


@pytest.fixture
def mount(monkeypatch):
    """Take abilities away from the file system, as FUSE, CIFS and object mounts lack them."""
    monkeypatch.setattr(files, "_told", set())

    def lack(name: str, number: int, kinds=lambda *paths: True) -> None:
        monkeypatch.setattr(os, name, refuse(number, kinds)(getattr(os, name)))

    return lack


def is_taken(_source, target, **_) -> bool:
    return os.path.lexists(target)


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EPERM])
def test_where_nothing_is_moved_onto_what_exists(tmp_path, mount, capsys, number):
    path = tmp_path / "a.json"
    mount("replace", number, is_taken)
    mount("rename", number, is_taken)
    for content in range(3):
        write_json_atomically(path, content)
        assert json.loads(path.read_text()) == content
    assert os.listdir(tmp_path) == ["a.json"]
    assert capsys.readouterr().err == (
        f"{tmp_path}: this file system moves nothing onto what exists; files are written in "
        "another way there, and nothing is lost.\n"
    )


def test_the_old_file_is_back_where_the_new_one_cannot_take_its_place(tmp_path, mount):
    path = tmp_path / "a.txt"
    path.write_text("old")
    mount("replace", errno.EEXIST, is_taken)
    mount("rename", errno.EIO, lambda source, target: str(source).endswith(".tmp"))
    with pytest.raises(OSError, match="Input/output error"), publish_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_pointer_without_links_is_a_small_file(tmp_path, mount, capsys, number):
    write_pointer(tmp_path / "latest", "one")
    assert (tmp_path / "latest").readlink() == Path("one")
    mount("symlink", number)
    write_pointer(tmp_path / "latest", "two")
    write_pointer(tmp_path / "latest", "three")
    assert not (tmp_path / "latest").is_symlink()
    assert (tmp_path / "latest").read_text() == "three\n"
    assert os.listdir(tmp_path) == ["latest"]
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_a_folder_that_cannot_be_synced_is_no_error_but_a_bad_disk_is(
    tmp_path, mount, capsys, number
):
    mount("open", number, lambda path, *_: Path(path).is_dir())
    write_json_atomically(tmp_path / "a.json", 1)
    write_json_atomically(tmp_path / "a.json", 2)
    assert capsys.readouterr().err.count("\n") == 1
    mount("fsync", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        write_json_atomically(tmp_path / "a.json", 3)
    assert json.loads((tmp_path / "a.json").read_text()) == 2


def test_a_link_is_replaced_and_a_folder_never_is(tmp_path):
    (tmp_path / "target.txt").write_text("mine")
    (tmp_path / "link.json").symlink_to("target.txt")
    write_json_atomically(tmp_path / "link.json", 1)
    assert not (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "target.txt").read_text() == "mine"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    with pytest.raises(IsADirectoryError):
        write_json_atomically(tmp_path / "folder", 1)
    assert (tmp_path / "folder" / "kept").exists()


def test_removing_never_goes_through_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "kept").touch()
    (tmp_path / "here").mkdir()
    for link in (tmp_path / "link", tmp_path / "here" / "link"):
        link.symlink_to(tmp_path / "there")
    for path in (tmp_path / "link", tmp_path / "here", tmp_path / "none"):
        remove_path(path)
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "kept"]


def test_what_is_no_regular_file_is_written_not_replaced(tmp_path):
    # By links of our own: code that is broken must not replace a device of this machine.
    for name in ("null", "full"):
        (tmp_path / name).symlink_to(f"/dev/{name}")
    write_json_atomically(tmp_path / "null", 1)
    with pytest.raises(OSError, match="No space left on device"):
        write_json_atomically(tmp_path / "full", 1)
    assert (tmp_path / "null").is_symlink() and (tmp_path / "full").is_symlink()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "to the pipe").symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json_atomically(tmp_path / "to the pipe", [1])
    assert json.loads(os.read(reader, 1000)) == [1]
    os.close(reader)
    assert stat.S_ISFIFO(os.lstat(pipe).st_mode) and len(os.listdir(tmp_path)) == 4


def test_a_pipe_that_nobody_reads_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_READER_S", 0.1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device or address"):
        write_json_atomically(tmp_path / "pipe", 1)


@pytest.mark.parametrize("redirected", [True, False], ids=["to a file", "to a pipe"])
def test_json_on_standard_output(tmp_path, redirected):
    program = (
        "from megablocks_utils.files import write_json_atomically as write\n"
        "import sys\nprint('before')\nwrite(sys.argv[1], 1)\nprint('after')\n"
    )
    out, name = tmp_path / "out", tmp_path / "stdout"
    name.symlink_to("/proc/self/fd/1")  # as /dev/stdout is
    with out.open("w") as file:
        answer = subprocess.run(
            [sys.executable, "-c", program, str(name)],
            stdout=file if redirected else subprocess.PIPE,
        )
    written = out.read_bytes() if redirected else answer.stdout
    assert written == b"before\n1\nafter\n"
    assert name.is_symlink()
