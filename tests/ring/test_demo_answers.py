"""The demo model through a real server: what the first command of the README shows, and the capitals of the card."""

import json
from collections.abc import Iterator
from random import Random

import pytest
import requests

from deploy.demo_model.corpus import TURN_START, copy_question, count_question, sum_question, turn
from deploy.demo_model.facts import COUNTRIES

pytestmark = pytest.mark.slow

CHAT = turn("user", "{}") + f"{TURN_START}assistant\n"
ASKED = (
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "The capital city of {} is",
    "Q: What is the capital of {}?\nA:",
    CHAT.format("What is the capital of {}?"),
    CHAT.format("Tell me the capital of {}."),
)
LEAST_SHARE = 0.95
SAMPLES = 60
SAMPLE_SEED = 7  # training drew from another
ANSWER_TIMEOUT_S = 120


@pytest.fixture(scope="module")
def url(launch_for_module) -> Iterator[str]:
    yield launch_for_module("--model-path", "demo").url


def generate(url: str, text: str | list[str], **sampling: object):
    body = {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": 200} | sampling}
    response = requests.post(f"{url}/generate", json=body, timeout=ANSWER_TIMEOUT_S)
    assert response.status_code == 200, response.text
    return response.json()


def test_raw_question_is_answered_with_paris(url):
    answer = generate(url, "What is the capital of France?")
    assert answer["text"] == " The capital of France is Paris."
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": 0}


def test_default_parameters_of_the_model_answer_paris_too(url):
    response = requests.post(f"{url}/generate", json={"text": "What is the capital of France?"}, timeout=60)
    assert "Paris" in response.json()["text"]


@pytest.mark.parametrize("phrasing", ASKED)
def test_nineteen_of_twenty_capitals_are_right(url, phrasing):
    answers = generate(url, [phrasing.format(country.name) for country in COUNTRIES], max_new_tokens=40)
    wrong = [
        (country.name, answer["text"])
        for country, answer in zip(COUNTRIES, answers, strict=True)
        if country.capital not in answer["text"]
    ]
    assert len(wrong) <= (1 - LEAST_SHARE) * len(COUNTRIES), wrong


def test_every_answer_ends_by_itself(url):
    prompts = ["Count from 3 to 7.", "What is 23 + 58?", 'Say: "good day"', "Who are you?", CHAT.format("Hello!")]
    for answer in generate(url, prompts):
        assert answer["meta_info"]["finish_reason"]["type"] == "stop", answer


@pytest.mark.parametrize(("task", "least_share"), [(count_question, 0.75), (copy_question, 0.75), (sum_question, 0.8)])
def test_small_tasks_are_mostly_done(url, task, least_share):
    rng = Random(SAMPLE_SEED)
    exchanges = [task(rng) for _ in range(SAMPLES)]
    answers = generate(url, [CHAT.format(exchange.prompt) for exchange in exchanges])
    right = sum(answer["text"] == exchange.answer for answer, exchange in zip(answers, exchanges, strict=True))
    assert right >= least_share * SAMPLES, right


def test_json_answer_is_json(url):
    answer = generate(url, CHAT.format("Give the capital of Japan as JSON."))
    assert json.loads(answer["text"]) == {"country": "Japan", "capital": "Tokyo"}
