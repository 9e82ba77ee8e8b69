"""`python -m tests.simulated_ring SEED [--verbose]` replays a run; `--seeds N [--from M]` tries many."""

import argparse
import hashlib
import logging
import sys
import time

from tests.simulated_ring.simulation import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int, nargs="?")
    parser.add_argument("--verbose", action="store_true", help="print every message")
    parser.add_argument("--seeds", type=int, default=0, help="how many to try")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first of them")
    parser.add_argument("--levelling", action="store_true", help="several schedulers, many commands and deaths")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if options.seed is None and not options.seeds:
        parser.error("a seed, or --seeds")
    if options.seed is not None:
        return replay(options.seed, options.verbose, options.levelling)
    return try_many(range(options.first, options.first + options.seeds), options.levelling)


def replay(seed: int, verbose: bool, levelling: bool) -> int:
    digest = hashlib.blake2b(digest_size=8)

    def trace(line: str) -> None:
        digest.update(line.encode())
        if verbose:
            print(line)

    error = run(seed, trace, levelling)
    print(f"seed {seed}, trace {digest.hexdigest()}: {error or 'all is well'}")
    return int(error is not None)


def try_many(seeds: range, levelling: bool) -> int:
    began, failed = time.monotonic(), 0
    for seed in seeds:
        if (error := run(seed, levelling=levelling)) is not None:
            failed += 1
            print(f"seed {seed}: {error}", flush=True)
    print(f"{len(seeds)} seeds, {failed} failed, in {time.monotonic() - began:.0f} s")
    return int(failed > 0)


sys.exit(main())
