"""mypy leaves unannotated functions alone in these files, for the sake of Triton's kernels."""

import ast
from pathlib import Path

from megablocks_utils.kernels import fused


def test_everything_but_kernels_is_annotated():
    for path in Path(fused.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            if any(ast.unparse(by).startswith("triton.jit") for by in node.decorator_list):
                continue
            names = [*node.args.args, *node.args.kwonlyargs]
            bare = [arg.arg for arg in names if arg.annotation is None]
            assert set(bare) <= {"self", "cls"}, (path.name, node.name, bare)
            assert node.returns is not None, (path.name, node.name)
