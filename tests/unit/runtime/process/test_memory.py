"""How much memory may still be used, on trees of files as kernels write them."""

import mmap
import resource
import sys
from pathlib import Path

import pytest

from quartet.runtime.process.memory import give_back, look, shrink

MB = 1 << 20
UNLIMITED = resource.RLIM_INFINITY
V2_MOUNT = "30 23 0:26 {mounted} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 {mounted} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
CPU_MOUNT = "36 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"


class Machine:
    """A root directory that says it has 8 GB, 6 of them available."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {8 << 20} kB\nMemFree: 100 kB\nMemAvailable: {6 << 20} kB\n")
        self.write("proc/self/statm", f"{100 * MB // 4096} 1 1 1 0 {60 * MB // 4096} 0\n")

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def in_group(self, line: str, mount: str, mounted: str = "/") -> None:
        self.write("proc/self/cgroup", f"3:cpu:/elsewhere\n{line}\n")
        self.write("proc/self/mountinfo", f"{CPU_MOUNT}\n{mount.format(mounted=mounted)}\n")

    def v2(self, group: str, limit: object, used_mb: int = 0, inactive_mb: int = 0, high: object = "max") -> None:
        at = f"sys/fs/cgroup/{group}"
        self.write(f"{at}/memory.max", f"{limit}\n")
        self.write(f"{at}/memory.high", f"{high}\n")
        self.write(f"{at}/memory.current", f"{used_mb * MB}\n")
        self.write(f"{at}/memory.stat", f"anon 5\nfile 7\ninactive_file {inactive_mb * MB}\n")

    def v1(self, group: str, limit: int, used_mb: int = 0, inactive_mb: int = 0, beyond: int = 1 << 63) -> None:
        at = f"sys/fs/cgroup/memory/{group}"
        self.write(f"{at}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{at}/memory.usage_in_bytes", f"{used_mb * MB}\n")
        stat = f"inactive_file 3\nhierarchical_memory_limit {beyond}\ntotal_inactive_file {inactive_mb * MB}\n"
        self.write(f"{at}/memory.stat", stat)

    def look(self, **limits: int) -> tuple[int, int, str]:
        """MB available, MB in all, and by which limit."""
        by_number = {getattr(resource, name): size for name, size in limits.items()}
        found = look(self.root, lambda number: (by_number.get(number, UNLIMITED), UNLIMITED))
        return found.available // MB, found.total // MB, found.limit


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_machine_without_control_groups_gives_what_is_available(machine: Machine) -> None:
    assert machine.look() == (6144, 8192, "this machine's memory")


def test_a_group_of_version_2_gives_its_limit_without_what_is_used_but_for_idle_files(machine: Machine) -> None:
    machine.in_group("0::/pod/box", V2_MOUNT)
    machine.v2("pod/box", 900 * MB, used_mb=300, inactive_mb=100)
    assert machine.look() == (700, 900, "memory.max of the control group /pod/box")


def test_the_group_that_leaves_least_counts_wherever_it_is_above(machine: Machine) -> None:
    machine.in_group("0::/pod/box/inner", V2_MOUNT)
    machine.v2("pod/box/inner", "max")
    machine.v2("pod/box", 900 * MB, used_mb=100)
    machine.v2("pod", 1000 * MB, used_mb=950)
    assert machine.look() == (50, 900, "memory.max of the control group /pod")


def test_a_group_is_not_filled_beyond_where_it_is_slowed_down(machine: Machine) -> None:
    machine.in_group("0::/box", V2_MOUNT)
    machine.v2("box", 900 * MB, high=500 * MB, used_mb=100)
    assert machine.look() == (400, 500, "memory.high of the control group /box")


def test_a_container_that_sees_its_own_group_only_finds_its_limit_there(machine: Machine) -> None:
    machine.in_group("0::/", V2_MOUNT)
    machine.v2("", 900 * MB)
    assert machine.look()[0] == 900


@pytest.mark.parametrize("mounted", ["/docker/abc", "/docker/other"])
def test_a_container_that_is_told_its_name_on_the_host_finds_its_limit_too(machine: Machine, mounted: str) -> None:
    machine.in_group("4:memory:/docker/abc", V1_MOUNT, mounted)
    machine.v1("", 900 * MB, used_mb=300, inactive_mb=100)
    assert machine.look()[:2] == (700, 900)


def test_a_group_of_version_1_gives_its_limit_without_what_is_used_but_for_idle_files(machine: Machine) -> None:
    machine.in_group("4:blkio,memory:/box", V1_MOUNT)
    machine.v1("box", 900 * MB, used_mb=300, inactive_mb=100)
    machine.v1("", 9223372036854771712, used_mb=5000)
    assert machine.look() == (700, 900, "memory.limit_in_bytes of the control group /box")


def test_a_limit_of_a_group_that_cannot_be_seen_counts_in_version_1(machine: Machine) -> None:
    machine.in_group("4:memory:/", V1_MOUNT)
    machine.v1("", 9223372036854771712, used_mb=100, beyond=600 * MB)
    assert machine.look() == (500, 600, "hierarchical_memory_limit of the control group /")


def test_a_group_that_uses_more_than_it_may_leaves_nothing(machine: Machine) -> None:
    machine.in_group("0::/box", V2_MOUNT)
    machine.v2("box", 900 * MB, used_mb=950)
    assert machine.look()[0] == 0


def test_a_mount_with_blanks_in_its_path_is_found(machine: Machine) -> None:
    machine.in_group("0::/", V2_MOUNT.replace("/sys/fs/cgroup", r"/sys/fs/c\040group"))
    machine.write("sys/fs/c group/memory.max", f"{900 * MB}\n")
    assert machine.look()[0] == 900


def test_limits_of_the_process_count_what_it_has_already(machine: Machine) -> None:
    assert machine.look(RLIMIT_AS=500 * MB) == (400, 500, "RLIMIT_AS")
    assert machine.look(RLIMIT_DATA=500 * MB) == (440, 500, "RLIMIT_DATA")


def test_a_larger_limit_than_the_machine_changes_nothing(machine: Machine) -> None:
    machine.in_group("0::/box", V2_MOUNT)
    machine.v2("box", 900 << 30)
    assert machine.look(RLIMIT_AS=900 << 30) == (6144, 8192, "this machine's memory")


@pytest.mark.parametrize("text", ["", "max", "many", "-1", "\n"])
def test_a_file_without_a_number_is_no_limit(machine: Machine, text: str) -> None:
    machine.in_group("0::/box", V2_MOUNT)
    machine.v2("box", text)
    assert machine.look()[0] == 6144


def test_this_machine_has_memory() -> None:
    found = look()
    assert 0 < found.available <= found.total and found.limit


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_what_is_free_goes_back_to_the_system() -> None:
    blocks = [bytearray(b"x" * 60_000) for _ in range(2000)]  # below what malloc maps on its own
    kept = blocks[-1]
    held = resident_bytes()
    del blocks
    give_back()
    assert held - resident_bytes() > 50_000_000 and kept[0] == ord("x")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="smaps")
def test_pages_of_files_that_were_not_changed_are_unmapped_and_come_back(tmp_path: Path) -> None:
    file = tmp_path / "pages"
    file.write_bytes(b"x" * (8 << 20))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
        assert mapped[::4096].count(b"x") == 2048
        held = resident_bytes()
        shrink()
        assert held - resident_bytes() > 6 << 20
        assert mapped[::4096] == b"x" * 2048


@pytest.mark.skipif(sys.platform != "linux", reason="smaps")
def test_changed_copies_of_files_stay(tmp_path: Path) -> None:
    file = tmp_path / "pages"
    file.write_bytes(b"x" * 8192)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
        mapped[0] = ord("y")
        shrink()
        assert mapped[:2] == b"yx"
