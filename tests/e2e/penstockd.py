"""What a forked daemon runs: the same as `python -m penstock.server`. `nursery.py` imports this.

What each daemon would import or read while it starts is there already, boto3 included. After a daemon's end
its garbage is collected, which complains of what nobody awaited. The interpreter is not taken apart, which
took a third of a short life: daemons that tests execute do that.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from pathlib import Path

from penstock.server.__main__ import main
from penstock.server.system.version import distribution_version

for module in (
    "penstock.server.daemon",
    "penstock.server.sources.hub.source",
    "penstock.server.sources.s3.account",
    "penstock.server.sources.s3.answers",
    *("awscrt.checksums", "boto3", "botocore.auth", "botocore.config", "botocore.parsers"),
    "encodings.idna",
):
    importlib.import_module(module)
distribution_version()  # remembers it


def serve(flags: list[str], directory: str) -> int:
    """The exit code."""
    sys.path.remove(str(Path(__file__).parent))  # the nursery's, where other names of the tests lie
    sys.argv = ["penstockd", *flags]
    os.chdir(directory)
    code = main()
    gc.collect()
    return code
