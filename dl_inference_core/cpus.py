"""How much CPU this process may use: the cores of its affinity mask, and the CPU quota of its control groups.

A container's limit (`docker run --cpus`, a Kubernetes `limits.cpu`) is a quota. It is not visible in `os.cpu_count` or
the affinity mask: a process that starts one thread per core of the machine spends its quota in the first milliseconds
of each period, and stands still for the rest.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def affinity_cores() -> int:
    """The cores that this process may run on, whatever its quota."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13; honours PYTHON_CPU_COUNT
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_cpus() -> float:
    """CPU seconds that this process may use per second: its cores, or its quota where that is less."""
    cores, quota = affinity_cores(), cpu_quota()
    return cores if quota is None else min(cores, quota)


def cores() -> int:
    """The threads that can work at once: `available_cpus`, rounded up."""
    return math.ceil(available_cpus())


def cpu_quota(root: Path = _ROOT) -> float | None:
    """The smallest CPU quota of this process's control groups and of the groups around them, in cores; None without.

    Reads cgroup v1 and v2, also where both are mounted. A file that is missing or malformed sets no quota.

    Args:
        root: holds `proc/self/cgroup`, `proc/self/mountinfo` and the mounts that these name.
    """
    quotas = [quota for folder in _cpu_groups(root) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _cpu_groups(root: Path) -> Iterator[Path]:
    """The folders of the control groups that may limit this process's CPU: each mount's, and those around it."""
    paths = _group_paths(root)
    for version, mount_root, mount_point in _mounts(root):
        path = paths.get(version)
        if path is None:
            continue
        top = root / mount_point.lstrip("/")
        # Without a cgroup namespace a container sees the host's path, and its mount shows a part of the host's tree.
        inside = PurePosixPath(path)
        inside = inside.relative_to(mount_root) if inside.is_relative_to(mount_root) else PurePosixPath()
        if ".." in inside.parts:  # a group outside this process's cgroup namespace: the mount does not show it
            inside = PurePosixPath()
        yield from (top / each for each in (inside, *inside.parents))


def _group_paths(root: Path) -> dict[int, str]:
    """This process's path in cgroup v1's hierarchy of `cpu` and in v2's, by version. See cgroups(7)."""
    paths: dict[int, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[2] = path
        elif "cpu" in controllers.split(","):
            paths[1] = path
    return paths


def _mounts(root: Path) -> Iterator[tuple[int, str, str]]:
    """Version, root and mount point of each mounted hierarchy that may limit the CPU. See proc_pid_mountinfo(5)."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        places, kinds = before.split()[3:5], after.split()
        if len(places) != 2 or not kinds:
            continue
        (mount_root, mount_point), kind, options = places, kinds[0], kinds[-1]
        if kind == "cgroup2":
            yield 2, mount_root, mount_point
        elif kind == "cgroup" and "cpu" in options.split(","):
            yield 1, mount_root, mount_point


def _quota_of(folder: Path) -> float | None:
    """The quota that one control group sets, in cores."""
    with suppress(OSError, ValueError):
        limit, period = (folder / "cpu.max").read_text().split()
        return None if limit == "max" else _cores_of(limit, period)
    with suppress(OSError, ValueError):
        return _cores_of((folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text())
    return None


def _cores_of(limit: str, period: str) -> float | None:
    """Raises:
    ValueError: these are not numbers.
    """
    limit_us, period_us = int(limit), int(period)
    return limit_us / period_us if limit_us > 0 and period_us > 0 else None  # -1 is v1's word for no quota


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
