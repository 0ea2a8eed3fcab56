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
from megablocks_utils import evaluate
from megablocks_utils.config import DataConfig
from megablocks_utils.processes.launch import check_environment
from megablocks_utils.training import evaluation_hooks
from megablocks_utils.training.data.examples import load_examples
from megablocks_utils.training.data.held_out import hold_out
from megablocks_utils.training.report.evaluations import read_evaluations
from megablocks_utils.training.report.metrics import read_metrics
from megablocks_utils.training.report.samples import read_samples
from tests.support.argv import keep_last
from tests.support.parity import Layout, ParityCase, write_examples
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.tokenized import examples_of

SCRIPTS = {"fsdp2": train_accelerate_fsdp2, "fsdp1": train_fsdp1}
NUM_HELD_OUT = 3
NUM_NEW_TOKENS = 6


def _run(rank, script, argv, rising=False):
    """Call a script; `rising`: with losses that rise by one a step, and a thousandth of theirs."""
    measure = evaluation_hooks.evaluate_loss

    def measure_rising(*args, **kwargs):
        found = measure(*args, **kwargs)
        return replace(found, eval_loss=found.step + found.eval_loss / 1000) if rising else found

    short = mock.patch.object(evaluation_hooks, "MAX_NEW_TOKENS", NUM_NEW_TOKENS)
    with short, mock.patch.object(evaluation_hooks, "evaluate_loss", measure_rising):
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


@torch.no_grad()
def _stock_answer(model_folder, record):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    prompt = record["input_ids"][: max(1, record["labels"].count(-100))]
    ids = model.generate(
        torch.tensor([prompt]), max_new_tokens=NUM_NEW_TOKENS, do_sample=False, eos_token_id=1
    )
    return tiny_tokenizer().decode(ids[0, len(prompt) :], skip_special_tokens=True).strip()


def _evaluate_saved(rank, *words):
    return evaluate.evaluate(*evaluate.parse_options(words), check_environment())


@pytest.fixture(scope="module")
def model(parity_folder, tmp_path_factory):
    """A model with a tokenizer, for its answers."""
    base = parity_folder.argv(ParityCase(Layout(2, 2)))[1]
    folder = shutil.copytree(base, tmp_path_factory.mktemp("evaluation") / "model")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_loss_of_one_process_and_no_trace(
    script, pools, parity_folder, held_out, model, tmp_path
):
    """Four steps; in the second of two micro-batches a rank has no held-out example."""
    layout = Layout(2, 2, "shard" if script == "fsdp2" else "replicate")
    case, pool = ParityCase(layout, num_steps=4, accumulation=2), pools[2]
    argv = [*parity_folder.argv(case), "--debug", "False", "--model_name_or_path", str(model)]
    argv += ["--output_dir"]
    evaluated = [
        *("--eval_data_path", str(held_out), "--eval_strategy", "steps", "--eval_steps", "2"),
        *("--save_strategy", "steps", "--save_steps", "2", "--load_best_model_at_end", "True"),
        *("--predict_samples", "3", "--per_device_eval_batch_size", "1"),
    ]
    folders = {name: tmp_path / name for name in ("plain", "evaluated", "resumed")}
    pool.run(_run, script, [*argv, str(folders["plain"])], timeout=120)
    pool.run(_run, script, [*argv, str(folders["evaluated"]), *evaluated], timeout=120)
    assert _steps(folders["evaluated"]) == _steps(folders["plain"])
    lines = _evaluations(folders["evaluated"])
    assert [step for step, *_ in lines] == [0, 2, 4]
    loss, num_tokens = _stock_loss(model, held_out)
    assert lines[0] == (0, pytest.approx(loss, rel=1e-6), num_tokens)
    best = min(lines[1:], key=lambda line: line[1])
    assert _stock_loss(folders["evaluated"], held_out)[0] == pytest.approx(best[1], rel=1e-6)
    samples = read_samples(folders["evaluated"] / "samples.jsonl")
    assert [(s.step, s.sample) for s in samples] == [(s, n) for s in (0, 2, 4) for n in (1, 2, 3)]
    answers = [_stock_answer(model, record) for record in json.loads(held_out.read_text())]
    assert [sample.answer for sample in samples[:3]] == answers
    assert [sample.first_answer for sample in samples] == answers * 3
    if script == "fsdp1":
        return
    checkpoint = str(folders["evaluated"] / "checkpoint-2")
    resumed = [*argv, str(folders["resumed"]), *evaluated, "--resume_from_checkpoint", checkpoint]
    pool.run(_run, script, resumed, timeout=120)
    assert _evaluations(folders["resumed"]) == lines
    assert read_samples(folders["resumed"] / "samples.jsonl") == samples
    record = json.loads((folders["resumed"] / "run.json").read_text())["evaluation"]
    assert record["best"]["step"] == record["final_model_step"] == best[0]
    words = [checkpoint, "--data_path", str(held_out), "--ep_size", "2"]
    found = pool.run(_evaluate_saved, *words, timeout=120)
    assert found == found[:1] * 2
    assert found[0]["loss"] == pytest.approx(lines[1][1], rel=1e-6)


def test_patience_ends_the_run_with_the_best_model(pools, parity_folder, held_out, tmp_path):
    """Losses that rise: the first checkpoint is the best, and outlives the limit of one.

    The two ranks share every example, which counts once.
    """
    folder = tmp_path / "run"
    case = ParityCase(Layout(2, 1, tp_size=2), num_steps=6)
    argv = [*parity_folder.argv(case), "--debug", "False", "--output_dir", str(folder)]
    argv += ["--eval_data_path", str(held_out), "--eval_strategy", "steps", "--eval_steps", "1"]
    argv += ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1"]
    argv += ["--load_best_model_at_end", "True", "--early_stopping_patience", "2"]
    pools[2].run(_run, "fsdp2", argv, True, timeout=120)
    lines = _evaluations(folder)
    assert [step for step, *_ in lines] == [0, 1, 2, 3]
    assert len(_steps(folder)) == 3
    names = sorted(path.name for path in folder.glob("checkpoint-[0-9]*"))
    assert names == ["checkpoint-1", "checkpoint-3"]
    record = json.loads((folder / "run.json").read_text())["evaluation"]
    assert record["stopped_early_at_step"] == 3 and record["final_model_step"] == 1
    measured = (lines[1][1] - 1) * 1000
    assert _stock_loss(folder, held_out)[0] == pytest.approx(measured, rel=1e-6)


def test_a_share_of_the_data_is_held_out_by_the_seed():
    examples = examples_of([([n, n + 1], [-100, n + 1]) for n in range(20)])
    kept, out = hold_out(examples, 0.25, seed=3)
    firsts = [[int(ids[0]) for ids, _ in part] for part in (kept, out)]
    assert [len(part) for part in firsts] == [15, 5] and sorted(sum(firsts, [])) == [*range(20)]
    again, other = hold_out(examples, 0.25, seed=3)[1], hold_out(examples, 0.25, seed=4)[1]
    assert again.checksum() == out.checksum() != other.checksum()
    assert [len(part) for part in hold_out(examples, 0.999, seed=3)] == [1, 19]
