"""Tries every causal language model of the installed transformers: `python -m tests.model.try_architectures`.

For each architecture without a native family, a small random model is written and loaded as a server loads it, with the
self-check of its logits. What came out is written to deploy/tried_models.json, from which the page of models is made.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files.servable import causal_models
from quartet.scheduler_service.model.registry import FAMILIES
from quartet.scheduler_service.weights.checkpoint import CheckpointError
from tests.model import tiny
from tests.model.dense import serve

OUT = Path(__file__).parents[2] / "deploy" / "tried_models.json"
MAX_PARAMETERS = 60_000_000
MAX_BYTES = 12 << 30  # of address space
MAX_SECONDS = 120
OTHER_NAMES = {  # of the same sizes
    "n_embd": 64, "d_model": 64, "n_layer": 2, "n_layers": 2, "n_head": 4, "n_heads": 4, "n_positions": 512,
    "ffn_dim": 96, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 48, "head_dim": 16, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1, "topk_group": 1, "word_embed_proj_dim": 64,
}  # fmt: skip
ALWAYS = {"head_dim", "num_key_value_heads", "num_experts_per_tok"}  # given where a default would be none
SLIDES = ["sliding_attention", "full_attention"]
EXTRA: dict[str, dict[str, Any]] = {  # by model type
    "gemma3n_text": {
        "layer_types": SLIDES,
        "activation_sparsity_pattern": [0.5, 0.0],
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 320,
    },
    "gemma4_text": {"layer_types": SLIDES, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 320},
    "gemma4_unified_text": {"layer_types": SLIDES, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 320},
}


def main() -> int:
    """Try all, one after the other; returns the exit status."""
    outcomes: dict[str, str] = {}
    context = multiprocessing.get_context("fork")
    for model_type, architecture in sorted(causal_models().items()):
        if architecture in FAMILIES or outcomes.get(architecture) == "":
            continue
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=attempt, args=(model_type, sender))
        child.start()
        ended = "its process ended" if not receiver.poll(MAX_SECONDS) else ""
        try:
            outcome = ended or receiver.recv()
        except EOFError:
            outcome = "not tried: its process ended"
        child.kill()
        child.join()
        outcomes[architecture] = outcome
        print(f"{architecture}: {outcome or 'served'}", flush=True)
    found = {"transformers": transformers.__version__, "outcomes": dict(sorted(outcomes.items()))}
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def attempt(model_type: str, sender: Any) -> None:
    """In a process of its own: send why a model is not served; "" where it is."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        try:
            if not takes_attention(model_type):
                sender.send("its code takes no attention function from outside")
                return
            write(model_type, Path(name))
        except Exception as error:  # whatever a foreign model raises is what came out
            sender.send(f"not tried: {type(error).__name__} while a small one was made")
            return
        try:
            serve(Path(name))
        except (StartupError, CheckpointError) as error:
            sender.send(str(error).replace(name, "DIRECTORY"))
        else:
            sender.send("")


def takes_attention(model_type: str) -> bool:
    """Whether the class of a type computes attention by a function that others can put there."""
    kind: Any = transformers.AutoModelForCausalLM._model_mapping[transformers.CONFIG_MAPPING[model_type]]
    return bool((kind[0] if isinstance(kind, tuple) else kind).is_backend_compatible())


def write(model_type: str, directory: Path) -> None:
    """A small random model of a type. Raises what a foreign class raises, and AssertionError where it stays large."""
    torch.manual_seed(0)
    config = small(transformers.CONFIG_MAPPING[model_type])
    config.is_decoder = True
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    assert size <= MAX_PARAMETERS, size
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tiny.randomize(model)
    with torch.inference_mode():  # what does not run by itself tells nothing of how it is served
        model.eval()(input_ids=torch.tensor([[1, 2, 3, 4, 5]]), use_cache=False)
    model.save_pretrained(directory)


def small(kind: Any) -> Any:
    """A config of a class with small sizes, under the names that it has."""
    default = kind()
    text = default.get_text_config()
    known = text.to_dict()
    sizes = {**tiny.SHAPE, **OTHER_NAMES}
    own = {name: value for name, value in sizes.items() if known.get(name) is not None or name in ALWAYS & known.keys()}
    if "kv_lora_rank" in known:  # each head has its keys, and head_dim follows from others
        own |= {"num_key_value_heads": own["num_attention_heads"]}
        own.pop("head_dim", None)
    own |= EXTRA.get(text.model_type, {})
    return kind(**own) if text is default else kind(text_config={"model_type": text.model_type, **own})


if __name__ == "__main__":
    sys.exit(main())
