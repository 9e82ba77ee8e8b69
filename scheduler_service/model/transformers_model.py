"""Any other causal language model, through transformers' own code with our attention plugged in.

Slower than the generic decoder, and proven before it serves: `self_check` compares a short prompt, in two chunks and
through our attention, with the model's own eager attention. What keeps state that we do not page (recurrent layers),
biases its scores by position (ALiBi) or ignores the attention interface fails there or before.

This module imports transformers, which takes seconds: only the registry does it, and only when it must.
"""

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn

from quartet.kernels.cpu.linear import Linear
from quartet.kernels.reference import layers as reference
from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.runtime.shorten import reason
from quartet.scheduler_service.model.batch import Attend, AttentionSpec, Batch, ExpertShape
from quartet.scheduler_service.model.routers import Routers
from quartet.scheduler_service.sampling import choose
from quartet.scheduler_service.sampling.rows import Draws, SamplingRows
from quartet.scheduler_service.weights.checkpoint import CheckpointError
from quartet.scheduler_service.weights.load import is_dummy, open_checkpoint, read_state, tensor_list
from quartet.scheduler_service.weights.parameters import Layout, Place, Weights

log = logging.getLogger(__name__)

NEEDS_OTHER_MASKS = ("attention_chunk_size", "alibi", "use_bidirectional_attention")
PROBE_TOKENS, PROBE_SPLIT = 8, 5
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # relative error of logits


class PagedAttention:
    """The attention function that transformers calls in every layer; it passes on to the batch's `attend`."""

    def __init__(self) -> None:
        self.name = f"quartet_{id(self)}"
        self.specs: dict[int, AttentionSpec] = {}
        self.batch: Batch | None = None
        transformers.AttentionInterface.register(self.name, self)

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """query (1, heads, tokens, dim), key and value (1, kv_heads, tokens, dim) → (1, tokens, heads, dim)."""
        assert self.batch is not None
        spec = self.specs.get(module.layer_idx) or self.learn(module, query, key, options)
        value_dim = value.shape[-1]
        if value_dim < spec.head_dim:  # the KV pool has one width for keys and values
            value = nn.functional.pad(value, (0, spec.head_dim - value_dim))
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # (tokens, heads, dim)
        attend = cast(Attend, self.batch.attend)
        return attend(spec, q, k, v)[..., :value_dim].unsqueeze(0), None

    def learn(self, module: Any, query: torch.Tensor, key: torch.Tensor, options: Any) -> AttentionSpec:
        """The facts of a layer, read off its first call."""
        _, heads, _, head_dim = query.shape
        spec = AttentionSpec(
            layer=module.layer_idx,
            heads=heads,
            kv_heads=key.shape[1],
            head_dim=head_dim,
            scale=options.get("scaling") or head_dim**-0.5,
            window=options.get("sliding_window"),
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
        )
        self.specs[spec.layer] = spec
        return spec


class PackedLinear(nn.Module):
    """nn.Linear by our own routes; keeps the parameters' names."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.route: Linear | None = None

    def follow(self, weights: Weights, name: str) -> None:
        """Compute with the values in `weights` from now on."""
        self.route = Linear(self.weight, self.bias)
        weights.follow(self.route, name, ())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.route is not None
        y: torch.Tensor = self.route(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return y


class BodyOutput(tuple[torch.Tensor]):
    """A body's output as heads read it: by index or by name, with None for whatever else they ask for."""

    __slots__ = ()

    def __getattr__(self, name: str) -> torch.Tensor | None:
        return self[0] if name == "last_hidden_state" else None


class Passthrough(nn.Module):
    """Stands where a model's body was, so that its head can be run on hidden states alone."""

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **options: Any) -> BodyOutput:
        return BodyOutput((inputs_embeds,))

    @property
    def decoder(self) -> "Passthrough":
        """For heads that call the decoder inside the body."""
        return self


class TransformersModel:
    """A causal language model of transformers as the worker uses it."""

    def __init__(self, model: transformers.PreTrainedModel, weights: Weights, paged: PagedAttention) -> None:
        self.weights = weights
        self.dtype, self.device = weights.dtype, weights.device
        self.paged = paged
        self.body: Any = getattr(model, model.base_model_prefix)
        self.head = copy.copy(model)
        self.head._modules = {**model._modules, model.base_model_prefix: Passthrough()}
        text = model.config.get_text_config()
        self.hidden_size, self.vocab_size = text.hidden_size, text.vocab_size
        self.routers = Routers(self.body, text.num_hidden_layers)
        self.attention: list[AttentionSpec] = []

    @property
    def experts(self) -> ExpertShape | None:
        """The mixtures that report to `Batch.record_experts`; None for a dense model."""
        return self.routers.shape

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states after the final norm: (tokens, hidden)."""
        source: dict[str, torch.Tensor] = {"input_ids": batch.input_ids.unsqueeze(0)}
        if batch.embeds is not None and batch.embeds_mask is not None:
            embeds = self.body.get_input_embeddings()(batch.input_ids)
            mixed = torch.where(batch.embeds_mask.unsqueeze(1), batch.embeds.to(embeds.dtype), embeds)
            source = {"inputs_embeds": mixed.unsqueeze(0)}
        self.paged.batch, self.routers.report = batch, batch.record_experts
        try:
            output = self.body(**source, position_ids=batch.positions.unsqueeze(0), use_cache=False)
        finally:
            self.paged.batch, self.routers.report = None, None
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, hidden) → float32 (rows, vocab), scaled and capped as the model's own head does."""
        logits: torch.Tensor = self.head(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits[0]
        return logits.float() if out is None else out.copy_(logits)

    def sample(
        self, logits: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor | None = None, keep_logits: bool = False
    ) -> Draws:
        return choose.sample(logits, rows, allowed, keep_logits)


def load_transformers_model(
    config: ResolvedConfig, info: ModelInfo, dtype: torch.dtype, device: torch.device
) -> TransformersModel:
    """Build, fill and prove the model. Raises StartupError in one line where it cannot be served."""
    model = build(config, info, dtype).eval()
    use_packed_linears(model)
    weights = adopt_weights(model, dtype, device)
    paged = PagedAttention()
    served = TransformersModel(model, weights, paged)
    with torch.inference_mode():
        self_check(model, served, info)
    return served


def build(config: ResolvedConfig, info: ModelInfo, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """transformers' model with its weights, read by our reader."""
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    try:
        settings = transformers.AutoConfig.from_pretrained(info.path, trust_remote_code=False)
        kind = model_class(settings, info)
        if is_dummy(config):
            torch.manual_seed(config.dummy_seed)
            return cast(transformers.PreTrainedModel, kind._from_config(settings, **options))
        state = read_state(open_checkpoint(Path(info.path)))
        loaded: tuple[transformers.PreTrainedModel, dict[str, Any]] = kind.from_pretrained(
            None, config=settings, state_dict=state, output_loading_info=True, **options
        )
        model, report = loaded
    except (ValueError, TypeError, KeyError, RuntimeError, ImportError, AttributeError, OSError) as error:
        cause = reason(error, 300)
        raise StartupError(f"transformers cannot build {info.architecture} from {info.path}: {cause}") from error
    tie_missing(model, report["missing_keys"])
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"the checkpoint in {info.path} lacks {tensor_list(missing)}")
    return model


def tie_missing(model: transformers.PreTrainedModel, missing: set[str]) -> None:
    """Where the checkpoint lacks nothing but tensors that such models have in common, they are what is missing."""
    tied = getattr(model, "_tied_weights_keys", None) or {}
    if missing and missing <= set(tied) and not missing & set(tied.values()):
        log.warning(
            "config.json does not say so, but the model is tied: the checkpoint has no %s.",
            tensor_list(sorted(missing)),
        )
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = True
        model.tie_weights()
        missing.clear()


def model_class(settings: transformers.PreTrainedConfig, info: ModelInfo) -> Any:
    """The class that runs these settings; raises StartupError for what no attention function could put right."""
    kind: Any = transformers.AutoModelForCausalLM._model_mapping.get(type(settings), None)
    if kind is None:
        raise StartupError(f"{info.architecture} is not a causal language model that Quartet can serve")
    kind = kind[0] if isinstance(kind, tuple) else kind
    if not kind.is_backend_compatible():
        raise StartupError(f"{info.architecture} is not served: its code takes no attention function from outside")
    for name in NEEDS_OTHER_MASKS:
        if getattr(settings.get_text_config(), name, None):
            raise StartupError(f"{info.architecture} is not served with {name}: its attention mask is not supported")
    return kind


def use_packed_linears(model: nn.Module) -> None:
    """Replace every plain nn.Linear."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))


def adopt_weights(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Weights:
    """Move all parameters into buffers of ours; the model computes on these from now on."""
    parameters = dict(model.named_parameters())
    layout = Layout(ignored=frozenset(model.state_dict().keys() - parameters.keys()))
    names = {id(parameter): name for name, parameter in parameters.items()}
    every = model.named_parameters(remove_duplicate=False)
    layout.ties = {name: names[id(parameter)] for name, parameter in every if name not in parameters}
    for name, parameter in parameters.items():
        layout.buffers[name] = tuple(parameter.shape)
        layout.places[name] = Place(name, (), 0, tuple(parameter.shape))
        layout.dtypes[name] = parameter.dtype  # some stay in float32 whatever the rest is
    weights = Weights(layout, dtype, device)
    for name, parameter in parameters.items():
        weights.view(name).copy_(parameter.data)
        parameter.requires_grad_(False)
        weights.lend(parameter, name)
    model.to(device)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.follow(weights, names[id(module.weight)])
    weights.after_update()
    return weights


def self_check(model: transformers.PreTrainedModel, served: TransformersModel, info: ModelInfo) -> None:
    """Raise StartupError unless a prompt in two chunks through our attention gives the model's own logits."""
    vocab = served.vocab_size
    ids = torch.arange(1, PROBE_TOKENS + 1, device=served.device) * 7919 % vocab
    try:
        expected = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float()
        model.set_attn_implementation(served.paged.name)
        found = torch.cat(run_in_chunks(served, ids))
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, AssertionError) as error:
        cause = reason(error, 300)
        raise StartupError(f"{info.architecture} is not served: it fails with our attention: {cause}") from error
    served.attention = [served.paged.specs[layer] for layer in sorted(served.paged.specs)]
    layers = model.config.get_text_config().num_hidden_layers
    distance = ((found - expected).norm() / expected.norm()).item()
    if len(served.attention) != layers or not distance <= TOLERANCE[served.dtype]:
        raise StartupError(
            f"{info.architecture} is not served: with our attention in {len(served.attention)} of {layers} layers "
            f"its logits differ from transformers' own by {distance:.2g}"
        )
    log.warning(
        "%s runs through transformers' own model: correct, but slower than a native family (self-check error %.1e).",
        info.architecture,
        distance,
    )


def run_in_chunks(served: TransformersModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits of the prompt's two chunks, the second on the keys and values of the first."""
    context: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if known := context.get(spec.layer):
            k, v = torch.cat((known[0], k)), torch.cat((known[1], v))
        context[spec.layer] = k, v
        return reference.attention(q, k, v, spec.scale, spec.window, spec.softcap, spec.sinks)

    positions = torch.arange(len(ids), device=ids.device)
    make = partial(Batch, attend=attend)
    chunks = [slice(0, PROBE_SPLIT), slice(PROBE_SPLIT, len(ids))]
    batches = [
        make(input_ids=ids[part], positions=positions[part], starts=torch.tensor([0, part.stop - part.start]))
        for part in chunks
    ]
    return [served.logits(served.forward(batch)) for batch in batches]
