"""LoRA adapters that peft itself has made, against peft on transformers' model. Skipped where peft is not installed."""

from typing import Any

import pytest
import torch
import transformers

from quartet.runtime.messages import LogprobOptions
from tests.model.test_adapters import GREEDY, NAMES, PROMPT, Served

peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")

DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODULES = {"qwen2": DENSE, "llama": DENSE, "qwen3_moe": DENSE[:4]}  # peft cannot adapt transformers' joined experts so


class PeftServed(Served):
    """As Served, with adapters that peft has written; its own model says what they give."""

    def load(self, name: str, seed: int, **settings: Any) -> None:
        rank = settings.pop("rank")
        target = MODULES[self.family]
        config = peft.LoraConfig(
            r=rank, target_modules=target, init_lora_weights=False, **{"lora_alpha": 2 * rank, **settings}
        )
        torch.manual_seed(seed)
        base = transformers.AutoModelForCausalLM.from_pretrained(self.base)
        self.oracles[name] = peft.get_peft_model(base, config).eval()
        directory = self.directory / f"{name}.{self.store.versions + 1}"
        self.oracles[name].save_pretrained(str(directory))
        self.store.install(name, name, str(directory), self.store.read(directory), pinned=False)
        self.engine.planner.waiting.set_adapter_versions(self.store.version_of)


@pytest.fixture(scope="module", params=list(MODULES))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PeftServed:
    return PeftServed(request.param, tmp_path_factory.mktemp(request.param))


def test_answers_alone_and_mixed_are_those_of_peft(served: PeftServed) -> None:
    answers = [served.ask([name])[0] for name in NAMES]
    assert len({tuple(answer.ids) for answer in answers}) > 1, "the adapters change something"
    for name, answer in [*zip(NAMES, answers, strict=True), *zip(NAMES * 2, served.ask(NAMES * 2), strict=True)]:
        served.check(answer, name)


def test_answers_with_prefix_hits_after_retraction_and_after_replacement_are_those_of_peft(served: PeftServed) -> None:
    prompt = [*PROMPT, *range(100, 130)]
    served.ask(NAMES, prompt)
    for name, answer in zip(NAMES, served.ask(NAMES, prompt), strict=True):
        assert answer.cached_tokens > 0
        served.check(answer, name, prompt)
    rids = [served.engine.add(prompt, GREEDY, adapter=name, logprobs=LogprobOptions()) for name in NAMES]
    for _ in range(3):
        served.engine.step()
    served.engine.planner.retract_all()
    served.engine.run()
    for rid, name in zip(rids, NAMES, strict=True):
        assert served.engine.answers[rid].retractions == 1
        served.check(served.engine.answers[rid], name, prompt)
    served.load("a1", seed=77, rank=5)
    [replaced] = served.ask(["a1"], prompt)
    assert replaced.cached_tokens == 0
    served.check(replaced, "a1", prompt)
