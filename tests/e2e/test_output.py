"""What a run leaves in its folder: one stock process's numbers, readable by stock libraries."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import train_accelerate_fsdp2
from megablocks_utils.training.report.metrics import StepMetrics, read_metrics
from tests.support.argv import keep_last
from tests.support.compare import relative_error
from tests.support.parity import Layout, ParityCase, ParityFolder

BOUND = 1e-5  # relative; the contract's
METRICS = [
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "input_tokens",
    "step_time_s",
    "tokens_per_s",
    "mem_peak_bytes",
    "mem_alloc_bytes",
    "mfu",
]


@pytest.fixture(scope="module")
def parity_folder(tmp_path_factory: pytest.TempPathFactory) -> ParityFolder:
    """Tiny models, data and reference runs."""
    return ParityFolder(tmp_path_factory.mktemp("output"))


def _call_main(rank: int, argv: list[str]) -> None:
    train_accelerate_fsdp2.main(keep_last(argv))


def _run(pool, parity_folder: ParityFolder, case: ParityCase, output_dir: Path) -> None:
    argv = [*parity_folder.argv(case), "--output_dir", str(output_dir)]
    pool.run(_call_main, argv, timeout=240)


def _check_metrics(output_dir: Path, case: ParityCase, reference) -> list[StepMetrics]:
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    assert all(list(json.loads(line)) == METRICS for line in lines)
    metrics = read_metrics(output_dir / "metrics.jsonl")
    assert [step.step for step in metrics] == list(range(1, case.num_steps + 1))
    for step, loss, norm in zip(metrics, reference.losses, reference.grad_norms, strict=True):
        assert step.loss == pytest.approx(loss, rel=BOUND)
        assert step.grad_norm == pytest.approx(norm, rel=BOUND)
    return metrics


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_full_run_leaves_a_model_that_transformers_loads(ranks4, parity_folder, tmp_path, family):
    case = ParityCase(Layout(4, 2), family, num_steps=2)
    _run(ranks4, parity_folder, case, tmp_path)
    reference = parity_folder.reference(parity_folder.stock_run(case))
    metrics = _check_metrics(tmp_path, case, reference)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    folders = tmp_path, tmp_path.with_name(f"stock-{family}")
    model.save_pretrained(folders[1])
    saved, stock = (json.loads((folder / "config.json").read_text()) for folder in folders)
    assert saved == stock
    for name, weight in model.named_parameters():
        assert relative_error(weight, reference.weights[name]) < BOUND, name

    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["mesh"] == {"dp": 2, "ep": 2}
    assert record["kernel"]["name"] == "grouped_mm"
    assert 0 < record["kernel"]["probe"]["worst"] < 2
    assert record["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert record["parameters"]["trainable"] == record["parameters"]["total"]
    assert record["totals"] == {
        "steps": 2,
        "tokens": sum(step.tokens for step in metrics),
        "input_tokens": sum(step.input_tokens for step in metrics),
    }
    assert record["options"]["parallel"]["ep_size"] == 2
    assert record["resolved"]["precision"] == "fp32"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "loss.png",
        "metrics.jsonl",
        "model.safetensors",
        "run.json",
    ]


@pytest.mark.parametrize(
    ("family", "lora"),
    [("mixtral", "attn-only"), ("qwen3_moe", "mlp-only"), ("olmoe", "all")],
)
def test_lora_run_leaves_an_adapter_that_peft_loads(ranks4, parity_folder, tmp_path, family, lora):
    """Plain PEFT on plain transformers gives the logits of the reference's adapters."""
    case = ParityCase(Layout(4, 2), family, num_steps=2, lora=lora, lora_rank=4)
    _run(ranks4, parity_folder, case, tmp_path)
    run = parity_folder.stock_run(case)
    reference = parity_folder.reference(run)
    _check_metrics(tmp_path, case, reference)

    base = AutoModelForCausalLM.from_pretrained(run.model_folder)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        untrained = base(tokens).logits
        model = PeftModel.from_pretrained(base, tmp_path)
        loaded = model(tokens).logits
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(reference.stored_weights[name])
        wanted = model(tokens).logits
    assert relative_error(loaded, wanted) < BOUND
    assert relative_error(untrained, wanted) > 1e-3  # the adapters do something
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == run.model_folder
    check = json.loads((tmp_path / "run.json").read_text())["adapter_check"]
    num_adapters = 0 if lora == "attn-only" else 16  # 4 experts, 2 projections, 2 layers
    assert (check["trained"], check["total"]) == (num_adapters, num_adapters)
    assert check["logits"]["ours"] <= 2 * check["logits"]["stock"]
    assert check["logits"]["effect"] > 1e-3


def test_experts_with_adapters_are_ours_also_without_expert_parallelism(
    ranks2, parity_folder, tmp_path
):
    case = ParityCase(Layout(2, 0), "mixtral", num_steps=2, lora="mlp-only", lora_rank=4)
    _run(ranks2, parity_folder, case, tmp_path)
    _check_metrics(tmp_path, case, parity_folder.reference(parity_folder.stock_run(case)))
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["mesh"] == {"dp": 2, "ep": 1}
    assert record["kernel"]["name"] == "grouped_mm"
    assert record["kernel"]["reason"].endswith("; experts with adapters are this project's at ep 1")


def test_the_final_model_has_the_dtype_asked_for(ranks2, parity_folder, tmp_path):
    case = ParityCase(Layout(2, 2), num_steps=1)
    argv = [*parity_folder.argv(case), "--output_dir", str(tmp_path), "--save_dtype", "bfloat16"]
    ranks2.run(_call_main, argv, timeout=240)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    reference = parity_folder.reference(parity_folder.stock_run(case))
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert relative_error(weight.float(), reference.weights[name]) < 2**-8, name
