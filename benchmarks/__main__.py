"""`python -m benchmarks NAME [options]`: canonical, overhead, first_step, parity, repeat, saving, seeds, survive."""

from __future__ import annotations

import argparse
import signal
import sys

from benchmarks import canonical, first_step, overhead, parity, repeat, saving, seeds, survive

_ALL = {
    "canonical": canonical,
    "overhead": overhead,
    "first_step": first_step,
    "parity": parity,
    "repeat": repeat,
    "saving": saving,
    "seeds": seeds,
    "survive": survive,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, module in _ALL.items():
        command = commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        module.arguments(command)
    chosen = parser.parse_args()
    # In order: what was started ends with the benchmark.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    return _ALL[chosen.name].main(chosen)


if __name__ == "__main__":
    sys.exit(main())
