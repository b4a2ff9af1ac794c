"""`penstock warm-set check FILE`: is it a warm set? Needs no daemon, and asks storage for nothing.

Exit codes: 0 it is, 1 it is not or cannot be read, with a line for each fault on standard error.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    try:
        from ...sources.stores import FLAGS
        from .wishes import MAX_FILE_BYTES, WishesError, parse
    except ModuleNotFoundError as error:
        print(f"penstock: {error.name} is not installed: pip install 'penstock[server]'", file=sys.stderr)
        return 1
    path = Path(sys.argv[1])
    try:
        with path.open("rb") as file:
            wishes = parse(file.read(MAX_FILE_BYTES + 1), [flags.locators for flags in FLAGS])
    except OSError as error:
        print(f"{path}: it cannot be read ({error.strerror}); give a file that can", file=sys.stderr)
        return 1
    except WishesError as error:
        for problem in error.problems:
            print(f"{path}: {problem}", file=sys.stderr)
        return 1
    print(f"{path}: a warm set of {len(wishes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
