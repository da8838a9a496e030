"""The system calls a sandboxed program may not make, as a seccomp filter in the form that bwrap reads.

A deny-list: what opens a way past the namespaces (mounts, other namespaces, other processes' memory, kernel modules,
io_uring, bpf, keys) fails with EPERM. Sockets are those of the empty network namespace only: AF_VSOCK, which no
namespace cuts off, is the road from a virtual machine to its host. Numbers: Linux's unistd.h of each architecture.
"""

from __future__ import annotations

import platform
import struct

# name -> numbers on (x86_64, aarch64); None where there is no such call. From 424 on they are the same everywhere.
DENIED: dict[str, tuple[int | None, int | None]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "lookup_dcookie": (212, 18),
    "mbind": (237, 235),
    "memfd_secret": (447, 447),
    "migrate_pages": (256, 238),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "name_to_handle_at": (303, 264),
    "nfsservctl": (180, 42),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "set_mempolicy": (238, 237),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "uselib": (134, None),
    "vmsplice": (278, 75),
}
# machine -> (AUDIT_ARCH, column above, numbers of clone, clone3, ioctl, socket)
MACHINES = {
    "x86_64": (0xC000003E, 0, (56, 435, 16, 41)),
    "aarch64": (0xC00000B7, 1, (220, 435, 29, 198)),
}
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF opcodes, 32-bit words
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; arguments are 8 bytes, low half first


def program(machine: str = "") -> bytes:
    """The filter for a machine (default: this one). ValueError: no list for it."""
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise ValueError(f"the code sandbox has no list of system calls for {machine}; known: {', '.join(MACHINES)}")
    architecture, column, (clone, clone3, ioctl, socket) = MACHINES[machine]
    lines: list[tuple[int, int, int, int]] = []  # opcode, lines to skip if true, if false, operand

    def give(result: int) -> None:
        lines.append((_RETURN, 0, 0, result))

    def when(number: int, *body: tuple[int, int, int, int]) -> None:
        """If the call is `number`, the body decides; it ends by returning."""
        lines.append((_EQUAL, 0, len(body), number))
        lines.extend(body)

    denied, allowed = (_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ALLOW)
    lines.append((_LOAD, 0, 0, _ARCHITECTURE))
    lines.append((_EQUAL, 1, 0, architecture))
    give(_KILL)
    lines.append((_LOAD, 0, 0, _NUMBER))
    if machine == "x86_64":  # the x32 calls have other numbers
        lines.append((_AT_LEAST, 0, 1, 0x40000000))
        give(_ERRNO | _ENOSYS)
    when(clone, (_LOAD, 0, 0, _ARGUMENTS), (_ANY_BIT, 0, 1, _NEW_NAMESPACES), denied, allowed)
    when(clone3, (_RETURN, 0, 0, _ERRNO | _ENOSYS))  # its flags are out of a filter's reach; libc falls back to clone
    first, second = _TERMINAL_INPUT
    when(ioctl, (_LOAD, 0, 0, _ARGUMENTS + 8), (_EQUAL, 1, 0, first), (_EQUAL, 0, 1, second), denied, allowed)
    families = [(_EQUAL, len(_FAMILIES) - place, 0, family) for place, family in enumerate(_FAMILIES)]
    when(socket, (_LOAD, 0, 0, _ARGUMENTS), *families, denied, allowed)
    numbers = [number for pair in DENIED.values() if (number := pair[column]) is not None]
    for place, number in enumerate(numbers):
        lines.append((_EQUAL, len(numbers) - place, 0, number))  # to the last line
    give(_ALLOW)
    lines.append(denied)
    return b"".join(struct.pack("<HBBI", *line) for line in lines)
