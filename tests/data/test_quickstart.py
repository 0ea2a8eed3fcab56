"""What the quickstart launches, held out and shows."""

import json
import sys

import pytest


def test_the_training_command_on_two_cpu_processes(script):
    quickstart = script("quickstart")
    options = quickstart.build_parser().parse_args([])
    command = quickstart.training_command(2, "LoRA", quickstart.model_folder("mixtral"), options)
    assert command[:5] == [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
    ]
    assert " ".join(command[5:]) == (
        "train_accelerate_fsdp2.py --model_name_or_path data/.cache/smollm2-moe "
        "--data_path data/.cache/docs_train.json --output_dir results/quickstart "
        "--overwrite_output_dir True --use_megablocks_sharding True --use_lora all "
        "--lora_r 16 --learning_rate 1e-3 --ep_size 2 --per_device_train_batch_size 2 "
        "--gradient_accumulation_steps 1 --max_steps 16 --max_seq_length 160 --logging_steps 1 "
        "--expert_load_steps 1 --eval_data_path data/.cache/quickstart_held_out.json "
        "--eval_strategy steps --eval_steps 8 "
        "--seed 42"
    )


@pytest.mark.parametrize(
    ("num_processes", "ep_size", "batch"), [(1, 1, 4), (2, 2, 2), (3, 1, 1), (4, 4, 1), (8, 4, 1)]
)
def test_sizes_fit_any_number_of_gpus(script, tmp_path, num_processes, ep_size, batch):
    quickstart = script("quickstart")
    options = quickstart.build_parser().parse_args([])
    command = quickstart.training_command(num_processes, "full", tmp_path, options)
    assert command[command.index("--ep_size") + 1] == str(ep_size)
    assert command[command.index("--per_device_train_batch_size") + 1] == str(batch)
    assert command[command.index("--learning_rate") + 1] == "1e-4"


def test_held_out_examples_are_spread_and_the_question_is_not_among_them(
    script, tmp_path, monkeypatch
):
    quickstart = script("quickstart")
    records = [{"instruction": str(n), "output": "a"} for n in range(100)]
    (tmp_path / "docs_held_out.json").write_text(json.dumps(records))
    monkeypatch.setattr(quickstart, "CACHE", tmp_path)
    monkeypatch.setattr(quickstart, "HELD_OUT_DATA", tmp_path / "q.json")
    monkeypatch.setattr(quickstart, "TRAIN_DATA", tmp_path)
    monkeypatch.setattr(quickstart.prepare_model, "prepare", lambda options: None)
    assert quickstart.prepare_inputs("mixtral") == "0"
    held_out = json.loads((tmp_path / "q.json").read_text())
    assert [record["instruction"] for record in held_out] == [str(5 * n) for n in range(1, 17)]


def test_the_table_shows_both_losses_and_answers(script, capsys):
    quickstart = script("quickstart")
    before = {"loss": 4.5, "answers": {"Why?": "no [bold]idea"}}
    after = {"loss": 3.25, "answers": {"Why?": "Because."}}
    quickstart.show(before, after, [4.0, 3.5, 3.0], "LoRA")
    shown = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("│")
    ]
    assert shown == [
        ["held-out loss", "4.500", "3.250"],
        ["training loss", "4.000", "3.000"],
        ["Why?", "no [bold]idea", "Because."],
    ]


def test_a_failed_run_ends_with_one_sentence(script, monkeypatch, capsys):
    quickstart = script("quickstart")
    monkeypatch.setattr(quickstart, "prepare_inputs", lambda family: "Why?")
    monkeypatch.setattr(quickstart, "CACHE", quickstart.Path("no/such"))
    monkeypatch.setenv("MODEL", "granitemoe")
    monkeypatch.setattr(quickstart, "ROOT", quickstart.Path.cwd())
    monkeypatch.setattr(quickstart.sys, "executable", "false")
    assert quickstart.main([]) == 2
    assert capsys.readouterr().err == "evaluating no/such/smollm2-granitemoe failed\n"
    monkeypatch.setenv("MODEL", "llama")
    assert quickstart.main([]) == 2
    assert capsys.readouterr().err == "MODEL is llama, but it must be mixtral or granitemoe\n"
