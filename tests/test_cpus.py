"""CPU quotas, from control groups as the kernel shows them: trees of files, and one real group where we may make it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dl_inference_core import cpus

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot"
V1 = "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:11 - cgroup cgroup rw,cpu,cpuacct"
OTHERS = """\
22 28 0:21 / /proc rw,nosuid,nodev,noexec,relatime shared:12 - proc proc rw
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"""


def tree(root: Path, *, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """What a process sees at `root`: its `groups`, the `mounts` and the `files` of control groups."""
    files = {"proc/self/cgroup": groups, "proc/self/mountinfo": f"{OTHERS}\n{mounts}\n", **files}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


@pytest.mark.parametrize(
    ("said", "quota"),
    [
        ("max 100000", None),
        ("50000 100000", 0.5),
        ("250000 100000", 2.5),
        ("20000 10000", 2.0),
        ("noise", None),
        ("", None),
        ("a b c", None),
        ("0 100000", None),
    ],
)
def test_the_quota_of_cgroup_v2(tmp_path: Path, said: str, quota: float | None) -> None:
    root = tree(tmp_path, groups="0::/", mounts=V2, files={"sys/fs/cgroup/cpu.max": said})
    assert cpus.cpu_quota(root) == quota


@pytest.mark.parametrize(
    ("limit", "period", "quota"),
    [("-1", "100000", None), ("50000", "100000", 0.5), ("300000", "100000", 3.0), ("50000", "0", None)],
)
def test_the_quota_of_cgroup_v1(tmp_path: Path, limit: str, period: str, quota: float | None) -> None:
    folder = "sys/fs/cgroup/cpu,cpuacct/docker/abc"
    root = tree(
        tmp_path,
        groups="5:memory:/docker/other\n4:cpu,cpuacct:/docker/abc\n3:cpuset:/docker/other",
        mounts=V1,
        files={f"{folder}/cpu.cfs_quota_us": limit, f"{folder}/cpu.cfs_period_us": period},
    )
    assert cpus.cpu_quota(root) == quota


@pytest.mark.parametrize(
    "smallest", ["", "kubepods.slice/", "kubepods.slice/pod.slice/", "kubepods.slice/pod.slice/c/"]
)
def test_the_smallest_quota_on_the_way_to_the_root_counts(tmp_path: Path, smallest: str) -> None:
    folders = ("", "kubepods.slice/", "kubepods.slice/pod.slice/", "kubepods.slice/pod.slice/c/")
    root = tree(
        tmp_path,
        groups="0::/kubepods.slice/pod.slice/c",
        mounts=V2,
        files={
            f"sys/fs/cgroup/{folder}cpu.max": "150000 100000" if folder == smallest else "400000 100000"
            for folder in folders
        }
        | {"sys/fs/cgroup/kubepods.slice/another/cpu.max": "10000 100000"},
    )
    assert cpus.cpu_quota(root) == 1.5


@pytest.mark.parametrize(
    ("path", "mount_root"),
    [
        ("/docker/abc", "/docker/abc"),  # a container in the host's namespace, which sees its own part of the tree
        ("/docker/abc/worker", "/docker/abc"),
        ("/../../host", "/"),  # a process that was moved out of the namespace that it sees
        ("/elsewhere", "/docker/abc"),
    ],
)
def test_a_container_sees_a_part_of_the_tree(tmp_path: Path, path: str, mount_root: str) -> None:
    mount = f"30 23 0:26 {mount_root} /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw"
    root = tree(tmp_path, groups=f"0::{path}", mounts=mount, files={"sys/fs/cgroup/cpu.max": "50000 100000"})
    assert cpus.cpu_quota(root) == 0.5


def test_both_versions_may_be_mounted(tmp_path: Path) -> None:
    unified = V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
    v1 = "sys/fs/cgroup/cpu,cpuacct"
    root = tree(
        tmp_path,
        groups="4:cpu,cpuacct:/a\n0::/b",
        mounts=f"{V1}\n{unified}",
        files={f"{v1}/a/cpu.cfs_quota_us": "200000", f"{v1}/a/cpu.cfs_period_us": "100000"},
    )
    assert cpus.cpu_quota(root) == 2.0


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpus.cpu_quota(tmp_path) is None
    assert cpus.cpu_quota(tree(tmp_path, groups="noise", mounts="noise - ", files={})) is None


@pytest.mark.parametrize(
    ("affinity", "quota", "available", "cores"),
    [(8, None, 8, 8), (8, 0.5, 0.5, 1), (8, 0.01, 0.01, 1), (8, 1.5, 1.5, 2), (8, 2.0, 2, 2), (2, 6.0, 2, 2)],
)
def test_the_cores_are_the_lesser_of_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, affinity: int, quota: float | None, available: float, cores: int
) -> None:
    monkeypatch.setattr(cpus, "affinity_cores", lambda: affinity)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    assert (cpus.available_cpus(), cpus.cores()) == (available, cores)


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of its own for CPU, whose quota is half a core."""
    name = f"dl-inference-test-{os.getpid()}"
    for parent, file in ((Path("/sys/fs/cgroup"), "cpu.max"), (Path("/sys/fs/cgroup/cpu"), "cpu.cfs_quota_us")):
        folder = parent / name
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if (folder / file).exists():
                (folder / file).write_text("50000" if file == "cpu.cfs_quota_us" else "50000 100000")
                yield folder
                return
        finally:
            folder.rmdir()
    pytest.skip("needs a writable control group of CPU, as root has outside of containers")


def test_a_process_in_a_control_group_sees_its_quota(group: Path) -> None:
    program = """
import os, sys
open(os.path.join(sys.argv[1], "cgroup.procs"), "w").write("0")
from dl_inference_core.cpus import available_cpus, cores
print(available_cpus(), cores())
"""
    ran = subprocess.run(
        [sys.executable, "-c", program, str(group)], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout.split() == ["0.5", "1"]
