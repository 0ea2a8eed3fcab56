"""Bugs planted in the kernels one at a time, and the test that each is caught by.

    PYTHONPATH=. python -m tests.kernels.fused.planted_bugs

copies the package and its tests aside, plants a bug, runs the kernels' tests until one fails, and
prints a Markdown table. Not part of the suite: it takes minutes. The suite checks that each can
still be planted.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
KERNELS = Path("megablocks_utils/kernels/fused")
TESTS = tuple(
    f"tests/kernels/fused/test_{of}.py"
    for of in ("codes", "tile_walk", "adamw", "unpermute", "kernels", "fused_experts")
)
TIMEOUT_S = 1200


@dataclass(frozen=True)
class Bug:
    """Replace some text, which stands exactly once in a file."""

    what: str
    file: str
    right: str
    wrong: str

    def plant(self, root: Path) -> None:
        """Change the file below `root`."""
        path = root / KERNELS / self.file
        text = path.read_text()
        assert text.count(self.right) == 1, f"{self.what}: {text.count(self.right)} places"
        path.write_text(text.replace(self.right, self.wrong))


BUGS = (
    Bug(
        "persistent: the last tile is skipped", "row_gemm.py", "listed[2], 0)", "listed[2], 0) - 1"
    ),
    Bug(
        "persistent: later tiles are computed by many programs",
        "gate_up.py",
        "tl.program_id(0), tl.num_programs(0)",
        "tl.program_id(0), 1",
    ),
    Bug(
        "persistent: the first tile after an expert's last counts as that expert's",
        "tile_walk.py",
        "(tiles_end <= tile)",
        "(tiles_end < tile)",
    ),
    Bug(
        "persistent: groups of row tiles do not begin with their expert",
        "tile_walk.py",
        "swizzle(tile - first_tile, num_tiles_m, num_tiles_n, GROUP_M)",
        "swizzle(tile, num_tiles_m, num_tiles_n, GROUP_M)",
    ),
    Bug(
        "persistent: the epilogue stays with the first tile",
        "row_gemm.py",
        "            finished += step\n",
        "",
    ),
    Bug(
        "persistent: the epilogue takes the former tile's offsets",
        "gate_up.py",
        "(listed, finished, ",
        "(listed, tl.maximum(finished - step, 0), ",
    ),
    Bug(
        "persistent: every part of a wide tile is stored as its first",
        "row_gemm.py",
        "tile_n * BLOCK_N + i * size)",
        "tile_n * BLOCK_N)",
    ),
    Bug(
        "persistent: an adapter of more ranks than one step has is cut off",
        "kernel_launch.py",
        "num_rows <= MAX_BLOCK_RANK",
        "num_rows <= 2 * MAX_BLOCK_RANK",
    ),
    Bug("row tiles of later groups are lost", "device_code.py", "first_m + within %", "within %"),
    Bug(
        "a tile begins at its expert's end",
        "device_code.py",
        "(tile_m - tiles_end + tiles)",
        "(tile_m - tiles_end)",
    ),
    Bug(
        "mask of rows: one of the next expert's too",
        "device_code.py",
        "rows < tl.sum(",
        "rows <= tl.sum(",
    ),
    Bug(
        "mask of the sum: last element left out",
        "device_code.py",
        "mask = mask & (k < num_k)[None, :]",
        "mask = mask & (k < num_k - 1)[None, :]",
    ),
    Bug(
        "partial sum dropped: last step of the product",
        "device_code.py",
        "range(0, num_k, BLOCK_K)",
        "range(0, num_k - BLOCK_K, BLOCK_K)",
    ),
    Bug(
        "partial sum dropped: ranks past the first block",
        "device_code.py",
        "range(0, adapter[2], BLOCK_R)",
        "range(0, BLOCK_R, BLOCK_R)",
    ),
    Bug(
        "descriptor ignores the expert",
        "weight_tile.py",
        "w.load([expert * num_cols + first_col, first_k])",
        "w.load([first_col, first_k])",
    ),
    Bug(
        "bf16 is cut off instead of rounded",
        "rounding.py",
        "(bits + 0x7FFF + ((bits >> 16) & 1))",
        "(bits)",
    ),
    Bug(
        "gate and up swapped",
        "gate_up.py",
        "gate, up = gate.to(tl.float32), up.to(tl.float32)",
        "gate, up = up.to(tl.float32), gate.to(tl.float32)",
    ),
    Bug(
        "gate and up swapped in what is kept",
        "gate_up.py",
        "tl.store(gate_up_out_ptr + 2 * row_starts + cols[None, :], gate, mask=mask)",
        "tl.store(gate_up_out_ptr + 2 * row_starts + cols[None, :], up, mask=mask)",
    ),
    Bug(
        "interleaved up taken for gate",
        "row_gemm.py",
        "gate, up = split_pairs(",
        "up, gate = split_pairs(",
    ),
    Bug(
        "interleaved up taken for gate in backward",
        "gate_code.py",
        "gate, up = split_pairs(",
        "up, gate = split_pairs(",
    ),
    Bug(
        "gradients of interleaved gate and up swapped",
        "gate_code.py",
        "tl.interleave(by_gate, by_up)",
        "tl.interleave(by_up, by_gate)",
    ),
    Bug(
        "interleaved: last pair of a row is lost",
        "row_gemm.py",
        "pairs < num_pairs",
        "pairs < num_pairs - 1",
    ),
    Bug(
        "adapter of up takes gate's columns",
        "gate_up.py",
        "rows, exists, up_cols, is_col, BLOCK_R)",
        "rows, exists, gate_cols, is_col, BLOCK_R)",
    ),
    Bug(
        "up is not clamped below",
        "gate_code.py",
        "limit_above(tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL), LIMIT)",
        "limit_above(up, LIMIT)",
    ),
    Bug(
        "the limit is on the wrong side",
        "gate_code.py",
        "return tl.minimum(x, LIMIT,",
        "return tl.maximum(x, LIMIT,",
    ),
    Bug(
        "NaN is cut off to the limit",
        "gate_code.py",
        "return tl.minimum(x, LIMIT, propagate_nan=tl.PropagateNan.ALL)",
        "return tl.minimum(x, LIMIT)",
    ),
    Bug(
        "GPT-OSS's one is added to all clamped ups",
        "gate_code.py",
        'if CLAMP == "gpt_oss":\n        up += 1.0',
        'if CLAMP != "none":\n        up += 1.0',
    ),
    Bug(
        "a clamp after the activation comes before it",
        "gate_code.py",
        "    result = activate(gate, ACTIVATION, ALPHA)\n"
        '    if CLAMP == "after":\n        result = limit_above(result, LIMIT)\n',
        "    result = activate(limit_above(gate, LIMIT) if CLAMP == 'after' else gate, "
        "ACTIVATION, ALPHA)\n",
    ),
    Bug(
        "mask of columns left out of the gate's results",
        "gate_up.py",
        "mask = exists[:, None] & is_col[None, :]",
        "mask = exists[:, None] & (cols < num_cols - 1)[None, :]",
    ),
    Bug(
        "partial sum dropped: router's gradient of the first part",
        "gate_backward.py",
        "part += backward_through_gate(",
        "part = backward_through_gate(",
    ),
    Bug(
        "other parts read the first part's columns",
        "gate_backward.py",
        "*(parts[i], first_col + i * size, ",
        "*(parts[i], first_col, ",
    ),
    Bug(
        "partial sum dropped: router's gradient of other column tiles",
        "gate_backward.py",
        "partial.sum(dim=0)",
        "partial[0]",
    ),
    Bug(
        "gradients of gate and up swapped",
        "gate_code.py",
        "tl.store(grad_gate_up_ptr + 2 * row_starts + gate_cols, by_gate, mask=mask)",
        "tl.store(grad_gate_up_ptr + 2 * row_starts + gate_cols, by_up, mask=mask)",
    ),
    Bug(
        "alpha left out of the gate's derivative",
        "gate_code.py",
        "x_slope = ALPHA * x",
        "x_slope = x",
    ),
    Bug("GELU is one of a line, not of a cube", "gate_code.py", "0.07135481282655572", "0.0"),
    Bug("GELU's derivative: three left out", "gate_code.py", "+ 3.0 * cubic", "+ cubic"),
    Bug(
        "relu squared's derivative: two left out",
        "gate_code.py",
        "factor * (2.0 * positive)",
        "factor * positive",
    ),
    Bug(
        "squared without relu in backward",
        "gate_code.py",
        "        result = positive * positive\n        slope",
        "        result = x * x\n        slope",
    ),
    Bug(
        "clamp of gates forgotten in backward",
        "gate_code.py",
        "differentiate_activation(limited_gate, limited_up",
        "differentiate_activation(gate, limited_up",
    ),
    Bug(
        "clamp of ups forgotten in backward",
        "gate_code.py",
        "differentiate_activation(limited_gate, limited_up",
        "differentiate_activation(limited_gate, up",
    ),
    Bug(
        "clamp after the activation forgotten in backward",
        "gate_code.py",
        "        by_up = limit_above(by_up, LIMIT)\n",
        "",
    ),
    Bug(
        "clamp after the activation: slope ends where the gate reaches the limit",
        "gate_code.py",
        "inside_gate = by_up <= LIMIT",
        "inside_gate = gate <= LIMIT",
    ),
    Bug(
        "clamped ups get a gradient",
        "gate_code.py",
        "tl.where((up >= -LIMIT) & (up <= LIMIT), by_up, 0.0)",
        "by_up",
    ),
    Bug(
        "no gate: rows of the activation's inputs are read 2 * I apart",
        "gate_code.py",
        "up = tl.load(gate_up_out_ptr + row_starts + cols[None, :]",
        "up = tl.load(gate_up_out_ptr + 2 * row_starts + cols[None, :]",
    ),
    Bug(
        "no gate: rows of their gradients are written 2 * I apart",
        "gate_code.py",
        "tl.store(grad_gate_up_ptr + row_starts + cols[None, :], by_up",
        "tl.store(grad_gate_up_ptr + 2 * row_starts + cols[None, :], by_up",
    ),
    Bug(
        "no gate: no activation",
        "row_gemm.py",
        'if ACTIVATION != "none":',
        'if ACTIVATION == "all":',
    ),
    Bug(
        "no gate: what is kept is the activation's result",
        "row_gemm.py",
        "tl.store(gate_up_out_ptr + places, out, mask=mask)",
        "tl.store(gate_up_out_ptr + places, activate(out.to(tl.float32), ACTIVATION, ALPHA)"
        ".to(dtype), mask=mask)",
    ),
    Bug(
        "no gate: tokens are read as if they were sorted",
        "fused_experts.py",
        "        gather=True,\n        lora=lora,",
        "        gather=routing.order is None,\n        lora=lora,",
    ),
    Bug(
        "no gate: bias left out",
        "fused_experts.py",
        "        bias=bias,\n        layout=",
        "        layout=",
    ),
    Bug(
        "clamped gates get a gradient",
        "gate_code.py",
        "tl.where(inside_gate, by_gate, 0.0)",
        "by_gate",
    ),
    Bug(
        "router's gradient is weighted",
        "gate_code.py",
        "part = tl.sum(tl.where(mask, grad * result, 0.0), 1)",
        "part = tl.sum(tl.where(mask, grad * result * tl.load(weight_ptr + routed, mask=exists, "
        "other=0.0).to(tl.float32)[:, None], 0.0), 1)",
    ),
    Bug(
        "results are not weighted for the weights' gradients",
        "gate_code.py",
        "        result *= weight\n",
        "",
    ),
    Bug(
        "rows are read by slot instead of by token",
        "row_gemm.py",
        "routed // TOP_K if GATHER",
        "routed if GATHER",
    ),
    Bug(
        "results stay in expert order",
        "row_gemm.py",
        "routed if SCATTER else rows.to(tl.int64)",
        "rows.to(tl.int64)",
    ),
    Bug(
        "bias of expert 0 for all",
        "row_gemm.py",
        "bias_ptr + expert.to(tl.int64) * num_cols + cols",
        "bias_ptr + cols",
    ),
    Bug("scale left out", "row_gemm.py", "    acc *= scale\n", ""),
    Bug(
        "partial sum dropped: shares after the first",
        "weight_grad.py",
        "out.copy_(sums.sum(dim=0))",
        "out.copy_(sums[0])",
    ),
    Bug(
        "shares begin at the same row",
        "weight_grad.py",
        "        start += split * share\n",
        "",
    ),
    Bug(
        "shares do not end",
        "weight_grad.py",
        "end = tl.minimum(end, start + share)",
        "end = end",
    ),
    Bug(
        "the ancestor's: every column tile writes to the first one's place",
        "weight_grad.py",
        "tile // num_tiles_x * BLOCK_N + tl.arange(0, BLOCK_N)",
        "tl.arange(0, BLOCK_N)",
    ),
    Bug(
        "the gradient of stored-transposed weights is not",
        "weight_grad.py",
        "sums.mT.stride() if is_transposed else",
        "sums.stride() if is_transposed else",
    ),
    Bug(
        "mask of columns left out on the right side",
        "weight_grad.py",
        "(cols_y < num_y)[None, :],",
        "(cols_y < num_y + 1)[None, :],",
    ),
    Bug(
        "only a token's first slot counts",
        "combine.py",
        "routed = token * TOP_K + slot",
        "routed = token * TOP_K",
    ),
    Bug(
        "sums in the dtype of the rows",
        "combine.py",
        "        acc += row\n",
        "        acc = round_to(acc + row, out_ptr.dtype.element_ty, INTERPRET).to(tl.float32)\n",
    ),
    Bug(
        "gradients of a token's rows with its first slot's weight",
        "combine_backward.py",
        "grad[None, :] * weights[:, None]",
        "grad[None, :] * tl.sum(tl.where(slots == 0, weights, 0.0))",
    ),
    Bug(
        "only the last tile of columns counts in the weights' gradients",
        "combine_backward.py",
        "products += rows * grad[None, :]",
        "products = rows * grad[None, :]",
    ),
    Bug(
        "the weights' gradients from rows in the order of tokens",
        "combine_backward.py",
        "rows = tl.load(rows_ptr + at,",
        "rows = tl.load(rows_ptr + (routed[:, None] * num_cols + cols[None, :]),",
    ),
    Bug(
        "rows of any number a token with the gradient of another token",
        "combine_backward.py",
        "token = tl.load(token_ptr + token)",
        "token = tl.load(token_ptr + tl.minimum(token, 1))",
    ),
    Bug(
        "codes: halves of a byte the other way round",
        "matrices.py",
        "high_is_first=self.high_is_first",
        "high_is_first=not self.high_is_first",
    ),
    Bug(
        "codes: another table", "matrices.py", "weight_format.table)", "weight_format.table * 1.01)"
    ),
    Bug(
        "codes: a block's neighbour's scale",
        "weight_tile.py",
        "blocks[None, :],",
        "1 - blocks[None, :],",
    ),
    Bug(
        "codes: scales of the first output",
        "weight_tile.py",
        "outs.to(tl.int64) * strides[3]",
        "outs.to(tl.int64) * 0",
    ),
    Bug(
        "codes: scales of the first expert",
        "weight_tile.py",
        "expert.to(tl.int64) * strides[2]",
        "expert.to(tl.int64) * 0",
    ),
    Bug(
        "codes: the first block's for all of a row",
        "weight_tile.py",
        "first_in // CODE_BLOCK +",
        "0 *",
    ),
    Bug(
        "codes: the last bytes of a row left out",
        "weight_tile.py",
        "(2 * places < num_in)",
        "(2 * places < num_in - 8)",
    ),
    Bug(
        "codes: backward loads them as forward does",
        "weight_tile.py",
        "*(w, strides, expert, first_k, first_col, num_k, num_cols, dtype)",
        "*(w, strides, expert, first_col, first_k, num_cols, num_k, dtype)",
    ),
    Bug(
        "codes: numbers are not rounded",
        "weight_tile.py",
        "return round_to(tl.reshape(in_blocks, (HIGH, WIDE)), dtype, INTERPRET)",
        "return tl.reshape(in_blocks, (HIGH, WIDE))",
    ),
    Bug(
        "codes: experts that are not there are counted",
        "matrices.py",
        "part[:num_experts]",
        "part[1:]",
    ),
    Bug(
        "A's gradient without the scaling",
        "projection.py",
        "scale=self.scaling,",
        "scale=1.0,",
    ),
    Bug(
        "the bias's part of the router's gradient is lost",
        "fused_experts.py",
        "return weight_grads + by_row.squeeze(1)",
        "return weight_grads",
    ),
    Bug(
        "tokens are not kept where only B is trained",
        "fused_experts.py",
        "return weight or lora_a or lora_b\n",
        "return weight or lora_a\n",
    ),
    Bug(
        "both moments rounded with the same bits",
        "adamw.py",
        "exists, square, moments >> 16",
        "exists, square, moments & 0xFFFF",
    ),
    Bug(
        "both halves rounded with the same bits",
        "adamw.py",
        "bits[2 * half], bits[2 * half + 1]",
        "bits[0], bits[1]",
    ),
    Bug("weight decay left out", "adamw.py", "weight * kept_weight - ", "weight - "),
    Bug(
        "a carry makes NaN a number",
        "adamw.py",
        "tl.where(value == value, rounded",
        "tl.where(True, rounded",
    ),
)


def catch(bug: Bug) -> str | None:
    """Return the name of the first test that fails with a bug; None where all pass.

    A bug that reads or writes beyond a tensor may end the process: then the test that it was in.
    """
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder in ("megablocks_utils", "tests"):
            shutil.copytree(ROOT / folder, root / folder)
        shutil.copy(ROOT / "pyproject.toml", root)
        bug.plant(root)
        command = [sys.executable, "-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", *TESTS]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    if done.returncode == 0:
        return None
    tests = re.findall(r"^tests/\S+::(.+?) (?:FAILED|ERROR|PASSED|$)", done.stdout, re.MULTILINE)
    failed = re.search(r"^tests/\S+::(.+?) (?:FAILED|ERROR)", done.stdout, re.MULTILINE)
    if failed:
        return failed.group(1)
    return f"{tests[-1] if tests else 'import'} (ends the process)"


def main(argv: Sequence[str]) -> int:
    """Plant the bugs whose description contains a word given, or all; 1 if one is not caught."""
    chosen = [bug for bug in BUGS if not argv or any(word in bug.what for word in argv)]
    write = sys.stdout.write
    write("| planted in | bug | caught by |\n|---|---|---|\n")
    escaped = 0
    for bug in chosen:
        test = catch(bug)
        escaped += test is None
        write(f"| `{bug.file}` | {bug.what} | {f'`{test}`' if test else '**nothing**'} |\n")
        sys.stdout.flush()
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
