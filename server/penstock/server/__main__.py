"""penstockd: flags in, exit code out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator

from .config import variables
from .config.options import known_variables
from .config.settings import load_config
from .errors import ConfigError
from .sources.stores import FLAGS
from .system import log
from .system.limits import memory_bound

logger = logging.getLogger("penstock.server")


def main() -> int:
    """0: stopped as asked. 1: could not start, or not go on. 2: wrong usage."""
    try:
        config = load_config(sys.argv[1:], os.environ, memory_bound, FLAGS)
        log.set_up(as_json=config.log_format == "json", level=config.log_level)
        with _needing_the_extra():
            from . import daemon

        for name, nearest in variables.unknown(os.environ, known_variables(FLAGS)):
            hint = {"meant": nearest} if nearest else {}
            log.event(logger, "unknown variable", {"name": name, **hint}, level=logging.WARNING)
        code = 0 if asyncio.run(daemon.serve(config)) else 1
        _leave_hanging_threads(code)
    except ConfigError as error:
        print(f"penstockd: {error}", file=sys.stderr)
        return 1
    return code


@contextlib.contextmanager
def _needing_the_extra() -> Iterator[None]:
    """For imports that `--help` and `--version` do without. Raises ConfigError that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("penstock"):
            raise
        raise ConfigError(f"{error.name} is not installed: pip install 'penstock[server]'") from error


def _leave_hanging_threads(code: int) -> None:
    """Ends the process if a request to storage hangs on a worker's thread: the interpreter would wait for it,
    and whoever stops the daemon would kill it in the end."""
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
