"""Real GGUF files against transformers on the weights it makes of them: tokens, templates, greedy answers, logprobs.

Perplexity is measured on the text of `deploy.benchmarks.fidelity`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from deploy.benchmarks import fidelity
from quartet.runtime.messages import LogprobOptions
from quartet.runtime.model_files import hub, model_info, tokenizer_files
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.weights.parameters import Weights
from tests import real_models
from tests.configs import resolved
from tests.engine import Engine, floats
from tests.real_models import MODELS

pytestmark = [pytest.mark.slow, pytest.mark.real_models]

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = (
    "The capital of France is",
    "def quicksort(xs):\n",
    "Water boils at",
    "SELECT name FROM users WHERE",
    "import numpy as np\n\ndef mean(",
    "Das ist ein",
    "1, 2, 3, 5, 8,",
    "class Stack:\n    def __init__(self):",
)
TOKENS = 16
TEXTS = ("README.md", "docs/developing.md", "runtime/launcher/launch.py", "tests/model/test_real_gguf.py")
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is 7 a prime number?"}]
TOLERANCE = 2e-4  # of logprobs in float32


class Expected(NamedTuple):
    """What transformers makes of a prompt."""

    ids: list[int]
    output: list[int]
    logprobs: list[float]


class Real(NamedTuple):
    """A file, the directory that is made of it, and the tokenizer that is served."""

    file: Path
    directory: Path
    tokenizer: Tokenizer


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model.file)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Real:
    file = real_models.or_skip(request.param)
    config = hub.locate(resolved(model_path=str(file)), tmp_path_factory.mktemp("run"))
    return Real(file, Path(config.model_dir), tokenizer_files.load(Path(config.model_dir)))


@pytest.fixture(scope="module")
def reference(real: Real) -> Iterator[Any]:
    """transformers' model with the blocks expanded to float32."""
    pytest.importorskip("gguf", reason="transformers reads GGUF files with the gguf package, which is not installed")
    yield transformers.AutoModelForCausalLM.from_pretrained(
        real.file.parent,
        gguf_file=real.file.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )


@torch.inference_mode()
def expected(model: Any, ids: list[int]) -> Expected:
    whole = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    output = whole[0, len(ids) :].tolist()
    logprobs = model(whole).logits[0].log_softmax(-1)
    return Expected(ids, output, [float(logprobs[len(ids) - 1 + i, id]) for i, id in enumerate(output)])


@pytest.fixture(scope="module")
def engine(real: Real) -> Engine:
    return Engine(real.directory, dtype="float32", max_total_tokens=4096)


def texts(file: Path) -> Iterator[str]:
    for name in TEXTS:
        text = (ROOT / name).read_text()
        # transformers cuts runs of spaces otherwise than the tokenizer that the file was made of
        yield re.sub(" {2,}", " ", text) if "gemma" in file.name else text


def test_token_ids_of_real_texts_are_those_of_transformers_and_give_the_texts_back(real: Real) -> None:
    pytest.importorskip("gguf", reason="transformers reads GGUF files with the gguf package, which is not installed")
    original = transformers.AutoTokenizer.from_pretrained(real.file.parent, gguf_file=real.file.name)
    for text in texts(real.file):
        assert real.tokenizer.encode(text).ids == original(text).input_ids
        ids = real.tokenizer.encode(text, add_special_tokens=False).ids
        assert real.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_chat_template_renders_as_in_transformers(real: Real) -> None:
    template = real.directory / "chat_template.jinja"
    if not template.exists():
        assert "gemma" in real.file.name  # a base model
        return
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=real.tokenizer)
    text = tokenizer.apply_chat_template(
        CHAT, chat_template=template.read_text(), tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs 7 a prime number?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ends = model_info.load(resolved(model_path=str(real.directory))).eos_ids
    assert real.tokenizer.token_to_id("<|im_end|>") in ends


def test_weights_greedy_tokens_and_logprobs_are_those_of_transformers(
    real: Real, engine: Engine, reference: Any
) -> None:
    known = [expected(reference, real.tokenizer.encode(prompt).ids) for prompt in PROMPTS]
    weights = engine.worker.model.weights
    assert isinstance(weights, Weights)
    state = reference.state_dict()
    assert [name for name in weights.names() if not torch.equal(weights.view(name), state[name])] == []
    params = SamplingParams(temperature=0.0, max_new_tokens=TOKENS, ignore_eos=True)
    answers = engine.generate([prompt.ids for prompt in known], params, logprobs=LogprobOptions())
    assert [answer.ids for answer in answers] == [prompt.output for prompt in known]
    for answer, prompt in zip(answers, known, strict=True):
        assert answer.logprobs is not None
        assert floats(answer.logprobs.values) == pytest.approx(prompt.logprobs, abs=TOLERANCE)


def test_perplexity_of_real_text_is_that_of_transformers(real: Real, engine: Engine, reference: Any) -> None:
    encoding = real.tokenizer.encode(fidelity.text()[: 8 * fidelity.WINDOW])
    windows = fidelity.windows(encoding.ids, 1)
    expected = fidelity.of_transformers(reference, windows)
    once = SamplingParams(temperature=0.0, max_new_tokens=1)
    answers = engine.generate(windows, once, logprobs=LogprobOptions(start=fidelity.WINDOW // 2))
    given = answers[0].input_logprobs
    assert given is not None
    scored = floats(given.values)[-len(expected.logprobs) :]
    assert fidelity.Scores(scored).perplexity == pytest.approx(expected.perplexity, rel=1e-4)
