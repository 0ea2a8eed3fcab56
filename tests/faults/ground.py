"""A tiny model and data, the runs on them, and what a run that nobody disturbs makes of them."""

import time
from pathlib import Path

from tests.faults.ranks import ScriptRun
from tests.support.parity import write_examples
from tests.support.tiny_models import save_tiny_model

__all__ = ["NUM_STEPS", "OPTIONS", "RUN_TIMEOUT_S", "SAVE_STEPS", "WORLD_SIZE", "Ground"]

NUM_STEPS, SAVE_STEPS, WORLD_SIZE = 10, 2, 4
OPTIONS = (
    "--use_megablocks_sharding True --ep_size 2 --precision fp32 "
    f"--save_strategy steps --save_steps {SAVE_STEPS} --per_device_train_batch_size 4 "
    "--learning_rate 1e-3 --report_to none"
)
RUN_TIMEOUT_S = 240.0


class Ground:
    """A model, data, and what a run that nobody disturbs makes of them.

    Args:
        folder: for all of it.
        num_steps: of every run.
        world_size: number of ranks.
    """

    def __init__(
        self, folder: Path, num_steps: int = NUM_STEPS, world_size: int = WORLD_SIZE
    ) -> None:
        self.folder, self.num_steps, self.world_size = folder, num_steps, world_size
        if not (folder / "data.json").is_file():
            save_tiny_model("mixtral", folder / "model")
            # Three full global batches and a part of one: resumes fall within epochs.
            write_examples(folder / "data.json", 13 * world_size + 1)

    def argv(self, output: Path, *words: str) -> list[str]:
        """Return the options of a run."""
        values = ["--model_name_or_path", self.folder / "model"]
        values += ["--data_path", self.folder / "data.json", "--output_dir", output]
        values += ["--max_steps", self.num_steps]
        return [*OPTIONS.split(), *map(str, values), *words]

    def start(self, script: str, name: str, *words: str) -> ScriptRun:
        """Start a run that writes to a folder of this name."""
        logs = self.folder / "logs" / f"{name}-{time.monotonic_ns()}"
        argv = self.argv(self.folder / name, *words)
        return ScriptRun(script, argv, logs, world_size=self.world_size)

    def run(self, script: str, name: str, *words: str) -> str:
        """Run to the end, and return what was said.

        Raises:
            RuntimeError: it failed.
        """
        with self.start(script, name, *words) as run:
            run.finish(RUN_TIMEOUT_S)
            return run.output()

    def reference(self, script: str) -> Path:
        """Return the output of an undisturbed run of a script; it runs once."""
        name = f"whole-{script}"
        if not (self.folder / name / "run.json").is_file():
            self.run(script, name, "--overwrite_output_dir", "True")
        return self.folder / name
