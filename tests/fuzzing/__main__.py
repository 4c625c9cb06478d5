"""The command: `python -m fuzzing --help`, which scripts/fuzz runs."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import sys
from random import SystemRandom
from time import monotonic

from fuzzing.guest import BrokenPromise
from fuzzing.targets import GUIDED, PATIENCE, TARGETS, fuzz_with_atheris, run_case

# A device that looks at fewer chains than one in so many cases does nothing any more.
_CASES_A_CHAIN = 10


def main() -> int:
    """Fuzz, and say how it went."""
    options = _parse()
    if options.atheris is not None:
        return fuzz_with_atheris(options.atheris, options.libfuzzer)
    seed = SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    print(f"seed {seed}")
    print(f"{'':18}{'cases':>10}{'chains':>10}{'refused':>10}{'a second':>10}")
    total, started = 0, monotonic()
    for name in options.only or list(TARGETS):
        make, share = TARGETS[name]
        most = max(1, round(options.chains * share))
        start = monotonic()
        target = make()
        case = 0
        with contextlib.closing(target):
            while target.chains < most if options.case is None else not case:
                if case > _CASES_A_CHAIN * most:
                    raise BrokenPromise(f"{name}: {case} cases, and only {target.chains} chains were looked at")
                faulthandler.dump_traceback_later(PATIENCE, exit=True)
                run_case(target, seed, case if options.case is None else options.case)
                case += 1
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
        faulthandler.cancel_dump_traceback_later()
        rate = target.chains / (monotonic() - start)
        print(f"{name:18}{case:>10}{target.chains:>10}{target.broken:>10}{rate:>10.0f}", flush=True)
        total += target.chains
    seconds = monotonic() - started
    print(f"{'in all':18}{'':10}{total:>10}{'':10}{total / seconds:>10.0f}   in {seconds:.0f} s, nothing found")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz",
        description="Hostile guests for rings, devices and worker processes, hostile front ends of vhost-user, and "
        "nonsense for message queues. Ends with 0 where all keep what they promise, with a traceback and the way to "
        "have it again where one does not.",
    )
    parser.add_argument(
        "--chains", type=int, default=100_000, metavar="N", help="how many in all, messages not counted (100000)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="what all follows from; without it, a random one")
    parser.add_argument("--only", action="append", choices=list(TARGETS), help="this target (may be given again)")
    parser.add_argument("--case", type=int, metavar="N", help="only this case, of the targets that --only names")
    guided = parser.add_argument_group("coverage-guided, by atheris, until it finds something or ^C")
    guided.add_argument("--atheris", choices=GUIDED, metavar="TARGET", help=f"one of {', '.join(GUIDED)}")
    guided.add_argument("libfuzzer", nargs="*", help="after --: what libFuzzer takes, for example -max_total_time=600")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
