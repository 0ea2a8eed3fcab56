"""What Accelerate's launcher sets: each setting is honoured, or refused by name.

Torch-free. `accelerate launch` hands its configuration to the script in the environment, where
Accelerate reads part of it, this project sets part of it itself, and the rest would silently do
nothing. A table says of every setting what it may be.
"""

import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from megablocks_utils.config import RunConfig
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError

__all__ = ["check_accelerate_settings", "check_layer_classes"]

_YES, _NO = ("true", "1", "yes", "y", "t", "on"), ("false", "0", "no", "n", "f", "off", "none")
_FSDP_FILE = "FSDP is set up by this script"
_RESHARD = "weights are let go after the forward pass and gathered again"
_LAYERS = "every decoder layer becomes one FSDP unit"
_OFFLOAD = "--cpu_offload says what lies in host memory"
_COMPILE = "--compile True compiles what can be compiled here, the dense parts of the layers"
_MESH = "--ep_size and --expert_dp give the mesh"
_DTYPES = "dtypes come from --precision"


@dataclass(frozen=True)
class _Setting:
    """Say what a setting may be.

    Attributes:
        name: as Accelerate's configuration file has it.
        allowed: the words it may be, in small letters; any other is refused.
        reason: why.
    """

    name: str
    allowed: tuple[str, ...]
    reason: str

    def check(self, value: str) -> None:
        if value.strip().lower() in self.allowed:
            return
        wanted = "not be set"
        if self.allowed in (_NO, _YES):
            wanted = f"be {self.allowed[0]}"
        elif self.allowed:
            wanted = f"be {join_words(self.allowed)}"
        seen = value.strip() or "empty"
        raise ConfigurationError(
            f"{self.name} is {seen} in Accelerate's configuration, but it must {wanted}, since "
            f"{self.reason}."
        )


_SETTINGS = {
    "ACCELERATE_MIXED_PRECISION": _Setting("mixed_precision", ("no",), _DTYPES),
    "ACCELERATE_DOWNCAST_BF16": _Setting("downcast_bf16", _NO, _DTYPES),
    "XLA_USE_BF16": _Setting("XLA_USE_BF16", _NO, _DTYPES),
    "XLA_DOWNCAST_BF16": _Setting("downcast_bf16", _NO, _DTYPES),
    "ACCELERATE_DYNAMO_BACKEND": _Setting("dynamo_backend", ("no",), _COMPILE),
    "ACCELERATE_USE_DEEPSPEED": _Setting("use_deepspeed", _NO, "FSDP shards the model"),
    "ACCELERATE_USE_MEGATRON_LM": _Setting("use_megatron_lm", _NO, "FSDP shards the model"),
    **{
        f"PARALLELISM_CONFIG_{axis}_SIZE": _Setting(
            f"parallelism_config_{axis.lower()}_size", ("1",), _MESH
        )
        for axis in ("TP", "CP", "SP", "DP_REPLICATE")
    },
    "ACCELERATE_USE_PARALLELISM_CONFIG": _Setting("use_parallelism_config", _NO, _MESH),
    "ACCELERATE_USE_SAGEMAKER": _Setting(
        "ACCELERATE_USE_SAGEMAKER", _NO, "compute_environment must be LOCAL_MACHINE"
    ),
    "ACCELERATE_USE_CPU": _Setting("use_cpu", (*_YES, *_NO), "it is one or the other"),
    "ACCELERATE_USE_IPEX": _Setting("ipex", _NO, "IPEX is not used"),
    "ACCELERATE_USE_XPU": _Setting("use_xpu", _NO, "runs are made on CUDA devices or CPUs"),
    "ACCELERATE_TORCH_DEVICE": _Setting(
        "ACCELERATE_TORCH_DEVICE", (), "LOCAL_RANK says which device a process uses"
    ),
}
_FSDP_SETTINGS = {
    "FSDP_OFFLOAD_PARAMS": _Setting("fsdp_offload_params", _NO, _OFFLOAD),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": _Setting(
        "fsdp_activation_checkpointing_offload", _NO, "activations stay on the devices"
    ),
    "FSDP_AUTO_WRAP_POLICY": _Setting(
        "fsdp_auto_wrap_policy", ("transformer_based_wrap",), _LAYERS
    ),
    "FSDP_STATE_DICT_TYPE": _Setting(
        "fsdp_state_dict_type",
        ("sharded_state_dict", "full_state_dict"),
        "checkpoints are sharded and the final model is whole",
    ),
    "FSDP_USE_ORIG_PARAMS": _Setting(
        "fsdp_use_orig_params", _YES, "frozen and trained parameters share a layer"
    ),
    "FSDP_IGNORED_MODULES": _Setting("fsdp_ignored_modules", (), _FSDP_FILE),
    # Both mean that memory is spared and all ranks begin alike, which streamed weights give.
    "FSDP_CPU_RAM_EFFICIENT_LOADING": _Setting(
        "fsdp_cpu_ram_efficient_loading", (*_NO, *_YES), _FSDP_FILE
    ),
    "FSDP_SYNC_MODULE_STATES": _Setting("fsdp_sync_module_states", (*_NO, *_YES), _FSDP_FILE),
}
_PREFETCHES = ("backward_pre", "backward_post", "no_prefetch")
_OF_ENTRY_POINT = {
    "fsdp1": {
        "FSDP_VERSION": _Setting(
            "fsdp_version", ("1",), "train_fsdp1.py runs FSDP1 (train_accelerate_fsdp2.py FSDP2)"
        ),
        "FSDP_SHARDING_STRATEGY": _Setting(
            "fsdp_sharding_strategy",
            ("full_shard", "shard_grad_op", "1", "2"),
            "dense weights are sharded over all ranks",
        ),
        "FSDP_RESHARD_AFTER_FORWARD": _Setting(
            "fsdp_reshard_after_forward", _YES, "under FSDP1 fsdp_sharding_strategy says it"
        ),
        "FSDP_BACKWARD_PREFETCH": _Setting(
            "fsdp_backward_prefetch", (*_PREFETCHES, "1", "2"), _FSDP_FILE
        ),
        "FSDP_FORWARD_PREFETCH": _Setting("fsdp_forward_prefetch", (*_NO, *_YES), _FSDP_FILE),
    },
    "fsdp2": {
        "FSDP_VERSION": _Setting(
            "fsdp_version", ("2",), "train_accelerate_fsdp2.py runs FSDP2 (train_fsdp1.py FSDP1)"
        ),
        "FSDP_RESHARD_AFTER_FORWARD": _Setting(
            "fsdp_reshard_after_forward", (*_YES, "full_shard"), _RESHARD
        ),
        "FSDP_SHARDING_STRATEGY": _Setting("fsdp_sharding_strategy", ("full_shard", "1"), _RESHARD),
        "FSDP_BACKWARD_PREFETCH": _Setting(
            "fsdp_backward_prefetch", _PREFETCHES[:1], "FSDP2 prefetches in its own way"
        ),
        "FSDP_FORWARD_PREFETCH": _Setting(
            "fsdp_forward_prefetch", _NO, "FSDP2 prefetches in its own way"
        ),
    },
}
_READ_WHERE_EMPTY = "ACCELERATE_MIXED_PRECISION"
"""Accelerate takes it for a dtype even when it is empty."""
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def check_accelerate_settings(
    config: RunConfig, environ: MutableMapping[str, str] = os.environ
) -> None:
    """Refuse what Accelerate's launcher asks for and this project does not do.

    `use_cpu` is honoured here: GPUs are hidden from torch, which must not be imported yet.

    Raises:
        ConfigurationError: naming the setting, its value and what it must be.
    """
    _check_mpi(environ)
    # Also without `ACCELERATE_USE_FSDP`: Accelerate's FSDP plugin reads them wherever they are set.
    settings = _SETTINGS | _FSDP_SETTINGS | _OF_ENTRY_POINT[config.entry_point]
    _check_checkpointing(config, environ)
    for name, setting in settings.items():
        if name in environ and (environ[name].strip() or name == _READ_WHERE_EMPTY):
            setting.check(environ[name])
    _check_number(environ, "gradient_accumulation_steps", config.optim.gradient_accumulation_steps)
    _check_number(environ, "gradient_clipping", config.optim.max_grad_norm)
    if environ.get("ACCELERATE_USE_CPU", "").lower() in _YES:
        environ["CUDA_VISIBLE_DEVICES"] = ""


def check_layer_classes(
    layer_classes: Sequence[str], environ: Mapping[str, str] = os.environ
) -> None:
    """Refuse other FSDP units than the model's decoder layers, once they are known.

    Raises:
        ConfigurationError: naming the setting, its value and what it must be.
    """
    text = environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").strip()
    given = {name.strip() for name in text.split(",")}
    if text and given != set(layer_classes):
        raise ConfigurationError(
            f"fsdp_transformer_layer_cls_to_wrap is {text} in Accelerate's configuration, but it "
            f"must be {','.join(layer_classes)} or not be set, since {_LAYERS}."
        )


def _check_number(environ: Mapping[str, str], name: str, own: float) -> None:
    """Refuse a number of the launcher's that an option gives too, unless they are the same."""
    text = environ.get(f"ACCELERATE_{name.upper()}", "").strip()
    if text.lower() in ("", "auto", "none"):
        return
    option = "max_grad_norm" if name == "gradient_clipping" else name
    try:
        is_same = float(text) == own
    except ValueError:
        is_same = False
    if not is_same:
        raise ConfigurationError(
            f"{name} is {text} in Accelerate's configuration, but --{option} is {own}; leave it "
            f"out there or give --{option} the same."
        )


def _check_checkpointing(config: RunConfig, environ: Mapping[str, str]) -> None:
    asks = environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() in _YES
    if asks and config.gradient_checkpointing == "none":
        raise ConfigurationError(
            "fsdp_activation_checkpointing is true in Accelerate's configuration, but "
            "--gradient_checkpointing is False; leave one of the two out."
        )


def _check_mpi(environ: Mapping[str, str]) -> None:
    """Refuse processes of mpirun that would each take themselves for the whole run."""
    for name in _MPI_SIZES:
        if "RANK" not in environ and environ.get(name, "1").strip() not in ("", "1"):
            raise ConfigurationError(
                f"{name} is {environ[name]}, but processes of mpirun are not connected (as with "
                "mpirun_config in Accelerate's configuration); start with torchrun or accelerate "
                "launch on every machine."
            )
