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
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if options.seed is None and not options.seeds:
        parser.error("a seed, or --seeds")
    if options.seed is not None:
        return replay(options.seed, options.verbose)
    return try_many(range(options.first, options.first + options.seeds))


def replay(seed: int, verbose: bool) -> int:
    digest = hashlib.blake2b(digest_size=8)

    def trace(line: str) -> None:
        digest.update(line.encode())
        if verbose:
            print(line)

    error = run(seed, trace)
    print(f"seed {seed}, trace {digest.hexdigest()}: {error or 'all is well'}")
    return int(error is not None)


def try_many(seeds: range) -> int:
    began, failed = time.monotonic(), 0
    for seed in seeds:
        if (error := run(seed)) is not None:
            failed += 1
            print(f"seed {seed}: {error}", flush=True)
    print(f"{len(seeds)} seeds, {failed} failed, in {time.monotonic() - began:.0f} s")
    return int(failed > 0)


sys.exit(main())
