"""penstockd: flags in, exit code out."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading

from . import variables
from .config import load_config
from .errors import ConfigError
from .limits import memory_bound
from .options import known_variables

logger = logging.getLogger("penstock.server")


def main() -> int:
    """0: stopped as asked. 1: could not start. 2: wrong usage."""
    try:
        config = load_config(sys.argv[1:], os.environ, memory_bound)
        from . import daemon, log

        log.set_up(as_json=config.log_format == "json", level=config.log_level)
        for name, nearest in variables.unknown(os.environ, known_variables()):
            hint = {"meant": nearest} if nearest else {}
            log.event(logger, "unknown variable", {"name": name, **hint}, level=logging.WARNING)
        asyncio.run(daemon.serve(config))
        _leave_hanging_threads()
    except ConfigError as error:
        print(f"penstockd: {error}", file=sys.stderr)
        return 1
    return 0


def _leave_hanging_threads() -> None:
    """Ends the process if a request to storage hangs on a worker's thread: the interpreter would wait for it,
    and whoever stops the daemon would kill it in the end."""
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
