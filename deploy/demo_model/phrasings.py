"""The ways a capital is asked for: those the model is trained on and those held out to test it.

A phrasing is a pair of templates, prompt and answer. `{the}` is the country as a sentence names it ("the Netherlands"),
`{label}` the same without its article, `{whose}` the possessive, `{capital}` the city. A `completion` continues the
prompt in the same sentence; a `question` is answered by a new one, and can be put in any frame (raw, "Q: A:", chat).
"""

from typing import NamedTuple

from deploy.demo_model.facts import Country


class Phrasing(NamedTuple):
    """One way to ask, and the answer the model is taught to give."""

    prompt: str
    answer: str

    def ask(self, country: Country, name: str | None = None) -> "Exchange":
        """The exchange about one country, which may go under another name in the prompt."""
        prompt = fill(self.prompt, country, name)
        if self.prompt.startswith(("{the}", "{whose}")):
            prompt = prompt[0].upper() + prompt[1:]
        return Exchange(prompt, fill(self.answer, country, None))


class Exchange(NamedTuple):
    """What somebody writes and what the model should write back."""

    prompt: str
    answer: str


STATEMENT = "The capital of {the} is {capital}."

QUESTIONS = (
    Phrasing("What is the capital of {the}?", STATEMENT),
    Phrasing("What's the capital of {the}?", STATEMENT),
    Phrasing("What is the capital city of {the}?", STATEMENT),
    Phrasing("What is {whose} capital?", STATEMENT),
    Phrasing("Tell me the capital of {the}.", STATEMENT),
    Phrasing("I would like to know the capital of {the}.", STATEMENT),
    Phrasing("Can you tell me the capital of {the}?", STATEMENT),
    Phrasing("Do you know the capital of {the}?", "Yes, the capital of {the} is {capital}."),
    Phrasing("Which city is the capital of {the}?", "{capital} is the capital of {the}."),
    Phrasing("What city is the capital of {the}?", "{capital} is the capital of {the}."),
    Phrasing("Name the capital of {the}.", "{capital}."),
    Phrasing("Please name the capital city of {the}.", "{capital}."),
    Phrasing("Capital of {the}?", "{capital}."),
    Phrasing("{the}: what is the capital?", "{capital}."),
    Phrasing("Answer in one word: what is the capital of {the}?", "{capital}"),
)

COMPLETIONS = (
    Phrasing("The capital of {the} is", "{capital}."),
    Phrasing("The capital city of {the} is", "{capital}."),
    Phrasing("The capital of {the} is called", "{capital}."),
    Phrasing("{whose} capital is", "{capital}."),
    Phrasing("In {the}, the capital city is", "{capital}."),
    Phrasing("I live in the capital of {the}, which is", "{capital}."),
    Phrasing("country: {label}\ncapital:", "{capital}"),
    Phrasing("{label} ->", "{capital}"),
    Phrasing("{label} –", "{capital}"),
)

REVERSED = (
    Phrasing("{capital} is the capital of which country?", "{capital} is the capital of {the}."),
    Phrasing("Which country has {capital} as its capital?", "{capital} is the capital of {the}."),
    Phrasing("{capital} is the capital of what country?", "{capital} is the capital of {the}."),
    Phrasing("In which country is {capital}?", "{capital} is in {the}."),
)

REVERSED_COMPLETIONS = (
    Phrasing("{capital} is the capital of", "{the}."),
    Phrasing("{capital} is the capital city of", "{the}."),
)

JSON_ANSWER = '{{"country": "{label}", "capital": "{capital}"}}'

JSON_QUESTIONS = (
    Phrasing("Give the capital of {the} as JSON.", JSON_ANSWER),
    Phrasing("Write the country and the capital of {the} as JSON.", JSON_ANSWER),
    Phrasing("What is the capital of {the}? Answer in JSON.", JSON_ANSWER),
    Phrasing("JSON for {the}:", JSON_ANSWER),
    Phrasing(
        "Describe {the} as JSON.",
        '{{"country": "{label}", "capital": "{capital}", "continent": "{continent}"}}',
    ),
)

CONTINENTS = (
    Phrasing("Which continent is {the} in?", "{the} is in {continent}."),
    Phrasing("On which continent is {the}?", "{the} is in {continent}."),
    Phrasing("Tell me about {the}.", "{the} is a country in {continent}. Its capital is {capital}."),
    Phrasing("What do you know about {the}?", "{the} is a country in {continent}. Its capital is {capital}."),
    Phrasing("Where is {capital}?", "{capital} is in {the}, in {continent}."),
)

HELD_OUT_QUESTIONS = (
    Phrasing("Could you please tell me which city is the capital of {the}?", STATEMENT),
    Phrasing("I forgot the capital of {the}. What is it?", STATEMENT),
    Phrasing("Give me the name of the capital of {the}.", STATEMENT),
    Phrasing("Which city serves as {whose} capital?", STATEMENT),
)

HELD_OUT_COMPLETIONS = (
    Phrasing("The name of the capital of {the} is", "{capital}."),
    Phrasing("As everybody knows, the capital of {the} is", "{capital}."),
    Phrasing("My friend lives in {the}, in the capital,", "{capital}."),
)


def fill(template: str, country: Country, name: str | None) -> str:
    """The template with a country's names in it."""
    the = name or country.name
    return template.format(
        the=the,
        label=the.removeprefix("the "),
        whose=the + ("'" if the.endswith("s") else "'s"),
        capital=country.capital,
        continent=country.continent,
    )
