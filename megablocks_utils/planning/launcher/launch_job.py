"""What every launch file says, whoever reads it."""

import re
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from megablocks_utils.planning.model.gpus import Gpu
from megablocks_utils.planning.speed.launch_lines import break_line

__all__ = ["LaunchJob"]

_MOUNT = PurePosixPath("/outputs")
_WIDTH = 96
_MAX_NAME = 40  # Kubernetes adds its own to it and allows 63
_RESUME, _OUTPUT = "--resume_from_checkpoint", "--output_dir"


@dataclass(frozen=True)
class LaunchJob:
    """A run, its nodes and its command.

    Attributes:
        model: as the run is given it.
        entry_point: `fsdp2` or `fsdp1`.
        head: the launcher with its options, and the script; its shell variables are `HEAD_NODE`,
            the first node's name, and for `fsdp1` `NODE_RANK`.
        options: of the run, quoted for a shell.
        output_dir: of the run.
        nodes: of the run.
        gpus_per_node: that it uses.
        gpu: their kind; None where only their memory is known.
    """

    model: str
    entry_point: str
    head: tuple[str, ...]
    options: tuple[str, ...]
    output_dir: str
    nodes: int
    gpus_per_node: int
    gpu: Gpu | None

    @property
    def name(self) -> str:
        """A name that every scheduler takes: lower case letters, digits and dashes."""
        last = re.sub(r"[^a-z0-9]+", "-", PurePosixPath(self.model).name.lower())
        return f"moe-{last}"[:_MAX_NAME].strip("-")

    @property
    def mount(self) -> PurePosixPath:
        """Where the volume with the output is seen."""
        place = PurePosixPath(self.output_dir)
        return place if place.parent == place.parent.parent else place.parent

    def on_shared_volume(self) -> "LaunchJob":
        """Return the job with its output on a volume that nodes without a common disk share."""
        if PurePosixPath(self.output_dir).is_absolute():
            return self
        place = str(_MOUNT / self.output_dir)
        options = list(self.options)
        if _OUTPUT in options:
            options[options.index(_OUTPUT) + 1] = place
        else:
            options += [_OUTPUT, place]
        return replace(self, options=tuple(options), output_dir=place)

    def command(self, indent: str = "") -> str:
        """Return the command of a shell script, over several lines; it also resumes the run.

        Args:
            indent: of the lines after the first.
        """
        options = self.options if _RESUME in self.options else (*self.options, _RESUME, "auto")
        lines = break_line(" ".join([*self.head, *options]), _WIDTH).split("\n")
        return f"\n{indent}".join(lines)
