"""What a run and an evaluation write where there is no terminal: lines, and nothing of others."""

import pytest

from tests.faults.ranks import ScriptRun
from tests.support.parity import write_examples
from tests.support.tiny_models import save_tiny_model

OPTIONS = (
    "--use_lora all --verify_adapter True --precision fp32 --max_steps 2 --save_strategy steps "
    "--save_steps 1 --report_to none"
)


def log_of(script, argv, logs) -> str:
    """Return all that a command writes, whose end must be good."""
    with ScriptRun(script, [str(word) for word in argv], logs, world_size=1) as run:
        run.finish(180)
        return run.output()


@pytest.mark.slow
def test_no_bars_and_no_warnings_of_other_libraries(tmp_path):
    """The check of the adapter loads a plain model, whose bar would have a state a tensor."""
    model, data, out = tmp_path / "model", tmp_path / "data.json", tmp_path / "out"
    save_tiny_model("olmoe", model)
    write_examples(data, 12)
    paths = ("--model_name_or_path", model, "--data_path", data, "--output_dir", out)
    log = log_of("fsdp2", [*OPTIONS.split(), *paths], tmp_path / "training")
    assert "plain PEFT's" in " ".join(log.split())
    options = (model, "--data_path", data, "--adapter", out)
    evaluation = log_of("megablocks_utils.evaluate", options, tmp_path / "evaluation")
    assert '"loss"' in evaluation
    for unwanted in ("\r", "it/s]", "Loading weights", "Warning"):
        assert unwanted not in log + evaluation
