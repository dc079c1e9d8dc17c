"""Files and folders that are whole or not there, and what a kill leaves."""

import os
import stat
import time
from pathlib import Path

import pytest

from smalti.errors import ConfigError
from smalti.files import (
    LOCK_FILE,
    check_folder,
    check_writable,
    folder_beside,
    is_free,
    remove_leftovers,
    set_aside,
    temporary_name,
    write_atomically,
    written_beside,
)


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, "old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ConfigError, match=r"x.json: can't be written \(No space left on device\)"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.fixture
def umask() -> int:
    """A umask that is not the usual one."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_permissions_are_what_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    write_atomically(tmp_path / "a.json", "x")
    assert mode(tmp_path / "a.json") == 0o666 & ~umask
    with folder_beside(tmp_path / "folder") as draft:
        (draft / "private").write_text("x")
        (draft / "private").chmod(0o600)  # as safetensors writes it
    assert mode(tmp_path / "folder") == 0o777 & ~umask
    assert mode(tmp_path / "folder" / "private") == 0o666 & ~umask


def test_files_are_synced_before_they_get_their_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(handle: int) -> None:
        name = Path(f"/proc/self/fd/{handle}").readlink().name
        done.append("file" if name.startswith(".writing_x.json") else f"folder {name}")
        fsync(handle)

    def note_name(self: Path, target: Path) -> Path:
        done.append("name")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_name)
    write_atomically(tmp_path / "x.json", "new")
    assert done == ["file", "name", f"folder {tmp_path.name}"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), folder_beside(tmp_path / "out") as draft:
        (draft / "half").write_text("x")
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())


def test_a_folder_with_what_a_kill_left_is_free_and_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert is_free(out)
    out.mkdir()
    temporary_name(out / "a.json").write_text("half")
    temporary_name(out / "b").mkdir()
    (out / LOCK_FILE).write_text("")
    assert is_free(out)
    with folder_beside(out) as draft:
        (draft / "a").write_text("x")
    assert [path.name for path in out.iterdir()] == ["a"]
    assert not is_free(out)
    (tmp_path / "file").write_text("x")
    assert not is_free(tmp_path / "file")


def test_only_old_temporary_names_are_removed_where_others_may_write(tmp_path: Path) -> None:
    old, new = temporary_name(tmp_path / "a"), temporary_name(tmp_path / "b")
    for path in (old, new):
        path.write_text("x")
    os.utime(old, (time.time() - 7200,) * 2)
    remove_leftovers(tmp_path, abandoned=True)
    assert [path.name for path in tmp_path.iterdir()] == [new.name]
    remove_leftovers(tmp_path)
    assert not any(tmp_path.iterdir())


def test_whether_a_file_can_be_written_is_known_before_and_nothing_is_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder" / "x.json")
    check_folder(tmp_path / "new")
    assert not any(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"file/x.json: can't be written \(Not a directory\)"):
        check_writable(tmp_path / "file" / "x.json")
    with pytest.raises(ConfigError, match=r"/proc/x.json: can't be written"):
        check_writable(Path("/proc/x.json"))


def test_an_error_while_a_file_is_written_names_the_file_and_not_its_temporary_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^/proc/x.json: can't be written \("), written_beside(Path("/proc/x.json")):
        pass


def test_a_damaged_file_is_kept_beside(tmp_path: Path) -> None:
    for content in ("first", "second"):
        (tmp_path / "log.csv").write_text(content)
        with pytest.warns(
            UserWarning, match="is damaged; renamed it to damaged_log.csv and started a new one .ValueError: x"
        ):
            set_aside(tmp_path / "log.csv", ValueError("x"))
    assert [path.name for path in tmp_path.iterdir()] == ["damaged_log.csv"]
    assert (tmp_path / "damaged_log.csv").read_text() == "second"
