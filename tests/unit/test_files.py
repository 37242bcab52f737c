"""Files are there whole or not at all, and whoever cannot write says where."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orbcalc import files
from orbcalc.active.certificate import Certificate
from orbcalc.files import (
    append_json,
    changed_files,
    file_sha256,
    fingerprints,
    read_json,
    read_jsonl,
    replace_file,
    write_json,
    write_text,
)

FULL_DISK = """
import resource, signal, sys
from orbcalc.files import replace_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
replace_file(sys.argv[1], "x" * 5000)
"""


@pytest.mark.parametrize("data", ["µ\nÅ\n", b"\x00\r\n", "", b""])
def test_what_is_written_is_what_is_read(tmp_path: Path, data: str | bytes) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    replace_file(str(path), data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert list(tmp_path.iterdir()) == [path]


def test_the_data_are_on_disk_before_they_have_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "file", []
    path.write_text("old")
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.fstat(descriptor).st_size, path.read_text()))
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        calls.append(("replace", Path(source).parent, path.read_text()))
        replace(source, target)

    monkeypatch.setattr("os.fsync", watched_fsync)
    monkeypatch.setattr("os.replace", watched_replace)
    replace_file(path, "longer")
    assert calls == [("fsync", 6, "old"), ("replace", tmp_path, "old")]
    assert path.read_text() == "longer"


def fail(code: int) -> Callable[..., None]:
    """Return what raises an error of the system."""

    def raise_it(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return raise_it


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("pathlib.Path.open", errno.EACCES),
        ("os.fsync", errno.ENOSPC),
        ("os.fsync", errno.EIO),
        ("os.replace", errno.EACCES),
    ],
)
def test_a_failed_write_names_the_file_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, code: int
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(target, fail(code))
        with pytest.raises(OSError, match=re.escape(f"{os.strerror(code)}: '{path}'")) as caught:
            replace_file(path, "new")
    assert caught.value.errno == code
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "file"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            replace_file(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True
    )
    assert done.stderr.endswith(f"File too large: '{path}'\n")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing/file'"):
        replace_file(tmp_path / "missing" / "file", "x")
    (tmp_path / "no_folder").touch()
    with pytest.raises(NotADirectoryError, match=r"no_folder/file'"):
        replace_file(tmp_path / "no_folder" / "file", "x")


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    texts = [str(number) * 100_000 for number in range(10)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: replace_file(path, text), texts * 4))
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_every_writer_says_which_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = Certificate(
        reason="max_labels",
        looks=(),
        tolerance=0.005,
        quantity="energy per atom, eV",
        gamma=0.9,
        delta=0.1,
        seed=0,
        n_pool=3,
        pool_hash="p",
        model_hash="m",
        version="0",
    )
    monkeypatch.setattr("os.fsync", fail(errno.ENOSPC))
    for write in (certificate.write, lambda path: write_json(path, {"a": 1})):
        with pytest.raises(OSError, match=r"No space left on device: '.*file\.json'"):
            write(tmp_path / "file.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
def test_a_hash_does_not_depend_on_how_much_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    path, data = tmp_path / "file", os.urandom(size)
    path.write_bytes(data)
    monkeypatch.setattr(files, "_CHUNK", 64)
    assert file_sha256(str(path)) == hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------------ what has changed
@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Two files."""
    found = [tmp_path / "a.xyz", tmp_path / "b.xyz"]
    for path in found:
        path.write_text(f"content of {path.name}")
    return found


def test_a_changed_file_is_found(paths: list[Path]) -> None:
    known = json.loads(json.dumps(fingerprints(paths)))
    assert changed_files(paths, known) == []
    paths[1].write_text("longer than it was before")
    assert changed_files(paths, known) == [paths[1]]
    paths[1].write_text("content of b.xyz")
    assert changed_files(paths, known) == []


def test_neither_size_nor_time_hides_a_change(paths: list[Path]) -> None:
    before = paths[0].stat()
    known = fingerprints(paths)
    time.sleep(0.05)  # the clock of a file system is coarse
    paths[0].write_text("CONTENT OF a.xyz")
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert paths[0].stat().st_size == before.st_size
    assert changed_files(paths, known) == [paths[0]]


def test_a_file_that_was_only_touched_or_copied_has_not_changed(paths: list[Path]) -> None:
    known = fingerprints(paths)
    os.utime(paths[0])
    copy = paths[1].with_name("copy")
    copy.write_bytes(paths[1].read_bytes())
    copy.replace(paths[1])
    assert changed_files(paths, known) == []


def test_a_file_is_read_only_if_it_may_have_changed(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = fingerprints(paths)
    with paths[1].open("a") as file:
        file.write("more")
    monkeypatch.setattr(files, "file_sha256", pytest.fail)
    assert changed_files(paths, known) == [paths[1]]  # another size says enough


def test_what_is_no_file_is_left_out(paths: list[Path], tmp_path: Path) -> None:
    everything = [*paths, tmp_path, tmp_path / "later.xyz"]
    known = fingerprints(everything)
    assert list(known) == [str(path) for path in paths]
    (tmp_path / "later.xyz").write_text("it is there now")
    paths[0].unlink()
    assert changed_files(everything, known) == []


def test_a_choice_of_structures_stands_for_its_file(paths: list[Path]) -> None:
    choice = Path(f"{paths[0]}@:10")
    known = fingerprints([choice])
    assert changed_files([choice], known) == []
    paths[0].write_text("other")
    assert changed_files([choice], known) == [choice]


# --------------------------------------------------------------------------------- JSON
def test_files_appear_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
    write_json(path, {"a": float("nan")}, allow_nan=True)
    assert str(read_json(path)["a"]) == "nan"
    write_text(path, "other")
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_log_survives_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert read_jsonl(path) == []
    append_json(path, {"n": 1})
    with path.open("a") as file:
        file.write('{"n": 2, "na')
    assert read_jsonl(path) == [{"n": 1}]
    append_json(path, {"n": 3})
    append_json(path, {"n": 4})
    assert [record["n"] for record in read_jsonl(path)] == [1, 3, 4]
