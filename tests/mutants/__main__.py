"""Breaks rules of the code one by one, and reports those whose tests pass all the same.

    python -m tests.mutants [-n WORKERS] [WORD ...]     from the repository's root, or `make mutants`

`breaks.py` has the list. Each break is made in a copy of the working tree, so that a run that is ended leaves
nothing behind. With words, only those breaks whose file, rule or test contains one of them are made.

The exit code is 0 if every test passed in the untouched copy and failed with its rule broken, else 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from .breaks import BREAKS, Break, locate

ROOT = Path(__file__).parents[2]
TEST_SECONDS = 120.0
"""A test that hangs has failed."""
PASSED, FAILED = 0, 1  # of pytest; other codes say that it could not run the test


class Copy:
    """The working tree once more, with an interpreter that imports from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout.decode()
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():  # else it was removed, and that is not committed yet
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, path / name)
        if (ROOT / ".cache").is_dir():  # programs that `.ci/run` installed
            (path / ".cache").symlink_to(ROOT / ".cache")
        venv.create(path / ".venv", symlinks=True)
        self.python = path / ".venv/bin/python"
        (site,) = (path / ".venv/lib").glob("python*/site-packages")
        installed = [entry for entry in sys.path if entry.endswith("site-packages")]
        roots = [str(path / root) for root in ("proto", "client", "server")]
        (site / "mutants.pth").write_text("\n".join([*roots, *installed, ""]))

    def run(self, test: str) -> tuple[int | None, str]:
        """What pytest ends with, None if it had to be killed; and what it wrote."""
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--timeout={TEST_SECONDS:.0f}"]
        command = [str(self.python), "-m", "pytest", *options, test]
        # In CI a test that is skipped fails: so one that cannot run here is found before its rule is broken.
        environment = {**os.environ, "CI": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        # Programs that came with packages, such as SeaweedFS, lie beside the interpreter that has these.
        environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), environment.get("PATH", "")])
        with subprocess.Popen(
            command,
            cwd=self.path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                written, _ = process.communicate(timeout=2 * TEST_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return None, ""
        return process.returncode, written

    def judge(self, broken: Break) -> str:
        """What is wrong with the break's test; empty if it passes, and fails with the rule broken."""
        test = locate(broken.test)
        code, written = self.run(test)
        if code != PASSED:
            return f"its test does not pass with the rule in force:\n{written[-3000:]}"
        file = self.path / broken.file
        original = file.read_text()
        file.write_text(broken.apply(original))
        try:
            code, written = self.run(test)
        finally:
            file.write_text(original)
        if code == PASSED:
            return "its test passes with the rule broken"
        if code is not None and code > FAILED:  # less than 0 is the signal that ended it, such as SIGSEGV
            return f"its test could not run with the rule broken:\n{written[-3000:]}"
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("words", nargs="*", help="only breaks whose file, rule or test contains one of them")
    parser.add_argument("-n", "--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    chosen = [
        broken
        for broken in BREAKS
        if not options.words
        or any(word in f"{broken.file} {broken.rule} {broken.test}" for word in options.words)
    ]
    with tempfile.TemporaryDirectory(prefix="mutants-", dir="/tmp") as directory:
        os.chmod(directory, 0o755)  # for tests that become other users
        copies: SimpleQueue[Copy] = SimpleQueue()
        for number in range(max(1, min(options.workers, len(chosen)))):
            copies.put(Copy(Path(directory, str(number))))

        def judge(broken: Break) -> bool:
            copy, began = copies.get(), time.monotonic()
            try:
                wrong = copy.judge(broken)
            finally:
                copies.put(copy)
            seconds = time.monotonic() - began
            print(f"{'WRONG' if wrong else 'ok'}  {seconds:5.1f} s  {broken.test}: {broken.rule}", flush=True)
            if wrong:
                print(f"       {broken.file}: {wrong}", flush=True)
            return not wrong

        with ThreadPoolExecutor(options.workers) as workers:
            right = list(workers.map(judge, chosen))
    print(f"{sum(right)} of {len(chosen)} tests fail when their rule is broken")
    return 0 if chosen and all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
