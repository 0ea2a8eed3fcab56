"""What the manifest of a run's checkpoint says besides its files, checked name by name."""

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from megablocks_utils.checkpoint.json_file import JsonObject, show_value
from megablocks_utils.checkpoint.manifest import read_manifest
from megablocks_utils.errors import CheckpointError
from megablocks_utils.processes.output_folder import MANIFEST_NAME

__all__ = ["BASE_FOLDER_KEY", "BASE_KEY", "COMPATIBILITY_KEY", "DATE_KEY"]
__all__ += ["STREAM_KEY", "adapters_of", "read_run_manifest"]

COMPATIBILITY_KEY = "continuity"
"""Of what a resumed run must share with the one that wrote the manifest, in format 1."""
BASE_KEY = "base_sha256"
"""Within it: fingerprint of the model that adapters were trained on; earlier versions had none."""
DATE_KEY = "template_date"
"""Within it: the day that a chat template was told; null for one that does not ask for it."""

BASE_FOLDER_KEY = "base"
"""Of the folder of the model that was trained, and of how many of its tensors are not in the
checkpoint and belong to the model; earlier versions did not say it."""

STREAM_KEY = "stream"
"""Of how far data that is read while training was read; only there for such data."""

_LEAST_SEED = -(2**63)
_LONGEST_RUN_S = 1e10


def read_run_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint of a run, with everything in it that is read later.

    Raises:
        CheckpointError: as `read_manifest`, or it lacks something or has it in another type.
    """
    manifest = read_manifest(folder)
    contents = JsonObject(folder / MANIFEST_NAME, manifest)
    contents.whole_number("world_size", minimum=1)
    contents.number("train_runtime_s", maximum=_LONGEST_RUN_S)
    mesh = contents.section("mesh")
    for axis in mesh.values:
        mesh.whole_number(axis, minimum=1)
    if BASE_FOLDER_KEY in manifest:
        base = contents.section(BASE_FOLDER_KEY)
        base.text("folder")
        base.whole_number("num_passed_through")
    options, facts = contents.section("options"), contents.section(COMPATIBILITY_KEY)
    _check_facts(facts)
    if STREAM_KEY in manifest or facts.values.get("streaming"):
        position = contents.section(STREAM_KEY)
        for name in ("epoch", "records", "examples"):
            position.whole_number(name)
    if "lora" in facts:
        _check_adapters(facts.section("lora"))
        options.section("model").text("model_name_or_path")
    return manifest


def adapters_of(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the `LoraSettings` of the run that wrote a manifest; None where all was trained."""
    return manifest[COMPATIBILITY_KEY]["lora"]


def _check_facts(facts: JsonObject) -> None:
    for name in ("model_type", "data_sha256"):
        facts.text(name)
    facts.whole_number("seed", minimum=_LEAST_SEED)
    facts.whole_number("num_examples")
    facts.whole_number("global_batch", minimum=1)
    facts.flag("shuffle")
    dtypes = facts.section("dtypes")
    for name in dtypes.values:
        dtypes.text(name)
    facts.optional("lora")
    if BASE_KEY in facts:
        facts.text(BASE_KEY)
    if DATE_KEY in facts:
        _check_day(facts)


def _check_day(facts: JsonObject) -> None:
    day = facts.text(DATE_KEY)
    try:
        date.fromisoformat(day)
    except ValueError as error:
        raise CheckpointError(
            f"{facts.path} has {DATE_KEY} {show_value(day)}, wanted is a day as 2026-11-30"
        ) from error


def _check_adapters(lora: JsonObject) -> None:
    lora.whole_number("r", minimum=1)
    lora.number("lora_alpha")
    lora.texts("target_modules")
    for name in ("target_weights", "router_weights"):
        if name in lora:
            lora.texts(name)
    ranks = lora.section("expert_ranks")
    for name in ranks.values:
        ranks.whole_number(name, minimum=1)
