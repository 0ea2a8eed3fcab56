"""The list of planted bugs keeps up with the kernels."""

import shutil

import pytest

from tests.kernels.fused.planted_bugs import BUGS, KERNELS, ROOT


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_it_can_be_planted(tmp_path, bug):
    folder = tmp_path / KERNELS
    folder.mkdir(parents=True)
    shutil.copy(ROOT / KERNELS / bug.file, folder)
    bug.plant(tmp_path)
    compile((folder / bug.file).read_text(), bug.file, "exec")
    assert (folder / bug.file).read_text() != (ROOT / KERNELS / bug.file).read_text()


def test_every_kernel_has_one():
    kernels = {
        path.name for path in (ROOT / KERNELS).glob("*.py") if "@triton.jit" in path.read_text()
    }
    assert kernels <= {bug.file for bug in BUGS}
