"""Memory of a CPU rank, from the kernel or from getrusage."""

import mmap
import resource

import pytest
import torch

from megablocks_utils.training.report.memory import (
    PROCESS_STATUS,
    MemoryReading,
    describe_memory_source,
    read_memory,
)

CPU = torch.device("cpu")


def test_sizes_come_from_the_status_file_in_bytes(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    300 kB\nVmRSS:\t    200 kB\nThreads:\t3\n")
    assert read_memory(CPU, status) == MemoryReading(300 * 1024, 200 * 1024)
    assert describe_memory_source(CPU, status) == "resident memory of the process (VmHWM, VmRSS)"


def test_getrusage_stands_in_for_a_missing_status_file(tmp_path):
    missing = tmp_path / "status"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    reading = read_memory(CPU, missing)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert before <= reading.peak_bytes <= after
    assert reading.allocated_bytes == reading.peak_bytes
    assert describe_memory_source(CPU, missing) == (
        "resident memory of the process (getrusage ru_maxrss, getrusage ru_maxrss)"
    )


@pytest.mark.skipif(not PROCESS_STATUS.exists(), reason="needs the status file of Linux")
def test_the_peak_stays_when_memory_is_given_back():
    """Memory straight from the system: an allocator may take and keep what was freed before."""
    size = 256 * 1024**2
    held = mmap.mmap(-1, size)
    held.write(b"\1" * size)
    with_it = read_memory(CPU)
    held.close()
    without_it = read_memory(CPU)
    assert with_it.allocated_bytes - without_it.allocated_bytes > 0.9 * size
    assert without_it.peak_bytes > 0.99 * with_it.peak_bytes
