"""What may stand between the product of queries, keys and values and their rotation, in torch."""

from collections.abc import Callable

import torch

from quartet.scheduler_service.model.layers import Attention, Norm

Normed = Callable[[torch.Tensor, Norm | None], torch.Tensor]


def arranged(projected: torch.Tensor, attention: Attention, normed: Normed) -> torch.Tensor:
    """Queries, keys and values (tokens, width): the first two normed, in the order of the rotation.

    `normed` is the backend's. The order is that of Attention.pair_order.
    """
    spec = attention.spec
    if attention.query_norm is not None or attention.key_norm is not None:
        query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        queries, keys, values = projected.split((query, key, key), dim=1)
        if not attention.norms_all_heads:
            queries, keys = queries.unflatten(1, (-1, spec.head_dim)), keys.unflatten(1, (-1, spec.head_dim))
        # fused kernels read rows one behind the other
        queries = normed(queries.contiguous(), attention.query_norm)
        keys = normed(keys.contiguous(), attention.key_norm)
        projected = torch.cat((queries.flatten(1), keys.flatten(1), values), dim=1)
    return projected if attention.pair_order is None else projected.index_select(1, attention.pair_order)
