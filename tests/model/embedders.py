"""Small random embedding models on disk, transformers' answers for them, and ours."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, processors

from quartet.http_gateway.embedding.prompts import Prompted, choose_vectors
from quartet.runtime.messages import Generate, Request, Tokenized, pack_ids
from quartet.runtime.model_files import model_info
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.assemble import planner_config
from quartet.scheduler_service.core.plan import Update
from quartet.scheduler_service.core.planner import Planner
from quartet.scheduler_service.execution.worker import Worker
from quartet.tokenizer_service.load import load_encoder
from tests.configs import resolved
from tests.engine import floats
from tests.model import tiny

VOCAB_SIZE = tiny.VOCAB_SIZE
BERT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 200,
}
ROBERTA = {**BERT, "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
DISTIL = {"vocab_size": VOCAB_SIZE, "dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 4}
DISTIL["max_position_embeddings"] = 200
MODERN = {**BERT, "local_attention": 16, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0}
MODERN |= {"sep_token_id": 2}
MPNET = {**ROBERTA, "relative_attention_num_buckets": 32}
DEBERTA = {**BERT, "relative_attention": True, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
DEBERTA |= {"position_buckets": 16, "max_relative_positions": -1, "pos_att_type": ["p2c", "c2p"]}
DEBERTA |= {"position_biased_input": False, "type_vocab_size": 0}  # as v3
CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": BERT,
    "Roberta": ROBERTA,
    "XLMRoberta": ROBERTA,
    "DistilBert": DISTIL,
    "ModernBert": MODERN,
    "DebertaV2": DEBERTA,
    "Deberta": {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "Electra": {**BERT, "embedding_size": 64},
    "EuroBert": {**BERT, "num_key_value_heads": 2, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1},
    "Gte": {**BERT, "type_vocab_size": 1, "pad_token_id": 1},
    "JinaEmbeddingsV3": {**ROBERTA, "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
    "MPNet": MPNET,
    "NomicBert": BERT,
    "Gemma3Text": {**tiny.SHAPE, **tiny.GEMMA},
    "Llama": tiny.SHAPE,
    "Mistral": {**tiny.SHAPE, "sliding_window": 24},
    "Qwen2": tiny.SHAPE,
    "Qwen3": {**tiny.SHAPE, "head_dim": 16},
}
NEWER = ("Deberta", "DebertaV2", "Electra", "EuroBert", "Gte", "JinaEmbeddingsV3", "MPNet", "NomicBert")
ENCODERS = ("Bert", "Roberta", "XLMRoberta", "DistilBert", "ModernBert", *NEWER)
DECODERS = ("Llama", "Mistral", "Qwen2", "Qwen3")


def build(architecture: str, directory: Path, *, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """Write a random model of a class of transformers, with a tokenizer; returns transformers' own."""
    family = next(name for name in CONFIGS if architecture.startswith(name))
    config = getattr(transformers, f"{family}Config")(**{**CONFIGS[family], **overrides})
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, architecture)(config).eval()
        tiny.randomize(model)
    model.save_pretrained(directory)
    tiny.save_tokenizer(directory, VOCAB_SIZE)
    return model


def save_bidirectional_gemma(directory: Path) -> Any:
    """As EmbeddingGemma: windows reach both ways, two layers behind the pooling, prompts by name.

    Returns sentence-transformers' own; the model is in the folder `saved`.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    shape = {"use_bidirectional_attention": True, "sliding_window": 16, "sliding_window_pattern": 2}
    build("Gemma3TextModel", directory / "gemma", **shape)
    layers = [
        Dense(64, 96, bias=False, activation_function=torch.nn.Identity()),
        Dense(96, 48, activation_function=torch.nn.Tanh()),
    ]
    modules = [Transformer(str(directory / "gemma")), Pooling(64, pooling_mode="mean"), *layers, Normalize()]
    peer = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "task: search | query: ", "plain": ""})
    peer.save(str(directory / "saved"))
    return peer


class Embedder:
    """Planner and worker of an embedding model in one process."""

    def __init__(self, directory: Path, make_worker: Callable[..., Worker] = Worker, **settings: Any) -> None:
        settings = {"dtype": "float32", "page_size": 1, "max_total_tokens": 4096, "device": "cpu", **settings}
        config = resolved(model_path=str(directory), model_dir=str(directory), **settings)
        self.info = model_info.load(config)
        self.worker = make_worker(config, self.info)
        self.planner = Planner(planner_config(config, self.info, self.worker))
        self.steps: list[tuple[int, int]] = []  # new and cached tokens of each
        self.updates: dict[str, Update] = {}

    def add(self, ids: Sequence[int], types: Sequence[int] = (), **request: Any) -> str:
        rid = f"r{len(self.updates) + len(self.planner.live)}"
        made = Request(**{"rid": rid, "params": SamplingParams(max_new_tokens=0), "task": "embed", **request})
        message = Tokenized(request=made, prompt_ids=pack_ids(ids), token_types=pack_ids(types))
        self.planner.add(message, 0.0)
        return rid

    def run(self) -> None:
        """Until nothing is left to do; all state must be back then."""
        while plan := self.planner.next(0.0):
            self.steps.append((plan.tokens, plan.cached_tokens))
            for update in self.planner.apply(plan, self.worker.collect(self.worker.launch(plan)), 0.0):
                self.updates[update.sequence.rid] = update
            for sequence in self.planner.released:
                self.worker.forget(sequence)
            self.planner.released.clear()
            self.planner.check_invariants()
        assert self.planner.idle and not self.worker.states

    def embed(self, texts: Sequence[Sequence[int]], **request: Any) -> list[torch.Tensor]:
        """The vectors of texts that arrive together."""
        rids = [self.add(text, **request) for text in texts]
        self.run()
        return [torch.tensor(floats(self.updates[rid].vector)) for rid in rids]


class Served:
    """Tokenizer, planner and worker of a model, without a ring."""

    def __init__(self, directory: Path) -> None:
        self.encoder = load_encoder(resolved(model_path=str(directory), model_dir=str(directory), is_embedding=True))
        self.embedder = Embedder(directory)
        self.embedding = self.embedder.info.embedding

    def ask(self, sentences: Sequence[str], name: str | None = None) -> list[Any]:
        """The update of each text, under the prompt of that name."""
        prefix = self.embedding.prompts[name] if name else ""
        messages = []
        for i, sentence in enumerate(sentences):
            request = Request(rid=f"{name}-{i}", params=SamplingParams(max_new_tokens=0), task="embed")
            choose_vectors(request, Prompted(prompt_name=name), self.embedding)
            messages.append(Generate(request=request, text=prefix + sentence))
        for tokenized in self.encoder.step(messages):
            assert isinstance(tokenized, Tokenized), tokenized
            self.embedder.planner.add(tokenized, 0.0)
        self.embedder.run()
        return [self.embedder.updates[message.request.rid] for message in messages]

    def vectors(self, sentences: Sequence[str], name: str | None = None) -> list[torch.Tensor]:
        size = self.embedding.token_size(self.embedder.info.hidden_size)
        return [torch.tensor(floats(update.vector)).view(-1, size) for update in self.ask(sentences, name)]


def wrap_texts(directory: Path, *, known: Sequence[str] = ()) -> None:
    """Have the tokenizer put tokens around a text and know a mask, and words of one token."""
    file = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(["[MASK]", "[UNK]", *known])
    pair = [("<bos>", 0), ("<eos>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=pair)
    tokenizer.save(str(file))
    settings = directory / "tokenizer_config.json"
    given = {**json.loads(settings.read_text()), "mask_token": "[MASK]", "unk_token": "[UNK]"}
    settings.write_text(json.dumps({**given, "cls_token": "<bos>", "sep_token": "<eos>"}))


def change_config(directory: Path, **changes: Any) -> None:
    """Change fields of a model's config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def texts(*lengths: int) -> list[list[int]]:
    """Random ids without special ones, of these lengths."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(4, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def hidden_states(model: transformers.PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """transformers' last hidden states of one text: (tokens, hidden)."""
    return model(torch.tensor([list(ids)])).last_hidden_state[0]


@torch.inference_mode()
def scores(model: transformers.PreTrainedModel, ids: Sequence[int], types: Sequence[int] = ()) -> torch.Tensor:
    """transformers' logits of one text or pair: (labels,)."""
    more = {"token_type_ids": torch.tensor([list(types)])} if types else {}
    return model(torch.tensor([list(ids)]), **more).logits[0]


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    """In float64: the question is about the sixth digit."""
    return float(torch.nn.functional.cosine_similarity(left.double(), right.double(), dim=0))
