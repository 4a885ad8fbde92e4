"""Python programs in processes of their own, forked by a server that has torch and the scripts imported.

An import of torch takes seconds each time. Tests of what happens before or in it start a process as everybody does.
"""
import atexit
import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVER = """
import atexit, fcntl, gc, io, json, os, resource, runpy, signal, socket, sys, termios, traceback
import generate, prepare_data, torch, train_heads
signal.signal(signal.SIGINT, signal.SIG_DFL)    # as the scripts' first lines do, for one right after the fork
torch.optim.AdamW([generate.Llama.from_pretrained("model").norm.weight]).step()         # which import more of torch
gc.freeze()                                     # a collection would copy all pages of a child
requests, waiting = socket.socket(fileno=int(sys.argv[1])), 0
while True:
    message, fds, *_ = socket.recv_fds(requests, 2 ** 20, 4)
    while waiting and os.waitpid(-1, os.WNOHANG)[0]:
        waiting -= 1
    if not message:
        os._exit(0)                             # the tests have ended
    if not os.fork():
        break
    waiting += 1
    for fd in fds:
        os.close(fd)
requests.close()
answers, *streams = fds
if child := os.fork():
    for fd in streams:                          # else a pipe would not end with the child
        os.close(fd)
    os.write(answers, b"%d\\n" % child)
    os.write(answers, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)
os.close(answers)
command, folder, environment, terminal, largest = json.loads(message)
for number, fd in enumerate(streams):
    os.dup2(fd, number)
    os.close(fd)
os.environ.clear()
os.environ.update(environment)
unbuffered, sys.stdin = "PYTHONUNBUFFERED" in environment, open(0)
sys.stdout, sys.stderr = (
    io.TextIOWrapper(open(fd, "wb", 0 if unbuffered else -1), errors=errors, line_buffering=lines,
                     write_through=unbuffered)
    for fd, errors, lines in ((1, "strict", os.isatty(1)), (2, "backslashreplace", True)))
if terminal:                                    # so that its Ctrl-C comes here
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if largest:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
os.chdir(folder)
atexit._clear()                                 # torch's functions, which take 40 ms
status = 1
try:
    if command[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *command[2:]], ""
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = command, os.path.dirname(command[0])
        runpy.run_path(command[0], run_name="__main__")
    status = 0
except SystemExit as stop:
    status = stop.code or 0
    if isinstance(status, str):
        status = print(status, file=sys.stderr) or 1
except BaseException:
    traceback.print_exc()
finally:                                        # not by the interpreter's end: to take torch down takes seconds too
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)
"""


@cache
def server() -> socket.socket:
    """Where it takes requests; it ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}        # no threads before the fork
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                               cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


class Process:
    """A process of `python script.py --option ..`, or of `python -c code`; `streams` are open files' descriptors.

    With `terminal` its input is the terminal of its session. No file that it writes grows beyond `largest` bytes.
    """

    def __init__(self, *command, streams, cwd=".", env=None, terminal=False, largest=0):
        answers, theirs = os.pipe()
        request = [list(map(str, command)), str(cwd), dict(env or os.environ), terminal, largest]
        socket.send_fds(server(), [json.dumps(request).encode()], [theirs, *streams])
        os.close(theirs)
        self.answers = open(answers, "rb", buffering=0)
        self.pid = int(self.answers.readline())

    def ended(self, seconds=0.0) -> bool:
        return bool(select.select([self.answers], [], [], seconds)[0])

    def wait(self, seconds=60.0) -> int:
        """The exit status, below 0 for a signal; once."""
        assert self.ended(seconds), f"no end after {seconds} s"
        with self.answers:
            return int(self.answers.readline())

    def send_signal(self, number) -> None:
        """To a process that may have ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


def run(*command, meanwhile=None, **options) -> subprocess.CompletedProcess:
    """As subprocess.run with texts; `meanwhile(process)` is called while it runs."""
    read, write = os.pipe()                     # a file would be subject to the limit
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 2 ** 20)
    with tempfile.TemporaryFile() as out, open(os.devnull) as nothing, open(read, "rb") as err:
        process = Process(*command, streams=[nothing.fileno(), out.fileno(), write], **options)
        os.close(write)
        if meanwhile:
            meanwhile(process)
        said, status = err.read().decode(), process.wait()
        out.seek(0)
        return subprocess.CompletedProcess(command, status, out.read().decode(), said)
