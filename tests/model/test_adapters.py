"""LoRA adapters beside their base, against models into which they were merged, computed by transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quartet.kernels.cpu.native import build as native_build
from quartet.kernels.cpu.native import library
from quartet.runtime.messages import LogprobOptions
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.execution.adapters import AdapterStore
from quartet.scheduler_service.model.cpu_backend import CpuBackend
from quartet.scheduler_service.model.torch_backend import TorchBackend
from tests.adapters import merge, write_adapter
from tests.engine import ALL_LOGPROBS, Answer, Engine, floats
from tests.model.tiny import build

PROMPT = [5, 9, 200, 31, 77, 120, 14, 8, 251, 60]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
SETTINGS = [
    {"rank": 3},
    {"rank": 8, "use_rslora": True},
    {"rank": 16, "rank_pattern": {"q_proj": 5, "down_proj": 7}, "alpha_pattern": {"q_proj": 3.0}},
    {"rank": 64, "lora_alpha": 16},
]
NAMES = ["", "a0", "a1", "a2", "a3"]


class Served:
    """An engine with adapters a0, a1, ..., and the tokens that transformers gives for each."""

    def __init__(self, family: str, directory: Path, **settings: object) -> None:
        self.family, self.directory = family, directory
        self.base = self.build()
        self.engine = self.start(enable_lora=True, max_running_requests=16, **settings)
        store = self.engine.worker.load_adapters(self.engine.config, str(directory))
        assert store is not None
        self.store: AdapterStore = store
        self.oracles = {"": transformers.AutoModelForCausalLM.from_pretrained(self.base).eval()}
        for i, own in enumerate(SETTINGS):
            self.load(f"a{i}", seed=i + 1, **own)

    def build(self) -> Path:
        return build(self.family, self.directory / "base")

    def start(self, **settings: Any) -> Engine:
        return Engine(self.base, **settings)

    def load(self, name: str, seed: int, **settings: object) -> None:
        version = str(self.store.versions + 1)
        adapter = write_adapter(self.base, self.directory / f"{name}.{version}", seed=seed, **settings)
        self.store.install(name, name, str(adapter), self.store.read(adapter), pinned=False)
        self.engine.planner.waiting.set_adapter_versions(self.store.version_of)
        merged = merge(self.base, adapter, self.directory / f"{name}.{version}.merged")
        self.oracles[name] = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()

    def ask(self, names: list[str], prompt: list[int] = PROMPT) -> list[Answer]:
        rids = [self.engine.add(prompt, GREEDY, adapter=name, logprobs=LogprobOptions()) for name in names]
        self.engine.run()
        return [self.engine.answers[rid] for rid in rids]

    def check(self, answer: Answer, name: str, prompt: list[int] = PROMPT) -> None:
        """Equal tokens, and logprobs within 1e-3."""
        with torch.no_grad():
            ids = torch.tensor([prompt + answer.ids])
            logprobs = self.oracles[name](ids).logits[0].float().log_softmax(-1)
        expected = logprobs[len(prompt) - 1 : -1]
        assert answer.ids == expected.argmax(-1).tolist(), name
        assert answer.logprobs is not None
        own = torch.tensor(floats(answer.logprobs.values))
        assert torch.allclose(own, expected.max(-1).values, atol=1e-3), name


@pytest.fixture(scope="module", params=["qwen2", "llama", "qwen3_moe", "phi3", "gemma3n", "gemma4"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(request.param, tmp_path_factory.mktemp(request.param))


def test_adapters_alone_and_mixed_with_the_base_give_what_merged_models_give(served: Served) -> None:
    for name in NAMES:
        served.check(*served.ask([name]), name)
    for name, answer in zip(NAMES * 2, served.ask(NAMES * 2), strict=True):
        served.check(answer, name)


def test_prefixes_are_reused_by_the_same_adapter_only(served: Served) -> None:
    prompt = list(range(100, 140))
    for name in NAMES:
        first, second = served.ask([name], prompt)[0], served.ask([name], prompt)[0]
        assert (first.cached_tokens, second.cached_tokens) == (0, 36), name
        served.check(second, name, prompt)


def test_adapters_survive_retraction_and_follow_a_replacement_with_a_new_version(served: Served) -> None:
    prompt = [*PROMPT, 44, 45, 46]
    rids = [served.engine.add(prompt, GREEDY, adapter=name, logprobs=LogprobOptions()) for name in NAMES]
    for _ in range(3):
        served.engine.step()
    served.engine.planner.retract_all()
    served.engine.run()
    for rid, name in zip(rids, NAMES, strict=True):
        assert served.engine.answers[rid].retractions == 1
        served.check(served.engine.answers[rid], name, prompt)
    before = served.store.version_of["a1"]
    served.load("a1", seed=77, rank=5)
    (replaced,) = served.ask(["a1"], prompt)
    assert replaced.cached_tokens == 0 and served.store.version_of["a1"] != before
    served.check(replaced, "a1", prompt)


def test_in_deterministic_mode_bits_do_not_depend_on_the_adapters_of_others(tmp_path: Path) -> None:
    served = Native("qwen2", tmp_path, enable_deterministic_inference=True)
    alone = [served.ask([name])[0] for name in NAMES]
    for one, mixed in zip(alone * 2, served.ask(NAMES * 2), strict=True):
        assert one.ids == mixed.ids
        assert one.logprobs is not None and mixed.logprobs is not None
        assert one.logprobs.values == mixed.logprobs.values


class Native(Served):
    """In bfloat16, with heads that the kernel of all layers in one call knows."""

    def __init__(self, family: str, directory: Path, **settings: object) -> None:
        self.sizes = {"hidden_size": 256} | ({} if family == "phi3" else {"head_dim": 64})
        super().__init__(family, directory, dtype="bfloat16", disable_radix_cache=True, **settings)

    def build(self) -> Path:
        return build(self.family, self.directory / "base", **self.sizes)

    def logprobs(self, names: list[str]) -> list[list[float]]:
        """Of the prompt and of the output."""
        rids = [self.engine.add(PROMPT, GREEDY, adapter=name, logprobs=ALL_LOGPROBS) for name in names]
        self.engine.run()
        answers = [self.engine.answers[rid] for rid in rids]
        return [floats(one.input_logprobs.values + one.logprobs.values)[1:] for one in answers]  # type: ignore[union-attr]

    def errors(self, answers: list[Answer], names: list[str]) -> torch.Tensor:
        """How far the logprobs of the tokens are from those of the merged models in float32."""
        found = []
        for answer, name in zip(answers, names, strict=True):
            with torch.no_grad():
                logprobs = self.oracles[name](torch.tensor([PROMPT + answer.ids])).logits[0].float().log_softmax(-1)
            exact = logprobs[len(PROMPT) - 1 : -1].gather(1, torch.tensor(answer.ids)[:, None]).flatten()
            assert answer.logprobs is not None
            found.append((torch.tensor(floats(answer.logprobs.values)) - exact).abs())
        return torch.cat(found)


has_kernels = pytest.mark.skipif(not native_build.is_possible(), reason="no compiler, or another kind of machine")


@has_kernels
@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3", "qwen3_moe", "qwen2_moe"])
def test_steps_with_adapters_are_one_call_with_the_bits_of_single_ones(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = library.library()
    torchs_attention = kernels is None or not kernels.has_attention  # whose bits depend on the other rows
    served = Native(family, tmp_path, enable_deterministic_inference=torchs_attention)
    backend = served.engine.worker.model.backend
    assert isinstance(backend, CpuBackend)
    together = served.logprobs(NAMES * 2)
    assert (backend.together is not None) == (kernels is not None and kernels.has_attention)
    assert len({tuple(each) for each in together[: len(NAMES)]}) == len(NAMES), "the adapters change something"
    alone = [served.logprobs([name])[0] for name in NAMES]
    assert together == alone * 2, "a row's bits do not depend on its company"
    monkeypatch.setattr(CpuBackend, "run_layers", lambda *_, **__: None)
    assert served.logprobs(NAMES * 2) == together


@has_kernels
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_adapters_in_bfloat16_are_as_near_to_the_exact_ones_as_with_torch(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Native(family, tmp_path / "ours")
    own = ours.errors(ours.ask(NAMES * 2), NAMES * 2)
    with monkeypatch.context() as patch:
        patch.setattr(library, "_loading", None)
        patch.setenv("QUARTET_CPU_ISA", "none")
        torchs = Native(family, tmp_path / "torch")
        assert isinstance(torchs.engine.worker.model.backend, TorchBackend)
        theirs = torchs.errors(torchs.ask(NAMES * 2), NAMES * 2)
    assert own.mean() <= 1.3 * theirs.mean() < 0.2, (own.mean(), theirs.mean())


@has_kernels
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_adapters_change_a_quantized_base(quantization: str, tmp_path: Path) -> None:
    served = Native("qwen2", tmp_path, quantization=quantization)
    alone = [served.ask([name])[0] for name in NAMES]
    assert len({tuple(answer.ids) for answer in alone}) > 1
    for answer, again in zip(alone * 2, served.ask(NAMES * 2), strict=True):
        assert answer.logprobs is not None and again.logprobs is not None
        ours, others = floats(answer.logprobs.values), floats(again.logprobs.values)
        assert ours[0] == pytest.approx(others[0], abs=0.3)
