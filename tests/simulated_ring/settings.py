"""What the services of a run are set to, drawn from its seed, and which links keep what nobody receives."""

from random import Random

from quartet.scheduler_service.core.drafts import DraftOptions
from quartet.scheduler_service.core.rules import PlannerConfig
from quartet.tokenizer_service.encode import Encoder
from quartet.tokenizer_service.jobs import Pace
from tests.fakes import AtOnce
from tests.simulated_ring.load import VOCAB_SIZE, tokenizer
from tests.simulated_ring.services import GATEWAY, SCHEDULER, TOKENIZER

ONE_SCHEDULER = 0.6  # the share of runs with one; the others have two


def schedulers_of(seed: int, levelling: bool) -> int:
    """How many a run has."""
    if levelling:
        return Random(f"levelling {seed}").choice([2, 2, 3])
    return 1 if Random(f"schedulers {seed}").random() < ONE_SCHEDULER else 2


def keeps(sender: str, receiver: str, several: bool) -> bool:
    """Whether frames are kept while nobody is there to receive them, so that the sender does not wait."""
    return sender == GATEWAY or (several and sender == TOKENIZER and receiver.startswith(SCHEDULER))


def encoder(random: Random) -> Encoder:
    """Slow ones encode a text in a step, or all but the shortest beside it."""
    pace = Pace(step_chars=random.choice([1, 8, 1 << 16]), long_chars=random.choice([4, 12, 1 << 16]))
    return Encoder(tokenizer(), pace=pace, executor=AtOnce(), clock=lambda: 0.0)


def planner_config(random: Random) -> PlannerConfig:
    return PlannerConfig(
        page_size=random.choice([1, 1, 2, 4]),
        total_pages=random.choice([64, 100, 400]),
        max_running=random.choice([1, 2, 4, 8]),
        context_length=500,
        vocab_size=VOCAB_SIZE,
        chunked_prefill_size=random.choice([-1, 8]),
        max_queued=random.choice([None, None, 2, 6]),
        policy=random.choice(["fcfs", "priority", "lpm"]),
        drafts=random.choice([None, None, DraftOptions(max_tokens=4, min_match=1, max_match=3)]),
    )
