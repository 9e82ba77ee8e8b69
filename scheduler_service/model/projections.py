"""What may stand between the product of queries, keys and values and their rotation, in torch."""

from collections.abc import Callable

import torch

from quartet.kernels.reference.layers import rotate
from quartet.scheduler_service.model.batch import PagedAttend
from quartet.scheduler_service.model.layers import Attention, Norm

Normed = Callable[[torch.Tensor, Norm | None], torch.Tensor]


def arranged(projected: torch.Tensor, attention: Attention, normed: Normed) -> torch.Tensor:
    """Queries, keys and values (tokens, width): the first two normed, in the order of the rotation.

    `normed` is the backend's. The order is that of Attention.pair_order.
    """
    spec = attention.spec
    if attention.query_norm is not None or attention.key_norm is not None:
        query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        queries, keys = projected[:, :query], projected[:, query : query + key]
        values = keys if attention.values_from_keys else projected[:, query + key :]
        if not attention.norms_all_heads:
            queries, keys = queries.unflatten(1, (-1, spec.head_dim)), keys.unflatten(1, (-1, spec.head_dim))
        # fused kernels read rows one behind the other
        queries = normed(queries.contiguous(), attention.query_norm)
        keys = normed(keys.contiguous(), attention.key_norm)
        if attention.value_norm is not None:
            values = normed(values.unflatten(1, (-1, spec.head_dim)).contiguous(), attention.value_norm).flatten(1)
        projected = torch.cat((queries.flatten(1), keys.flatten(1), values), dim=1)
    return projected if attention.pair_order is None else projected.index_select(1, attention.pair_order)


def attend_read(
    projected: torch.Tensor,
    attention: Attention,
    rotation: tuple[torch.Tensor, torch.Tensor],
    context: PagedAttend,
    normed: Normed,
) -> torch.Tensor:
    """Attention of queries (tokens, heads * dim) to the keys and values of an earlier layer: the same shape."""
    heads = projected.unflatten(1, (-1, attention.spec.head_dim))
    queries = rotate(normed(heads.contiguous(), attention.query_norm), *rotation)
    return context.attend_written(attention.spec, queries).flatten(1)
