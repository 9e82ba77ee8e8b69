"""What a model serves: text or vectors. Every endpoint that needs one of them asks here."""

from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime.errors import RequestError
from quartet.runtime.model_files.embedding import Embedding

NOT_GENERATIVE = "This model serves embeddings and does not generate; use /encode."
NOT_EMBEDDING = (
    "This model does not appear to be an embedding model by default. "
    "Please add `--is-embedding` when launching the server or try another model."
)
MANY_VECTORS = "This model has a vector for each token, not one for a text; use /pooling or /embed_all."
WORD_WEIGHTS = "This model has weights of words for a text, not a vector; use /embed_sparse."
NOT_MATRYOSHKA = (
    "Model '{}' does not support matryoshka representation, changing output dimensions will lead to poor results."
)


def check_generates(gateway: Gateway) -> None:
    """Raise RequestError where the model gives no text."""
    if gateway.model.is_embedding:
        raise RequestError(NOT_GENERATIVE)


def check_embeds(gateway: Gateway) -> Embedding:
    """How the model embeds. Raises RequestError where it does not."""
    if gateway.model.embedding is None:
        raise RequestError(NOT_EMBEDDING)
    return gateway.model.embedding


def check_one_vector(gateway: Gateway) -> Embedding:
    """How the model embeds. Raises RequestError where it has no one vector for a text."""
    embedding = check_embeds(gateway)
    if embedding.multi_vector is not None:
        raise RequestError(MANY_VECTORS)
    if embedding.sparse is not None:
        raise RequestError(WORD_WEIGHTS)
    return embedding


def cut_to(gateway: Gateway, embedding: Embedding, dimensions: int | None) -> int | None:
    """The dimensions to cut vectors to; None where they stay as they are. Raises RequestError where that cannot be."""
    if dimensions is None:
        return None
    size = embedding.size(gateway.model.hidden_size)
    if not 1 <= dimensions <= size:
        raise RequestError(f"dimensions must be in [1, {size}], got {dimensions}.", field="dimensions")
    if dimensions == size:
        return None if embedding.own_dimensions is None else size
    if not embedding.matryoshka:
        raise RequestError(NOT_MATRYOSHKA.format(gateway.config.name), field="dimensions")
    if embedding.dimensions and dimensions not in embedding.dimensions:
        raise RequestError(
            f"dimensions must be one of {list(embedding.dimensions)} for this model, got {dimensions}.",
            field="dimensions",
        )
    return dimensions
