"""Compare a family's run with stock: loss, every gradient, what is stored, what PEFT reads."""

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from tests.families.run import Seen, train_family
from tests.families.stock import (
    Step,
    is_random_in_training,
    load_peft,
    load_stock,
    load_whole,
    plain_name,
    read_examples,
    step_stock,
)
from tests.support.compare import relative_error
from tests.support.rank_pool import RankError, RankPool
from tests.support.tiny_families import save_tiny

__all__ = ["Row", "Verdict", "check_family", "train_options"]

TOLERANCE = 1e-5
NUM_EXAMPLES = 4
# A gradient that is zero but for rounding: the norm of others is 1e-3 and more.
NO_GRADIENT = 1e-7


class Verdict:
    """What a family's run has come to."""

    WORKS = "works"
    REFUSED = "refused"
    WRONG = "wrong"
    FAILS = "fails"
    NOT_BUILT = "not built"


@dataclass(frozen=True)
class Row:
    """What is known of a family.

    Attributes:
        family: by transformers' name.
        verdict: of `Verdict`.
        why: the sentence of a refusal, what is wrong, or how near it is to stock.
        experts: what its experts are.
        batches: how examples share a micro-batch.
        lora: whether an adapter equals PEFT's, or why not.
    """

    family: str
    verdict: str
    why: str
    experts: str = ""
    batches: str = ""
    lora: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether it is neither right nor refused."""
        return self.verdict in (Verdict.WRONG, Verdict.FAILS) or self.lora.startswith("wrong")


@dataclass(frozen=True)
class Ground:
    """Where a family's files are.

    Attributes:
        model: the folder that transformers has saved.
        data: the examples of a step.
        output: of the run that trains all weights.
        axes: sizes of axes besides ep and dp, by their options.
    """

    model: Path
    data: Path
    output: Path
    axes: Mapping[str, int] = field(default_factory=dict)


def check_family(
    pool: RankPool,
    family: str,
    folder: Path,
    *,
    with_lora: bool = True,
    train: Callable[..., Seen] = train_family,
    axes: Mapping[str, int] | None = None,
) -> Row:
    """Train a step of a tiny model on the ranks of a pool, compare it, and say how it went.

    Args:
        pool: of two ranks, times the sizes of further axes.
        family: by transformers' name.
        folder: where models and runs are kept.
        with_lora: whether an adapter is trained, too.
        train: what the ranks run.
        axes: sizes of further axes of the mesh, by their options.
    """
    files = (folder / family, folder / "data.json", folder / f"{family}-trained")
    ground = Ground(*files, axes or {})
    if not ground.data.exists():
        write_examples(ground.data)
    examples = read_examples(ground.data)
    try:
        save_tiny(family, ground.model)
        stock = load_stock(ground.model)
        draws = is_random_in_training(stock, examples)
        wanted = step_stock(stock.eval() if draws else stock, examples)
    except Exception as error:  # noqa: BLE001 - whatever transformers raises: it is not our run
        return Row(family, Verdict.NOT_BUILT, f"transformers alone: {_one_line(error)}")
    try:
        seen = pool.run(train, train_options(ground), draws=draws, timeout=240)[0]
    except RankError as error:
        return Row(family, Verdict.FAILS, _last_line(error))
    if seen.refusal:
        return Row(family, Verdict.REFUSED, _without_paths(seen.refusal, folder))
    faults = [*find_faults(seen, wanted, ground, draws=draws), *find_lost(seen, ground)]
    verdict = Verdict.WRONG if faults else Verdict.WORKS
    lora = check_lora(pool, ground, draws=draws) if with_lora else ""
    return Row(family, verdict, "; ".join(faults), seen.experts, seen.batches, lora)


def find_faults(seen: Seen, wanted: Step, ground: Ground, *, draws: bool) -> Iterator[str]:
    """Yield how a step differs from stock's by more than rounding does."""
    errors = dict(_errors(seen.step, wanted))
    if not any(error > TOLERANCE for error in errors.values()):
        return
    model = load_stock(ground.model, torch.float64)
    exact = step_stock(model.eval() if draws else model, read_examples(ground.data))
    ours, stocks = dict(_errors(seen.step, exact)), dict(_errors(wanted, exact))
    far = {name: e for name, e in ours.items() if e > max(TOLERANCE, 2 * stocks.get(name, 0.0))}
    if far:
        worst = max(far, key=far.__getitem__)
        yield f"{worst} differs by {far[worst]:.1e} ({len(far)} do)"


def _errors(seen: Step, wanted: Step) -> Iterator[tuple[str, float]]:
    yield "loss", abs(seen.loss - wanted.loss) / wanted.loss
    yield "gradient norm", abs(seen.grad_norm - wanted.grad_norm) / wanted.grad_norm
    for name, gradient in wanted.gradients.items():
        ours = seen.gradients.get(name)
        if ours is None:
            yield name, 0.0 if gradient.norm() < NO_GRADIENT else float("inf")
            continue
        if len(ours) < len(gradient) and not gradient[len(ours) :].any():
            gradient = gradient[: len(ours)]  # rows that nothing is computed with
        if gradient.norm() < NO_GRADIENT:
            yield name, float(ours.norm() > NO_GRADIENT)
        elif ours.shape == gradient.shape:
            yield name, relative_error(ours, gradient)
        else:
            yield name, float("inf")


def find_lost(seen: Seen, ground: Ground) -> Iterator[str]:
    """Yield what the written model has otherwise than it was trained, or than it was before."""
    before, after = (set(stored_keys(path)) for path in (ground.model, ground.output))
    if lost := sorted(before ^ after):
        yield f"stored otherwise: {lost[0]} ({len(lost)} tensors)"
        return
    trained = {plain_name(name): weight for name, weight in seen.weights.items()}
    old = load_whole(ground.model).state_dict()
    changed, whole = 0, load_whole(ground.output)
    for name, weight in whole.state_dict().items():
        if name in whole.all_tied_weights_keys:
            continue  # the same as another
        wanted = trained.get(plain_name(name), old[name])
        changed += not torch.equal(weight, old[name])
        if not torch.equal(weight[: len(wanted)] if wanted.dim() else weight, wanted):
            yield f"{name} is not stored as it was trained"
            return
    if not changed:
        yield "nothing was trained"


def check_lora(pool: RankPool, ground: Ground, *, draws: bool) -> str:
    """Train an adapter, and compare the next step with what PEFT makes of the file."""
    adapter = ground.output.with_name(f"{ground.model.name}-adapter")
    lora = {"use_lora": "all", "lora_r": 4, "lora_alpha": 8}
    first = train_options(ground, **lora, output_dir=adapter, learning_rate=1e-2)
    resumed = {"resume_adapter": adapter, "output_dir": adapter.with_name("unused")}
    second = train_options(ground, use_lora="all", **resumed, overwrite_output_dir=True)
    try:
        for argv in (first, second):
            seen = pool.run(train_family, argv, draws=draws, timeout=240)[0]
            if seen.refusal:
                return f"refused: {_without_paths(seen.refusal, ground.model.parent)}"
    except RankError as error:
        return f"wrong: {_last_line(error)}"
    try:
        model = load_peft(ground.model, adapter)
        wanted = step_stock(model.eval() if draws else model, read_examples(ground.data))
    except Exception as error:  # noqa: BLE001 - PEFT or transformers: not our run
        return f"PEFT cannot: {_one_line(error)}"
    pairs = ((seen.step.loss, wanted.loss), (seen.step.grad_norm, wanted.grad_norm))
    error = max(abs(ours - theirs) / theirs for ours, theirs in pairs)
    return "equal" if error < TOLERANCE * 5 else f"wrong: loss or norm differs by {error:.1e}"


def train_options(ground: Ground, **more: object) -> list[str]:
    """Return the options of a run of one step: two examples on each of two ranks.

    Ranks that share rows have the same ones; those of slices of experts have one each.
    """
    options = {
        "model_name_or_path": ground.model,
        "data_path": ground.data,
        "output_dir": ground.output,
        "max_steps": 1,
        "per_device_train_batch_size": 2 // ground.axes.get("expert_tp_size", 1),
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "precision": "fp32",
        "report_to": "none",
        "use_megablocks_sharding": True,
        "ep_size": 2,
    }
    options |= {**ground.axes, **more}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def write_examples(path: Path) -> None:
    """Write token records, some of whose first labels are not learned."""
    generator = random.Random(0)
    examples = []
    for length in (19, 13, 7, 16)[:NUM_EXAMPLES]:
        tokens = [generator.randrange(3, 128) for _ in range(length)]
        prompt = generator.randrange(4)
        examples.append({"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]})
    path.write_text(json.dumps(examples))


def stored_keys(folder: Path) -> Iterator[str]:
    """Yield the names of all tensors in a folder's files."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            yield from file.keys()


def _last_line(error: RankError) -> str:
    report = error.reports[min(error.reports)]
    lines = [line for line in report.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (named or lines)[-1][:300]


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _without_paths(sentence: str, folder: Path) -> str:
    return sentence.replace(f"{folder}/", "")
