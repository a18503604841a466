"""The machine: device, precision, seeds, memory allocator and memory peaks."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import random
import resource
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]
COMPILES_SINCE = (7, 0)  # compute capability (V100) from which on Triton makes kernels
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str, option: str = "--train.device") -> torch.device:
    """The device called `name`; `auto` is the first GPU, else the CPU. Raises: UserError naming `option` if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{option} {name} is not available here ({reason}); use auto or cpu") from None
    return device


def resolve_precision(name: str, device: torch.device, width: int = 768) -> Precision:
    """What `auto` means on `device`.

    bf16 where a GPU computes it natively (compute capability 8.0), fp16 on older cards with fast halves, fp32 on the
    rest. On a CPU flags do not tell (many list bf16 and are ten times slower with it), so products of the model's width are timed.
    """
    if name != "auto":
        return name  # type: ignore[return-value]
    if device.type == "cuda":
        return card_precision(torch.cuda.get_device_capability(device))
    if device.type == "cpu" and _cpu_prefers_bf16(width):
        return "bf16"
    return "fp32"


def card_precision(capability: tuple[int, int]) -> Precision:
    """The precision that `auto` takes on a card of this compute capability."""
    if capability >= (8, 0):
        return "bf16"
    return "fp16" if capability >= (7, 0) or capability == (6, 0) else "fp32"  # 6.0 is P100; 6.1 has slow halves


def resolve_compile(asked: bool | str, device: torch.device) -> bool:
    """Whether blocks are compiled; auto: on a GPU that torch.compile makes kernels for.

    Raises: UserError where it was asked for on a card that is too old.
    """
    if device.type != "cuda":
        return asked is True
    if (capability := torch.cuda.get_device_capability(device)) < COMPILES_SINCE:
        if asked is True:
            raise UserError(
                f"--train.compile true: {describe(device)} has compute capability {capability[0]}.{capability[1]}, and "
                f"Triton, which compiles torch.compile's kernels, needs {COMPILES_SINCE[0]}.{COMPILES_SINCE[1]}. Use false, or auto"
            )
        return False
    return asked is True or (asked == "auto" and find_spec("triton") is not None)


@functools.cache  # near the limit two probes may differ, and one process must not
def _cpu_prefers_bf16(width: int) -> bool:
    """Whether an MLP, forward and backward, takes at most 2/3 of the time under bf16 autocast (probed, about 0.1 s).

    It is the machine that is asked, not the model: any MLP of about its size has the same answer.
    """
    x, inner = torch.ones(256, width, requires_grad=True), 4 * width
    up, down = torch.ones(inner, width, requires_grad=True), torch.ones(width, inner, requires_grad=True)

    def seconds(bf16: bool) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                y = F.linear(F.gelu(F.linear(x, up), approximate="tanh"), down)
            y.float().sum().backward()  # type: ignore[no-untyped-call]
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(True) <= seconds(False) / 1.5


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; from the host onto a GPU through pinned memory, without waiting for the copy."""
    if device.type == "cuda" and tensor.is_cpu:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[object]:
    """Mixed precision for a forward pass; weights and optimizer stay in float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch: new weights and dropout. (The order of the data has its own seed.)"""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory instead of giving it back to the kernel; returns whether it was done.

    By default every large tensor is mapped anew and its pages are cleared by the kernel at first touch, which costs
    time in every CPU training step (docs/performance.md). Set TUNESMITH_ALLOCATOR=system to leave the allocator as it is.
    """
    huge = 2**31 - 1
    return _tell_allocator({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: huge, M_TOP_PAD: 2**26})


def return_memory_at_once() -> bool:
    """Tell glibc to give every tensor of 128 KB or more back to the kernel when it is freed; returns whether it was done.

    The process then takes what its tensors take, without a heap's holes, and no longer by chance: 0.4 GB less for a step
    of GPT-2 at 1,024 tokens, for more time (docs/performance.md). Huge pages, where the kernel has them for who asks,
    win a part of that back. TUNESMITH_ALLOCATOR=system leaves the allocator as it is here too.
    """
    done = _tell_allocator({M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 2**17, M_TRIM_THRESHOLD: 2**17, M_TOP_PAD: 0})
    if done:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it with its first tensor
        return_freed_memory()
    return done


def set_allocator(kind: Literal["fast", "lean"]) -> bool:
    """As --train.allocator has it; returns whether it was done."""
    return return_memory_at_once() if kind == "lean" else keep_freed_memory()


def has_lean_allocator() -> bool:
    """Whether there is a glibc that may be told."""
    return _tell_allocator({})


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # from <malloc.h>


def _tell_allocator(settings: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux") or os.environ.get("TUNESMITH_ALLOCATOR") == "system":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all(mallopt(key, value) == 1 for key, value in settings.items())


def return_freed_memory() -> None:
    """Give back to the kernel now what `keep_freed_memory` keeps, where the C library is glibc: after large things are freed."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far in 10^9 bytes: allocated tensors on a GPU, the whole process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(
        OSError
    ):  # Linux; getrusage's figure begins with the peak of the process that started this one
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def resident_memory() -> float:
    """Bytes of this process that are in memory now; 0 where the system does not tell (it is Linux that does)."""
    with contextlib.suppress(OSError):
        return float(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    return 0.0


def available_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Bytes that this process can still take: what the system has, or less where the limit of a container or cgroup is closer.

    None where the system does not tell (it is Linux that does). What is only cached from files counts as there.
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        limits = [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        mine = [line.split(":", 2) for line in (proc / "self/cgroup").read_text().splitlines()]
    except OSError:
        return None
    for number, controllers, path in mine:
        if number == "0":
            root, limit, used, cached = groups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used, cached = (
                groups / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        group = root / path.lstrip("/")  # in a container often not there: then its own is at the root
        for level in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such group, or no limit ("max")
                stat = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
                room = int((level / limit).read_text()) - int((level / used).read_text()) + int(stat.get(cached, 0))
                limits.append(max(0.0, float(room)))
            if level == root:
                break
    return min(limits, default=None)


def environment(device: torch.device) -> dict[str, str | int]:
    """What a run's result depends on beside its configuration: versions, system and hardware; no names of machines or users."""
    from tunesmith import __version__

    return {
        "tunesmith": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": describe(device),
        "threads": torch.get_num_threads(),
    }


def describe(device: torch.device) -> str:
    """The device in words, for logs and benchmark results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    n = torch.get_num_threads()
    return f"CPU, {n} {'thread' if n == 1 else 'threads'}, {torch.backends.cpu.get_cpu_capability()}"
