"""Runs that meet a fault: killed at three moments, on a full disk, with a damaged checkpoint.

On two ranks; `tests.faults.kill` has four. `tests/processes/test_monitor.py` has several survivors.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megablocks_utils.checkpoint.manifest import check_files, read_manifest
from megablocks_utils.processes.output_folder import find_checkpoints
from megablocks_utils.training.report.metrics import read_metrics
from tests.faults.cases import Case, count_steps, play, wait_for
from tests.faults.ground import Ground
from tests.faults.kill import build_table, summarize

END_S = 60.0
SMALL_BYTES = 3_600_000  # room for one checkpoint of 2.3 MB, not for two


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    """A model, data, and what an undisturbed run makes of them."""
    return Ground(tmp_path_factory.mktemp("faults"), num_steps=6, world_size=2)


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
    Case("fsdp2", False, "step", 3, 0.02, (0,)),  # rank 0 holds the store
    Case("fsdp2", False, "save", 4, 0.0, (1,)),
    Case("fsdp2", False, "rename", 4, 0.0, (0, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=[case.moment for case in CASES])
def test_a_killed_run_goes_on_bit_by_bit(ground, case):
    row = play(ground, case, f"killed-{case.moment}")
    assert row["differences"] == row["damaged"] == row["unreported"] == row["wrong_endings"] == []
    assert row["is_good"]
    assert len(row["losses"]) == (len(case.victims) == 1)
    # The last one before, or the one that was being written, which is complete or not there.
    assert row["resumed_from"] in (2, 4)
    assert "1 of 1" in build_table([row])
    assert summarize([row])["equal"] == 1


@pytest.mark.parametrize(
    ("script", "asked", "resume"),
    [("fsdp2", signal.SIGUSR1, "auto"), ("fsdp1", signal.SIGTERM, "True")],
)
def test_a_signal_to_one_rank_saves_and_the_run_goes_on_bit_by_bit(ground, script, asked, resume):
    folder, whole = ground.folder / f"stopped-{script}", ground.reference(script)
    with ground.start(script, folder.name, "--save_strategy", "no") as run:
        wait_for(lambda: count_steps(folder) >= 2, run)
        run.freeze()
        os.kill(run.pids[1], asked)
        run.thaw()
        run.finish(END_S)  # every rank ends with 0
        said = run.output()
    ((step, _),) = find_checkpoints(folder)
    assert 2 <= step < ground.num_steps
    assert f"Stopped by {asked.name} after step {step} of {ground.num_steps}; " in said
    assert not (folder / "run.json").exists() and not (folder / "model.safetensors").exists()
    ground.run(script, folder.name, "--resume_from_checkpoint", resume)
    assert _series(folder) == _series(whole)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def _series(folder: Path) -> list[tuple]:
    """Return the numbers of each step that do not depend on the clock."""
    steps = read_metrics(folder / "metrics.jsonl")
    return [(s.step, s.epoch, s.loss, s.grad_norm, s.learning_rate, s.tokens) for s in steps]


@pytest.mark.parametrize("words", [[], ["--async_save", "True"]], ids=["sync", "async"])
def test_full_disk(ground, small_disk, words):
    """The save fails with one sentence on all ranks, and what was complete stays so."""
    folder = small_disk / "-".join(["out", *words])
    shutil.rmtree(folder, ignore_errors=True)
    with ground.start("fsdp2", f"small/{folder.name}", *words) as run:
        codes = run.wait(END_S)
        said = _sentences(run.output())
    assert codes == [2, 2], said
    kept = f"{folder}/checkpoint-2 is complete and kept"
    (sentence,) = said
    assert sentence.startswith(f"cannot write {folder}/checkpoint-4.incomplete")
    assert sentence.endswith(f": No space left on device; {kept}")
    names = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-latest"]
    files = read_manifest(folder / "checkpoint-2")["files"]
    check_files(folder / "checkpoint-2", files, files)
    shutil.rmtree(folder)


def test_full_disk_while_a_step_is_noted_down(ground, small_disk):
    """Nothing is saved: the line of a step in metrics.jsonl is what meets the full disk."""
    folder, filler = small_disk / "lines", small_disk / "filler"
    words = ["--save_strategy", "no", "--max_steps", "100"]
    try:
        with ground.start("fsdp2", "small/lines", *words) as run:
            wait_for(lambda: count_steps(folder) > 0, run)
            run.freeze()
            with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            run.thaw()
            # The others end by rank 0's verdict 10 s later.
            assert run.wait(END_S, [0]) == [2]
            said = _sentences(run.output())
        kept = f"there is no complete checkpoint in {folder}"
        assert said == [f"cannot write {folder}/metrics.jsonl: No space left on device; {kept}"]
        assert 1 < count_steps(folder) < 100
    finally:
        filler.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def test_output_folder_that_vanishes(ground):
    folder = ground.folder / "gone"
    with ground.start("fsdp2", "gone", "--async_save", "True") as run:
        wait_for(lambda: count_steps(folder) >= 3, run)
        run.freeze()
        shutil.rmtree(folder)
        run.thaw()
        codes = run.wait(END_S)
        (said,) = _sentences(run.output())
        assert "Traceback" not in run.output()
    assert codes == [2, 2]
    assert said.startswith(("cannot read ", "cannot write ")) and str(folder) in said
    assert "No such file or directory" in said
    assert not folder.exists()


def _flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "altered": ("__1_0.distcp", _flip_one_bit, "{path} was altered: its checksum is "),
    "missing": ("rng-00001.json", Path.unlink, "the checkpoint {path.parent} lacks its file "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(ground, damage):
    """Both ranks refuse it in one sentence, with exit code 2, and write nothing."""
    folder = ground.folder / f"damaged-{damage}"
    folder.mkdir()
    checkpoint = ground.reference("fsdp2") / "checkpoint-4"
    path = shutil.copytree(checkpoint, folder / "checkpoint-4") / DAMAGES[damage][0]
    DAMAGES[damage][1](path)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    with ground.start("fsdp2", folder.name, "--resume_from_checkpoint", "True") as run:
        codes = run.wait(END_S)
        said = run.output().splitlines()
    assert codes == [2, 2], said
    assert len([line for line in said if str(folder) in line]) == 1
    assert [line for line in said if line.startswith(DAMAGES[damage][2].format(path=path))]
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def _sentences(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("cannot ")]
