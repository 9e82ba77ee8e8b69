"""From hidden states to the answer of an embedding request: pool, score, activate, cut, normalise."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import Kind, StartupError
from quartet.runtime.messages import Request
from quartet.runtime.model_files import tokenizer_files
from quartet.runtime.model_files.embedding import Embedding
from quartet.runtime.model_files.model_info import ModelInfo, tokenizer_dir
from quartet.runtime.model_files.vector_kinds import MultiVector, Sparse
from quartet.scheduler_service.core.plan import Plan, Result
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.execution.logprobs import as_bytes
from quartet.scheduler_service.model.batch import ServedModel
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.encoder import Encoder
from quartet.scheduler_service.model.heads import Head

NOT_FINITE = "the model's answer to this text is not a finite number"
IN_PIECES = "this model computes texts in pieces and gives no vectors of single tokens"
TOKENS_AT_ONCE = 256  # whose logits of all words are in memory
GENERATES_NOT = "this model serves embeddings and does not generate"
TORCH_MODULES = "torch.nn."

Pool = Callable[[torch.Tensor], torch.Tensor]
Activation = Callable[[torch.Tensor], torch.Tensor]
WordLogits = Callable[[torch.Tensor], torch.Tensor]  # (tokens, hidden) → (tokens, vocab)

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


def make_pooler(config: ServerConfig, info: ModelInfo, model: ServedModel) -> "Pooler | None":
    """What answers the requests of an embedding model; None for one that generates. Raises StartupError."""
    if info.embedding is None:
        return None
    head = model.head if isinstance(model, Decoder | Encoder) else None
    skipped = skipped_ids(config, info.embedding.multi_vector)
    return Pooler(info.embedding, head, model.word_logits if isinstance(model, Encoder) else None, skipped)


def skipped_ids(config: ServerConfig, given: MultiVector | None) -> torch.Tensor:
    """The tokens whose vectors are left out, (ids,) int64."""
    if given is None or not given.skipped_words:
        return torch.empty(0, dtype=torch.int64)
    tokenizer = tokenizer_files.load(tokenizer_dir(config))
    return torch.tensor([id for word in given.skipped_words if (id := tokenizer.token_to_id(word)) is not None])


class Pooler:
    """Answers the embedding requests of a step."""

    def __init__(
        self,
        embedding: Embedding,
        head: Head | None = None,
        word_logits: WordLogits | None = None,
        skipped: torch.Tensor | None = None,
    ) -> None:
        """`word_logits`: of a model that weighs words. `skipped`: tokens without a vector, (ids,)."""
        self.embedding = embedding
        self.head = head
        self.word_logits = word_logits
        self.skipped = torch.empty(0, dtype=torch.int64) if skipped is None else skipped
        self.pools = [POOLINGS[name] for name in embedding.pooling]
        self.activation = activation_of(embedding.activation)
        self.scalar = embedding.cross_encoder and embedding.labels == 1

    def fill(self, plan: Plan, offsets: list[int], hidden: torch.Tensor, results: list[Result]) -> None:
        """Give each request whose prompt ends in this step its answer; hidden (tokens, hidden) of all slices."""
        pooled: list[int] = []
        for i, share in enumerate(plan.slices):
            sequence = share.sequence
            if share.end < sequence.prefill_end:
                continue
            if sequence.request.task != "embed":
                results[i].error, results[i].error_kind = GENERATES_NOT, Kind.BAD_REQUEST
            elif sequence.request.vectors == "own" and self.embedding.gives_one_vector:
                pooled.append(i)
            elif share.start or not self.embedding.whole_prompts:
                results[i].error, results[i].error_kind = IN_PIECES, Kind.BAD_REQUEST
            else:
                self.answer(sequence, hidden[offsets[i] : offsets[i + 1]], results[i])
        if not pooled:
            return
        vectors = self.vectors([hidden[offsets[i] : offsets[i + 1]] for i in pooled])
        for i, vector in zip(pooled, vectors, strict=True):
            keep(results[i], self.finish(vector, plan.slices[i].sequence.request))
            results[i].scalar = self.scalar

    def answer(self, sequence: Sequence, states: torch.Tensor, result: Result) -> None:
        """What is no single vector: weights of words, or the vectors of the tokens of states (tokens, hidden)."""
        request = sequence.request
        if self.embedding.sparse is not None and request.vectors == "own":
            assert self.word_logits is not None
            values, ids = word_weights(states, self.word_logits, self.embedding.sparse)
            keep(result, values)
            result.vector_ids = as_bytes(ids, torch.int32)
            return
        kept = states[self.kept(sequence).to(states.device)]
        keep(result, self.token_vectors(kept, request))

    def kept(self, sequence: Sequence) -> torch.Tensor:
        """The places of the tokens that have a vector."""
        ids = torch.tensor(sequence.ids[: sequence.prompt_len])
        many, what = self.embedding.multi_vector, sequence.request.vectors
        skips = many is not None and what != "tokens" and ("query" if what == "query" else "document") in many.skips
        return torch.isin(ids, self.skipped, invert=True).nonzero()[:, 0] if skips else torch.arange(len(ids))

    def token_vectors(self, states: torch.Tensor, request: Request) -> torch.Tensor:
        """float32 (tokens, size): as a model of many vectors projects them, of others their last hidden states."""
        if self.embedding.multi_vector is None:
            return states.float().cpu()
        if self.head is not None and len(states):
            states = self.head(states)
        normalize = self.embedding.normalize if request.normalize is None else request.normalize
        return F.normalize(states.float().cpu(), dim=-1) if normalize else states.float().cpu()

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
        vector = vector[: request.dimensions or self.embedding.own_dimensions]
        normalize = self.embedding.normalize if request.normalize is None else request.normalize
        return F.normalize(vector, dim=-1) if normalize else vector


def keep(result: Result, values: torch.Tensor) -> None:
    """Make numbers a request's answer, if they are numbers."""
    if values.isfinite().all():
        result.vector = as_bytes(values, torch.float32)
    else:
        result.error = NOT_FINITE


def word_weights(states: torch.Tensor, word_logits: WordLogits, sparse: Sparse) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of words that are not zero, and their ids, in order: of a text's states (tokens, hidden)."""
    found: torch.Tensor | None = None
    for part in states.split(TOKENS_AT_ONCE):
        weights = word_logits(part).relu_().log1p_()
        if sparse.activation_function == "log1p_relu":
            weights = weights.log1p_()
        if found is not None:
            weights = torch.cat((weights, found.unsqueeze(0)))
        found = weights.amax(0) if sparse.pooling_strategy == "max" else weights.sum(0)
    assert found is not None
    found = found.cpu()
    ids = (found != 0).nonzero()[:, 0]  # what is no number stays, and is found
    return found[ids], ids
