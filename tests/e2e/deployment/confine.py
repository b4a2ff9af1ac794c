"""A system call filter like the RuntimeDefault profile of container runtimes.

That profile lists what it allows, which is nearly all that programs use. This one lists what it refuses,
which says more about what the daemon does without. Here it is compiled, with libseccomp; as a program,
`python confine.py FILTER COMMAND [ARGUMENT...]`, this runs a command under it, and needs no library.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

CLONE_NEW_NAMESPACES = 0x7E020000
REFUSED = """
    acct add_key bpf clock_settime delete_module fanotify_init finit_module fsconfig fsmount fsopen fspick
    get_mempolicy init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp kexec_load
    kexec_file_load keyctl lookup_dcookie mbind mount mount_setattr move_mount move_pages open_by_handle_at
    open_tree perf_event_open pidfd_getfd pivot_root quotactl reboot request_key set_mempolicy setns
    settimeofday swapoff swapon syslog umount2 unshare userfaultfd vhangup
"""
INSTRUCTION_BYTES = 8
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2


def compile_filter(path: Path) -> None:
    """Writes the filter as the kernel takes it."""
    import pyseccomp as seccomp

    profile = seccomp.SyscallFilter(seccomp.ALLOW)
    for name in REFUSED.split():
        profile.add_rule(seccomp.ERRNO(errno.EPERM), name)
    profile.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")  # its flags lie where no filter can look
    for bit in range(32):
        flag = 1 << bit
        if CLONE_NEW_NAMESPACES & flag:
            new_namespace = seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag)
            profile.add_rule(seccomp.ERRNO(errno.EPERM), "clone", new_namespace)
    with path.open("wb") as file:
        profile.export_bpf(file)


class _Program(ctypes.Structure):
    _fields_ = (("instructions", ctypes.c_ushort), ("code", ctypes.c_char_p))


def main() -> None:
    code = Path(sys.argv[1]).read_bytes()
    program = _Program(len(code) // INSTRUCTION_BYTES, code)
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program)),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
