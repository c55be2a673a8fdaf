"""Confine Triton's process: it ends with the launcher, and other users cannot read its shared memory."""

from __future__ import annotations

import ctypes
import os
import signal

PRIVATE_UMASK = 0o077

# Constants of prctl(2):
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38

# Constants of seccomp(2) on x86-64: the call, offsets in struct seccomp_data, and results of a filter. Without SPEC_ALLOW,
# kernels before 5.16 slow down a process with a filter.
SYSCALL_SECCOMP, SET_MODE_FILTER, SPEC_ALLOW = 317, 1, 4
OFFSET_NUMBER, OFFSET_ARCHITECTURE, OFFSET_SECOND_ARGUMENT = 0, 4, 24
ARCHITECTURE_X86_64, SYSCALL_FCHMOD = 0xC000003E, 91
ALLOW, DO_NOTHING = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, and SECCOMP_RET_ERRNO with errno 0: success

# Instructions of classic BPF: load a word, jump if it is equal or any bit is set, return.
LOAD, JUMP_IF_EQUAL, JUMP_IF_ANY, RETURN = 0x20, 0x15, 0x45, 0x06


class _Instruction(ctypes.Structure):
    """``struct sock_filter``."""

    _fields_ = (("code", ctypes.c_uint16), ("if_true", ctypes.c_uint8), ("if_false", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


# Triton's Python backend creates its shared memory with Boost, which opens it to all users by fchmod(2) regardless of the
# umask.
_INSTRUCTIONS = (_Instruction * 8)(
    _Instruction(LOAD, 0, 0, OFFSET_ARCHITECTURE),
    _Instruction(JUMP_IF_EQUAL, 0, 5, ARCHITECTURE_X86_64),
    _Instruction(LOAD, 0, 0, OFFSET_NUMBER),
    _Instruction(JUMP_IF_EQUAL, 0, 3, SYSCALL_FCHMOD),
    _Instruction(LOAD, 0, 0, OFFSET_SECOND_ARGUMENT),
    _Instruction(JUMP_IF_ANY, 0, 1, PRIVATE_UMASK),
    _Instruction(RETURN, 0, 0, DO_NOTHING),
    _Instruction(RETURN, 0, 0, ALLOW),
)
_PROGRAM = _Program(len(_INSTRUCTIONS), _INSTRUCTIONS)
_LIBC = ctypes.CDLL(None)


def confine() -> None:
    """Confine this process and its children; to be called in the child between fork and exec.

    The kernel sends SIGTERM when the launcher ends for any reason. Only this user can read files and shared memory. On a kernel
    without seccomp filters, other users can read the shared memory.
    """
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    os.umask(PRIVATE_UMASK)
    _LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _LIBC.syscall(SYSCALL_SECCOMP, SET_MODE_FILTER, SPEC_ALLOW, ctypes.byref(_PROGRAM))
