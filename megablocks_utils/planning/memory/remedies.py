"""What would make a layout fit that does not: one change after the other is predicted again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from megablocks_utils.config import PrecisionConfig, resolve_precision
from megablocks_utils.planning.memory.scenario import Scenario
from megablocks_utils.planning.memory.verdict import FITS, TIGHT, Verdict, judge
from megablocks_utils.planning.model.prediction import ParallelLayout
from megablocks_utils.planning.model.units import format_gb

__all__ = ["Remedy", "find_remedies", "layout_words"]

_MIN_LENGTH, _MAX_GROWTH = 128, 64


class Attempt(NamedTuple):
    """A changed run: its options, and what becomes of scenario and layout with them."""

    words: str
    scenario: Scenario
    layout: ParallelLayout


Change = Callable[[Scenario, ParallelLayout], Iterator[Attempt]]
Chain = dict[Change, str]


@dataclass(frozen=True)
class Remedy:
    """Options that make a layout fit, and the peak with them."""

    words: str
    verdict: Verdict

    def describe(self) -> str:
        """Say both: `--expert_dp shard: 50.9 GB`."""
        tight = ", tight" if self.verdict.name != FITS else ""
        return f"{self.words}: {format_gb(self.verdict.peak_bytes)}{tight}"


def find_remedies(scenario: Scenario, layout: ParallelLayout, capacity_bytes: int) -> list[Remedy]:
    """Try every change alone; where none is enough, one on top of the other.

    Args:
        scenario: the run.
        layout: the one that does not fit.
        capacity_bytes: memory of a device.

    Returns:
        What makes it fit, in the order of how little it changes; empty where nothing tried does.
    """
    alone = (_try_change(change, scenario, layout, capacity_bytes) for change in _CHANGES)
    found = [remedy for remedy in alone if remedy is not None]
    if found:
        return found
    combined = (_combine(scenario, layout, capacity_bytes, goal) for goal in (FITS, TIGHT))
    first = next((remedy for remedy in combined if remedy is not None), None)
    return [] if first is None else [first]


def layout_words(layout: ParallelLayout) -> str:
    """Return the options that ask for a layout."""
    if layout.ep_size == 1 and not layout.is_dmoe:
        return "--use_megablocks_sharding False"
    words = f"--use_megablocks_sharding True --ep_size {layout.ep_size}"
    return f"{words} --expert_dp {layout.expert_dp}"


def _try_change(
    change: Change, scenario: Scenario, layout: ParallelLayout, capacity_bytes: int
) -> Remedy | None:
    """Return the mildest attempt of a change that fits; one that is tight where none does."""
    tight = None
    for attempt in change(scenario, layout):
        remedy = _try(attempt, capacity_bytes)
        if remedy.verdict.name == FITS:
            return remedy
        if remedy.verdict.name == TIGHT and tight is None:
            tight = remedy
    return tight


def _combine(
    scenario: Scenario, layout: ParallelLayout, capacity_bytes: int, goal: str
) -> Remedy | None:
    """Put the strongest attempts of the changes together until they fit, then take back.

    What is not needed is left out, and of what is, the mildest attempt that does is taken.
    """

    def build(chain: Chain) -> Remedy | None:
        remedy = _apply(chain, scenario, layout, capacity_bytes)
        return remedy if remedy is not None and remedy.verdict.name in (FITS, goal) else None

    chain = _strongest_chain(scenario, layout, capacity_bytes, goal)
    for change, words in reversed(chain.items()):  # the later ones change more
        without = {kept: own for kept, own in chain.items() if kept is not change}
        milder = (chain | {change: own} for own in _words_before(change, words, scenario, layout))
        for shorter in (without, *milder):
            if build(shorter) is not None:
                chain = shorter
                break
    return build(chain)


def _strongest_chain(
    scenario: Scenario, layout: ParallelLayout, capacity_bytes: int, goal: str
) -> Chain:
    """Take from each change the attempt with the smallest peak, until they fit together."""
    chain: Chain = {}
    peak = scenario.predict(layout).peak_bytes
    for change in _CHANGES:
        attempts = list(change(scenario, layout))
        tried = [_try(attempt, capacity_bytes) for attempt in attempts]
        best = min(tried, key=lambda remedy: remedy.verdict.peak_bytes, default=None)
        if best is None or best.verdict.peak_bytes >= peak:
            continue
        chain[change], peak = best.words, best.verdict.peak_bytes
        _, scenario, layout = attempts[tried.index(best)]
        if best.verdict.name in (FITS, goal):
            break
    return chain


def _words_before(
    change: Change, words: str, scenario: Scenario, layout: ParallelLayout
) -> Iterator[str]:
    """Yield the words of the attempts of a change that are milder than the named one."""
    for attempt in change(scenario, layout):
        if attempt.words == words:
            return
        yield attempt.words


def _apply(
    chain: Chain, scenario: Scenario, layout: ParallelLayout, capacity_bytes: int
) -> Remedy | None:
    """Make the named attempts one on top of the other; None where one is no longer possible."""
    for change, words in chain.items():
        attempts = (one for one in change(scenario, layout) if one.words == words)
        attempt = next(attempts, None)
        if attempt is None:
            return None
        _, scenario, layout = attempt
    return _try(Attempt(" ".join(chain.values()), scenario, layout), capacity_bytes)


def _try(attempt: Attempt, capacity_bytes: int) -> Remedy:
    prediction = attempt.scenario.predict(attempt.layout)
    verdict = judge(prediction, capacity_bytes, attempt.scenario.device_type)
    return Remedy(attempt.words, verdict)


def _other_expert_dp(scenario: Scenario, layout: ParallelLayout) -> Iterator[Attempt]:
    sharded = replace(layout, expert_dp="shard")
    if layout != sharded and sharded in scenario.legal_layouts():
        yield Attempt("--expert_dp shard", scenario, sharded)


def _other_ep_size(scenario: Scenario, layout: ParallelLayout) -> Iterator[Attempt]:
    """Offer the other sizes, the nearest first."""
    others = [
        other
        for other in scenario.legal_layouts()
        if other.ep_size != layout.ep_size and other.expert_dp in (layout.expert_dp, "shard")
    ]
    for other in sorted(others, key=lambda o: _distance(o.ep_size, layout.ep_size)):
        words = layout_words(other)
        if min(other.ep_size, layout.ep_size) > 1:
            has_own = other.expert_dp == layout.expert_dp
            words = f"--ep_size {other.ep_size}" + ("" if has_own else " --expert_dp shard")
        yield Attempt(words, scenario, other)


def _distance(first: int, second: int) -> float:
    return max(first, second) / min(first, second)


def _checkpointing(scenario: Scenario, layout: ParallelLayout) -> Iterator[Attempt]:
    if scenario.config.gradient_checkpointing != "full":
        config = replace(scenario.config, gradient_checkpointing="full")
        yield Attempt("--gradient_checkpointing True", replace(scenario, config=config), layout)


def _smaller_batch(scenario: Scenario, layout: ParallelLayout) -> Iterator[Attempt]:
    optim = scenario.config.optim
    for size in _halves(optim.per_device_train_batch_size, 1):
        config = replace(scenario.config, optim=replace(optim, per_device_train_batch_size=size))
        smaller = _scale(scenario, size, optim.per_device_train_batch_size)
        smaller = replace(smaller, config=config, examples=_least_examples(scenario, size))
        yield Attempt(f"--per_device_train_batch_size {size}", smaller, layout)


def _shorter(scenario: Scenario, layout: ParallelLayout) -> Iterator[Attempt]:
    data, row_tokens = scenario.config.data, scenario.config.row_tokens
    for length in _halves(row_tokens, _MIN_LENGTH):
        longest = min(length, data.max_seq_length)
        words, packing_length = f"--max_seq_length {longest}", None
        if data.packing_length is not None:
            words, packing_length = f"--packing_length {length} {words}", length
        shorter = replace(data, max_seq_length=longest, packing_length=packing_length)
        config = replace(scenario.config, data=shorter)
        smaller = _scale(scenario, length, row_tokens)
        yield Attempt(words, replace(smaller, config=config), layout)


def _least_examples(scenario: Scenario, batch_size: int) -> int:
    """Return the examples of a smaller micro-batch; a packed row has more than one."""
    least = 1 if scenario.config.data.packing_length is None else 2
    return min(scenario.examples, max(batch_size, least))


def _cpu_offload(scenario: Scenario, layout: ParallelLayout) -> Iterator[Attempt]:
    """Offer host memory, which takes time but changes no number, if it is another memory."""
    if scenario.config.cpu_offload != "none" or scenario.device_type == "cpu":
        return
    has_copies = layout.expert_dp == "replicate" and layout.ep_size < scenario.slice_ranks
    can_offload_params = scenario.config.entry_point == "fsdp2" and not has_copies
    for what in ("optimizer", *(("params",) if can_offload_params else ())):
        config = replace(scenario.config, cpu_offload=what)
        yield Attempt(f"--cpu_offload {what}", replace(scenario, config=config), layout)


def _smaller_dtypes(scenario: Scenario, layout: ParallelLayout) -> Iterator[Attempt]:
    precision = resolve_precision(scenario.config, scenario.device_type)
    if precision.optim == "float32":
        given = replace(scenario.config.precision, optim_dtype="bfloat16")
        yield _with_precision("--optim_dtype bfloat16", scenario, given, layout)
    if precision.adapter == "float32":
        yield _with_precision("--precision bf16", scenario, PrecisionConfig("bf16"), layout)


def _lora(scenario: Scenario, layout: ParallelLayout) -> Iterator[Attempt]:
    if scenario.config.adapter.has_lora:
        return
    adapter = replace(scenario.config.adapter, use_lora="attn-only", lora_target=None)
    optim = replace(scenario.config.optim, sync_each_batch=False)  # the default with adapters
    config = replace(scenario.config, adapter=adapter, optim=optim)
    yield Attempt("--use_lora attn-only", replace(scenario, config=config), layout)


def _more_ranks(scenario: Scenario, layout: ParallelLayout) -> Iterator[Attempt]:
    for power in range(1, _MAX_GROWTH.bit_length()):
        larger = replace(scenario, world_size=scenario.world_size << power)
        if layout in larger.legal_layouts():
            yield Attempt(f"--gpus {larger.world_size}", larger, layout)


def _with_precision(
    words: str, scenario: Scenario, precision: PrecisionConfig, layout: ParallelLayout
) -> Attempt:
    config = replace(scenario.config, precision=precision)
    return Attempt(words, replace(scenario, config=config), layout)


def _scale(scenario: Scenario, new: int, old: int) -> Scenario:
    tokens = max(1, scenario.tokens * new // old)
    return replace(scenario, tokens=tokens, label_tokens=min(scenario.label_tokens, tokens))


def _halves(value: int, minimum: int) -> Iterator[int]:
    while value // 2 >= minimum:
        value //= 2
        yield value


_CHANGES: tuple[Change, ...] = (
    _other_expert_dp,
    _other_ep_size,
    _checkpointing,
    _smaller_batch,
    _shorter,
    _cpu_offload,
    _smaller_dtypes,
    _lora,
    _more_ranks,
)
