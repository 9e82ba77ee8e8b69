"""What a model directory says about embedding: which architectures do it, how vectors are pooled, what a score means.

The settings of sentence-transformers (modules.json and the folders it names) are followed where a model has them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import task_adapters, vector_kinds
from quartet.runtime.model_files.files import MAX_SETTINGS_BYTES, present, read_small
from quartet.runtime.model_files.vector_kinds import COLBERT, MODEL_TYPES, MultiVector, Sparse
from quartet.runtime.shorten import short

Json = Mapping[str, Any]
Pooling = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]

ENCODERS = (
    *("Bert", "Roberta", "XLMRoberta", "Camembert", "DistilBert", "ModernBert", "Electra", "MPNet", "DebertaV2"),
    "Deberta",
    *("NomicBert", "Gte", "JinaEmbeddingsV3", "EuroBert"),
)
SCORING = ("ForSequenceClassification", "ForRewardModel")
SUFFIXES = ("Model", "ForMaskedLM", *SCORING)  # architectures that end in these give vectors or scores
ENDS = (*SCORING, "ForMaskedLM", "ForCausalLM", "TextModel", "Model")  # behind the name of a family
GENERATING = "HeadModel"  # GPT2LMHeadModel
PADDED_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")  # their positions begin behind the padding id
LEGACY_POOLING: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# of sentence-transformers, those that are followed
MODULES = ("Transformer", "MLMTransformer", "Pooling", "SpladePooling", "MultiVectorMask", "Dense", "Normalize")
PROMPTS_FILE = "config_sentence_transformers.json"
IDENTITY = "torch.nn.modules.linear.Identity"
DENSE_ACTIVATIONS = {"Identity": None, "GELU": "gelu", "ReLU": "relu", "SiLU": "silu", "Tanh": "tanh"}
MAX_FEATURES = 1 << 16
FOLDER = re.compile(r"\w[\w.-]*")  # of a module
MAX_PROMPT_CHARS = 4096  # it stands before each of a thousand texts
DEFAULT_LABELS = 2  # what config.json leaves out


class Dense(msgspec.Struct, frozen=True, kw_only=True):
    """A layer on top of the pooled vector, as its folder describes it."""

    folder: str = ""
    in_features: int
    out_features: int
    bias: bool = True
    use_residual: bool = False
    activation_function: str = "torch.nn.modules.activation.Tanh"

    @property
    def activation(self) -> str | None:
        """Its name among those of score heads."""
        return DENSE_ACTIVATIONS[self.activation_function.rsplit(".", 1)[-1]]


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """How an embedding model makes its answer of its hidden states.

    One vector for a text, but for those with `multi_vector` (one for each token) and `sparse` (weights of words).
    """

    pooling: tuple[Pooling, ...]  # several: side by side in one vector
    normalize: bool = False  # to length 1
    labels: int = 0  # outputs of the score head; 0: there is none
    activation: str | None = None  # of the scores: the path of a torch module
    encoder: bool = False  # BERT and its kin, rather than a decoder
    cross_encoder: bool = False  # reads two texts at once; its only label is answered as a bare number
    causal: bool = True
    scores_tokens: bool = False  # each token gets scores, and their mean is the text's
    matryoshka: bool = False  # its vectors may be cut
    dimensions: tuple[int, ...] = ()  # cut to one of these alone, where the model lists them
    own_dimensions: int | None = None  # that vectors are cut to where a request does not say
    dense: tuple[Dense, ...] = ()  # what the pooled vector passes
    prompts: dict[str, str] = {}  # texts that are put before others, by what the vector is for
    default_prompt: str = ""  # a name among those: where a request names none
    prompts_pooled: bool = True  # their tokens count like others
    task_adapters: bool = False  # its makers have an adapter for each task, here or elsewhere
    tasks: dict[str, str] = {}  # those that are here, and their folders; "": in the checkpoint
    default_task: str = ""  # among them, where a request names none
    multi_vector: MultiVector | None = None
    sparse: Sparse | None = None

    @property
    def gives_one_vector(self) -> bool:
        return self.multi_vector is None and self.sparse is None

    @property
    def whole_prompts(self) -> bool:
        """Every position sees every other, or all of them are pooled: no chunks, no cached prefix."""
        return not self.causal or self.pooling != ("lasttoken",) or not self.gives_one_vector

    def size(self, hidden: int) -> int:
        """Numbers of a vector, where hidden states have so many."""
        return self.dense[-1].out_features if self.dense else hidden * len(self.pooling)

    def token_size(self, hidden: int) -> int:
        """Numbers of a token's vector, likewise."""
        return self.dense[-1].out_features if self.dense and self.multi_vector else hidden


class Module(msgspec.Struct, frozen=True):
    """An entry of modules.json."""

    type: str
    path: str = ""


def is_embedder(architecture: str) -> bool:
    """Whether an architecture is one for embedding, whatever the flags say."""
    return architecture == COLBERT or (architecture.endswith(SUFFIXES) and not architecture.endswith(GENERATING))


def family_name(architecture: str) -> str:
    """For example Qwen2 of Qwen2ForSequenceClassification."""
    return next((architecture.removesuffix(end) for end in ENDS if architecture.endswith(end)), architecture)


def is_encoder(architecture: str) -> bool:
    return architecture == COLBERT or any(
        architecture == f"{family}{suffix}" for family in ENCODERS for suffix in SUFFIXES
    )


def usable_positions(config: Json, positions: int) -> int:
    """The longest input of a model with a table of so many positions."""
    if config.get("model_type") in PADDED_POSITIONS:
        return positions - int(config.get("pad_token_id", 1)) - 1
    return positions


def embedding(path: Path, architecture: str, config: Json) -> Embedding:
    """Read the settings of an embedding model. Raises StartupError for what cannot be followed."""
    encoder, scoring = is_encoder(architecture), architecture.endswith(SCORING)
    dimensions = config.get("matryoshka_dimensions") or ()
    pools_all = task_adapters.has_tasks(architecture, config)
    found = Embedding(
        pooling=("mean",) if pools_all else ("cls",) if encoder else ("lasttoken",),
        normalize=not scoring,
        encoder=encoder,
        causal=not encoder
        and config.get("is_causal", True) is not False
        and not config.get("use_bidirectional_attention"),
        matryoshka=bool(dimensions or config.get("is_matryoshka")),
        dimensions=tuple(dimensions),
        own_dimensions=config.get("truncate_dim"),
        task_adapters=architecture.startswith(task_adapters.FAMILY),
    )
    if scoring:
        return with_scores(found, architecture, config)
    if architecture == COLBERT:
        return colbert(found, path)
    return with_tasks(with_prompts(with_modules(found, path, architecture), path), path, architecture, config)


def with_tasks(found: Embedding, path: Path, architecture: str, config: Json) -> Embedding:
    """The task adapters of a model, and their prompts; unchanged where there are none. Raises StartupError."""
    if not task_adapters.has_tasks(architecture, config):
        return found
    tasks = task_adapters.tasks_of(path, architecture, config)
    prompts = {**task_adapters.instructions_of(path, config), **found.prompts}
    check_prompts(path / "config.json", prompts)
    default = task_adapters.default_of(path, config, tasks)
    return msgspec.structs.replace(found, tasks=tasks, prompts=prompts, default_task=default)


def check_cuts(found: Embedding, path: Path, hidden: int) -> None:
    """Raise StartupError for vectors that are to be cut to more numbers than they have."""
    size = found.labels or found.size(hidden)
    fields = {"matryoshka_dimensions": found.dimensions, "truncate_dim": (found.own_dimensions or 0,)}
    for field, given in fields.items():
        if given and max(given) > size:
            raise StartupError(f"{path}/config.json: {field} is {max(given)}, more than the {size} numbers of a vector")


def colbert(found: Embedding, path: Path) -> Embedding:
    """A checkpoint of Stanford's ColBERT: one more matrix behind BERT, in the same file."""
    multi_vector, prompts, size = vector_kinds.stanford(path)
    hidden = int(read_settings(path / "config.json").get("hidden_size") or 0)
    dense = Dense(in_features=hidden, out_features=size, bias=False, activation_function=IDENTITY)
    return msgspec.structs.replace(found, normalize=True, dense=(dense,), multi_vector=multi_vector, prompts=prompts)


def with_scores(found: Embedding, architecture: str, config: Json) -> Embedding:
    """A classification or reward model: one score for each label."""
    labels = len(config.get("id2label") or ()) or int(config.get("num_labels") or DEFAULT_LABELS)
    if architecture.endswith("ForRewardModel"):
        labels = int(config.get("num_labels") or 1)
    late = "late" if architecture.startswith("EuroBert") else None
    if found.encoder and (kind := config.get("classifier_pooling", late)) in ("mean", "late"):
        found = msgspec.structs.replace(found, pooling=("mean",), scores_tokens=kind == "late")
    settings = config.get("sentence_transformers") or {}
    activation = config.get("sbert_ce_default_activation_function") or settings.get("activation_fn")
    return msgspec.structs.replace(found, labels=labels, activation=activation, cross_encoder=found.encoder)


def with_modules(found: Embedding, path: Path, architecture: str) -> Embedding:
    """The pooling and normalisation of a sentence-transformers model; unchanged where it is none."""
    modules = read_modules(path)
    if not modules:
        return found
    folders = {module.type.rsplit(".", 1)[-1]: module.path for module in modules}
    if unknown := sorted(folders.keys() - set(MODULES)):
        raise StartupError(f"{path}/modules.json has a {unknown[0]} module; {', '.join(MODULES)} are served")
    dense = tuple(read_dense(path, module.path) for module in modules if module.type.endswith(".Dense"))
    found = msgspec.structs.replace(found, normalize="Normalize" in folders, dense=dense)
    if "SpladePooling" in folders:
        if not architecture.endswith("ForMaskedLM"):
            raise StartupError(f"{path} weighs words, which a {architecture} has no head for; ForMaskedLM has one")
        sparse = vector_kinds.read_sparse(path / folders["SpladePooling"] / "config.json")
        return msgspec.structs.replace(found, sparse=sparse)
    if "Pooling" in folders:
        pooling, pooled = read_pooling(path / folders["Pooling"] / "config.json")
        return msgspec.structs.replace(found, pooling=pooling, prompts_pooled=pooled)
    return with_token_vectors(found, path, folders)


def with_token_vectors(found: Embedding, path: Path, folders: Mapping[str, str]) -> Embedding:
    """A model without a pooling: one of many vectors, where its files are those of PyLate or say so."""
    given = read_settings(path / PROMPTS_FILE)
    if given.get("model_type") not in MODEL_TYPES and "MultiVectorMask" not in folders:
        return found
    multi_vector, marks = MultiVector(), dict[str, str]()
    if given.get("model_type") == "ColBERT":
        multi_vector, marks = vector_kinds.pylate(path / PROMPTS_FILE, given)
        found = msgspec.structs.replace(found, normalize=True)
    if "MultiVectorMask" in folders:
        multi_vector = vector_kinds.masked(path / folders["MultiVectorMask"] / "config.json", multi_vector)
    multi_vector = vector_kinds.expanded(path / "sentence_bert_config.json", multi_vector)
    return msgspec.structs.replace(found, multi_vector=multi_vector, prompts=marks)


def read_dense(path: Path, folder: str) -> Dense:
    """The layer of a folder. Raises StartupError."""
    file = path / folder / "config.json"
    try:
        found = msgspec.json.decode(read_small(file, MAX_SETTINGS_BYTES), type=Dense)
    except msgspec.DecodeError as error:
        raise StartupError(f"{file} does not describe a layer: {error}") from error
    if found.use_residual:
        raise StartupError(f"{file}: use_residual is not supported")
    if not (1 <= found.in_features <= MAX_FEATURES and 1 <= found.out_features <= MAX_FEATURES):
        raise StartupError(f"{file}: in_features and out_features must be in [1, {MAX_FEATURES}]")
    module = found.activation_function
    if not module.startswith("torch.nn.") or module.rsplit(".", 1)[-1] not in DENSE_ACTIVATIONS:
        raise StartupError(
            f"{file} names the activation {module}; served are {', '.join(DENSE_ACTIVATIONS)} of torch.nn"
        )
    return msgspec.structs.replace(found, folder=folder)


class Prompts(msgspec.Struct):
    """The part of config_sentence_transformers.json that is wanted here."""

    prompts: dict[str, str] = {}
    default_prompt_name: str | None = None


def with_prompts(found: Embedding, path: Path) -> Embedding:
    """The prompts of a sentence-transformers model; unchanged where it has none. Raises StartupError."""
    file = path / PROMPTS_FILE
    if not present(file):
        return found
    try:
        given = msgspec.json.decode(read_small(file, MAX_SETTINGS_BYTES), type=Prompts)
    except msgspec.DecodeError as error:
        raise StartupError(f"{file} does not describe prompts: {error}") from error
    check_prompts(file, given.prompts)
    default = given.default_prompt_name or ""
    if default and default not in given.prompts:
        raise StartupError(f"{file}: default_prompt_name is {default!r}, which is not among its prompts")
    marked = {name: mark + given.prompts.get(name, "").removeprefix(mark) for name, mark in found.prompts.items()}
    return msgspec.structs.replace(found, prompts={**given.prompts, **marked}, default_prompt=default)


def check_prompts(file: Path, prompts: Mapping[str, str]) -> None:
    """Raise StartupError for a prompt that is too long."""
    if longest := next((name for name, text in prompts.items() if len(text) > MAX_PROMPT_CHARS), None):
        raise StartupError(f"{file}: the prompt {longest!r} has more than {MAX_PROMPT_CHARS} characters")


def read_settings(file: Path) -> dict[str, Any]:
    """A settings file; {} where there is none. Raises StartupError."""
    found: dict[str, Any] = vector_kinds.settings(file, dict[str, Any], "a model") if present(file) else {}
    return found


def read_modules(path: Path) -> list[Module]:
    """The entries of modules.json; none where there is no such file. Raises StartupError."""
    file = path / "modules.json"
    if not present(file):
        return []
    try:
        modules = msgspec.json.decode(read_small(file, MAX_SETTINGS_BYTES), type=list[Module])
    except msgspec.DecodeError as error:
        raise StartupError(f"{file} is not a list of modules: {error}") from error
    if wrong := next((module.path for module in modules if module.path and not FOLDER.fullmatch(module.path)), None):
        raise StartupError(f"{file} names the folder {short(repr(wrong))}, which is not one beside it")
    return modules


def read_pooling(file: Path) -> tuple[tuple[Pooling, ...], bool]:
    """The pooling modes of a sentence-transformers pooling module, and whether a prompt's tokens are pooled too."""
    try:
        config = msgspec.json.decode(read_small(file, MAX_SETTINGS_BYTES), type=dict[str, Any])
        modes = config.get("pooling_mode") or [mode for key, mode in LEGACY_POOLING.items() if config.get(key)]
        pooling = msgspec.convert([modes] if isinstance(modes, str) else modes, tuple[Pooling, ...])
    except (StartupError, msgspec.DecodeError) as error:
        raise StartupError(f"{file} does not name a pooling that is served: {error}") from error
    if not pooling:
        raise StartupError(f"{file} names no pooling")
    if len(set(pooling)) < len(pooling):
        raise StartupError(f"{file} names a pooling twice")
    return pooling, config.get("include_prompt") is not False
