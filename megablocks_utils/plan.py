"""Plan a run before it is paid for: `python -m megablocks_utils.plan --help`.

Torch is imported in other processes alone: by the runs of `calibrate`, and to build a model whose
config.json does not say enough.
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from megablocks_utils.byte_units import GIB
from megablocks_utils.config import check_world
from megablocks_utils.config.given import CommandLine
from megablocks_utils.config.parallel import check_heads
from megablocks_utils.config.reader import choose_model
from megablocks_utils.config.record import format_config, format_record, read_recorded_options
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.files import MODEL_CONFIG_NAME, write_json_atomically
from megablocks_utils.planning.launcher.launch_file import build_launch_file
from megablocks_utils.planning.memory.scenario import Scenario, has_rare_adapters, read_shape
from megablocks_utils.planning.model.config_file import (
    find_config_file,
    launch_name,
    read_config_file,
)
from megablocks_utils.planning.model.config_values import KNOWN_MODEL_TYPES
from megablocks_utils.planning.model.described_shape import shape_of
from megablocks_utils.planning.model.gpus import DEFAULT_GPU, GPUS
from megablocks_utils.planning.model.model_shape import ModelShape
from megablocks_utils.planning.model.prediction import (
    ONE_ROW,
    PADDED,
    ParallelLayout,
    PlannedRun,
    Prediction,
)
from megablocks_utils.planning.plan_arguments import PlanArguments
from megablocks_utils.planning.plan_options import (
    PlanOptions,
    build_plan_options,
    read_arguments,
    read_run,
    write_output_file,
)
from megablocks_utils.planning.report.load_table import show_loads
from megablocks_utils.planning.report.plan_chart import draw_plan
from megablocks_utils.planning.report.plan_record import (
    build_plan_record,
    build_scale_record,
    list_assumptions,
)
from megablocks_utils.planning.report.prediction_check import build_check_table, read_run_plan
from megablocks_utils.planning.report.scale_chart import draw_scale
from megablocks_utils.planning.report.tables import build_console, show_plan, show_scale
from megablocks_utils.planning.speed.calibration import Calibration, read_calibration
from megablocks_utils.planning.speed.layout_plan import PlanRequest, choose_row, plan_layouts
from megablocks_utils.planning.speed.scale import plan_scale
from megablocks_utils.planning.speed.traffic_links import Cluster
from megablocks_utils.processes.entry_point import run_entry_point
from megablocks_utils.rehearsal.worker import RehearsalWorker
from megablocks_utils.training.report.expert_load import read_measured_loads

__all__ = ["build_request", "main", "open_model", "plan_world", "plan_worlds", "print_config"]

DOES_NOT_FIT = 3


def main(argv: Sequence[str]) -> None:
    """Answer, and end with 3 where nothing fits.

    Raises:
        HelpRequested: for `--help` or `-h`.
        UserError: for options, a model or a file that cannot be used.
        SystemExit: with 3, where no layout fits.
    """
    if argv and argv[0] == "calibrate":
        from megablocks_utils.planning.calibrate import calibrate

        calibrate(argv[1:])
        return
    own, line = read_arguments(argv)
    if own.check is not None:
        build_console().print(build_check_table(read_run_plan(own.check)))
        return
    if own.print_config:
        sys.stdout.write(print_config(own, line))
        return
    options = build_plan_options(own, line)
    plan = plan_worlds if len(options.world_sizes) > 1 else plan_world
    with open_model(options) as model:
        fits = plan(options, model)
    if not fits:
        sys.exit(DOES_NOT_FIT)


def print_config(own: PlanArguments, line: CommandLine) -> str:
    """Return the options of a run as YAML that `--config` of its script takes.

    Raises:
        ConfigurationError: for options that cannot work, or a run.json that holds none.
    """
    if own.run is not None:
        if line.positional or line.given:
            raise ConfigurationError(
                f"--run is {own.run}, but options of a run are given beside it; give one of the "
                "two."
            )
        return format_record(read_recorded_options(Path(own.run)))
    config, leftovers = read_run(line, own.entry_point)
    if line.positional:
        config = replace(config, model=replace(config.model, model_name_or_path=choose_model(line)))
    return format_config(config, leftovers)


@dataclass(frozen=True)
class PlannedModel:
    """The model of a plan.

    Attributes:
        shape: its sizes.
        packing: how examples of a micro-batch are laid out.
        is_varlen: whether attention takes these one by one, without a mask.
        rehearse: predicts what the formulas do not know of it; None where they know all.
    """

    shape: ModelShape
    packing: str = ONE_ROW
    is_varlen: bool = False
    rehearse: Callable[[ParallelLayout, PlannedRun], Prediction] | None = None


@contextmanager
def open_model(options: PlanOptions) -> Iterator[PlannedModel]:
    """Read a model's config.json; what that does not say, a process finds out that builds it.

    Raises:
        UserError: a model that is not there, or that cannot be built.
    """
    path = find_config_file(options.model)
    settings = read_config_file(path)
    # How transformers splits a model over a tp group, its config does not say; and no formula
    # knows adapters of some parts.
    is_rare = options.config.parallel.tp_size > 1 or has_rare_adapters(options.config.adapter)
    if settings.get("model_type") in KNOWN_MODEL_TYPES and not is_rare:
        packing = PADDED if options.config.optim.packing == "False" else ONE_ROW
        shape = read_shape(options.config, settings)
        yield PlannedModel(shape, packing, options.config.may_be_varlen)
        return
    with (
        TemporaryDirectory() as folder,
        RehearsalWorker(
            Path(folder), truncate_layers=options.config.model.truncate_layers
        ) as worker,
    ):
        shutil.copy(path, Path(folder, MODEL_CONFIG_NAME))
        shape = shape_of(worker.describe())
        packing, is_varlen = worker.choose_packing(options.config)
        yield PlannedModel(shape, packing, is_varlen, worker.rehearse)


def plan_world(options: PlanOptions, model: PlannedModel) -> bool:
    """Plan for one number of GPUs, show and write it; return whether a layout fits.

    Raises:
        UserError: as `build_request`, or a file that cannot be written.
    """
    request, own = build_request(options, model), options.own
    loads = None if own.loads is None else read_measured_loads(own.loads, "loads")
    if loads is not None:
        loads.check(dict.fromkeys(loads.layers, model.shape.num_experts), "loads")
    rows = plan_layouts(request)
    assumptions = _list_assumptions(request, options)
    console = build_console(stderr=own.launcher is not None)
    show_plan(console, request, rows, assumptions)
    if loads is not None:
        show_loads(console, request, rows, loads)
    chosen = choose_row(rows)
    if own.launcher is not None and chosen is not None:
        gpu = None if own.gpu is None else GPUS[own.gpu]
        sys.stdout.write(build_launch_file(own.launcher, request, chosen.layout, gpu))
    if own.json:
        record = build_plan_record(request, rows, asdict(own), assumptions)
        write_output_file("json", own.json, lambda path: write_json_atomically(path, record))
    if own.plot:
        write_output_file("plot", own.plot, lambda path: draw_plan(request, rows, path))
    return chosen is not None


def plan_worlds(options: PlanOptions, model: PlannedModel) -> bool:
    """Plan for several numbers of GPUs, a line each; return whether one of them fits.

    Raises:
        UserError: as `plan_world`.
    """
    request = build_request(options, model)
    points = plan_scale(request, options.world_sizes)
    if not points:
        raise ConfigurationError(
            f"--ep_size is {options.ep_size}, but it divides none of these numbers of GPUs and the "
            f"{request.scenario.shape.num_experts} experts of this model."
        )
    assumptions = _list_assumptions(request, options)
    show_scale(build_console(), request, points, assumptions)
    own = options.own
    if own.json:
        record = build_scale_record(request, points, asdict(own), assumptions)
        write_output_file("json", own.json, lambda path: write_json_atomically(path, record))
    if own.plot:
        series, capacity = {request.model: points}, request.capacity_bytes
        write_output_file("plot", own.plot, lambda path: draw_scale(series, capacity, path))
    return any(point.chosen is not None for point in points)


def build_request(options: PlanOptions, model: PlannedModel) -> PlanRequest:
    """Put together what is asked.

    Raises:
        UserError: an ep_size or number of GPUs that does not fit the model.
    """
    own, config, shape = options.own, options.config, model.shape
    gpu = GPUS[own.gpu or DEFAULT_GPU]
    per_node = own.gpus_per_node or gpu.gpus_per_node
    for world_size in options.world_sizes:
        _check_nodes(world_size, per_node)
        config.count_data_ranks(world_size)
    if shape.attention is not None:
        check_heads([shape.attention.num_heads], config.parallel.sp_size, config.parallel.tp_size)
    if options.ep_size is not None and len(options.world_sizes) == 1:
        check_world(config, options.world_sizes[0], shape.num_experts)
    tokens = config.optim.per_device_train_batch_size * config.row_tokens
    kernel = "grouped_mm" if config.parallel.kernel == "auto" else config.parallel.kernel
    scenario = Scenario(
        config=config,
        shape=shape,
        world_size=options.world_sizes[0],
        device_type="cuda",
        kernel=kernel,
        tokens=tokens,
        label_tokens=tokens,
        examples=max(config.optim.per_device_train_batch_size, 1 + config.has_several_examples),
        packing=model.packing,
        is_varlen=model.is_varlen,
        imbalance=own.imbalance,
        rehearse=model.rehearse,
    )
    memory_gib = own.gpu_mem_gib
    return PlanRequest(
        model=options.model,
        launch_model=launch_name(options.model),
        scenario=scenario,
        cluster=Cluster(gpu, per_node),
        capacity_bytes=gpu.memory_bytes if memory_gib is None else round(memory_gib * GIB),
        words=options.words,
        ep_size=options.ep_size,
        expert_dp=options.expert_dp,
        calibration=_read_calibration(options, scenario),
    )


def _read_calibration(options: PlanOptions, scenario: Scenario) -> Calibration | None:
    path = options.own.calibration
    if path is None:
        return None
    if len(options.world_sizes) > 1:
        raise ConfigurationError(
            f"--calibration is {path}, but seconds are given for the GPUs that were measured only: "
            "--gpus must be one number."
        )
    calibration = read_calibration(path)
    calibration.check_workload(scenario, path)
    return calibration


def _check_nodes(world_size: int, per_node: int) -> None:
    if world_size > per_node and world_size % per_node:
        raise ConfigurationError(
            f"--gpus is {world_size}, but with {per_node} GPUs a node (--gpus_per_node) it must be "
            f"at most {per_node} or a multiple of it."
        )


def _list_assumptions(request: PlanRequest, options: PlanOptions) -> list[str]:
    says = list_assumptions(request, asdict(options.own))
    if options.passed_on:
        says.append(f"Passed on to TrainingArguments unread: {' '.join(options.passed_on)}.")
    return says


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
