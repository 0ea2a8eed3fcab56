"""Formats against slow definitions, tables and other programs; what they take and how far off."""

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megablocks_utils.config.quantization import BLOCKS, QUANTIZATIONS, count_packed_bytes
from megablocks_utils.quantization import packed_experts
from megablocks_utils.quantization.format_table import FORMATS, round_to_format
from megablocks_utils.quantization.nf4 import NF4_VALUES
from megablocks_utils.quantization.packing import pack_all
from megablocks_utils.quantization.weight_format import MatrixCut, keep_parts, unpack

SHAPES = [(5, 7), (130, 200), (192, 64)]
# Of normal numbers: of a block of 64, 32 or 256, the largest is about 2.4, 2.1 or 2.9 sigma.
ERRORS = {"nf4": 0.093, "int8": 0.008, "fp8": 0.028, "mxfp4": 0.12}
MOST_BYTES = {"nf4": 0.53, "int8": 1.02, "fp8": 1.001, "mxfp4": 0.54}


def _draw(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * 0.02


def test_every_choice_is_a_format():
    assert ("none", *FORMATS) == QUANTIZATIONS
    assert {name: weight_format.block for name, weight_format in FORMATS.items()} == BLOCKS


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_are_those_that_are_described_and_counted(name, shape):
    matrix = _draw(*shape)
    parts = FORMATS[name].pack(matrix)
    described = FORMATS[name].describe_parts(*shape)
    seen = {n: (tuple(p.shape), p.dtype) for n, p in parts.items()}
    assert seen == {n: (layout.shape, layout.dtype) for n, layout in described.items()}
    assert sum(part.nbytes for part in parts.values()) == count_packed_bytes(name, *shape)
    # A row's numbers are its own: not those of a neighbour, of another block or of the padding.
    error = (round_to_format(matrix, FORMATS[name]) - matrix).norm() / matrix.norm()
    assert error < ERRORS[name] * 1.1
    zeros = torch.zeros(shape)
    assert torch.equal(round_to_format(zeros, FORMATS[name]), zeros)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ([range(512)], range(256, 512)),
        ([range(128, 256), range(384, 512)], range(768)),  # of gate and of up
        ([range(512)], range(768)),
    ],
)
def test_a_cut_stands_for_the_numbers_of_the_whole(name, rows, columns):
    """Also where scales of scales go from row to row; and shards of its rows take what is said."""
    matrix, own = _draw(512, 768), FORMATS[name]
    cut = MatrixCut(rows, columns, *matrix.shape)
    parts = own.pack(matrix)
    kept = {n: part[None] for n, part in keep_parts(own, parts, cut).items()}
    wanted = round_to_format(matrix, own)[:, columns.start : columns.stop]
    wanted = torch.cat([wanted[run.start : run.stop] for run in rows])
    assert torch.equal(unpack(own, kept, len(columns))[0], wanted)
    num_slices = matrix.numel() // wanted.numel()
    counted = count_packed_bytes(
        name, len(wanted) // 2, len(columns), num_slices=num_slices, num_shards=2
    )
    for shard in range(2):
        held = keep_parts(own, parts, cut._replace(shard=shard, num_shards=2))
        assert sum(part.nbytes for part in held.values()) == counted


@pytest.mark.parametrize("name", FORMATS)
def test_error_and_bytes(name):
    matrix = _draw(256, 1024)
    rounded = round_to_format(matrix, FORMATS[name])
    assert (rounded - matrix).norm() / matrix.norm() < ERRORS[name]
    assert count_packed_bytes(name, 1536, 2048) <= MOST_BYTES[name] * 1536 * 2048


@pytest.mark.parametrize("name", FORMATS)
def test_each_block_has_its_own_scale(name):
    """Blocks differ in size 16 times, so that no other block's scale would do."""
    high, wide = FORMATS[name].block
    sizes = 4.0 ** torch.tensor([[0, 1, 2], [1, 2, 0]])
    spread = sizes.repeat_interleave(high, 0).repeat_interleave(wide, 1)
    matrix = _draw(*spread.shape) * spread
    error = round_to_format(matrix, FORMATS[name]) - matrix
    for row in range(2):
        for column in range(3):
            where = (
                slice(row * high, (row + 1) * high),
                slice(column * wide, (column + 1) * wide),
            )
            assert error[where].norm() < 2 * ERRORS[name] * matrix[where].norm()


def test_nf4_is_the_nearest_of_the_table_in_each_block():
    """Scales come out of 8 bits, so they are compared up to what these lose."""
    matrix = _draw(4, 128)
    blocks = matrix.view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    wanted = NF4_VALUES[(blocks[..., None] / scales[..., None] - NF4_VALUES).abs().argmin(-1)]
    codes = FORMATS["nf4"].pack(matrix)["codes"].view(-1, 32)
    first, second = NF4_VALUES[(codes >> 4).int()], NF4_VALUES[(codes & 15).int()]
    assert torch.equal(torch.stack([first, second], dim=2).flatten(1), wanted)
    rounded = round_to_format(matrix, FORMATS["nf4"]).view(-1, 64)
    assert torch.allclose(rounded, wanted * scales, rtol=0.01, atol=0)


def test_mxfp4_is_read_by_transformers_and_keeps_what_is_stored_so():
    parts = FORMATS["mxfp4"].pack(_draw(64, 96))
    blocks = parts["codes"].view(1, 64, 3, 16)
    wanted = convert_moe_packed_tensors(blocks, parts["exponents"][None], dtype=torch.float32)[0].T
    rounded = round_to_format(_draw(64, 96), FORMATS["mxfp4"])
    assert torch.equal(rounded, wanted)
    assert torch.equal(round_to_format(rounded, FORMATS["mxfp4"]), rounded)


@pytest.mark.parametrize(
    ("value", "wanted"), [(0.25, 0.0), (0.75, 1.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0), (7.0, 6.0)]
)
def test_mxfp4_rounds_ties_to_even_and_never_overflows(value, wanted):
    matrix = torch.tensor([[value, 6.0]])
    assert round_to_format(-matrix, FORMATS["mxfp4"])[0, 0] == -wanted


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_some_rows_or_experts_at_a_time_are_as_all_at_once(name, is_transposed, monkeypatch):
    """Rows end inside a block of fp8, and blocks of nf4's scales go from row to row."""
    weights = torch.randn(3, 300, 130, generator=torch.Generator().manual_seed(0))
    weights = weights.mT.contiguous() if is_transposed else weights
    packed = pack_all(name, weights, is_transposed=is_transposed)
    whole = unpack(FORMATS[name], packed.parts, 130)
    wanted = whole.mT if is_transposed else whole
    for at_a_time in (1, 7 * 130, 2 * 300 * 130):
        monkeypatch.setattr(packed_experts, "count_unpacked", lambda _, n=at_a_time: n)
        assert torch.equal(packed.dequantize_some(0, 3), wanted)
        assert torch.equal(packed.dequantize_some(1, 3), wanted[1:])
