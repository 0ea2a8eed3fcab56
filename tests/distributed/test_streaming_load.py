"""What every rank reads and holds while a run's model is filled, from options to first step."""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.config import parse_args
from megablocks_utils.errors import CheckpointError
from megablocks_utils.fsdp import fsdp1, fsdp2
from megablocks_utils.fsdp.fsdp1 import strip_wrappers
from megablocks_utils.mesh.placement import local_tensor
from megablocks_utils.processes.launch import check_environment
from megablocks_utils.processes.start import start_processes
from megablocks_utils.training.loop import build_training_state
from megablocks_utils.training.setup import Setup, build_setup
from megablocks_utils.training.trainer import MoETrainer
from tests.support.argv import keep_last
from tests.support.fsdp1_run import build_setup_and_arguments
from tests.support.parity import Layout, write_examples
from tests.support.reads import LiveBytes, recorded_reads
from tests.support.tiny_models import save_tiny_model

NORM = "model.norm.weight"
FP32 = 4  # bytes of an element in memory
SLACK = 1.05

MODELS: dict[str, dict] = {
    "bf16": {"family": "mixtral", "prepare": lambda model: model.to(torch.bfloat16)},
    "tied": {"family": "qwen3_moe", "tie_word_embeddings": True, "num_hidden_layers": 4},
    # Four ranks get 33, 33, 33 and 32 rows of the embeddings.
    "uneven": {"family": "qwen3_moe", "vocab_size": 131},
    # Fewer experts than ranks: whole ones leave some ranks without rows, in experts and router.
    "2 experts": {"family": "olmoe", "num_experts": 2, "num_experts_per_tok": 1, "fused": True},
}


@dataclass(frozen=True)
class Case:
    """A load: the script, the ranks, the model and further options."""

    script: str
    layout: Layout
    model: str
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Name it."""
        return ", ".join([self.script, str(self.layout), self.model, *self.options])


@dataclass
class Loaded:
    """What a rank saw of its load.

    Attributes:
        weights: gathered, by their names in the transformers model; on rank 0 only.
        num_on_meta: parameters left without memory.
        num_bytes_read: from weight files.
        num_read_twice: reads of what had been read before.
        num_wanted: elements that this rank has a use for.
        num_held: elements that it holds in the end, adapters too.
        num_in_passing: elements that FSDP1 must hold besides, to flatten one unit.
        most_bytes_alive: at once while the model was filled.
    """

    weights: dict[str, torch.Tensor]
    num_on_meta: int
    num_bytes_read: int
    num_read_twice: int
    num_wanted: int
    num_held: int
    num_in_passing: int
    most_bytes_alive: int


CASES = [
    Case("fsdp2", Layout(2, 2), "bf16"),
    Case("fsdp2", Layout(4, 1), "uneven"),
    Case("fsdp2", Layout(4, 2), "tied"),
    Case("fsdp2", Layout(4, 2), "2 experts"),
    Case("fsdp2", Layout(4, 2, "replicate"), "bf16"),
    Case("fsdp2", Layout(4, 4), "uneven"),
    Case("fsdp2", Layout(4, 0), "2 experts"),
    Case("fsdp2", Layout(4, 2), "uneven", ("--use_lora", "all")),
    Case("fsdp1", Layout(2, 2), "bf16"),
    Case("fsdp1", Layout(4, 1), "uneven"),
    Case("fsdp1", Layout(4, 2), "tied"),
    Case("fsdp1", Layout(4, 0), "2 experts"),
    Case("fsdp1", Layout(4, 2), "uneven", ("--use_lora", "all")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and data, each model made once."""
    folder = tmp_path_factory.mktemp("streaming")
    write_examples(folder / "data.json", 8)
    for name, options in MODELS.items():
        options = dict(options)
        save_tiny_model(options.pop("family"), folder / name, **options)
    return folder


def argv_of(case: Case, folder: Path) -> list[str]:
    options = {
        "model_name_or_path": folder / case.model,
        "data_path": folder / "data.json",
        "output_dir": folder / "unused",
        "max_steps": 1,
        "precision": "fp32",
        "verify_kernel": False,  # takes memory of its own, which has its own test
    }
    if case.layout.ep_size:
        options |= {"use_megablocks_sharding": True, "ep_size": case.layout.ep_size}
        if case.script == "fsdp2":
            options |= {"expert_dp": case.layout.expert_dp}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [*words, *case.options]


def load(rank: int, script: str, argv: list[str]) -> Loaded:
    """Build a run up to its first step and look at what its load read and held."""
    with recorded_reads() as reads:
        setup, fill, full_parameters = _prepare(script, argv)
        reads.spans.clear()  # samples of some tensors, for the model's fingerprint
        with LiveBytes() as live:
            model = fill()
    held = {name: local_tensor(p.detach()) for name, p in model.named_parameters()}
    own = {name: local for name, local in held.items() if "lora_" not in name}
    num_own = sum(local.numel() for local in own.values())
    dense = [] if script == "fsdp2" else _dense_sizes(setup)
    num_experts = sum(p.numel() for n, p in own.items() if _is_expert(strip_wrappers(n)))
    num_own_experts = num_experts if setup.sharded else 0
    weights = full_parameters(model)
    return Loaded(
        weights={
            name.replace("base_layer.", ""): weight.clone()
            for name, weight in weights
            if weight is not None and "lora_" not in name
        },
        num_on_meta=sum(local.is_meta for local in own.values()),
        num_bytes_read=reads.num_bytes,
        num_read_twice=len(reads.spans) - len(set(reads.spans)),
        num_wanted=num_own_experts + sum(size for _, size in dense) if dense else num_own,
        num_held=sum(local.numel() for local in held.values()),
        num_in_passing=2 * _largest_unit(dense),
        most_bytes_alive=live.most,
    )


def _prepare(script: str, argv: list[str]) -> tuple[Setup, Callable, Callable]:
    """Return a setup, what wraps and fills its model, and what gathers it again."""
    if script == "fsdp1":
        setup, arguments = build_setup_and_arguments(argv)
        fill = lambda: MoETrainer(setup, arguments, lambda metrics: None).model  # noqa: E731
        return setup, fill, fsdp1.full_parameters
    config = parse_args(keep_last(argv), entry_point="fsdp2")
    launch = check_environment(config)
    setup = build_setup(config, launch, start_processes(launch))
    return setup, lambda: build_training_state(setup).model, fsdp2.full_parameters


def _is_expert(name: str) -> bool:
    return bool(re.search(r"\.experts\.(gate_up|down)_proj$", name))


def _dense_sizes(setup: Setup) -> list[tuple[str, int]]:
    """Return name and elements of what FSDP1 flattens."""
    return [
        (name, math.prod(shape))
        for name, shape, _ in setup.parameter_specs
        if setup.sharded is None or not _is_expert(name)
    ]


def _largest_unit(sizes: list[tuple[str, int]]) -> int:
    units: Counter[str] = Counter()
    for name, size in sizes:
        layer = re.match(r"model\.layers\.\d+", name)
        units[layer[0] if layer else "the rest"] += size
    return max(units.values(), default=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rank_reads_and_holds_its_own_part(pools, folder, case):
    ranks = pools[case.layout.world_size].run(load, case.script, argv_of(case, folder))
    index = open_checkpoint(folder / case.model)
    stored = index.dtype(NORM).itemsize
    largest = max(math.prod(index.shape(key)) for key in index) * stored
    model = AutoModelForCausalLM.from_pretrained(folder / case.model, dtype=torch.float32)
    expected = dict(model.named_parameters())
    assert list(ranks[0].weights) == list(expected)
    for name, weight in ranks[0].weights.items():
        assert weight.dtype == torch.float32 and torch.equal(weight, expected[name]), name
    for rank in ranks:
        assert rank.num_on_meta == rank.num_read_twice == 0
        assert rank.num_bytes_read == rank.num_wanted * stored
        bound = SLACK * FP32 * rank.num_held + largest + FP32 * rank.num_in_passing
        assert rank.most_bytes_alive <= bound
    if case.layout.expert_dp == "shard" and case.script == "fsdp2":
        assert sum(rank.num_bytes_read for rank in ranks) == index.total_bytes


def meet_error(rank: int, script: str, argv: list[str]) -> str:
    try:
        _prepare(script, argv)[1]()
    except CheckpointError as error:
        return str(error)
    return "it was filled"


@pytest.mark.parametrize("script", ["fsdp2", "fsdp1"])
def test_a_bad_value_that_one_rank_reads_ends_all(pools, folder, tmp_path, script):
    save_tiny_model("olmoe", tmp_path / "bad", sharded=False)
    file, key = (
        tmp_path / "bad" / "model.safetensors",
        "model.layers.1.mlp.experts.3.up_proj.weight",
    )
    tensors = load_file(file)
    tensors[key][95, 63] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "data.json").write_bytes((folder / "data.json").read_bytes())
    argv = argv_of(Case(script, Layout(4, 4), "bad"), tmp_path)
    answers = pools[4].run(meet_error, script, argv)
    assert answers == [f"{key} in {file} holds 1 non-finite value"] * 4
