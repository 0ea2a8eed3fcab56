"""The table of tiles: small, within the hardware's limits, a function of powers of two alone."""

import json
from dataclasses import replace
from itertools import product

import pytest

from megablocks_utils.kernels.fused.shared_memory import SHARED_LIMIT_BYTES, shared_bytes
from megablocks_utils.kernels.fused.tile import KINDS, Tile, TileTable
from megablocks_utils.kernels.fused.tiles import (
    FEW_ROWS,
    bucket_of,
    choose_tile,
    choose_tiles,
    list_candidates,
    name_architecture,
)

COMBINATIONS = list(product(SHARED_LIMIT_BYTES, (2, 4), KINDS))


@pytest.mark.parametrize(("arch", "itemsize", "kind"), COMBINATIONS)
def test_every_tile_fits(arch, itemsize, kind):
    tiles = list_candidates(kind, arch=arch, itemsize=itemsize)
    assert 2 <= len(set(tiles)) == len(tiles) <= 4
    # Persistent programs are what a search tries, and never what runs unmeasured.
    assert [t for t in tiles if t.programs_per_processor] == list(tiles[3:])
    for tile in tiles:
        assert shared_bytes(kind, tile, itemsize) <= SHARED_LIMIT_BYTES[arch], tile
        sides = (tile.block_m, tile.block_n, tile.block_k)
        assert all(side >= 16 and bucket_of(side) == side for side in sides), tile
        # The accumulators, one number of 4 bytes a thread and register, leave half of 255 free.
        numbers = tile.block_m * tile.block_n * (2 if kind == "up" else 1)
        assert numbers / (32 * tile.num_warps) <= 128, tile


def test_shared_memory_is_what_triton_allocates():
    """Of a plain kernel, compiled for sm_90 with Triton 3.9: bytes as its metadata has them."""
    assert shared_bytes("linear", Tile(128, 128, 64, 8, 4), 2) == 131072
    assert shared_bytes("linear", Tile(128, 256, 64, 8, 4), 2) == 196608
    assert shared_bytes("up", Tile(128, 128, 64, 8, 4), 2) == 196608
    assert shared_bytes("up", Tile(64, 128, 64, 8, 4), 2) == 163840
    assert shared_bytes("skinny", Tile(128, 32, 128, 4, 3), 2) == 122880
    # Rows are looked up: with 5 and 7 of Triton's stages.
    assert shared_bytes("weight_grad", Tile(128, 256, 64, 8, 3), 2) == 148480
    assert shared_bytes("weight_grad", Tile(128, 128, 64, 8, 4), 2) == 132608
    # Persistent programs, which have room for results besides, with adapters of rank 64.
    assert shared_bytes("up", Tile(128, 128, 64, 8, 4, True, 1), 2) == 229440
    assert shared_bytes("linear", Tile(128, 256, 64, 8, 4, True, 1), 2) == 221216


def test_a_result_larger_than_the_operands_counts():
    assert shared_bytes("weight_grad", Tile(128, 256, 16, 8, 1), 2) == 128 * 256 * 2


@pytest.mark.parametrize(
    ("rows", "bucket"), [(0, 1), (1, 1), (2, 2), (3, 2), (4095, 2048), (4096, 4096), (4097, 4096)]
)
def test_buckets(rows, bucket):
    assert bucket_of(rows) == bucket


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_bucket_of_rows_counts(kind):
    def choose(rows, num_experts=8):
        return choose_tile(kind, arch="sm_90", itemsize=2, rows=rows, num_experts=num_experts)

    edge = 8 * FEW_ROWS
    few, many, *_ = list_candidates(kind, arch="sm_90", itemsize=2)
    assert choose(0) == choose(1) == choose(edge - 1) == few
    assert choose(edge) == choose(edge + 1) == choose(2 * edge - 1) == choose(100 * edge) == many
    # 512 rows for each of 6 experts lie within a bucket: all of it takes what its start takes.
    assert choose(2048, 6) == choose(6 * FEW_ROWS, 6) == choose(4095, 6) == few
    assert choose(4096, 6) == many


@pytest.mark.parametrize(
    ("rows", "num_experts", "name"),
    [(512, 1, "few"), (1023, 1, "few"), (2048, 1, "few"), (4096, 8, "many"), (4095, 1, "few"),
     (8192, 1, "many"), (4096, 1, "many")],
)  # fmt: skip
def test_a_tile_must_make_a_program_for_every_processor(rows, num_experts, name):
    """Of 128 rows and 256 of Qwen3-30B's 2048 columns: 8 programs for every 128 rows."""
    few, many, *_ = list_candidates("linear", arch="sm_90", itemsize=2)
    sizes = {"arch": "sm_90", "itemsize": 2, "rows": rows, "num_experts": num_experts}
    table = choose_tiles(**sizes, num_cols={"linear": 2048}, num_processors=132)
    assert table.linear == {"few": few, "many": many}[name]
    # Gradients of weights are cut by columns; nothing is known of the others.
    others = choose_tiles(**sizes)
    assert replace(table, linear=others.linear) == others and others.linear == many


def test_few_rows_take_half_high_tiles():
    sizes = {"itemsize": 2, "num_experts": 8}
    for arch, kind in product(SHARED_LIMIT_BYTES, ("up", "linear", "skinny", "act_backward")):
        few, many = (choose_tile(kind, arch=arch, rows=n, **sizes) for n in (64, 2**16))
        assert (few.block_m, many.block_m) == (64, 128)


def test_the_table_of_all_kinds():
    sizes = {"arch": "sm_80", "itemsize": 2, "rows": 12345, "num_experts": 4}
    table = choose_tiles(**sizes)
    assert {kind: getattr(table, kind) for kind in KINDS} == {
        kind: choose_tile(kind, **sizes) for kind in KINDS
    }


def test_the_interpreter_has_one_tile_of_each_kind():
    for kind, itemsize in product(KINDS, (2, 4)):
        tile = choose_tile(kind, arch="interpret", itemsize=itemsize, rows=9, num_experts=4)
        assert list_candidates(kind, arch="interpret", itemsize=itemsize) == (tile,)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        (None, "interpret"),
        *(((8, minor), arch) for minor, arch in ((0, "sm_80"), (6, "sm_86"), (9, "sm_86"))),
        *(((8, 7), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((12, 0), "sm_86")),
    ],
)
def test_architectures_by_shared_memory(capability, arch):
    assert name_architecture(capability) == arch


TABLE = choose_tiles(arch="sm_90", itemsize=2, rows=2**16, num_experts=8)


def test_round_trip():
    table = TileTable.from_json(json.loads(json.dumps(TABLE.as_json())))
    assert table == TABLE and hash(table) == hash(TABLE)
    assert table != replace(TABLE, up=replace(TABLE.up, num_stages=9))
    walk = replace(TABLE, up=replace(TABLE.up, programs_per_processor=2))
    assert TileTable.from_json(walk.as_json()) == walk
    older = TABLE.as_json()
    del older["up"]["programs_per_processor"]
    assert TileTable.from_json(older) == TABLE


@pytest.mark.parametrize(
    "spoil",
    [
        lambda payload: payload.pop("up"),
        lambda payload: payload.update(other=payload["up"]),
        lambda payload: payload["up"].pop("num_warps"),
        lambda payload: payload["up"].update(block_m=0),
        lambda payload: payload["up"].update(block_m="128"),
        lambda payload: payload["up"].update(block_m=True),
        lambda payload: payload["up"].update(programs_per_processor=-1),
        lambda payload: payload["weight_grad"].update(programs_per_processor=1),
    ],
)
def test_tables_that_are_none(spoil):
    payload = TABLE.as_json()
    spoil(payload)
    with pytest.raises(ValueError):
        TileTable.from_json(payload)
