"""Check and measure this project on one GPU, a part at a time. `--help` lists the parts.

    PYTHONPATH=. python -m benchmarks.gpu_check --part 1 --output gpu_results

Torch is imported when the options are good, so `--help` answers at once.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.gpu_check.options import parse_options
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes.entry_point import run_entry_point

if TYPE_CHECKING:
    from benchmarks.gpu_check.programs import Start


def main(argv: Sequence[str], start: "Start | None" = None) -> None:
    """Run a part, row by row, and end with exit code 1 if a row failed.

    Args:
        argv: the command line.
        start: starts the programs of the rows; None: as new processes.

    Raises:
        HelpRequested: for `--help` or `-h`.
        ConfigurationError: for options that cannot work, or a machine without a GPU.
        SystemExit: with exit code 1.
    """
    options = parse_options(argv)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "--device is cuda, but torch finds no CUDA GPU here; --device cpu tries every part out "
            "on a tiny scale."
        )
    from benchmarks.gpu_check.part import open_part, run_part

    with open_part(options, argv, start) as part:
        run_part(part)
        has_failed = part.finish()
    if has_failed:
        sys.exit(1)


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
