"""Runs that meet a fault: killed at three moments, on a full disk, with a damaged checkpoint."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megablocks_utils.checkpoint.manifest import check_files, read_manifest
from tests.faults.cases import Case, Ground, play
from tests.faults.kill import build_table, summarize

END_S = 60.0
SMALL_BYTES = 3_600_000  # room for one checkpoint of 2.3 MB, not for two


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    """A model, data, and what an undisturbed run makes of them."""
    return Ground(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def small_disk(ground) -> Iterator[Path]:
    """A folder that is full after one checkpoint."""
    folder = ground.folder / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or (answer := subprocess.run(mount, capture_output=True, text=True)).returncode
    ):
        reason = "there is no mount" if shutil.which("mount") is None else answer.stderr.strip()
        pytest.skip(f"no small tmpfs can be mounted here: {reason}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


CASES = [
    Case("fsdp2", False, "step", 5, 0.02, (0,)),  # rank 0 holds the store
    Case("fsdp2", False, "save", 6, 0.0, (2,)),
    Case("fsdp2", False, "rename", 4, 0.0, (0, 1, 2, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=[case.moment for case in CASES])
def test_a_killed_run_goes_on_bit_by_bit(ground, case):
    row = play(ground, case, f"killed-{case.moment}")
    assert row["differences"] == row["damaged"] == row["unreported"] == row["wrong_endings"] == []
    assert row["is_good"]
    assert len(row["losses"]) == (len(case.victims) == 1)
    # The checkpoint that was being written is complete or not there.
    assert row["resumed_from"] in (case.step - 2 + case.step % 2, case.step - case.step % 2)
    assert "1 of 1" in build_table([row])
    assert summarize([row])["equal"] == 1


@pytest.mark.parametrize("words", [[], ["--async_save", "True"]], ids=["sync", "async"])
def test_full_disk(ground, small_disk, words):
    """The save fails with one sentence on all ranks, and what was complete stays so."""
    folder = small_disk / "-".join(["out", *words])
    shutil.rmtree(folder, ignore_errors=True)
    with ground.start("fsdp2", f"small/{folder.name}", *words) as run:
        codes = run.wait(END_S)
        said = _sentences(run.output())
    assert codes == [2, 2, 2, 2], said
    assert said == [f"cannot write {folder}/checkpoint-4.incomplete: No space left on device"]
    names = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-latest"]
    files = read_manifest(folder / "checkpoint-2")["files"]
    check_files(folder / "checkpoint-2", files, files)
    if words:
        shutil.rmtree(folder)
        return
    # More room: the run goes on from what is complete.
    roomy = shutil.move(folder, ground.folder / "roomy")
    ground.run("fsdp2", roomy.name, "--resume_from_checkpoint", "True")
    whole = ground.reference("fsdp2")
    for path in (roomy, whole):
        assert (path / "model.safetensors").is_file()
    assert (roomy / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def _sentences(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("cannot ")]
