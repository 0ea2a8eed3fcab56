"""Evaluation while training: the loss of one process, and no trace of it in training."""

import json
import shutil
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import train_accelerate_fsdp2
import train_fsdp1
from megablocks_utils.config import DataConfig
from megablocks_utils.training import evaluation_hooks
from megablocks_utils.training.data.examples import load_examples
from megablocks_utils.training.report.evaluations import read_evaluations
from megablocks_utils.training.report.metrics import read_metrics
from megablocks_utils.training.report.samples import read_samples
from tests.support.argv import keep_last
from tests.support.parity import Layout, ParityCase, write_examples
from tests.support.tiny_tokenizer import tiny_tokenizer

SCRIPTS = {"fsdp2": train_accelerate_fsdp2, "fsdp1": train_fsdp1}
NUM_HELD_OUT = 3


def _run(rank, script, argv, rising=False):
    """Call a script; `rising`: with losses that are the number of the step."""
    measure = evaluation_hooks.evaluate_loss

    def measure_rising(*args, **kwargs):
        found = measure(*args, **kwargs)
        return replace(found, eval_loss=float(found.step)) if rising else found

    with mock.patch.object(evaluation_hooks, "evaluate_loss", measure_rising):
        SCRIPTS[script].main(keep_last(argv))


@pytest.fixture
def held_out(tmp_path):
    path = tmp_path / "held_out.json"
    write_examples(path, NUM_HELD_OUT)
    return path


def _steps(folder):
    wanted = ("step", "loss", "grad_norm", "learning_rate", "tokens")
    return [[getattr(m, name) for name in wanted] for m in read_metrics(folder / "metrics.jsonl")]


def _evaluations(folder):
    found = read_evaluations(folder / "metrics.jsonl")
    return [(e.step, e.eval_loss, e.eval_tokens) for e in found]


@torch.no_grad()
def _stock_loss(model_folder, data_path):
    """Return the mean loss of all label tokens, one example after the other."""
    eager = {"experts_implementation": "eager", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(model_folder, **eager).double()
    total = count = 0
    for ids, labels in load_examples(DataConfig(data_path=(str(data_path),)), None):
        logits = model(torch.from_numpy(ids)[None]).logits[0, :-1]
        targets = torch.from_numpy(labels)[1:]
        total += F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
        count += int((targets != -100).sum())
    return total / count, count


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_loss_of_one_process_and_no_trace(script, pools, parity_folder, held_out, tmp_path):
    """Four steps on four ranks, of which one has no held-out example; resumed after the second."""
    layout = Layout(4, 2, "shard" if script == "fsdp2" else "replicate")
    case = ParityCase(layout, num_steps=4, accumulation=2)
    argv = [*parity_folder.argv(case), "--debug", "False", "--output_dir"]
    evaluated = [
        *("--eval_data_path", str(held_out), "--eval_strategy", "steps", "--eval_steps", "2"),
        *("--save_strategy", "steps", "--save_steps", "2", "--load_best_model_at_end", "True"),
    ]
    folders = {name: tmp_path / name for name in ("plain", "evaluated", "resumed")}
    pools[4].run(_run, script, [*argv, str(folders["plain"])], timeout=120)
    whole = [*argv, str(folders["evaluated"]), *evaluated]
    pools[4].run(_run, script, whole, timeout=120)
    assert _steps(folders["evaluated"]) == _steps(folders["plain"])
    lines = _evaluations(folders["evaluated"])
    assert [step for step, *_ in lines] == [0, 2, 4]
    base = argv[argv.index("--model_name_or_path") + 1]
    loss, num_tokens = _stock_loss(base, held_out)
    assert lines[0] == (0, pytest.approx(loss, rel=1e-6), num_tokens)
    best = min(lines[1:], key=lambda line: line[1])
    loss, _ = _stock_loss(folders["evaluated"], held_out)
    assert best[1] == pytest.approx(loss, rel=1e-6)
    resumed = [*argv, str(folders["resumed"]), *evaluated, "--resume_from_checkpoint"]
    pools[4].run(_run, script, [*resumed, str(folders["evaluated"] / "checkpoint-2")], timeout=120)
    assert _evaluations(folders["resumed"]) == lines
    record = json.loads((folders["resumed"] / "run.json").read_text())["evaluation"]
    assert record["best"]["step"] == record["final_model_step"] == best[0]
    assert record["examples"] == NUM_HELD_OUT


@torch.no_grad()
def _stock_answer(model_folder, prompt):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=1)
    return tiny_tokenizer().decode(ids[0, len(prompt) :], skip_special_tokens=True).strip()


def test_patience_ends_the_run_with_the_best_model(pools, parity_folder, held_out, tmp_path):
    """Losses that rise: the first checkpoint is the best, and outlives the limit of one."""
    base = parity_folder.argv(ParityCase(Layout(2, 2)))[1]
    model = shutil.copytree(base, tmp_path / "model")
    tiny_tokenizer().save_pretrained(model)
    for script, expert_dp in (("fsdp2", "shard"), ("fsdp1", "replicate")):
        case = ParityCase(Layout(2, 2, expert_dp), num_steps=6)
        folder = tmp_path / script
        argv = [*parity_folder.argv(case), "--debug", "False", "--output_dir", str(folder)]
        argv += ["--eval_data_path", str(held_out), "--eval_strategy", "steps", "--eval_steps", "1"]
        argv += ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1"]
        argv += ["--load_best_model_at_end", "True", "--early_stopping_patience", "2"]
        argv += ["--model_name_or_path", str(model), "--predict_samples", "3"]
        pools[2].run(_run, script, argv, True, timeout=120)
        assert [step for step, *_ in _evaluations(folder)] == [0, 1, 2, 3]
        assert len(_steps(folder)) == 3
        names = sorted(path.name for path in folder.glob("checkpoint-[0-9]*"))
        assert names == ["checkpoint-1", "checkpoint-3"]
        record = json.loads((folder / "run.json").read_text())["evaluation"]
        assert record["stopped_early_at_step"] == 3 and record["final_model_step"] == 1
        samples = read_samples(folder / "samples.jsonl")
        assert [(s.step, s.sample) for s in samples] == [
            (s, n) for s in range(4) for n in (1, 2, 3)
        ]
        for sample, record in zip(samples, json.loads(held_out.read_text()), strict=False):
            prompt = record["input_ids"][: max(1, record["labels"].count(-100))]
            assert sample.answer == sample.first_answer == _stock_answer(model, prompt)
