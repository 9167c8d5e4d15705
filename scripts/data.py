"""Fetches what experiments need, or says what to do: `python -m scripts.data [name ...]`."""

import argparse
import sys

from experiments.data import D4RL, FILES, LRA, DataError, find


def main() -> int:
    files = FILES | D4RL | LRA
    parser = argparse.ArgumentParser(prog="python -m scripts.data", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(files)} ({', '.join(FILES)})")
    names = parser.parse_args().names or list(FILES)
    unknown = sorted(set(names) - set(files))
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such file; there are {', '.join(files)}")
    missing = 0
    for name in names:
        try:
            print(f"{name}: {find(name)} ({files[name].about})")
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            missing += 1
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
