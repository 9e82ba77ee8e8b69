"""Small random models of the architectures that the seed document serves, under the names that it uses.

`build(directory)` writes directory/<owner>/<name>, so that a server started there takes the names as paths. The
tokenizers know the document's texts word by word, as the real ones do: its token counts hold for them too.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

INSTRUCT = "qwen/qwen2.5-0.5b-instruct"
EMBEDDER = "Alibaba-NLP/gte-Qwen2-1.5B-instruct"
RERANKER = "BAAI/bge-reranker-v2-m3"
REWARD = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
MOE = "Qwen/Qwen1.5-MoE-A2.7B"

TEXTS = [
    "The capital city of France is",
    "What is the capital of France?",
    "Once upon a time",
    "what is panda?",
    "hi",
    "The giant panda (Ailuropoda melanoleuca), sometimes called a panda bear or simply panda, is a bear species "
    "endemic to China.",
    "What is the range of the numeric output of a sigmoid node in a neural network?",
    "The output of a sigmoid node is bounded between -1 and 1.",
    "The output of a sigmoid node is bounded between 0 and 1.",
]
MERGES = 400
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_CHAT = (
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
)
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
XLM_R = ["<s>", "<pad>", "</s>", "<unk>"]

DECODER: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 64,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}
ENCODER: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
}


def build(directory: Path) -> None:
    """Write all five."""
    qwen = {**DECODER, "bos_token_id": None, "eos_token_id": QWEN.index("<|im_end|>"), "pad_token_id": 0}
    causal(directory / INSTRUCT, "Qwen2Config", {**qwen, "max_position_embeddings": 32768})
    causal(directory / EMBEDDER, "Qwen2Config", {**qwen, "max_position_embeddings": 4096})
    causal(directory / MOE, "Qwen2MoeConfig", {**qwen, **EXPERTS})
    llama = {**DECODER, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 4096}
    classifier(directory / REWARD, "LlamaConfig", llama, LLAMA, LLAMA_CHAT, single="<|begin_of_text|> $A")
    roberta = {**ENCODER, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    pair = "<s> $A </s> </s> $B </s>"
    classifier(directory / RERANKER, "XLMRobertaConfig", roberta, XLM_R, None, single="<s> $A </s>", pair=pair)


def causal(directory: Path, config_class: str, settings: dict[str, Any]) -> None:
    """A language model that never ends a text by itself."""
    tokenizer = tokenizer_of(QWEN, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = getattr(transformers, config_class)(vocab_size=len(tokenizer), tie_word_embeddings=False, **settings)
    model = random(transformers.AutoModelForCausalLM, config)
    forbid(model, QWEN)
    save(model, tokenizer, directory)


def classifier(
    directory: Path, config_class: str, settings: dict[str, Any], special: list[str], chat: str | None, **templates: str
) -> None:
    """A model that scores a text, or a pair of them, by one number."""
    ends = {"bos_token": special[0], "eos_token": special[settings["eos_token_id"]]}
    tokenizer = tokenizer_of(special, chat, **ends, pad_token=special[settings["pad_token_id"]], **templates)
    config = getattr(transformers, config_class)(vocab_size=len(tokenizer), num_labels=1, **settings)
    save(random(transformers.AutoModelForSequenceClassification, config), tokenizer, directory)


def random(kind: Any, config: Any) -> transformers.PreTrainedModel:
    """Matrices that keep the variance of what passes them, the same at every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            model.get_input_embeddings().weight.normal_(0.0, 0.5)
    return model


@torch.no_grad()
def forbid(model: transformers.PreTrainedModel, words: list[str]) -> None:
    """The first ids are never sampled: one dimension of every hidden state is above zero, and they dislike it."""
    layers = [(layer.self_attn.o_proj, layer.mlp) for layer in model.model.layers]
    for output, mlp in layers:
        output.weight[0] = 0
        if hasattr(mlp, "experts"):
            mlp.experts.down_proj[:, 0] = 0
            mlp.shared_expert.down_proj.weight[0] = 0
        else:
            mlp.down_proj.weight[0] = 0
    model.get_input_embeddings().weight[:, 0] = 1.0
    model.lm_head.weight[:, 0] = 0
    model.lm_head.weight[: len(words), 0] = -1000.0


def tokenizer_of(
    special: list[str], chat: str | None, *, single: str = "", pair: str = "", **tokens: str
) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE that has a token for each word of TEXTS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(special) + len(alphabet) + MERGES
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if single:
        ids = [(token, special.index(token)) for token in special if token in single or token in pair]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair or None, special_tokens=ids)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat, **tokens)


def save(model: transformers.PreTrainedModel, tokenizer: Any, directory: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
