"""Files appear whole or not at all, whoever else writes them at the time."""

import multiprocessing
import os
import zipfile

import pytest
import torch

from f2d2_lightning.utils.files import remove_partial, whole_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_writers_at_once_do_not_mix(tmp_path):
    path = tmp_path / "a.txt"
    with whole_file(path) as one, whole_file(path) as other:
        assert one != other
        assert {one.parent, other.parent} == {tmp_path}
        one.write_text("one" * 1000)
        other.write_text("other")
    # the one whose context ends last
    assert path.read_text() == "one" * 1000
    assert names(tmp_path) == ["a.txt"]


def write_many(path, letter):
    for _ in range(100):
        with whole_file(path) as partial, partial.open("w") as file:
            for _ in range(10):
                file.write(letter * 1000)
                file.flush()


def test_two_processes_do_not_mix(tmp_path):
    path, context = tmp_path / "a.txt", multiprocessing.get_context("fork")
    processes = [context.Process(target=write_many, args=(path, letter)) for letter in "ab"]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if path.exists():
            assert path.read_text() in ("a" * 10_000, "b" * 10_000)
    assert [process.exitcode for process in processes] == [0, 0]
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail():
        with whole_file(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "before"
    assert names(tmp_path) == ["a.txt"]


def test_the_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    path, seen, fsync = tmp_path / "a.txt", [], os.fsync

    def recorded(descriptor):
        seen.append((os.fstat(descriptor).st_size, path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    with whole_file(path) as partial:
        partial.write_text("content")
    assert seen == [(7, False)]
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.write(-1, b""))
    with pytest.raises(OSError, match="descriptor"), whole_file(tmp_path / "b.txt") as partial:
        partial.write_text("content")
    assert names(tmp_path) == ["a.txt"]


def test_a_file_of_torch_has_the_same_bytes_each_time(tmp_path):
    content = []
    for _ in range(2):
        with whole_file(tmp_path / "a.pt") as partial:
            torch.save({"a": torch.ones(3)}, partial)
        content.append((tmp_path / "a.pt").read_bytes())
    assert content[0] == content[1]
    assert zipfile.ZipFile(tmp_path / "a.pt").namelist()[0] == "a.pt/data.pkl"


def test_what_killed_writers_left(tmp_path):
    kept = ["a.txt", "a.txt.part", "ba.txt.part-12-00ff00ff"]
    for name in [*kept, "a.txt.part-12-00ff00ff"]:
        (tmp_path / name).write_text("")
    remove_partial(tmp_path / "a.txt")
    assert names(tmp_path) == kept


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_whoever_may_read_new_files_may_read_these(tmp_path, umask):
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "a.safetensors") as partial:
            partial.touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
