"""Models, options and scenarios that several tests plan."""

import json
from pathlib import Path

from megablocks_utils.config import parse_args
from megablocks_utils.planning.memory.scenario import Scenario, read_shape
from megablocks_utils.planning.model.gpus import GPUS
from megablocks_utils.planning.model.prediction import COMPONENTS, GroupTraffic, Prediction
from megablocks_utils.planning.speed.traffic_links import Cluster
from tests.support.argv import keep_last

MODELS = Path(__file__).parents[2] / "benchmarks" / "models"
MIXTRAL = MODELS / "mixtral-8x7b" / "config.json"
PUBLISHED = (
    "--max_seq_length 256 --per_device_train_batch_size 1 --gradient_accumulation_steps 16 "
    "--precision bf16"
)
"""The run of the published table: its MoE on 8 A100, pure bf16."""
A100_NODE = Cluster(GPUS["a100-80g"], 8)


def read_model(name):
    return json.loads((MODELS / name / "config.json").read_text())


def build_scenario(line=PUBLISHED, *, model="mixtral-8x7b", world_size=8, entry_point="fsdp2"):
    config = parse_args(keep_last(line.split()), entry_point=entry_point)
    tokens = config.optim.per_device_train_batch_size * config.data.max_seq_length
    return Scenario(
        config=config,
        shape=read_shape(config, read_model(model)),
        world_size=world_size,
        device_type="cuda",
        kernel="grouped_mm",
        tokens=tokens,
        label_tokens=tokens,
        examples=config.optim.per_device_train_batch_size,
    )


def build_prediction(*, allocated_bytes=0, moment="backward", sent=None, groups=None, **components):
    """Build a prediction with some components, all others 0.

    What is sent goes over (ranks, stride) of `groups`, by kind; else over 8 neighbours.
    """
    groups = groups or {}
    return Prediction(
        dict.fromkeys(COMPONENTS, 0) | components,
        moment,
        allocated_bytes,
        tuple(GroupTraffic(k, *groups.get(k, (8, 1)), n) for k, n in (sent or {}).items()),
    )
