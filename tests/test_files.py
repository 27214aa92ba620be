from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dl_inference_core.errors import ConfigError
from dl_inference_core.files import FileWatcher, decode, stamp

GOOD = b"# comment\n69=100,10.0.0.1:8500,10.0.0.2:8500\n70=200,10.0.0.3:8500@5\n"


def written(path: Path, text: str) -> Path:
    """A file of that content whose time of modification is 1 s after the epoch, as in a reproducible image."""
    path.write_text(text)
    os.utime(path, (1, 1))
    return path


def test_a_file_that_nobody_touches_keeps_its_stamp(tmp_path: Path) -> None:
    file = written(tmp_path / "file", "old")
    assert stamp(file) == stamp(file)


def test_a_file_written_again_with_the_same_size_and_time_has_another_stamp(tmp_path: Path) -> None:
    file = written(tmp_path / "file", "old")
    before = stamp(file)
    written(file, "new")
    assert (file.stat().st_size, file.stat().st_mtime) == (3, 1)
    assert stamp(file) != before


def test_a_file_replaced_by_one_with_the_same_size_and_time_has_another_stamp(tmp_path: Path) -> None:
    file, other = written(tmp_path / "file", "old"), written(tmp_path / "other", "new")
    before = stamp(file)
    other.replace(file)
    assert stamp(file) != before


def test_a_link_turned_to_another_file_has_another_stamp(tmp_path: Path) -> None:
    old, new = written(tmp_path / "old", "same"), tmp_path / "new"
    os.link(old, new)  # of the two files nothing differs but the name
    link, other = tmp_path / "link", tmp_path / "other"
    link.symlink_to(old)
    before = stamp(link)
    other.symlink_to(new)
    other.replace(link)
    assert stamp(link) != before


def test_files_that_cannot_be_looked_at_have_stamps(tmp_path: Path) -> None:
    missing, loop = tmp_path / "missing", tmp_path / "loop"
    loop.symlink_to(loop)
    assert stamp(missing) == stamp(missing) != stamp(loop) == stamp(loop)


@pytest.mark.parametrize("path", ["file", "link"])
def test_an_entry_of_a_folder_has_the_stamp_of_its_path(tmp_path: Path, path: str) -> None:
    (tmp_path / "link").symlink_to(written(tmp_path / "file", "text"))
    with os.scandir(tmp_path) as entries:
        stamps = {entry.name: stamp(entry) for entry in entries}
    assert stamps[path] == stamp(tmp_path / path)


def test_text_may_begin_with_a_byte_order_mark() -> None:
    assert decode(b"\xef\xbb\xbfgr\xc3\xbc\xc3\x9fe\n") == decode("grüße\n".encode()) == "grüße\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a = 1\n".encode("utf-16"), "it is UTF-16; expected UTF-8"),
        ("a = 1\n# grüße\n".encode("latin-1"), "line 2 is not UTF-8 (byte 0xfc); expected UTF-8"),
    ],
)
def test_text_in_another_encoding_is_an_error_that_says_so(content: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        decode(content)
    assert str(caught.value) == said


# FileWatcher


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "nodefile.txt"
    path.write_bytes(GOOD)
    return path


@pytest.fixture
def watched(path: Path) -> FileWatcher:
    watched = FileWatcher(path, patience=4)
    assert watched.read() == GOOD
    assert watched.look() is None
    return watched


def looks(watched: FileWatcher, count: int) -> list[bytes | None]:
    return [watched.look() for _ in range(count)]


NEW = b"69=100,10.0.0.9:8500\n"


def test_new_content_is_taken_once_at_the_second_look(watched: FileWatcher, path: Path) -> None:
    path.write_bytes(NEW)
    assert looks(watched, 5) == [None, NEW, None, None, None]


def test_content_without_a_last_line_end_is_taken_when_patience_ends(watched: FileWatcher, path: Path) -> None:
    path.write_bytes(NEW[:-1])
    assert looks(watched, 7) == [None, None, None, None, NEW[:-1], None, None]


def test_nothing_is_taken_of_a_file_that_still_changes(watched: FileWatcher, path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for byte in NEW[:-1]:
            file.write(bytes([byte]))
            assert looks(watched, 2) == [None, None]  # the writer is slower than we look
        file.write(NEW[-1:])
    assert looks(watched, 3) == [None, NEW, None]


def test_a_file_that_goes_back_is_no_news(watched: FileWatcher, path: Path) -> None:
    path.write_bytes(NEW)
    assert watched.look() is None
    path.write_bytes(GOOD)
    assert looks(watched, 6) == [None] * 6


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def looped(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def replaced_by_pipe(path: Path) -> None:
    """Nobody writes into it: reading it would never end."""
    path.unlink()
    os.mkfifo(path)


def unreadable(path: Path) -> None:
    """For root as well, who may read whatever has a mode."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


BROKEN = [Path.unlink, replaced_by_folder, looped, replaced_by_pipe]
if Path("/proc/self/mem").exists():
    BROKEN.append(unreadable)


@pytest.mark.parametrize("break_it", BROKEN)
def test_a_file_that_cannot_be_read_says_so_and_is_read_again_later(
    watched: FileWatcher, path: Path, break_it: Callable[[Path], None]
) -> None:
    break_it(path)
    assert looks(watched, 5) == [None] * 5
    assert str(path) in watched.complaint
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(GOOD)
    assert looks(watched, 5) == [None] * 5  # nothing new
    assert watched.complaint == ""
    path.write_bytes(NEW)
    assert looks(watched, 2) == [None, NEW]


def test_a_symlink_may_be_swapped(tmp_path: Path) -> None:
    old, new, link = tmp_path / "old", tmp_path / "new", tmp_path / "link"
    old.write_bytes(GOOD)
    new.write_bytes(NEW)
    link.symlink_to(old)
    watched = FileWatcher(link, patience=4)
    watched.read()
    other = tmp_path / "other"
    other.symlink_to(new)
    other.replace(link)
    assert looks(watched, 2) == [None, NEW]


def test_a_file_without_end_is_read_so_far_and_no_further() -> None:
    assert len(FileWatcher(Path("/dev/zero"), patience=1).read()) == 16 * 1024 * 1024 + 1


def test_a_missing_file_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none: No such file"):
        FileWatcher(tmp_path / "none", patience=1).read()


def test_of_a_file_that_is_written_byte_by_byte_no_part_is_taken(watched: FileWatcher, path: Path) -> None:
    content = b"".join(b"%d=100,10.0.0.%d:8500\n" % (task, task) for task in range(1, 20))
    with path.open("wb", buffering=0) as file:
        for byte in content:
            file.write(bytes([byte]))
            assert watched.look() is None
    assert looks(watched, 2) == [content, None]


def test_without_patience_content_is_taken_at_the_first_look(path: Path) -> None:
    watched = FileWatcher(path, patience=0)
    watched.read()
    path.write_bytes(NEW[:-1])
    assert looks(watched, 2) == [NEW[:-1], None]
