"""Cases, and the systems that each compares."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.end_to_end.contenders import PACKED, PEFT, TRAINER
from benchmarks.end_to_end.drive import SCRIPT
from benchmarks.end_to_end.settings import Case, build_arguments
from benchmarks.end_to_end.systems import SystemSpec
from benchmarks.harness.workload import Workload
from megablocks_utils.config import parse_args
from megablocks_utils.training.data.examples import load_examples
from megablocks_utils.training.data.schedule import Schedule

OURS, OURS_EP1, BASELINE = "ours", "ours, ep 1", "baseline"


def list_cases(ranks: Iterable[int], precision: str) -> list[Case]:
    """Return the cases on these numbers of ranks: all weights, and adapters everywhere."""
    return [
        Case(size, size, use_lora, precision=precision)
        for size in ranks
        for use_lora in ("none", "all")
    ]


def build_systems(
    case: Case, workload: Workload, folder: Path, tree: Path | None, *, max_steps: int
) -> list[SystemSpec]:
    """Return the systems of a case, ours first.

    Under LoRA on the experts transformers' own expert parallelism fails, so PEFT has every expert
    on every rank; its adapters start from other random numbers, so only its first loss is the same.
    """

    def describe(name: str, kind: str = SCRIPT, ep_size: int = case.ep_size) -> SystemSpec:
        output = "".join(letter for letter in f"{name}-{case.label()}" if letter.isalnum())
        one = replace(case, ep_size=ep_size)
        argv = build_arguments(one, workload, folder, output=output, max_steps=max_steps)
        return SystemSpec(name, argv, kind)

    systems = [describe(OURS)]
    if case.ep_size > 1:
        systems.append(describe(OURS_EP1, ep_size=1))
    if tree is not None:
        systems.append(replace(describe(BASELINE), tree=tree))
    if case.use_lora == "none":
        systems.append(describe("transformers, our packed rows", PACKED))
        systems.append(describe("transformers, Trainer", TRAINER))
    else:
        peft = describe("PEFT, experts on every rank", PEFT)
        systems.append(replace(peft, compares_later_steps=False))
    return systems


def count_tokens(argv: Sequence[str], world_size: int) -> list[int]:
    """Return the input tokens of each step of a run, all ranks."""
    config = parse_args(argv, entry_point="fsdp2")
    examples = load_examples(config.data, None)
    schedule = Schedule(config, examples, 0, world_size)
    return [step.num_input_tokens for _, step in schedule.plans()]
