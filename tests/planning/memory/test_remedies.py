"""What would help, on a model of memory that is known, and on the real formulas."""

from dataclasses import replace

import pytest

from megablocks_utils.planning.memory import scenario as scenario_module
from megablocks_utils.planning.memory.remedies import find_remedies
from megablocks_utils.planning.model.prediction import ParallelLayout
from tests.planning.cases import PUBLISHED, build_prediction, build_scenario

GB = 10**9
COPIES, SHARED = ParallelLayout(4, "replicate"), ParallelLayout(4, "shard")


def predict_simply(shape, layout, run):
    """Take 640 GB over the ranks, twice that for fp32; 4 GB a 1000 tokens, 10 x if not recomputed.

    Copies take it all on every rank of an ep group; adapters need a quarter.
    """
    ranks = layout.ep_size if layout.expert_dp == "replicate" else run.world_size
    trained = 0.25 if run.use_lora != "none" else 1
    held = 640 * GB // ranks * (2 if run.precision.optim == "float32" else 1) * trained
    kept = 1 if run.gradient_checkpointing == "full" else 10
    return build_prediction(optimizer=int(held), activations=4 * GB * run.tokens * kept // 1000)


@pytest.fixture
def simple(monkeypatch):
    monkeypatch.setattr(scenario_module, "predict", predict_simply)


def remedies(line, layout, capacity_gb, **options):
    found = find_remedies(build_scenario(line, **options), layout, round(capacity_gb * GB))
    return [remedy.describe() for remedy in found]


BF16 = "--precision bf16 --per_device_train_batch_size 1 --max_seq_length 1000"


def test_every_change_alone_with_its_peak(simple):
    # 640 / 4 + 4 = 164 GB of 170: the context and fragmentation want 17.9 more than there are.
    assert remedies(BF16, COPIES, 165) == [
        "--expert_dp shard: 84.0 GB",
        "--ep_size 2 --expert_dp shard: 84.0 GB",
        "--max_seq_length 500: 162.0 GB, tight",
        "--use_lora attn-only: 44.0 GB",
    ]


def test_host_memory_where_it_is_another_one(monkeypatch):
    def predict(shape, layout, run):
        held = {"none": 100, "optimizer": 60, "params": 30}[run.offloaded] * GB
        return build_prediction(optimizer=held)

    monkeypatch.setattr(scenario_module, "predict", predict)
    both = ["--cpu_offload optimizer: 60.0 GB", "--cpu_offload params: 30.0 GB"]
    assert remedies(BF16, SHARED, 80) == both[:1]  # the milder
    assert remedies(BF16, SHARED, 50) == both[1:]
    assert remedies(BF16, COPIES, 50) == []
    assert remedies(BF16, COPIES, 80, entry_point="fsdp1") == both[:1]
    on_cpu = replace(build_scenario(BF16), device_type="cpu")
    assert find_remedies(on_cpu, SHARED, 80 * GB) == []


def test_the_nearest_ep_size_that_fits(simple):
    # FSDP1 keeps copies: 320 GB a rank with ep 2, 80 with ep 8, as without expert parallelism.
    options = {"entry_point": "fsdp1"}
    assert remedies(BF16, COPIES, 120, **options)[0] == "--ep_size 8: 84.0 GB"
    pair = ParallelLayout(2, "replicate")
    assert remedies(BF16, pair, 120, **options)[0] == "--use_megablocks_sharding False: 84.0 GB"
    alone = remedies(f"{BF16} --max_seq_length 3000", ParallelLayout(1, "shard"), 1, **options)
    assert alone == []


def test_another_ep_size_does_not_help_where_memory_does_not_depend_on_it(simple):
    assert not [r for r in remedies(BF16, SHARED, 70) if "--ep_size" in r]


def test_more_ranks_until_it_fits(simple):
    # 640 / 16 + 4 = 44; 640 / 32 + 4 = 24
    assert remedies(BF16, SHARED, 30)[-1] == "--gpus 32: 24.0 GB"
    # With copies more ranks change nothing.
    assert not [r for r in remedies(BF16, COPIES, 60) if "--gpus" in r]


def test_dtypes_and_checkpointing(simple):
    line = f"{BF16} --precision fp32 --gradient_checkpointing False --max_seq_length 2000"
    # 160 + 80 GB; recomputing takes 72 away, bf16 states 80, half the tokens 40. 157 of 175 GB
    # are safe: what stays below is preferred to what is tight.
    assert remedies(line, SHARED, 175) == [
        "--gradient_checkpointing True: 168.0 GB, tight",
        "--max_seq_length 250: 170.0 GB, tight",
        "--optim_dtype bfloat16: 160.0 GB, tight",
        "--use_lora attn-only: 120.0 GB",
        "--gpus 32: 120.0 GB",
    ]


def test_fp32_weights_go_where_smaller_states_are_not_enough(simple, monkeypatch):
    def predict(shape, layout, run):
        return build_prediction(parameters=90 * GB if run.precision.weights == "float32" else GB)

    monkeypatch.setattr(scenario_module, "predict", predict)
    assert "--precision bf16: 1.0 GB" in remedies(f"{BF16} --precision fp32", SHARED, 80)


def test_batch_before_length(simple):
    line = f"{BF16} --per_device_train_batch_size 8"
    # 80 + 32 GB; of 100 GB, 89 are safe
    assert remedies(line, SHARED, 100)[:2] == [
        "--per_device_train_batch_size 2: 88.0 GB",
        "--max_seq_length 250: 88.0 GB",
    ]


def test_a_smaller_batch_has_fewer_examples(monkeypatch):
    """One example needs no mask."""

    def predict(shape, layout, run):
        return build_prediction(activations=90 * GB if run.examples > 1 else GB)

    monkeypatch.setattr(scenario_module, "predict", predict)
    line = f"{BF16} --per_device_train_batch_size 8"
    assert remedies(line, SHARED, 80) == ["--per_device_train_batch_size 1: 1.0 GB"]


def test_several_changes_where_none_is_enough(simple):
    line = f"{BF16} --precision fp32 --per_device_train_batch_size 8"
    # 320 + 32 GB with copies, 75 of 85 are safe: 160 / 4 + 32 with both. A smaller batch, shorter
    # examples and bf16 states are tried on the way, and taken back.
    combined = "--expert_dp shard --use_lora attn-only: 72.0 GB"
    assert remedies(line, COPIES, 85) == [combined]
    # 59 of 66 safe: 32 GB of tokens have to go down to 16
    combined = "--expert_dp shard --per_device_train_batch_size 4 --use_lora attn-only: 56.0 GB"
    assert remedies(line, COPIES, 66) == [combined]


def test_tight_at_least(simple):
    # 640 / 512 / 4 + 1 GB is the least that all changes together reach, and needs 1.5 beside it.
    (combined,) = remedies(BF16, SHARED, 2.85)
    assert combined == "--max_seq_length 250 --use_lora attn-only --gpus 512: 1.3 GB, tight"
    assert remedies(BF16, SHARED, 2.8) == []


def test_nothing_helps(simple):
    assert remedies(BF16, COPIES, 1) == []


def test_the_published_row_that_ran_out_of_memory():
    """Full ep 4 with copies: sharding them was simulated to need 49.7 GB (facts of the table)."""
    scenario = build_scenario(PUBLISHED)
    first = find_remedies(scenario, COPIES, 85 * GB)[0]
    assert first.words == "--expert_dp shard"
    assert first.verdict.peak_bytes == scenario.predict(SHARED).peak_bytes
    assert first.verdict.peak_bytes == pytest.approx(49.7 * GB, rel=0.1)
