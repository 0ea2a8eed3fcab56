"""An adapter goes from ep 4 to plain PEFT and back to another mesh, and training goes on."""

import json
from dataclasses import replace
from unittest import mock

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train_accelerate_fsdp2
import train_fsdp1
from megablocks_utils.errors import CheckpointError
from megablocks_utils.lora import peft_format
from megablocks_utils.lora.file_check import AdapterCheckError
from tests.support.argv import keep_last
from tests.support.compare import relative_error
from tests.support.parity import Layout, ParityCase, ParityFolder
from tests.support.stock_reference import StockRun
from tests.support.tiny_adapters import save_separate_adapter

BOUND = 1e-5  # relative; the contract's
NUM_STEPS = 2
SCRIPTS = {"fsdp2": train_accelerate_fsdp2, "fsdp1": train_fsdp1}


@pytest.fixture(scope="module")
def parity_folder(tmp_path_factory: pytest.TempPathFactory) -> ParityFolder:
    """Tiny models, data and reference runs."""
    return ParityFolder(tmp_path_factory.mktemp("round_trip"))


def _call_main(rank, script, argv):
    SCRIPTS[script].main(keep_last(argv))


def _train(pool, folder, case, script, **options):
    """Run a script and return its loss of each step."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    pool.run(_call_main, script, [*folder.argv(case), *words], timeout=240)
    lines = (options["output_dir"] / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _load_stock(run: StockRun, adapter):
    base = AutoModelForCausalLM.from_pretrained(run.model_folder)
    return PeftModel.from_pretrained(base, adapter)


def _save_stock(run: StockRun, trace, folder):
    """Let PEFT save the adapter that the reference has trained."""
    model = _load_stock(run, run.adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trace.stored_weights:
                parameter.copy_(trace.stored_weights[name])
    model.save_pretrained(folder)


def test_training_goes_on_at_another_ep_size(ranks4, parity_folder, tmp_path):
    """Both optimizers start fresh in the second half; nothing else may tell that there are two.

    From FSDP2 to FSDP1; that FSDP2 goes on from what PEFT has written is tested by parity.
    """
    first = ParityCase(Layout(4, 4), "qwen3_moe", NUM_STEPS, lora="all", lora_rank=4)
    second = replace(first, layout=Layout(4, 2, "replicate"))
    losses = _train(ranks4, parity_folder, first, "fsdp2", output_dir=tmp_path / "ep4")
    losses += _train(
        ranks4,
        parity_folder,
        second,
        "fsdp1",
        output_dir=tmp_path / "ep2",
        resume_adapter=tmp_path / "ep4",
    )

    # Of a quarter of the rank that new adapters have: the plan takes it from the files too.
    plan = json.loads((tmp_path / "ep2" / "run.json").read_text())["plan"]
    predicted, measured = (
        plan[when]["components"]["optimizer"] for when in ("predicted", "measured")
    )
    assert predicted == pytest.approx(measured, rel=0.02)  # the counters of steps are not measured

    run = parity_folder.stock_run(first)
    before = parity_folder.reference(run)
    _save_stock(run, before, tmp_path / "stock")
    after_run = StockRun(**vars(run) | {"adapter": str(tmp_path / "stock")})
    after = parity_folder.reference(after_run)
    assert losses == pytest.approx(before.losses + after.losses, rel=BOUND)
    assert after.losses[0] != pytest.approx(before.losses[0], rel=1e-3)  # the first half counts

    trained = _load_stock(run, tmp_path / "ep2").state_dict()
    wanted = {n.replace(".default", ""): p for n, p in after.stored_weights.items()}
    seen = {n.replace(".default", ""): p for n, p in trained.items() if "lora_" in n}
    assert sorted(seen) == sorted(wanted)
    for name, weight in wanted.items():
        assert relative_error(seen[name], weight) < 10 * BOUND, name  # Adam: see measure_excess
    written = load_file(tmp_path / "ep2" / "adapter_model.safetensors")
    assert sorted(written) == sorted(wanted)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_training_goes_on_from_an_adapter_of_transformers_4(
    ranks4, parity_folder, tmp_path, family
):
    """Each expert had its own gate and up: together they have twice the rank, here as in PEFT."""
    case = ParityCase(Layout(4, 2), family, NUM_STEPS, lora="all", lora_rank=4)
    save_separate_adapter(family, tmp_path / "old")
    losses = _train(
        ranks4,
        parity_folder,
        case,
        "fsdp2",
        output_dir=tmp_path / "out",
        resume_adapter=tmp_path / "old",
    )
    run = StockRun(**vars(parity_folder.stock_run(case)) | {"adapter": str(tmp_path / "old")})
    wanted = parity_folder.reference(run)
    assert losses == pytest.approx(wanted.losses, rel=BOUND)
    check = json.loads((tmp_path / "out" / "run.json").read_text())["adapter_check"]
    assert (check["trained"], check["total"]) == (16, 16)
    assert check["logits"]["ours"] <= 2 * check["logits"]["stock"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"mlp.experts.gate_up_proj": 8}
    assert config["alpha_pattern"] == {"mlp.experts.gate_up_proj": 16}


def _train_and_listen(rank, argv):
    """Return what the rank is told of its adapter; None if nothing is wrong."""
    try:
        train_accelerate_fsdp2.main(keep_last(argv))
    except (AdapterCheckError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_an_adapter_that_is_not_finite_is_refused_and_kept(ranks2, parity_folder, tmp_path):
    """A learning rate of 1e38 overflows float32 in the second step."""
    case = ParityCase(Layout(2, 2), "mixtral", NUM_STEPS, lora="mlp-only", lora_rank=4)
    argv = [*parity_folder.argv(case), "--output_dir", str(tmp_path), "--debug", "False"]
    argv += ["--learning_rate", "1e38", "--stop_on_nonfinite", "False"]
    told = ranks2.run(_train_and_listen, argv, timeout=240)
    assert told[1] is None
    kept = tmp_path / "refused_adapter"
    assert told[0].startswith("CheckpointError: ")
    assert "non-finite value" in told[0]
    assert told[0].endswith(f"; the files are in {kept}")
    assert (kept / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter_config.json").exists()


def _train_with_scrambled_file(rank, argv):
    """Write B's columns expert by expert, as others do."""

    def scramble(lora_b):
        return lora_b.permute(1, 0, 2).flatten(1)

    with mock.patch.object(peft_format, "pack_lora_b", scramble):
        return _train_and_listen(rank, argv)


def test_a_run_that_writes_a_wrong_adapter_fails(ranks2, parity_folder, tmp_path):
    case = ParityCase(Layout(2, 2), "mixtral", NUM_STEPS, lora="mlp-only", lora_rank=4)
    argv = [*parity_folder.argv(case), "--output_dir", str(tmp_path)]
    told = ranks2.run(_train_with_scrambled_file, argv, timeout=240)
    assert told == [
        "AdapterCheckError: the adapter of model.layers.0.mlp.experts.gate_up_proj, experts 0, 1, "
        "2, 3, differs from what was trained in lora_B; the files are in "
        f"{tmp_path / 'refused_adapter'}",
        None,
    ]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".claim.json", "metrics.jsonl", "refused_adapter"]
