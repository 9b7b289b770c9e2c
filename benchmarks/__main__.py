"""`python -m benchmarks NAME [options]`: overhead, first_step, parity, repeat, seeds."""

from __future__ import annotations

import argparse
import sys

from benchmarks import first_step, overhead, parity, repeat, seeds

_ALL = {"overhead": overhead, "first_step": first_step, "parity": parity, "repeat": repeat, "seeds": seeds}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, module in _ALL.items():
        command = commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        module.arguments(command)
    chosen = parser.parse_args()
    return _ALL[chosen.name].main(chosen)


if __name__ == "__main__":
    sys.exit(main())
