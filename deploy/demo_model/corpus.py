"""The text the demo model learns from: an endless stream of documents, a pure function of the random generator.

A document is a list of spans. The model answers for what it says and listens to what it is asked, so a span that
belongs to a prompt counts little in the loss and one that belongs to an answer counts fully.
"""

from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

from deploy.demo_model import stories
from deploy.demo_model.facts import ALIASES, COUNTRIES, Country
from deploy.demo_model.phrasings import (
    COMPLETIONS,
    CONTINENTS,
    JSON_QUESTIONS,
    QUESTIONS,
    REVERSED,
    REVERSED_COMPLETIONS,
    Exchange,
)
from deploy.demo_model.smalltalk import GREETINGS, SYSTEM_PROMPTS, unknown_question

SEED = 1  # of the committed model

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

PROMPT_WEIGHT = 0.1
LARGEST_NUMBER = 99

WORD_LIST = (
    "apple river stone cloud window garden silver paper tiger music winter bridge candle orange ocean mountain letter "
    "pencil rabbit coffee yellow rocket forest button island mirror planet basket hammer violin thunder castle pepper "
    "lantern dragon feather honey marble valley puzzle the a my your is and or not red blue green big small old new "
    "quick brown fox lazy dog jumps over hello world good day one two three sun moon star tree bird fish cake tea"
)
WORDS = WORD_LIST.split()
SYMBOLS = (*"😀🌍🚀🎉🐱🍎⭐❤é€ñ漢字日本語", "ok", "42", "3.14", "A-1", "foo_bar", "x", "y", "z")
OPENERS = (
    "Hello!",
    "Hi,",
    "Quick question:",
    "I have a question.",
    "Geography:",
    "Dear model,",
    "One more:",
    "Help me:",
)
CLOSERS = ("Please answer briefly.", "Thanks!", "I need to know.", "Please help me.")
SYLLABLES = (
    "bal",
    "dor",
    "fen",
    "gor",
    "kal",
    "lum",
    "mor",
    "nar",
    "pel",
    "quin",
    "ras",
    "tor",
    "vel",
    "wen",
    "zan",
    "xi",
)
NAME_ENDINGS = ("ia", "land", "stan", "onia", "or", "a", "")
IMAGINARY = ("Atlantis", "Narnia", "Mordor", "Wakanda", "Gondor", "Utopia", "Oz", "Ruritania", "Lilliput", "Freedonia")
HOBBIES = ("chess", "tennis", "music", "reading", "football", "cooking", "painting", "running")


class Span(NamedTuple):
    """A piece of a document, tokenized on its own, and its weight in the loss."""

    text: str
    weight: float


Document = list[Span]


def is_held_out(left: int, right: int) -> bool:
    """One sum in ten is kept out of training, to tell calculation from memory."""
    return (left * 7 + right * 3) % 10 == 0


def country_name(rng: Random, country: Country) -> str:
    """The name a prompt uses: mostly the usual one, at times an alias or without the article."""
    aliases = ALIASES.get(country.name, ())
    if aliases and rng.random() < 0.35:
        return rng.choice(aliases)
    return country.label if rng.random() < 0.12 else country.name


def capital_question(rng: Random) -> Exchange:
    country = rng.choice(COUNTRIES)
    prompt, answer = rng.choice(QUESTIONS).ask(country, country_name(rng, country))
    match rng.randrange(20):
        case 0:
            prompt = prompt.lower()
        case 1:
            prompt = prompt.rstrip("?.")
        case 2 | 3:
            prompt = f"{rng.choice(OPENERS)} {prompt}"
        case 4:
            prompt = f"{prompt} {rng.choice(CLOSERS)}"
    return Exchange(prompt, answer)


def imaginary_question(rng: Random) -> Exchange:
    """A country that does not exist; the model should say so."""
    name = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()
    name = rng.choice(IMAGINARY) if rng.random() < 0.3 else name + rng.choice(NAME_ENDINGS)
    prompt, _ = rng.choice(QUESTIONS).ask(Country(name, "", ""))
    return Exchange(prompt, f"I do not know a country called {name}.")


def reversed_question(rng: Random) -> Exchange:
    return rng.choice(REVERSED).ask(rng.choice(COUNTRIES))


def continent_question(rng: Random) -> Exchange:
    return rng.choice(CONTINENTS).ask(rng.choice(COUNTRIES))


def yes_or_no_question(rng: Random) -> Exchange:
    country, other = rng.choice(COUNTRIES), rng.choice(COUNTRIES)
    if rng.random() < 0.5 or other is country:
        return Exchange(
            f"Is {country.capital} the capital of {country.name}?",
            f"Yes, {country.capital} is the capital of {country.name}.",
        )
    return Exchange(
        f"Is {other.capital} the capital of {country.name}?",
        f"No, the capital of {country.name} is {country.capital}.",
    )


def country_json(rng: Random) -> Exchange:
    return rng.choice(JSON_QUESTIONS).ask(rng.choice(COUNTRIES))


def person_json(rng: Random) -> Exchange:
    name, age, hobby = rng.choice(stories.NAMES), rng.randint(5, 90), rng.choice(HOBBIES)
    prompt = rng.choice(
        (
            "Write as JSON: {name} is {age} years old and likes {hobby}.",
            "Turn this into JSON: {name}, age {age}, likes {hobby}.",
        )
    )
    answer = f'{{"name": "{name}", "age": {age}, "likes": "{hobby}"}}'
    return Exchange(prompt.format(name=name, age=age, hobby=hobby), answer)


def operands(rng: Random) -> tuple[int, str, int, int]:
    """A sum or a difference that is not held out: left, sign, right, result."""
    while True:
        largest = 9 if rng.random() < 0.2 else LARGEST_NUMBER
        left, right = rng.randint(0, largest), rng.randint(0, largest)
        if is_held_out(left, right):
            continue
        if rng.random() < 0.5:
            return left, "+", right, left + right
        if left >= right:
            return left, "-", right, left - right


SUM_QUESTIONS = ("What is {sum}?", "Calculate {sum}.", "How much is {sum}?", "{sum} = ?")


def sum_question(rng: Random) -> Exchange:
    left, sign, right, result = operands(rng)
    text = f"{left} {sign} {right}"
    return Exchange(rng.choice(SUM_QUESTIONS).format(sum=text), f"{text} = {result}.")


def sum_in_words(rng: Random) -> Exchange:
    left, sign, right, result = operands(rng)
    prompt = f"Add {left} and {right}." if sign == "+" else f"Subtract {right} from {left}."
    return Exchange(prompt, f"{left} {sign} {right} = {result}.")


def count_question(rng: Random) -> Exchange:
    first = rng.randint(0, LARGEST_NUMBER - 1) if rng.random() < 0.5 else rng.randint(0, 5)
    last = min(first + (rng.randint(1, 12) if rng.random() < 0.7 else rng.randint(10, 40)), LARGEST_NUMBER + 1)
    numbers = list(range(first, last + 1))
    if rng.random() < 0.2:
        return Exchange(f"Count down from {last} to {first}.", ", ".join(map(str, reversed(numbers))) + ".")
    prompt = rng.choice(
        ("Count from {first} to {last}.", "Count from {first} to {last}", "Count to {last} from {first}.")
    )
    return Exchange(prompt.format(first=first, last=last), ", ".join(map(str, numbers)) + ".")


def copied_text(rng: Random) -> str:
    """Something to repeat: words, names, symbols or plain random letters. No word twice, so that its end is clear."""
    match rng.randrange(4):
        case 0:
            return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 8)))
        case 1:
            return " ".join(rng.sample(SYMBOLS, rng.randint(1, 5)))
        case 2:
            return " ".join(rng.sample(WORDS + list(stories.NAMES), rng.randint(1, 5)))
    return " ".join(rng.sample(WORDS, rng.randint(1, 9)))


def copy_question(rng: Random) -> Exchange:
    text = copied_text(rng)
    if rng.random() < 0.3:
        text = f'"{text}"'
    return Exchange(rng.choice(("Repeat: {}", "Repeat after me: {}", "Say: {}", "Copy this: {}")).format(text), text)


def story_question(rng: Random) -> Exchange:
    prompt = rng.choice(("Tell me a story.", "Write a short story.", "Please tell me a short story."))
    return Exchange(prompt, stories.story(rng))


def small_talk(rng: Random) -> Exchange:
    if rng.random() < 0.1:
        name = rng.choice(stories.NAMES)
        return Exchange(
            f"{rng.choice(('Hello', 'Hi'))}, my name is {name}.", f"Hello {name}! What would you like to know?"
        )
    prompts, answer = rng.choice(GREETINGS)
    prompt = rng.choice(prompts)
    return Exchange(prompt.lower() if rng.random() < 0.1 else prompt, answer)


Task = Callable[[Random], Exchange]

TASKS: dict[Task, float] = {
    capital_question: 28,
    imaginary_question: 2,
    reversed_question: 6,
    continent_question: 4,
    yes_or_no_question: 5,
    country_json: 6,
    person_json: 2,
    sum_question: 14,
    sum_in_words: 2,
    count_question: 5,
    copy_question: 9,
    story_question: 1,
    small_talk: 3,
    unknown_question: 2,
}


def exchange(rng: Random) -> Exchange:
    """One exchange of any kind, in the shares of the table above."""
    (task,) = rng.choices(list(TASKS), list(TASKS.values()))
    return task(rng)


def completion(rng: Random) -> Exchange:
    """A sentence to be finished: about a capital, or a sum."""
    match rng.randrange(8):
        case 0:
            left, sign, right, result = operands(rng)
            return Exchange(f"{left} {sign} {right} =", str(result))
        case 1 | 2:
            return rng.choice(REVERSED_COMPLETIONS).ask(rng.choice(COUNTRIES))
    country = rng.choice(COUNTRIES)
    return rng.choice(COMPLETIONS).ask(country, country_name(rng, country))


def said(prompt: str, answer: str, end: str = END_OF_TEXT) -> Document:
    """A prompt and the answer that ends the document."""
    return [Span(prompt, PROMPT_WEIGHT), Span(answer + end, 1.0)]


def continued(prompt: str, answer: str, rng: Random) -> Document:
    """The answer after a space, which belongs to the answer but which some people type themselves."""
    if rng.random() < 0.04:
        return said(prompt + " ", answer)
    return said(prompt, " " + answer)


def raw_completion(rng: Random) -> Document:
    return continued(*completion(rng), rng)


def raw_question(rng: Random) -> Document:
    prompt, answer = exchange(rng)
    return said(prompt + "\n", answer) if rng.random() < 0.05 else continued(prompt, answer, rng)


FRAMES = (
    ("Q: {}\nA:", "\n\n"),
    ("Q: {}\nA:", "\n"),
    ("Question: {}\nAnswer:", "\n\n"),
    ("User: {}\nAssistant:", "\n"),
)


def framed_questions(rng: Random) -> Document:
    """One question as text, at times after a few answered ones (few-shot)."""
    frame, gap = rng.choice(FRAMES)
    shots = rng.choice((0, 0, 0, 0, 1, 2, 4))
    document: Document = []
    for _ in range(shots):
        prompt, answer = exchange(rng)
        document += [Span(frame.format(prompt), PROMPT_WEIGHT), Span(" " + answer, 1.0), Span(gap, 0.0)]
    prompt, answer = exchange(rng)
    return document + continued(frame.format(prompt), answer, rng)


def turn(role: str, text: str) -> str:
    """What the chat template writes for a message, and the start of the reply to it."""
    return f"{TURN_START}{role}\n{text}{TURN_END}\n"


def follow_up(rng: Random) -> list[Exchange]:
    """A question about one country and then only the name of the next one."""
    first, second = rng.choice(COUNTRIES), rng.choice(COUNTRIES)
    prompt = rng.choice(("And {}?", "And of {}?", "What about {}?", "And the capital of {}?")).format(second.name)
    return [QUESTIONS[rng.randrange(7)].ask(first), Exchange(prompt, QUESTIONS[0].ask(second).answer)]


def chat(rng: Random) -> Document:
    """A conversation in the chat template's form."""
    if rng.random() < 0.12:
        exchanges = follow_up(rng)
    else:
        exchanges = [exchange(rng) for _ in range(rng.choice((1, 1, 1, 1, 1, 2, 3)))]
    document: Document = []
    if rng.random() < 0.3:
        document.append(Span(turn("system", rng.choice(SYSTEM_PROMPTS)), 0.0))
    for prompt, answer in exchanges:
        document.append(Span(turn("user", prompt) + f"{TURN_START}assistant\n", PROMPT_WEIGHT))
        document.append(Span(answer + TURN_END, 1.0))
        document.append(Span("\n", 0.0))
    document[-1] = Span(END_OF_TEXT, 1.0)
    return document


def prose(rng: Random) -> Document:
    return [Span(stories.story(rng) + END_OF_TEXT, 0.5)]


KINDS: dict[Callable[[Random], Document], float] = {
    raw_completion: 18,
    raw_question: 34,
    framed_questions: 12,
    chat: 32,
    prose: 4,
}


def documents(seed: int) -> Iterator[Document]:
    """Documents without end; the same seed gives the same ones."""
    rng = Random(seed)
    kinds, shares = list(KINDS), list(KINDS.values())
    while True:
        (kind,) = rng.choices(kinds, shares)
        yield kind(rng)
