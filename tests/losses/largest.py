"""Measures the largest tensor that is created."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Inside ``with LargestTensor() as largest``, `largest.elements` is the size of the largest memory behind a tensor
    that any operation returned, in forward, in backward, and inside a custom function of autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(value):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result
