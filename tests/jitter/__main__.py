"""Runs tests while every Python process of theirs is late at random places.

    JITTER=7 python -m tests.jitter [ARGUMENT OF PYTEST...]

in the repository's root. Without a seed in JITTER it draws one, and says which. The same seed delays other
places in each run, as pids count too: run a test several times to see it fail again.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

NAME = "penstock_jitter"


def main() -> int:
    seed = os.environ.get("JITTER") or str(random.randrange(1, 1000))
    packages = Path(sysconfig.get_path("purelib"))
    module, line = packages / f"{NAME}.py", packages / f"{NAME}.pth"
    shutil.copy(Path(__file__).with_name("delays.py"), module)
    # Not in this process, nor in another that has nothing to do with this run.
    line.write_text(f"import os; 'JITTER' in os.environ and __import__({NAME!r})\n")
    print(f"JITTER={seed}", flush=True)
    try:
        command = [sys.executable, "-m", "pytest", *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, "JITTER": seed}, check=False).returncode
    finally:
        line.unlink()
        module.unlink()
        print(f"JITTER={seed}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
