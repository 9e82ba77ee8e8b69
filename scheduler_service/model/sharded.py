"""Products, norms and embeddings of which each rank has a part of the weight.

What products and embeddings give is the same on every rank.
"""

import torch
import torch.nn.functional as F

from quartet.kernels.cpu.linear import Linear
from quartet.kernels.cpu.native import library as native
from quartet.kernels.cpu.native.quantized import QuantizedWeight
from quartet.scheduler_service.host.parallel import Parallel


class ReducedLinear(Linear):
    """A product whose weight has some of the columns: the ranks' results are summed, in float32 on a CPU."""

    is_whole = False

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, quantized: QuantizedWeight | None, parallel: Parallel
    ) -> None:
        """`bias`: on one of the ranks only, so that it counts once."""
        super().__init__(weight, bias, quantized)
        self.parallel = parallel

    def __call__(self, x: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        """With what adapters add: of these, too, each rank has a part."""
        return self.product(x, gelu)

    def product(self, x: torch.Tensor, gelu: bool) -> torch.Tensor:
        """The whole product, with what adapters add: the same on every rank."""
        assert not gelu
        if not self.has_kernel:
            part = super().product(x, gelu)
            if self.adapters is not None:
                self.adapters.add(self, x, part)
            return self.parallel.sum(part)
        part = x.new_empty(len(x), len(self.weight), dtype=torch.float32)
        super().multiply_native(x, part, "float")
        return self.parallel.sum(part).to(x.dtype)

    def multiply_native(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        output: str,
        activation: str = "silu",
        norm: native.NormWeight | None = None,
    ) -> None:
        """As the whole layer does; only sums to a residual stream ask for it."""
        assert output == "add" and norm is None, output
        out.add_(self(x))


class GatheredLinear(Linear):
    """A language-model head whose weight has some of the tokens: the ranks' logits are put side by side."""

    is_whole = False

    def __init__(self, weight: torch.Tensor, quantized: QuantizedWeight | None, parallel: Parallel) -> None:
        super().__init__(weight, None, quantized)
        self.parallel = parallel

    def write(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """The logits of all tokens into `out` (rows, vocab)."""
        part = x.new_empty(len(x), len(self.weight), dtype=out.dtype)
        super().write(x, part)
        self.parallel.gather(part, out)


def norm_over_ranks(x: torch.Tensor, weight: torch.Tensor, epsilon: float, parallel: Parallel) -> torch.Tensor:
    """A root-mean-square norm over the columns of all ranks: x (tokens, size) and weight are this rank's part.

    Where several ranks have the same part, as heads of keys, all parts have as many copies, and the mean is the same.
    """
    squares = parallel.sum(x.float().square().sum(1, keepdim=True))
    scale = torch.rsqrt(squares / (x.shape[1] * parallel.size) + epsilon)
    return (x.float() * scale * weight.float()).to(x.dtype)


def rows_of(ids: torch.Tensor, table: torch.Tensor | QuantizedWeight) -> torch.Tensor:
    """Rows of a table: (tokens, hidden)."""
    return table.read(ids.long()) if isinstance(table, QuantizedWeight) else F.embedding(ids, table)


def look_up(ids: torch.Tensor, table: torch.Tensor | QuantizedWeight, parallel: Parallel) -> torch.Tensor:
    """Rows of a table of which each rank has an equal part: (tokens, hidden)."""
    length = table.rows if isinstance(table, QuantizedWeight) else len(table)
    own = ids - parallel.rank * length
    here = (own >= 0) & (own < length)
    rows = rows_of(torch.where(here, own, 0), table)
    return parallel.sum(rows.masked_fill(~here.unsqueeze(1), 0))
