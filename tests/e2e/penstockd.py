"""What a forked daemon runs: the same as `python -m penstock.server`. `nursery.py` imports this."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import penstock.server.daemon  # noqa: F401  (so that children need not import it)
from penstock.server.__main__ import main


def serve(flags: list[str], directory: str) -> None:
    sys.path.remove(str(Path(__file__).parent))  # the nursery's, where other names of the tests lie
    sys.argv = ["penstockd", *flags]
    os.chdir(directory)
    sys.exit(main())
