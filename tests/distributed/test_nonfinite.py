"""Values that are not finite end a run in their step, named, and nothing of them is written."""

import json

import pytest

from megablocks_utils.errors import NonFiniteError
from megablocks_utils.mesh.placement import local_tensor
from megablocks_utils.training.checkpointer import Checkpointer
from megablocks_utils.training.loop import fit
from megablocks_utils.training.recorder import RunRecorder
from megablocks_utils.training.trainer import MoETrainer
from tests.support.fsdp1_run import build_setup_and_arguments
from tests.support.parity import Layout, ParityCase, build_run

POISONED_STEP = 2


class _Poisoned(Checkpointer):
    """Spoil one number on the last rank after a step, before or after the step is saved."""

    def __init__(self, setup, metrics_path, what):
        super().__init__(setup, metrics_path)
        self._what, self._is_last = what, setup.launch.rank == setup.launch.world_size - 1

    def after_step(self, step, state):
        if step == POISONED_STEP and self._what == "state before saving":
            self._spoil(state, "exp_avg_sq")
        super().after_step(step, state)
        if step == POISONED_STEP and self._what in ("weight", "exp_avg_sq"):
            self._spoil(state, self._what)

    def _spoil(self, state, what):
        if not self._is_last:
            return
        held = [p for p in state.optimizer.state if local_tensor(p.detach()).numel()]
        tensor = held[-1] if what == "weight" else state.optimizer.state[held[-1]][what]
        local_tensor(tensor.detach()).view(-1)[-1] = float("nan")


def _train(rank, script, argv, what=""):
    """Return the sentence that a rank ends with, empty for a run that ends in its own way."""
    try:
        if script == "fsdp1":
            setup, arguments = build_setup_and_arguments(argv)
            recorder = RunRecorder(setup)
            checkpointer = _Poisoned(setup, recorder.metrics_path, what)
            trainer = MoETrainer(setup, arguments, on_step=recorder.record, hooks=checkpointer)
            with recorder, checkpointer:
                trainer.train()
            return ""
        setup, state = build_run(argv)
        recorder = RunRecorder(setup)
        checkpointer = _Poisoned(setup, recorder.metrics_path, what)
        with recorder, checkpointer:
            for metrics in fit(state, setup, checkpointer):
                recorder.record(metrics)
    except NonFiniteError as error:
        assert error.exit_code == 1
        return error.as_options()
    return ""


@pytest.fixture
def train(pools, parity_folder, tmp_path):
    """Train three steps, each saved, only the newest kept; return the sentence, alike on ranks."""

    def run(script, layout, *words, what="", **case) -> str:
        options = {"num_steps": 3, "checkpointing": "False", "lora_rank": 4}
        argv = parity_folder.argv(ParityCase(layout, **options | case))
        argv += ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1"]
        argv += ["--output_dir", str(tmp_path / "out"), "--debug", "False", *words]
        answers = pools[layout.world_size].run(_train, script, argv, what, timeout=120)
        assert answers == answers[:1] * len(answers)
        return answers[0]

    return run


def _left(tmp_path) -> list[str]:
    folder = tmp_path / "out"
    assert not list(folder.glob("*.safetensors"))
    return sorted(p.name for p in folder.glob("checkpoint-*") if not p.is_symlink())


def _metrics(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]


IN_BACKGROUND = ("--async_save", "True")
RUNS = [
    ("weight", "fsdp2", Layout(2, 2), (), {}),
    ("weight", "fsdp2", Layout(2, 1), IN_BACKGROUND, {"max_grad_norm": 0.0}),
    ("exp_avg_sq", "fsdp2", Layout(2, 1), IN_BACKGROUND, {}),
    ("exp_avg_sq", "fsdp1", Layout(2, 2, "replicate"), (), {}),
    ("weight", "fsdp1", Layout(2, 1, "replicate"), IN_BACKGROUND, {"lora": "all"}),
    ("exp_avg_sq", "fsdp2", Layout(2, 2, "replicate"), (), {"lora": "mlp-only"}),
]


@pytest.mark.parametrize(("what", "script", "layout", "words", "case"), RUNS)
def test_the_step_ends_the_run(what, script, layout, words, case, train, tmp_path):
    """Everything of the step before is whole on disk, also where it was saved meanwhile."""
    message = train(script, layout, *words, what=what, **case)
    kind = "weight" if what == "exp_avg_sq" else "gradient"
    assert message.startswith(f"step 3 of this run: the {kind} "), message
    assert " is not finite" in message
    assert _left(tmp_path) == ["checkpoint-2"]
    assert (tmp_path / "out" / "checkpoint-2" / "manifest.json").exists()
    lines = _metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert (lines[2]["loss"] is None) == (what == "weight")


@pytest.mark.parametrize("words", [(), ("--async_save", "True")])
def test_a_state_that_no_step_has_shown_is_not_saved(words, train, tmp_path):
    message = train("fsdp2", Layout(2, 2), *words, what="state before saving")
    assert message.startswith("checkpoint-2 is not written: the tensor optimizer.model.")
    assert ".exp_avg_sq is not finite; --stop_on_nonfinite False continues." in message
    assert _left(tmp_path) == ["checkpoint-1"]


def test_a_rate_that_overflows_the_weights(train, tmp_path):
    """The norm of the first step is finite, its update is not."""
    message = train("fsdp2", Layout(2, 2), "--learning_rate", "3e38", "--weight_decay", "100")
    assert message.startswith("step 1 of this run: the weight model.embed_tokens.weight is not ")
    assert _left(tmp_path) == []


def test_a_run_that_is_told_to_continues(train, tmp_path):
    words = ("--stop_on_nonfinite", "False")
    assert train("fsdp2", Layout(2, 2), *words, what="weight") == ""
    assert _left(tmp_path) == ["checkpoint-3"]
    assert [line["loss"] is None for line in _metrics(tmp_path)] == [False, False, True]


def test_a_checkpoint_that_is_not_finite_is_not_resumed(train, tmp_path):
    words = ("--stop_on_nonfinite", "False", "--max_steps", "2")
    assert train("fsdp2", Layout(2, 2), *words, what="state before saving") == ""
    message = train("fsdp2", Layout(2, 2), "--resume_from_checkpoint", "True")
    assert message.startswith(f"{tmp_path / 'out' / 'checkpoint-2'}: the tensor optimizer.model.")
