"""What tuning keeps: private, whole, of this machine only, written by any number of processes at once."""

import json
import os
import stat
import subprocess
import sys

import pytest

from fused_res.tuning import files
from fused_res.tuning.files import PlanFiles

IDENTITY = {"device": "a GPU", "torch": "2.99"}


@pytest.fixture(autouse=True)
def _warns_anew(monkeypatch):
    monkeypatch.setattr(files, "_warned", set())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FUSED_RES_CACHE", str(folder))
    return folder


def test_values_come_back_and_belong_to_key_and_identity(cache):
    kept = PlanFiles(IDENTITY)
    assert kept.load("key") is None
    kept.save("key", {"own": True, "config": [1, 2]}, seconds={"a": 1.0})
    assert PlanFiles(dict(IDENTITY)).load("key") == {"own": True, "config": [1, 2]}
    assert kept.load("other") is None
    assert PlanFiles(IDENTITY | {"torch": "3.0"}).load("key") is None
    kept.save("key", "moment")
    assert kept.load("key") == "moment"
    assert len(list(cache.rglob("*"))) == 2


def test_folders_and_files_are_the_users_alone(cache):
    before = os.umask(0)
    try:
        PlanFiles(IDENTITY).save("key", 1)
    finally:
        os.umask(before)
    for path in (cache, *cache.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "\udcff", '{"format": 1}', '{"format": 2, "identity": {}, "key": "key", "value": "bad"}'],
    ids=range(7),
)
def test_what_cannot_be_read_is_ignored_with_one_warning_and_written_over(cache, text):
    kept = PlanFiles(IDENTITY)
    kept.save("key", "good")
    kept.path("key").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match="ignored .*json"):
        assert kept.load("key") is None
    assert kept.load("key") is None
    kept.save("key", "better")
    assert kept.load("key") == "better"


def test_a_file_of_another_key_under_this_name_is_not_believed(cache):
    kept = PlanFiles(IDENTITY)
    kept.save("one", 1)
    os.replace(kept.path("one"), kept.path("two"))
    with pytest.warns(UserWarning, match="something else"):
        assert kept.load("two") is None


def test_a_folder_that_others_can_write_to_is_not_used(cache):
    cache.mkdir()
    cache.chmod(0o777)
    kept = PlanFiles(IDENTITY)
    with pytest.warns(UserWarning, match="can be written to by others"):
        kept.save("key", 1)
    assert kept.load("key") is None
    assert not list(cache.iterdir())


def test_another_users_folder_is_not_used(cache, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: -5)
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert PlanFiles(IDENTITY).path("key") is None


def test_without_a_place_there_is_a_warning_and_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSED_RES_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="nothing that is tuned will be kept"):
        PlanFiles(IDENTITY).save("key", 1)


def test_a_full_disk_is_a_warning_and_leaves_nothing_behind(cache, monkeypatch):
    kept = PlanFiles(IDENTITY)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.warns(UserWarning, match="No space left"):
        kept.save("key", 1)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_the_usual_place_is_xdgs_and_empty_means_nowhere(tmp_path, monkeypatch):
    monkeypatch.delenv("FUSED_RES_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.root() == tmp_path / "xdg" / "fused_res"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.root() == tmp_path / "home" / ".cache" / "fused_res"
    monkeypatch.setenv("FUSED_RES_CACHE", "")
    assert files.root() is None
    PlanFiles(IDENTITY).save("key", 1)
    assert PlanFiles(IDENTITY).load("key") is None


WRITER = """
import sys
from fused_res.tuning.files import PlanFiles
kept = PlanFiles({"device": "a GPU"})
for i in range(40):
    for key in range(5):
        kept.save(f"key {key}", [int(sys.argv[1])] * 300)
        found = kept.load(f"key {key}")
        assert len(found) == 300 and len(set(found)) == 1, found
"""


def test_many_processes_write_the_same_decisions_at_once(cache):
    """Every read in between finds a whole file, without a warning."""
    writers = [subprocess.Popen([sys.executable, "-W", "error", "-c", WRITER, str(i)], stderr=subprocess.PIPE) for i in range(4)]
    for writer in writers:
        _, stderr = writer.communicate(timeout=300)
        assert writer.returncode == 0, stderr.decode()
    assert len(list(cache.rglob("*.json"))) == 5
    assert not list(cache.rglob("*.tmp"))
