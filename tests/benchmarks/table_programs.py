"""A program that ends as it is told, `--end WAY`, on the last rank; the others only wait."""

import os
import signal
import sys
import time

OOM = (
    "CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has a total capacity of 79.15 GiB of "
    "which 1.00 GiB is free."
)
_WAIT_S = 20.0


class OutOfMemoryError(RuntimeError):
    """As torch.OutOfMemoryError is called."""


def main(argv: list[str]) -> None:
    way = argv[argv.index("--end") + 1]
    if way == "well":
        return
    if int(os.environ["RANK"]) != int(os.environ["WORLD_SIZE"]) - 1 or way == "late":
        sys.stderr.write("still waiting\n")
        sys.stderr.flush()
        time.sleep(_WAIT_S)
    elif way == "oom":
        raise OutOfMemoryError(OOM)
    elif way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif way == "refused":
        sys.stderr.write("--kernel is scattermoe, but it runs experts without adapters.\n")
        os._exit(2)
    else:
        raise ValueError(f"told to end {way}")


if __name__ == "__main__":
    main(sys.argv[1:])
