"""What the ranks of a run read must be the same: data, model and adapter, wherever they lie.

Options and versions are compared when the processes meet, see `processes.rank_facts`. A machine may
have the same files in another place, so here it is their content that is compared.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megablocks_utils.checkpoint.fingerprint import fingerprint_model_folder
from megablocks_utils.config import RunConfig
from megablocks_utils.errors import CheckpointError, ConfigurationError
from megablocks_utils.processes.agreement import gather_from_all_ranks
from megablocks_utils.training.data.examples import TokenizedExamples

__all__ = ["Input", "check_run_inputs", "check_same_inputs", "fingerprint_files"]

_ADAPTER_FILES = "adapter_*"

_NUM_SAMPLES = 64
_SAMPLE_BYTES = 2**16  # files of up to 4 MiB are read whole


@dataclass(frozen=True)
class Input:
    """Something that all ranks read.

    Attributes:
        what: it is, such as "data".
        parameter: that names it.
        place: this rank's value of the parameter.
        fingerprint: returns a digest of the content.
    """

    what: str
    parameter: str
    place: object
    fingerprint: Callable[[], str]


def check_run_inputs(
    config: RunConfig,
    folder: Path,
    examples: TokenizedExamples,
    held_out: TokenizedExamples | None = None,
) -> str:
    """Refuse ranks that read another data, model or adapter; return the model's fingerprint.

    **Collective:** as `check_same_inputs`, which raises what this raises.

    Args:
        config: of the run, for what the options name.
        folder: where this rank reads the model.
        examples: the data.
        held_out: what is evaluated; None without.
    """
    name = config.model.model_name_or_path
    of_model = partial(fingerprint_model_folder, folder)
    inputs = [
        Input("data", "data_path", ", ".join(config.data.data_path), examples.checksum),
        Input("model", "model_name_or_path", name, of_model),
    ]
    if held_out is not None and (path := config.evaluation.eval_data_path) is not None:
        inputs.append(Input("held-out data", "eval_data_path", path, held_out.checksum))
    if (adapter := config.adapter.resume_adapter) is not None:
        of_adapter = partial(fingerprint_files, Path(adapter), _ADAPTER_FILES)
        inputs.append(Input("adapter", "resume_adapter", adapter, of_adapter))
    return check_same_inputs(inputs)["model_name_or_path"]


def check_same_inputs(inputs: Sequence[Input]) -> dict[str, str]:
    """Refuse a run whose ranks read something else under the same option.

    **Collective:** every rank must call; one small gather.

    Returns:
        The fingerprints by parameter.

    Raises:
        ConfigurationError: on every rank, naming the first rank that differs from rank 0.
        UserError: on every rank, what a fingerprint raises on one.
    """
    found = gather_from_all_ranks(lambda: (os.uname().nodename, _take_fingerprints(inputs)))
    (first_host, first), *others = found
    for rank, (host, theirs) in enumerate(others, start=1):
        for it in inputs:
            (place, digest), (first_place, first_digest) = theirs[it.parameter], first[it.parameter]
            if digest != first_digest:
                raise ConfigurationError(
                    f"the {it.what} of {it.parameter} on rank {rank} on {host} ({place}) is not "
                    f"that of rank 0 on {first_host} ({first_place}): its fingerprint is "
                    f"{digest[:12]}, not {first_digest[:12]}; all ranks of a run must read the "
                    "same.",
                    parameters=(it.parameter,),
                )
    return {parameter: digest for parameter, (_, digest) in first.items()}


def _take_fingerprints(inputs: Sequence[Input]) -> dict[str, tuple[str, str]]:
    return {it.parameter: (str(it.place), it.fingerprint()) for it in inputs}


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
