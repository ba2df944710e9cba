"""Matrix products of a training step: recorded, counted and run alone."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def random_matrix(rows: int, columns: int, transposed: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random (rows, columns), column-major if transposed."""
    shape = (columns, rows) if transposed else (rows, columns)
    x = torch.randn(shape, device=device).to(dtype)
    return x.mT if transposed else x


class Products(TorchDispatchMode):
    """Context that records the matrix products of linear layers, forward and backward, but not those of attention."""

    def __init__(self):
        super().__init__()
        self.seen: Counter = Counter()  # (M, K, N, first transposed, second transposed, dtype) -> count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            self.seen[*a.shape, b.shape[1], a.stride(0) == 1, b.stride(0) == 1, a.dtype] += 1
        return func(*args, **(kwargs or {}))

    @property
    def flops(self) -> int:
        """Floating-point operations of all recorded products."""
        return sum(2 * m * k * n * count for (m, k, n, *_), count in self.seen.items())

    def step(self, device: torch.device) -> Callable[[dict], None]:
        """Function of a batch, which it ignores, that computes all recorded products on random matrices."""
        pairs = [
            (random_matrix(m, k, first, dtype, device), random_matrix(k, n, second, dtype, device), count)
            for (m, k, n, first, second, dtype), count in self.seen.items()
        ]

        def multiply(_: dict) -> None:
            for a, b, count in pairs:
                for _ in range(count):
                    torch.mm(a, b)

        return multiply
