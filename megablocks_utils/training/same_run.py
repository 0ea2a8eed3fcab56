"""What the ranks of a run read must be the same: data, model and adapter, wherever they lie.

Options and versions are compared when the processes meet, see `processes.run_facts`. A machine may
have the same files in another place, so here it is their content that is compared.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megablocks_utils.errors import CheckpointError, ConfigurationError
from megablocks_utils.processes.agreement import gather_from_all_ranks

__all__ = ["check_same_content", "fingerprint_files"]

_NUM_SAMPLES = 64
_SAMPLE_BYTES = 2**16  # files of up to 4 MiB are read whole


def check_same_content(
    what: str, parameter: str, place: object, fingerprint: Callable[[], str]
) -> None:
    """Refuse a run whose ranks read something else under the same option.

    **Collective:** every rank must call; one small gather.

    Args:
        what: it is, such as "data".
        parameter: that names it.
        place: this rank's value of the parameter.
        fingerprint: returns a digest of the content.

    Raises:
        ConfigurationError: on every rank, naming the first rank that differs from rank 0.
        UserError: on every rank, what `fingerprint` raises on one.
    """
    if dist.get_world_size() == 1:
        return
    found = gather_from_all_ranks(lambda: (os.uname().nodename, str(place), fingerprint()))
    first_host, first_place, first = found[0]
    for rank, (host, its_place, digest) in enumerate(found):
        if digest != first:
            raise ConfigurationError(
                f"the {what} of {parameter} on rank {rank} on {host} ({its_place}) is not that of "
                f"rank 0 on {first_host} ({first_place}): its fingerprint is {digest[:12]}, not "
                f"{first[:12]}; all ranks of a run must read the same.",
                parameters=(parameter,),
            )


def fingerprint_files(folder: Path, pattern: str) -> str:
    """Return the SHA-256 of files in a folder: names, sizes and content, of large ones samples.

    Raises:
        CheckpointError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(f"{path.name} {size}\n".encode())
                for place in range(_NUM_SAMPLES):
                    file.seek(place * size // _NUM_SAMPLES)
                    digest.update(file.read(min(_SAMPLE_BYTES, size // _NUM_SAMPLES + 1)))
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()
