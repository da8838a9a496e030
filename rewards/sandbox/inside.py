"""The far side of a sandbox: takes requests on fd 0, runs the model's program, answers with one line on fd 1 each.

Its text is handed to `python -c`; it is imported by nobody and may use fast-loading built-in modules only. Nothing
here is trusted from the first line of the model's program on: that program can patch, read and answer for this one,
so no test, expected value or secret may ever be sent in. A line is `V` and the repr of a value, or `E` and a reason.
"""

import marshal
import os
import resource
import sys

SCALARS = (int, float, bool, str, bytes, complex, type(None))
MAPPINGS = ("Counter", "OrderedDict", "defaultdict")  # compare as dict does


def main() -> None:
    limits, output_limit = marshal.loads(bytes.fromhex(sys.argv[1]))
    sys.argv = ["solution.py"]
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    sys.set_int_max_str_digits(100_000)
    requests, replies, null = os.fdopen(os.dup(0), "rb"), os.dup(1), os.open("/dev/null", os.O_RDWR)
    os.write(replies, b"V ready\n")
    for fd in (0, 1, 2):
        os.dup2(null, fd)

    task = marshal.load(requests)
    line_limit = output_limit * (4 if task["stdin"] else 1)  # a byte of output prints as up to four

    def say(kind: str, text: str) -> None:
        line = f"{kind} {text}\n".encode("utf-8", "backslashreplace")
        if len(line) > line_limit:
            line = b"E output_limit\n"
        while line:
            line = line[os.write(replies, line) :]

    try:
        code = compile(task["source"], "solution.py", "exec", dont_inherit=True)
        module = type(sys)("__main__" if task["stdin"] else "solution")
        sys.modules[module.__name__] = module
        if not task["stdin"]:
            exec(code, module.__dict__)
    except BaseException as error:
        say("E", described(error))
        return
    say("V", "None")
    if task["stdin"]:
        programs(code, module, requests, replies, say, output_limit)
    else:
        calls(module, requests, say)


def calls(module, requests, say) -> None:
    """Each request (name, args, kwargs) is a call of a function that the program defined."""
    while True:
        try:
            name, args, kwargs = marshal.load(requests)
        except EOFError:
            return
        try:
            if not hasattr(module, name) and hasattr(module, "Solution"):  # LeetCode's form
                call = getattr(module.Solution(), name)
            else:
                call = getattr(module, name)
            kind, text = "V", literal(call(*args, **kwargs))
        except BaseException as error:
            kind, text = "E", described(error)
        say(kind, text)


def programs(code, module, requests, replies, say, output_limit) -> None:
    """Each request is bytes: the program runs as a script of its own process with them as its standard input."""
    while True:
        try:
            data = marshal.load(requests)
        except EOFError:
            return
        source = os.memfd_create("stdin")
        with os.fdopen(os.dup(source), "wb") as file:
            file.write(data)
        os.lseek(source, 0, os.SEEK_SET)
        ours, theirs = os.pipe()
        pid = os.fork()
        if not pid:
            requests.close()
            os.close(replies)
            os.close(ours)
            os.dup2(source, 0)
            os.dup2(theirs, 1)
            os.close(source)
            os.close(theirs)
            sys.stdin, sys.stdout = os.fdopen(0, encoding="utf-8"), os.fdopen(1, "w", encoding="utf-8")
            sys.modules["__main__"] = module
            exec(code, module.__dict__)
            return  # the interpreter ends as after any script: threads joined, output flushed
        os.close(source)
        os.close(theirs)
        pieces, size = [], 0
        while size <= output_limit:
            piece = os.read(ours, 1 << 16)
            if not piece:
                break
            pieces.append(piece)
            size += len(piece)
        os.close(ours)
        if size > output_limit:
            os.kill(pid, 9)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if size > output_limit:
            say("E", "output_limit")
        elif status:
            say("E", f"exit status {status}")
        else:
            say("V", repr(b"".join(pieces)))


def literal(value) -> str:
    """The repr of exact built-in types; TypeError for anything else, whose repr is whatever its author likes."""
    kind = type(value)
    if kind in SCALARS:
        return repr(value)
    if kind is dict or (kind.__module__ == "collections" and kind.__name__ in MAPPINGS):
        return "{" + ", ".join(f"{literal(key)}: {literal(value[key])}" for key in value) + "}"
    if kind in (set, frozenset):
        return "{" + ", ".join(map(literal, value)) + "}" if value else "set()"
    if kind is list:
        return "[" + ", ".join(map(literal, value)) + "]"
    if kind is tuple or (isinstance(value, tuple) and hasattr(kind, "_fields")):
        return "(" + "".join(literal(entry) + ", " for entry in value) + ")"
    raise TypeError(f"returned a {kind.__name__}, which is no plain value")


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error!s:.300}".replace("\n", " ")


if __name__ == "__main__":
    main()
