"""Programs that try to get out of the sandbox or to hurt the machine: bounded, and harmless if they succeed.

Each defines f(host), called with the addresses of canaries outside, and returns what it got hold of. A test of what
is returned stands beside it. They run in the sandbox only.
"""

CTYPES = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    libc.syscall.restype = ctypes.c_long
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in args])
    return errno.errorcode.get(ctypes.get_errno(), "?") if result < 0 else "done"
def tried(action, *args, **kwargs):
    try:
        return repr(action(*args, **kwargs))
    except BaseException as error:
        return errno.errorcode.get(getattr(error, "errno", None), type(error).__name__)
"""

# name -> (source after CTYPES, what f must return: a value or a predicate)
RETURNING = {
    "fork bomb": (
        """
def f(host):
    for count in range(150):
        try:
            if os.fork() == 0:
                import time; time.sleep(20); os._exit(0)
        except OSError as error:
            return [count, errno.errorcode[error.errno]]
    return [150, ""]
""",
        lambda got: got[0] < 40 and got[1] == "EAGAIN",
    ),
    "thread bomb": (
        """
import threading, time
def f(host):
    for count in range(150):
        try:
            threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
        except (RuntimeError, MemoryError):
            return count
    return 150
""",
        lambda got: got < 40,
    ),
    "memory bomb": ("def f(host): return tried(lambda: len(bytearray(1200 << 20)))", "MemoryError"),
    "disk fill": (
        """
def f(host):
    written = 0
    for place in ("/w", "/tmp", "/dev/shm", "/var/tmp", "/dev", "/", host["folder"]):
        for number in range(14):
            try:
                with open(f"{place}/fill{number}", "wb") as file:
                    for _ in range(30):
                        file.write(bytes(1 << 20)); file.flush()
                        written += 1
            except OSError:
                break
    return written
""",
        lambda got: got <= 64,
    ),
    "file of 400 MB": (
        """
def f(host):
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return tried(lambda: open("/w/big", "wb").truncate(400 << 20))
""",
        "EFBIG",
    ),
    "60000 inodes": (
        """
def f(host):
    for number in range(60000):
        os.close(os.open(f"/w/{number}", os.O_CREAT | os.O_WRONLY))
    return number
""",
        lambda got: True,  # memory of its own, gone with it; the disk is looked at afterwards
    ),
    "secret of the host": (
        """
def f(host):
    paths = [host["secret"], "/etc/shadow", "/etc/passwd", "/root" + "/.ssh", "/home", "/proc/1/environ", "/sys/kernel"]
    return [tried(lambda: open(path).read() if not os.path.isdir(path) else os.listdir(path)) for path in paths]
""",
        ["ENOENT"] * 7,
    ),
    "secret beside the interpreter": (
        """
import sys
def f(host):
    found = []
    for folder, names, files in os.walk(sys.prefix if sys.prefix not in ("/usr", "/") else "/usr/nothing"):
        if folder == os.path.dirname(os.__file__):
            names[:] = ["site-packages"] if "site-packages" in names else []
            continue
        found += files
    return found
""",
        lambda got: all(name.startswith(("python", "lib")) for name in got) and len(got) < 20,
    ),
    "environment": (
        "def f(host): return sorted(os.environ)",
        lambda got: "PATH" in got and not set(got) & {"CANARY", "USER", "PYTHONPATH", "VIRTUAL_ENV"} and len(got) < 12,
    ),
    "TCP to the host": (
        """
import socket
def f(host): return tried(socket.create_connection, ("127.0.0.1", host["tcp"]), 1)
""",
        lambda got: got in ("ECONNREFUSED", "ENETUNREACH"),
    ),
    "abstract unix socket": (
        """
import socket
def f(host): return tried(socket.socket(socket.AF_UNIX).connect, "\\0" + host["unix"])
""",
        "ECONNREFUSED",
    ),
    "UDP out": (
        """
import socket
def f(host):
    sent = socket.socket(type=socket.SOCK_DGRAM)
    return [tried(sent.sendto, b"x", ("8.8.8.8", 53)), tried(sent.sendto, b"x", ("127.0.0.1", host["udp"]))]
""",
        lambda got: got[0] == "ENETUNREACH",
    ),
    "socket to the hypervisor": (
        """
import socket
def f(host): return [tried(socket.socket, family, kind) for family, kind in ((40, 1), (38, 5), (16, 3), (17, 3))]
""",
        ["EPERM"] * 4,
    ),
    "write outside": (
        """
import sys
def f(host):
    places = [host["folder"], "/usr/lib", "/usr/bin", "/etc", "/", os.path.dirname(os.__file__), "/dev"]
    return [tried(open, place + "/escaped", "w") for place in places]
""",
        lambda got: set(got) <= {"EROFS", "ENOENT", "EACCES"},
    ),
    "signal the judge": (
        """
def f(host):
    reached = []
    for pid in {*range(1, 40000), host["pid"]} - {os.getpid()}:
        try:
            os.kill(pid, 0)
            reached.append(pid)
        except OSError:
            pass
    return reached
""",
        [1],  # the namespace's own
    ),
    "kill everything": ("def f(host): return tried(os.kill, -1, 9)", "ESRCH"),
    "ptrace the judge": (
        "def f(host): return [call(NR_ptrace, 16, pid, 0, 0) for pid in (host['pid'], 1)]",
        ["EPERM"] * 2,
    ),
    "memory of the judge": (
        "def f(host): return [call(NR_process_vm_readv, pid, 0, 0, 0, 0, 0) for pid in (host['pid'], 1)]",
        ["EPERM"] * 2,
    ),
    "symlink to a secret": (
        """
def f(host):
    os.symlink(host["secret"], "/w/result")
    return tried(lambda: open("/w/result").read())
""",
        "ENOENT",
    ),
    "double fork daemon": (
        """
def f(host):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            import signal, time
            for number in range(1, 64):
                try: signal.signal(number, signal.SIG_IGN)
                except (OSError, ValueError): pass
            time.sleep(600)
        os._exit(0)
    os.wait()
    return 0
""",
        0,
    ),
    "kernel switches": (
        """
def f(host):
    paths = ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/fs/cgroup/pids/cgroup.procs", "/proc/1/mem"]
    return [tried(os.open, path, os.O_WRONLY) for path in paths]
""",
        ["ENOENT"] * 4,
    ),
    "nested user namespace": (
        "def f(host): return [call(NR_unshare, 0x10000000), call(NR_clone, 0x10000011, 0, 0, 0, 0), call(435, 0, 88)]",
        ["EPERM", "EPERM", "ENOSYS"],
    ),
    "mount": (
        """
def f(host):
    os.makedirs("/w/m")
    name = ctypes.c_char_p(b"/w/m")
    place = ctypes.cast(name, ctypes.c_void_p).value
    return [call(NR_mount, place, place, place, 4096, 0), call(NR_pivot_root, place, place), call(428, 0, place, 0)]
""",
        ["EPERM"] * 3,
    ),
    "become root": (
        "def f(host): return [tried(os.setuid, 0), tried(os.setgid, 0), tried(os.setgroups, [0]), min(os.getresuid())]",
        lambda got: set(got[:3]) <= {"EPERM", "EINVAL"} and got[3] > 0,
    ),
    "raise limits": (
        """
import resource
def f(host):
    names = ["RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_FSIZE", "RLIMIT_CPU", "RLIMIT_NOFILE", "RLIMIT_CORE"]
    return [tried(resource.setrlimit, getattr(resource, name), (1 << 40, 1 << 40)) for name in names]
""",
        lambda got: set(got) <= {"ValueError", "EPERM"},
    ),
    "inherited files": (
        """
import stat
def f(host):
    kinds = []
    for fd in range(1024):
        try: mode = os.fstat(fd).st_mode
        except OSError: continue
        kinds.append("pipe" if stat.S_ISFIFO(mode) else "device" if stat.S_ISCHR(mode) else "other")
    return sorted(kinds)
""",
        ["device"] * 4 + ["pipe"] * 2,
    ),
    "shared memory left": (
        "def f(host): return libc.shmget(0x5AFE, 4096, 0o1666) >= 0",
        lambda got: True,  # looked for afterwards
    ),
    "type into the terminal": (
        """
import fcntl
def f(host):
    return [tried(fcntl.ioctl, 0, number, b"x") for number in (0x5412, 0x541C)] + [tried(open, "/dev/tty")]
""",
        ["EPERM", "EPERM", "ENOENT"],
    ),
    "raw devices": (
        """
def f(host):
    opened = [tried(os.open, "/dev/" + name, os.O_RDONLY) for name in ("vda", "sda", "mem", "kmsg", "kvm", "fuse")]
    return opened + [tried(os.mknod, "/w/disk", 0o60666, os.makedev(254, 0))]
""",
        ["ENOENT"] * 6 + ["EPERM"],
    ),
    "dangerous calls": (
        """
def f(host):
    numbers = [425, NR_userfaultfd, NR_keyctl, NR_perf_event_open, NR_bpf, 438, 447, NR_vmsplice, NR_add_key]
    return [call(number, 0, 0, 0, 0, 0) for number in numbers]
""",
        ["EPERM"] * 9,
    ),
    "clock and host name": (
        """
import time
def f(host): return [tried(time.clock_settime, 0, time.time()), call(NR_sethostname, 0, 0)]
""",
        ["EPERM"] * 2,
    ),
    "programs of the host": (
        """
import subprocess
def f(host):
    found = []
    for name in ("sudo", "su", "mount", "ping"):  # set-user-id programs gain nothing
        try: found.append(subprocess.run([name, "-V"], capture_output=True, timeout=5).stdout.decode()[:0])
        except (OSError, subprocess.SubprocessError): pass
    return [os.geteuid() == os.getuid(), tried(os.seteuid, 0)]
""",
        lambda got: got[0] and got[1] in ("EPERM", "EINVAL"),
    ),
}
# name -> (source, seconds it is given, what the reason starts with)
ENDING = {
    "infinite loop": ("def f(host):\n    while True: pass", 0.5, "timeout"),
    "sleep deaf to signals": (
        """
import signal, time
def f(host):
    for number in range(1, 64):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    while True: time.sleep(60)
""",
        0.5,
        "timeout",
    ),
    "interpreter lock held": ("def f(host): return len(str(9 ** 9 ** 9))", 0.5, "timeout"),
    "segmentation fault": ("def f(host):\n    import ctypes\n    ctypes.string_at(0)", 5, "crash"),
    "exit": ("def f(host):\n    import os\n    os._exit(0)", 5, "crash"),
    "flood of answers": (
        "import os\ndef f(host):\n    while True:\n        for fd in (3, 4, 5):\n"
        "            try: os.write(fd, b'x' * 65536)\n            except OSError: pass",
        5,
        "output_limit",
    ),
}
