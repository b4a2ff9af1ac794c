"""Starts a module of this installation in a process of its own.

The new process imports the same modules as this one: by the same interpreter, virtual environment, user site,
PYTHONPATH, `.pth` files, zip files, and what the program added to `sys.path`. It never imports from the
working directory, where files of strangers may lie: `python -m` and `python -c` would put it first.

    flags       -I, -E, -s and -S as this interpreter was started with them: the new one reads the same
                variables and runs the same `.pth` files, on which editable installations depend
    directory   the root directory until the path is set, so that an empty entry in PYTHONPATH finds nothing
    sys.path    replaced by this process's before anything is imported
"""

from __future__ import annotations

import contextlib
import os
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from .. import errors

# Its arguments: the module, a file descriptor of the working directory, the number of entries of sys.path,
# these entries, and the arguments of the module.
_BOOT = """\
import sys
count = int(sys.argv[3])
sys.path[:] = sys.argv[4 : 4 + count]
import os, runpy
os.fchdir(int(sys.argv[2]))
os.close(int(sys.argv[2]))
module = sys.argv[1]
sys.argv[1:] = sys.argv[4 + count :]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def start_module(
    module: str,
    arguments: Sequence[str],
    *,
    stdout: int | None = subprocess.DEVNULL,
    stderr: IO[bytes] | None,
    environment: Mapping[str, str],
) -> subprocess.Popen[bytes]:
    """Runs `module` as `python -m` would, with its standard input a pipe. It keeps the working directory, and
    Ctrl-C in the terminal does not reach it. With None for `stdout` or `stderr` it writes to this process's.

    Raises DaemonUnavailableError where this program has no interpreter that can be started.
    """
    interpreter = _interpreter()
    paths = import_paths()
    with _working_directory() as directory:
        command = [interpreter, *_flags(), "-c", _BOOT, module, str(directory), str(len(paths)), *paths]
        try:
            return subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                env=environment,
                cwd="/",
                pass_fds=(directory,),
                start_new_session=True,
            )
        except OSError as error:
            why = f"its Python interpreter {interpreter} cannot be run ({error.strerror or error})"
            raise _impossible(why) from error


def import_paths() -> list[str]:
    """The entries of `sys.path`, as absolute paths, without the working directory.

    The working directory stays if it is a part of the installation: if this package lies there, if it is a
    directory of the interpreter's, or if PYTHONPATH has it by its name.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:  # removed meanwhile, so nothing can be imported from it
        here = ""
    named = "" if sys.flags.ignore_environment else os.environ.get("PYTHONPATH", "")
    wanted = {*_installed(), *filter(os.path.isabs, named.split(os.pathsep))}
    entries = [os.path.join(here, entry) for entry in sys.path if isinstance(entry, str) and entry]
    return [entry for entry in entries if entry in wanted or not here or not _same(entry, here)]


def _installed() -> set[str]:
    package = sys.modules[__name__.partition(".")[0]]  # which may have several roots
    return {
        *(os.path.dirname(directory) for directory in package.__path__),
        *site.getsitepackages(),
        *sysconfig.get_paths().values(),
        site.getusersitepackages(),
    }


def _same(entry: str, directory: str) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(entry, directory)
    return False


def _interpreter() -> str:
    if getattr(sys, "frozen", False):
        raise _impossible("this program is frozen and has no Python interpreter")
    if not sys.executable:
        raise _impossible("its Python interpreter is unknown (sys.executable is empty)")
    return os.path.abspath(sys.executable)


def _impossible(why: str) -> errors.DaemonUnavailableError:
    return errors.DaemonUnavailableError(
        f"this program cannot start a private penstock daemon: {why}. Start a daemon beside it with "
        "`penstockd --socket-dir DIR`, and set PENSTOCK_SOCKET_DIR=DIR for the program"
    )


def _flags() -> list[str]:
    if sys.flags.isolated:
        isolation = ["-I"]
    else:
        isolation = ["-E"] * sys.flags.ignore_environment + ["-s"] * sys.flags.no_user_site
    return isolation + ["-S"] * sys.flags.no_site


@contextlib.contextmanager
def _working_directory() -> Iterator[int]:
    """A file descriptor that can be changed into, also if the directory may not be read, or is gone."""
    directory = os.open(".", os.O_PATH | os.O_DIRECTORY)
    try:
        yield directory
    finally:
        os.close(directory)
