"""Run a module as a program that ends at its n-th change of a file whose path holds a text.

python kill_at.py MODULE HOW TEXT NUMBER ARGUMENTS..., where HOW is
- before: killed before it opens, renames, links or removes the file
- within: killed while it writes the file, after 10 bytes
- full: it writes 10 bytes, and the system refuses more, as on a full disk
- count: not at all; the number of such changes, and what they are, go to the file in KILL_AT_COUNT.
"""

import os
import resource
import runpy
import signal
import sys

module, how, text, number = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
CHANGES = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}
seen = 0


def watch(event: str, arguments: tuple) -> None:
    global seen
    if event not in CHANGES or (event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
        return
    paths = [os.fsdecode(path) for path in arguments[:2] if isinstance(path, str | bytes | os.PathLike)]
    if event == "open":
        paths = paths[:1]
    if not any(text in path for path in paths):
        return
    seen += 1
    if how == "count":
        with open(os.open(os.environ["KILL_AT_COUNT"], os.O_CREAT | os.O_APPEND | os.O_WRONLY), "w") as file:
            print(event, *paths, file=file)
    elif seen != number:
        return
    elif how == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if how == "within" else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))


sys.addaudithook(watch)
sys.path[0] = os.getcwd()
sys.argv = [module, *sys.argv[5:]]
runpy.run_module(module, run_name="__main__", alter_sys=True)
