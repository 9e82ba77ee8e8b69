"""From hidden states to the answer of an embedding request: pool, score, activate, cut, normalise."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from quartet.runtime.errors import Kind, StartupError
from quartet.runtime.messages import Request
from quartet.runtime.model_files.embedding import Embedding
from quartet.scheduler_service.core.plan import Plan, Result
from quartet.scheduler_service.execution.logprobs import as_bytes
from quartet.scheduler_service.model.batch import ServedModel
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.encoder import Encoder
from quartet.scheduler_service.model.heads import Head

NOT_FINITE = "the model's answer to this text is not a finite number"
GENERATES_NOT = "this model serves embeddings and does not generate"
TORCH_MODULES = "torch.nn."

Pool = Callable[[torch.Tensor], torch.Tensor]
Activation = Callable[[torch.Tensor], torch.Tensor]

# the hidden states of one text (tokens, hidden) → (hidden,)
POOLINGS: dict[str, Pool] = {
    "cls": lambda x: x[0],
    "lasttoken": lambda x: x[-1],
    "max": lambda x: x.amax(0),
    "mean": lambda x: x.mean(0),
    "mean_sqrt_len_tokens": lambda x: x.sum(0) / len(x) ** 0.5,
    "weightedmean": lambda x: positions(x) @ x / positions(x).sum(),
}
# modules of torch by their class names; a config names one, and nothing else is ever looked up
ACTIVATIONS: dict[str, Activation] = {
    "GELU": F.gelu,
    "Identity": lambda x: x,
    "LogSigmoid": F.logsigmoid,
    "ReLU": F.relu,
    "Sigmoid": torch.sigmoid,
    "SiLU": F.silu,
    "Softmax": lambda x: x.softmax(-1),
    "Softplus": F.softplus,
    "Tanh": torch.tanh,
}


def positions(x: torch.Tensor) -> torch.Tensor:
    """1, 2, 3, … (tokens,)"""
    return torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)


def activation_of(name: str | None) -> Activation:
    """The function of a torch module's path. Raises StartupError for one that is not in the table."""
    if name is None:
        return ACTIVATIONS["Identity"]
    module = name.rsplit(".", 1)[-1]
    if not name.startswith(TORCH_MODULES) or module not in ACTIVATIONS:
        raise StartupError(f"config.json names the activation {name}; served are {', '.join(ACTIVATIONS)} of torch.nn")
    return ACTIVATIONS[module]


def make_pooler(embedding: Embedding | None, model: ServedModel) -> "Pooler | None":
    """What answers the requests of an embedding model; None for one that generates."""
    if embedding is None:
        return None
    return Pooler(embedding, model.head if isinstance(model, Decoder | Encoder) else None)


class Pooler:
    """Answers the embedding requests of a step."""

    def __init__(self, embedding: Embedding, head: Head | None = None) -> None:
        self.embedding = embedding
        self.head = head
        self.pools = [POOLINGS[name] for name in embedding.pooling]
        self.activation = activation_of(embedding.activation)
        self.scalar = embedding.cross_encoder and embedding.labels == 1

    def fill(self, plan: Plan, offsets: list[int], hidden: torch.Tensor, results: list[Result]) -> None:
        """Give each request whose prompt ends in this step its vector; hidden (tokens, hidden) of all slices."""
        ending = [i for i, share in enumerate(plan.slices) if share.end == share.sequence.prefill_end]
        if not ending:
            return
        vectors = self.vectors([hidden[offsets[i] : offsets[i + 1]] for i in ending])
        finite = vectors.isfinite().all(1).tolist()
        for i, vector, its_finite in zip(ending, vectors, finite, strict=True):
            request, result = plan.slices[i].sequence.request, results[i]
            if request.task != "embed":
                result.error, result.error_kind = GENERATES_NOT, Kind.BAD_REQUEST
            elif not its_finite:
                result.error = NOT_FINITE
            else:
                result.vector, result.scalar = (
                    as_bytes(self.finish(vector, request), torch.float32),
                    self.scalar,
                )

    def vectors(self, texts: list[torch.Tensor]) -> torch.Tensor:
        """One text's hidden states each (tokens, hidden) → float32 (texts, size)."""
        if self.embedding.scores_tokens and self.head is not None:
            sizes = [len(text) for text in texts]
            texts = list(self.head(torch.cat(texts)).float().split(sizes))
        pooled = torch.stack([torch.cat([pool(text) for pool in self.pools]) for text in texts])
        if self.embedding.scores_tokens:
            pooled = self.activation(pooled)
        elif self.head is not None:
            pooled = self.activation(self.head(pooled).float())
        return pooled.float().cpu()

    def finish(self, vector: torch.Tensor, request: Request) -> torch.Tensor:
        """The leading dimensions that a request asks for, of length 1 where it or the model says so."""
        vector = vector[: request.dimensions]
        normalize = self.embedding.normalize if request.normalize is None else request.normalize
        return F.normalize(vector, dim=-1) if normalize else vector
