"""What a resumed run must share with its checkpoint: exact sentences for each fact that differs."""

import json
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import pytest

from megablocks_utils.config import parse_args, resolve_precision
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.lora.settings import LoraSettings
from megablocks_utils.training.data.batches import Packing
from megablocks_utils.training.data.schedule import Schedule
from megablocks_utils.training.resume.resume_compatibility import (
    changed_options,
    check_compatibility,
    describe_compatibility,
)
from megablocks_utils.training.resume.resume_point import ResumePoint, choose_template_date
from tests.support.tokenized import examples_of

EXAMPLES = examples_of([([1, 2, 3], [-100, 2, 3])] * 30)
FLAGS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 10}


def parse(**options):
    words = [
        word for name, value in (FLAGS | options).items() for word in (f"--{name}", f"{value}")
    ]
    return parse_args(words, entry_point="fsdp2")


def describe(config, world_size=2, lora=None):
    return describe_compatibility(
        config,
        resolve_precision(config, "cpu"),
        lora,
        EXAMPLES,
        model_type="olmoe",
        world_size=world_size,
        base_sha256="ab" * 32,
        packing=Packing.POSITIONS,
    )


OWN = replace(describe(parse()), eval_sha256="cd" * 32)
MANIFEST = {"step": 4, "continuity": OWN.as_record()}  # as old checkpoints name it


def check(own=OWN, config=None, world_size=2, step=4):
    config = config or parse()
    manifest = MANIFEST | {"step": step}
    check_compatibility(manifest, own, config, Schedule(config, EXAMPLES, 0, world_size))


def refusal(*args, **kwargs):
    with pytest.raises(ConfigurationError) as caught:
        check(*args, **kwargs)
    return caught.value.as_options()


def test_same_run_is_resumed_also_when_it_is_done():
    assert OWN.global_batch == 12
    check()
    check(step=10)


@pytest.mark.parametrize(
    ("world_size", "batch", "accumulation"), [(1, 12, 1), (2, 6, 1), (3, 1, 4), (12, 1, 1)]
)
def test_same_global_batch_on_other_ranks_is_resumed(world_size, batch, accumulation):
    config = parse(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    check(describe(config, world_size), config, world_size)


def test_another_global_batch_is_refused_with_one_that_fits():
    assert refusal(describe(parse(), 4), parse(), 4) == (
        "4 processes x --per_device_train_batch_size 2 x --gradient_accumulation_steps 3 give "
        "steps of 24 examples, but the checkpoint to resume from has steps of 12; with 4 processes "
        "their product must be 3, for example --per_device_train_batch_size 3 "
        "and --gradient_accumulation_steps 1."
    )
    assert refusal(describe(parse(), 5), parse(), 5).endswith(
        "steps of 30 examples, but the checkpoint to resume from has steps of 12; 5 processes "
        "cannot share it evenly."
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 7}, "--seed is 7, but the checkpoint to resume from has 42."),
        ({"shuffle": False}, "--shuffle is False, but the checkpoint to resume from has True."),
        (
            {"num_examples": 31},
            "the number of examples in --data_path is 31, but the checkpoint to resume from has "
            "30.",
        ),
        (
            {"data_sha256": "0" * 64},
            "--data_path or --max_seq_length has changed: the checksum of its tokens is "
            f"{'0' * 40}, but the checkpoint to resume from has {OWN.data_sha256[:40]}.",
        ),
        (
            {"model_type": "mixtral"},
            "--model_name_or_path is a model of type mixtral, but the checkpoint to resume from "
            "has olmoe.",
        ),
        (
            {"base_sha256": "0" * 64},
            "--model_name_or_path is not the model that the adapters were trained on: its "
            f"fingerprint is {'0' * 40}, but the checkpoint to resume from has {'ab' * 20}.",
        ),
        (
            {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}},
            "--use_lora, --lora_r and --lora_alpha give the adapters r 4, target_modules q_proj "
            "v_proj, but the checkpoint to resume from has none.",
        ),
        (
            {"expert_quantization": "nf4"},
            "--expert_quantization, which the adapters were trained on, is nf4, but the checkpoint "
            "to resume from has none.",
        ),
        (
            {"dtypes": {"weights": "bfloat16", "optim": "float32"}},
            "--precision gives the dtypes weights bfloat16, optim float32, but the checkpoint to "
            f"resume from has weights {OWN.dtypes['weights']}, optim {OWN.dtypes['optim']}.",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_fact_that_differs_is_refused_in_one_sentence(change, sentence):
    assert refusal(replace(OWN, **change)) == sentence


# The template's date is taken over.
@pytest.mark.parametrize("name", sorted(OWN.as_record().keys() - {"template_date"}))
def test_every_fact_is_compared(name):
    other = 13 if name == "global_batch" else "another"
    refusal(replace(OWN, **{name: other}))


def test_a_single_example_fits_every_way_of_packing():
    check(replace(OWN, packing="alone"))
    assert "--packing gives micro-batches of kind padded" in refusal(replace(OWN, packing="padded"))


def test_a_checkpoint_that_does_not_say_its_base_is_taken():
    facts = {name: value for name, value in OWN.as_record().items() if name != "base_sha256"}
    schedule = Schedule(parse(), EXAMPLES, 0, 2)
    check_compatibility({"step": 4, "continuity": facts}, OWN, parse(), schedule)


def test_checkpoint_beyond_the_last_step_is_refused():
    assert refusal(step=11) == (
        "--max_steps or --num_train_epochs give 10 steps, but the checkpoint to resume from has "
        "done 11."
    )


def test_adapters_are_described_by_all_that_makes_them():
    settings = LoraSettings(r=4, lora_alpha=8, target_modules=("v_proj", "q_proj"))
    found = describe(parse(), lora=settings).lora
    assert found["r"] == 4
    assert found["lora_alpha"] == 8
    assert found["target_modules"] == ["q_proj", "v_proj"]


def test_changed_options_are_those_that_change_what_is_learned():
    before = json.loads(json.dumps(asdict(parse())))  # as the manifest has it
    assert changed_options(before, asdict(parse())) == []
    free = {
        "output_dir": "x",
        "logging_steps": 9,
        "save_strategy": "epoch",
        "ep_size": 2,
        "use_megablocks_sharding": True,
        "per_device_train_batch_size": 6,
    }
    assert changed_options(before, asdict(parse(**free))) == []
    now = parse(learning_rate=1e-3, max_grad_norm=0.5, lr_scheduler_type="constant")
    found = changed_options(before, asdict(now))
    assert sorted(line.split()[0] for line in found) == [
        "--learning_rate",
        "--lr_scheduler_type",
        "--max_grad_norm",
    ]
    assert f"--max_grad_norm {parse().optim.max_grad_norm} -> 0.5" in found


def test_a_resumed_run_tells_the_template_the_day_of_the_first_start():
    facts = MANIFEST["continuity"] | {"template_date": "2021-03-04"}
    point = ResumePoint(Path("checkpoint-4"), MANIFEST | {"continuity": facts})
    assert choose_template_date(point) == date(2021, 3, 4)
    undated = ResumePoint(Path("checkpoint-4"), MANIFEST)
    assert choose_template_date(undated) == choose_template_date(None) == date.today()


def test_a_date_that_no_checkpoint_tells_is_named_where_it_changes_the_data():
    dated = replace(OWN, template_date="2026-11-30")
    check(dated)
    assert refusal(replace(dated, data_sha256="0" * 64)) == (
        "the chat template writes the date (2026-11-30) into the examples, and the checkpoint to "
        "resume from does not say which date it had; give a template with that date written out as "
        "--chat_template."
    )
