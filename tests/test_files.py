"""Files are old or new and never half, and whatever is wrong with them is told with their name."""

from __future__ import annotations

import errno
import os

import pytest

from qgm_ext import topology
from qgm_ext.files import naming, write_atomically


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_write_atomically_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    for text in (b"old", b"new"):
        write_atomically(path, lambda file, text=text: file.write(text))
        assert path.read_bytes() == text
    assert names(tmp_path) == ["a.txt"]


def test_write_atomically_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        file.flush()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.txt"]


def test_write_atomically_syncs_the_file_before_and_the_folder_after_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(handle):
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    write_atomically(tmp_path / "a", lambda file: file.write(b"x"))
    assert calls == ["file", "rename", "folder"]


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_with_the_file_and_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("before")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*/file'") as caught:
        write_atomically(path, lambda file: file.write(b"after"))
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "before"
    assert names(tmp_path) == ["file"]


def test_a_file_system_that_refuses_to_delete_does_not_hide_what_was_wrong(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", "something else")

    monkeypatch.setattr(os, "fsync", full_disk)
    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(tmp_path / "file", lambda file: file.write(b"x"))


def test_a_missing_folder_is_told_with_the_name_of_the_file_and_not_of_its_temporary_one(tmp_path):
    path = tmp_path / "nowhere" / "file"
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(path, lambda file: file.write(b"x"))
    assert caught.value.filename == str(path)


def test_an_error_of_the_system_without_a_number_is_left_alone(tmp_path):
    with pytest.raises(OSError, match=r"^in words$"), naming(tmp_path):
        raise OSError("in words")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_picture_that_finds_no_space_is_told_with_its_name():
    pytest.importorskip("matplotlib")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        topology.ring(4).save_png("/dev/full")
