"""Stages that begin at once: they fork from a process that has imported the libraries, on Linux.

    python -m workflow.runtime.warm PARENT         # is that process, at the address in WORKFLOW_WARM
    python -IS workflow/runtime/warm.py COMMAND    # COMMAND is python -m MODULE ...

The second asks the first for a fork that does what the command would do, passes signals on to it and ends as it ends. It
starts the command itself if nobody answers, or if the command would find another environment than the libraries did.
What is asked and what is answered are messages of a Unix socket; a closed connection means that the other side is gone.

At its top it imports only the standard library, so that asking takes some 50 ms.
"""

import gc
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

VARIABLE = "WORKFLOW_WARM"  # the address of the socket; empty: every stage starts cold
CALLER = "WORKFLOW_CALLER"  # in a fork: its process id, and that of the process that asked for it
PATIENCE = 5.0  # seconds to wait for an answer
LONGEST = 1 << 17  # bytes of a request
ENDING = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # of Linux' prctl
# The others use the network, import little, or measure a memory that would hold what the fork got from its parent.
STAGES = {
    "try_model",
    "sample",
    "tune",
    "train",
    "evaluate_base",
    "evaluate",
    "divergence",
    "compare",
    "report",
}
# No library reads these: engines and shells set them for each command.
INDIFFERENT, INDIFFERENT_PREFIXES = {"_", "PWD", "OLDPWD", "SHLVL"}, ("DVC_", "WORKFLOW_")
TEMPORARY = ("TMPDIR", "TEMP", "TMP", "TEMPDIR")  # Snakemake sets them to what they are by default
# What stages import of other packages.
LIBRARIES = ("pydantic.dataclasses", "ruamel.yaml", "psutil", "numpy", "pandas", "scipy.stats", "pyarrow.parquet", "jinja2", "safetensors.torch", "torch.utils.data",
             "transformers.trainer", "transformers.modeling_gguf_pytorch_utils", "transformers.models.llama.modeling_llama",
             "transformers.models.auto.tokenization_auto", "datasets", "datasketch", "lm_eval.evaluator",
             "lm_eval.models.huggingface", "rouge_score.rouge_scorer", "sacrebleu", "gguf", "matplotlib.figure",
             "bitsandbytes", "peft.tuners.lora", "trl.trainer.sft_trainer")  # fmt: skip


def surroundings() -> dict[str, Any]:
    """Return what a process inherits and libraries may read as they are imported."""
    mask = os.umask(0)
    os.umask(mask)
    return {
        "variables": dict.fromkeys(TEMPORARY, "/tmp")
        | {
            name: value
            for name, value in os.environ.items()
            if name not in INDIFFERENT and not name.startswith(INDIFFERENT_PREFIXES)
        },
        "interpreter": os.path.realpath(os.path.dirname(sys.executable)),
        "user": [os.getuid(), os.getgid()],
        # A job of a cluster, or in a container, must stay within what it was given.
        "namespaces": {
            kind: os.readlink(f"/proc/self/ns/{kind}") for kind in sorted(os.listdir("/proc/self/ns"))
        },
        "group": Path("/proc/self/cgroup").read_text(),
        "terminal": os.isatty(2),
        "ignored": sorted(
            number for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN
        ),
        "mask": mask,
        "cores": sorted(os.sched_getaffinity(0)),
        "priority": os.nice(0),
        "limits": [
            list(resource.getrlimit(getattr(resource, name)))
            for name in dir(resource)
            if name.startswith("RLIMIT_")
        ],
    }


def ask(command: list[str]) -> None:
    """Be the process of a command `python -m MODULE ...`: by a fork of the warm process, or else itself."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until it is known who handles them
    connection = None
    with suppress(OSError):
        connection = _handed_over(command)
    if connection is None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from workflow.runtime import starting

        starting.end_in_a_sentence()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        os.execvp(command[0], command)
    for number in ENDING:
        signal.signal(number, _pass_on(connection))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    # No answer: the process that waited for the fork was killed, and the fork with it.
    code = int(connection.recv(16) or -signal.SIGKILL)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


def _pass_on(connection: socket.socket) -> Callable[..., None]:
    def send(number: int, frame: object) -> None:
        with suppress(OSError):  # the fork has ended
            connection.send(bytes([number]))

    return send


def _handed_over(command: list[str]) -> socket.socket | None:
    """Return the connection to the process that waits for the fork; None if there will be no fork.

    Raises:
        OSError: nobody answers.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(PATIENCE)
    connection.connect(os.environ[VARIABLE])
    request = {
        "caller": os.getpid(),
        "executable": command[0] if os.path.isabs(command[0]) else sys.executable,
        "command": command,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "surroundings": surroundings(),
    }
    connection.send(json.dumps(request).encode())
    if connection.recv(16) != b"ready":
        return None
    # Not with the request: streams that wait in the socket of a process that hangs would never be closed.
    socket.send_fds(connection, [b"go"], [0, 1, 2])
    connection.settimeout(None)
    return connection


def serve(
    libraries: Iterable[str],
    accepts: Callable[[dict[str, Any]], bool],
    prepare: Callable[[dict[str, Any]], None] = lambda request: None,
    importing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Import libraries, and fork for each command that asks, until the process that started this one is gone.

    Args:
        libraries: names of modules.
        accepts: whether a command may be a fork, by its request.
        prepare: called in the fork, before the command's module is imported.
        importing: makes the context in which the libraries are imported.
    """
    before = dict(os.environ)
    with importing():
        for name in libraries:
            __import__(name)
    set_by_libraries = {name: value for name, value in os.environ.items() if before.get(name) != value}
    _check_forkable()
    gc.collect()
    gc.freeze()  # a collection in a fork then copies no page of what was imported
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(os.environ[VARIABLE])
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for the forks
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            break
        connection.close()
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    content = connection.recv(LONGEST)
    request = json.loads(content) if content else {}
    if not content or not accepts(request):
        os._exit(0)
    try:
        connection.send(b"ready")
    except OSError:  # who asked has waited for too long, and does it itself
        os._exit(0)
    answer, descriptors, _, _ = socket.recv_fds(connection, 16, 3)
    if answer != b"go":
        os._exit(0)
    keeper, command = os.getpid(), os.fork()
    if command:
        _keep(command, connection, descriptors)
    end_with(keeper)
    connection.close()
    request["environment"] |= set_by_libraries
    _be(request, descriptors, prepare)


@contextmanager
def capabilities_by_the_driver() -> Iterator[None]:
    """Let libraries ask the driver what a GPU can do. CUDA would begin in this process to answer, and no fork could use it."""
    import pynvml
    import torch

    own = torch.cuda.get_device_capability

    def capability(device: object = None) -> tuple[int, int]:
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda._get_nvml_device_index(device))
            return tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
        except Exception:
            # No answer, as for a part of a GPU: a wrong one would have bitsandbytes choose another library.
            return own(device)

    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
    torch.cuda.get_device_capability = capability
    try:
        yield
    finally:
        torch.cuda.get_device_capability = own
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _check_forkable() -> None:
    """End this process if its forks could not be watched (Linux before 5.3), or could not use a GPU, as a library has begun to."""
    import torch

    os.close(os.pidfd_open(os.getpid()))
    child = os.fork()
    if child == 0:
        try:  # a library may have begun behind torch's back
            torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
        except Exception:
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        os._exit(1)


def end_with(parent: int) -> None:
    """Have this process killed when its parent, of this process id, ends; at once if it has ended."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _keep(command: int, connection: socket.socket, descriptors: Iterable[int]) -> None:
    """Pass signals on to a fork, say how it ended, and kill it if the process that asked for it is gone."""
    for descriptor in descriptors:
        os.close(descriptor)
    ended = os.pidfd_open(command)
    while ended not in (ready := select.select([ended, connection], [], [])[0]) and connection in ready:
        numbers = connection.recv(16) or bytes([signal.SIGKILL])
        signal.pidfd_send_signal(ended, numbers[0])
        if numbers[0] == signal.SIGKILL:
            break
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    with suppress(OSError):
        connection.send(str(code).encode())
    os._exit(0)


def _be(
    request: dict[str, Any], descriptors: Iterable[int], prepare: Callable[[dict[str, Any]], None]
) -> None:
    """Be `python -m MODULE ARGUMENTS`, in the folder and with the variables and streams of the one that asked."""
    import importlib
    import runpy

    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.environ[CALLER] = f"{os.getpid()} {request['caller']}"
    _, option, module, *arguments = sys.orig_argv[:] = request["command"]
    sys.argv = [option, *arguments]
    sys.executable = request["executable"]
    sys.path[0] = os.getcwd()
    importlib.invalidate_caches()
    _seed_anew()
    prepare(request)
    if package := module.rpartition(".")[0]:
        importlib.import_module(package)  # that of the stages handles signals
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _seed_anew() -> None:
    """Let each fork draw other random numbers until it sets a seed, as processes of their own do. Python's own does so."""
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()


def caller() -> int:
    """Return the process id that stands for this process where its ancestors count: its own, or that of what asked for it."""
    own, _, asked = os.environ.get(CALLER, "").partition(" ")
    return int(asked) if own == str(os.getpid()) else os.getpid()


def main(parent: int) -> None:
    """Be the warm process of the folder's repository, as long as the parent lives."""
    end_with(parent)
    inherited, packages = surroundings(), _packages()
    # Libraries ask for GPUs as they are imported. CUDA's own answer would keep forks from using one; the driver's does not.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    from workflow.runtime.stage import go_offline, quiet_libraries

    go_offline()
    quiet_libraries()
    with open(os.devnull, "w") as nowhere:  # what libraries say as they are imported
        os.dup2(nowhere.fileno(), 2)
    own = [name for name in sys.modules if name.partition(".")[0] == "workflow"]
    files = [Path(sys.modules[name].__file__) for name in ("__main__", *own)]
    code = [file.read_bytes() for file in files]
    for name in own:
        del sys.modules[name]  # a stage imports the code as it is when the stage starts

    def accepts(request: dict[str, Any]) -> bool:
        return (
            request["command"][2].removeprefix("workflow.stages.") in STAGES
            and request["surroundings"] == inherited
            and packages == _packages()
            and code == [file.read_bytes() for file in files]
        )

    has_gpu = Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()
    serve(LIBRARIES, accepts, importing=capabilities_by_the_driver if has_gpu else nullcontext)


def _packages() -> list[int]:
    """Return when a package was last installed, upgraded or removed: the times of the folders that list them."""
    import sysconfig

    return [os.stat(folder).st_mtime_ns for folder in {*map(sysconfig.get_path, ("purelib", "platlib"))}]


if __name__ == "__main__":
    if sys.argv[2:]:
        ask(sys.argv[1:])
    else:
        main(int(sys.argv[1]))
