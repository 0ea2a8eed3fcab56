"""What a piece of code allocates, operator by operator."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestResult(TorchDispatchMode):
    """Watch every operator, also of the backward pass, for the largest tensor it makes.

    Attributes:
        num_elements: of the largest result that is not a view of what was there.
    """

    num_elements = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None):
        """Run the operator and look at its results."""
        results = operator(*args, **(kwargs or {}))
        known = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor) and _storage(result) not in known:
                self.num_elements = max(self.num_elements, result.numel())
        return results


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
