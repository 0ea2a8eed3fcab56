"""Write what a run has trained: the model, or its adapter."""

from functools import partial
from itertools import chain
from pathlib import Path

from megablocks_utils.checkpoint.model_folder import WrittenModel, export_model
from megablocks_utils.fsdp.fsdp2 import NamedTensors
from megablocks_utils.fsdp.places import find_buffers
from megablocks_utils.lora.adapter_files import export_adapter
from megablocks_utils.lora.settings import LoraSettings
from megablocks_utils.training.adapter_check import AdapterCheck, build_plain_model
from megablocks_utils.training.resume.run_state import RunState
from megablocks_utils.training.saved_specs import choose_saved_specs
from megablocks_utils.training.setup import Setup

__all__ = ["write_adapter", "write_model"]


def write_model(setup: Setup, state: RunState, tensors: NamedTensors) -> None:
    """Write the model into the output folder, from rank 0.

    **Collective:** every rank must call; `tensors` gathers.
    """
    model = setup.model
    buffers = find_buffers(model)
    specs = [(name, tuple(buffer.shape), buffer.dtype) for name, buffer in buffers.items()]
    export_model(
        WrittenModel(
            setup.reader.layout,
            model.config,
            model.generation_config,
            setup.tokenizer,
            base=setup.reader if setup.config.model.truncate_layers is None else None,
        ),
        choose_saved_specs(setup, state.model, [*setup.parameter_specs, *specs]),
        chain(tensors, buffers.items()),
        Path(setup.config.output_dir),
        is_writer=setup.launch.rank == 0,
    )


def write_adapter(
    setup: Setup, lora: LoraSettings, tensors: NamedTensors, check: AdapterCheck
) -> None:
    """Write the adapter into the output folder, from rank 0, and check it.

    **Collective:** every rank must call; `tensors` gathers.
    """
    export_adapter(
        lora,
        setup.tokenizer,
        tensors,
        Path(setup.config.output_dir),
        generation_config=setup.model.generation_config,
        base_model=partial(build_plain_model, setup),
        base_model_name=setup.config.model.model_name_or_path,
        is_writer=setup.launch.rank == 0,
        weight_format=setup.config.adapter.packed_format,
        check=check,
    )
