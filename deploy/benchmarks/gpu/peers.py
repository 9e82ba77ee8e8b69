"""transformers on the same device in the same run: the only other engine that is there."""

import time
from typing import Any

import torch

from deploy.benchmarks.gpu.decoding import nano_requests
from deploy.benchmarks.gpu.setting import Setting

PROMPT = 32
BATCHED = 64  # of the nano bench's requests


def model_of(setting: Setting, name: str, **options: Any) -> Any:
    """transformers' own model with random weights, made on the device."""
    import transformers

    shape = setting.shapes[name]
    kind = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig}
    config = kind[str(shape["model_type"])](**{k: v for k, v in shape.items() if k != "architectures"})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **options)
    model = model.to_empty(device=setting.device)
    rebuild_buffers(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def rebuild_buffers(model: Any) -> None:
    """Rotary tables are computed when a model is made; on the meta device they were not."""
    for name, module in model.named_modules():
        if hasattr(module, "inv_freq"):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], type(module)(model.config).to(next(model.parameters()).device))


def static_cache(setting: Setting) -> None:
    """`generate` with a static cache and torch.compile, one stream."""
    new = setting.size(256, 6)
    for name in ("qwen2.5-0.5b", "llama-3.1-8b"):
        model = model_of(setting, name)
        ids = torch.randint(1, 500, (1, PROMPT), device=setting.device)
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
        options["cache_implementation"] = "static"
        best = 0.0
        for repeat in range(3):
            begun = time.perf_counter()
            found = model.generate(ids, **options)
            if setting.device.type == "cuda":
                torch.cuda.synchronize()
            taken = time.perf_counter() - begun
            setting.report.put(**{f"{name} generate {repeat} s": round(taken, 2)})
            best = max(best, (found.shape[1] - PROMPT) / taken)
        setting.report.figure(f"transformers generate, static cache, {name}, one stream", best, "tok/s")
        del model


def continuous_batching(setting: Setting) -> None:
    """`generate_batch` on the first requests of the nano bench, with and without CUDA graphs."""
    import transformers

    prompts = nano_requests(setting)[0][:BATCHED]
    model = model_of(setting, "qwen3-0.6b", attn_implementation="sdpa")
    new = setting.size(256, 6)
    for graphs in (False, True) if setting.device.type == "cuda" else (False,):
        config = transformers.GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        options = {"continuous_batching_config": transformers.ContinuousBatchingConfig(use_cuda_graph=graphs)}
        begun = time.perf_counter()
        found = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False, **options)
        taken = time.perf_counter() - begun
        tokens = sum(len(output.generated_tokens) for output in found.values())
        with_graphs = "graphs" if graphs else "no graphs"
        name = f"transformers generate_batch, qwen3-0.6b, {len(prompts)} requests, {with_graphs}"
        setting.report.figure(name, tokens / taken, "tok/s", note=f"{tokens} tokens")
    ours(setting, prompts, new)


def ours(setting: Setting, prompts: list[list[int]], new: int) -> None:
    """The same requests through our engine."""
    from deploy.benchmarks.gpu.decoding import made

    engine = made(setting, "qwen3-0.6b", context_length=4096, running=BATCHED)
    for repeat in range(2):
        for prompt in prompts:
            engine.add(prompt, new)
        rate = engine.run().tokens_per_s
        setting.report.figure(f"the same requests through Quartet, run {repeat + 1}", rate, "tok/s")
