"""Short stories put together from parts, so that the model has seen plain sentences in a row."""

from random import Random

NAMES = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Kate",
    "Leo",
    "Maria",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tom",
    "Vera",
    "Will",
    "Zoe",
)
ANIMALS = ("cat", "dog", "fox", "wolf", "horse", "rabbit", "mouse", "bear", "duck", "frog")
PLACES = ("forest", "village", "garden", "valley", "town", "castle", "harbour", "farm")
THINGS = ("key", "lamp", "book", "coin", "ring", "map", "bell", "stone", "letter", "flute")
QUALITIES = ("small", "tall", "golden", "strange", "bright", "heavy", "shiny", "blue")
FEELINGS = ("happy", "curious", "brave", "tired", "hungry", "lonely", "proud")

OPENINGS = (
    "Once upon a time there was a {feeling} {animal} who lived in a {quality} {place}.",
    "Once upon a time a {feeling} {animal} named {name} lived near a {place}.",
    "{name} was a {feeling} {animal} in a {quality} {place}.",
    "In a {place} far away there lived a {animal} called {name}.",
)
EVENTS = (
    "One day {name} found a {quality} {thing} under a tree.",
    "One morning a {other} came and asked for help.",
    "It rained all night, and the path to the {place} was gone.",
    "{name} had never seen a {thing} before and wanted to know what it was for.",
    "The {other} had lost a {quality} {thing} and looked very sad.",
    "They walked together until they came to a {quality} bridge.",
    "Nobody in the {place} knew what to do.",
    "{name} thought about it for a long time and then had an idea.",
    '"Let us look for it together," said {name}.',
    '"I will help you," said the {other}.',
    "When the sun went down they made a fire and shared some bread.",
    "At last they opened the old door, and behind it was a {thing}.",
)
ENDINGS = (
    "From that day on they were friends.",
    "In the evening everybody in the {place} was {feeling} again.",
    "{name} went home and slept very well.",
    "And the {thing} is still there today.",
)


def story(rng: Random) -> str:
    """A story of four to eight sentences about one animal."""
    animal, other = rng.sample(ANIMALS, 2)
    parts = {
        "name": rng.choice(NAMES),
        "animal": animal,
        "other": other,
        "place": rng.choice(PLACES),
        "thing": rng.choice(THINGS),
        "quality": rng.choice(QUALITIES),
        "feeling": rng.choice(FEELINGS),
    }
    middle = rng.sample(EVENTS, rng.randint(2, 6))
    return " ".join((rng.choice(OPENINGS), *middle, rng.choice(ENDINGS))).format(**parts)
