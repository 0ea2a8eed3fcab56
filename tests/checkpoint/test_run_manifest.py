"""Every value of a run's manifest that is read later has its type, or one sentence names it."""

import copy

import pytest

from megablocks_utils.checkpoint.manifest import describe_file, write_manifest
from megablocks_utils.checkpoint.run_manifest import adapters_of, read_run_manifest
from megablocks_utils.errors import CheckpointError

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "expert_ranks": {"down_proj": 4}}
GOOD = {
    "step": 3,
    "world_size": 2,
    "mesh": {"dp": 1, "ep": 2},
    "train_runtime_s": 1.5,
    "options": {"model": {"model_name_or_path": "someone/model"}, "seed": 42},
    "continuity": {
        "model_type": "mixtral",
        "global_batch": 16,
        "seed": 42,
        "shuffle": True,
        "num_examples": 100,
        "data_sha256": "ab" * 32,
        "dtypes": {"weights": "float32", "optim": "float32"},
        "lora": LORA,
        "base_sha256": "cd" * 32,
        "expert_quantization": "nf4",
    },
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / ".metadata").write_text("abc")
    return tmp_path


def write(folder, contents):
    write_manifest(folder, contents, {".metadata": describe_file(folder / ".metadata")})


def test_what_this_and_earlier_versions_write_is_read(folder):
    write(folder, GOOD)
    assert adapters_of(read_run_manifest(folder)) == LORA
    earlier = copy.deepcopy(GOOD)
    del earlier["continuity"]["base_sha256"]
    earlier["continuity"]["lora"] = None
    write(folder, earlier)
    assert adapters_of(read_run_manifest(folder)) is None


def places_in(contents, place=()):
    """Return where every value is that must have its own type."""
    for name, value in contents.items():
        if (*place, name) in {("options", "seed"), ("options",)}:
            continue
        yield (*place, name)
        if isinstance(value, dict):
            yield from places_in(value, (*place, name))


PLACES = [*places_in(GOOD), ("options",), ("options", "model", "model_name_or_path")]
OPTIONAL = {("continuity", "base_sha256"), ("continuity", "expert_quantization")}
NULLABLE = {("continuity", "lora")} | OPTIONAL
GONE = object()
FREE = {("mesh", "dp"), ("mesh", "ep"), ("continuity", "lora", "expert_ranks", "down_proj")}
FREE |= {("continuity", "dtypes", name) for name in ("weights", "optim")}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(place))
def test_a_value_of_another_type_is_named(folder, place):
    def mutate(value):
        contents = copy.deepcopy(GOOD)
        parent = contents
        for name in place[:-1]:
            parent = parent[name]
        if value is GONE:
            del parent[place[-1]]
        else:
            parent[place[-1]] = value
        write(folder, contents)

    *parents, last = place
    good = GOOD
    for name in place:
        good = good[name]
    values = [GONE, None, [], [1], {"x": 1}, "x", True, -1.5, 10**30]
    for value in values:
        is_allowed = (
            (value is GONE and place in FREE | OPTIONAL)
            or (value is None and place in NULLABLE)
            or (isinstance(good, str) and isinstance(value, str))
            or (isinstance(good, bool) and isinstance(value, bool))
            or (place[-1] == "target_modules" and value == [])
            or (place[-1] == "lora_alpha" and value == 10**30)
            or (place[-1] in ("mesh", "expert_ranks") and value == {"x": 1})
        )
        mutate(value)
        if is_allowed:
            read_run_manifest(folder)
            continue
        with pytest.raises(CheckpointError) as error:
            read_run_manifest(folder)
        message = str(error.value)
        # A wrong object is named by what it lacks.
        assert f"{folder / 'manifest.json'} has " in message and ", wanted is " in message
        assert value == {"x": 1} or last in message or parents[-1:] == [last]
