"""The cache of compiled things: whole or nothing, one builder, private, bounded."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cupyflash.build.cache import Cache, default_cache, default_folder, digest

posix = pytest.mark.skipif(os.name != "posix", reason="modes and owners are POSIX's")


def writer(data: bytes, calls: list[int] | None = None):
    def build(folder: Path) -> None:
        if calls is not None:
            calls.append(1)
        (folder / "data").write_bytes(data)

    return build


def fail(folder: Path) -> None:
    raise AssertionError("built what should have been there")


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_built_once(tmp_path):
    entry = Cache(tmp_path / "cache").get("key", writer(b"one"))
    assert (entry / "data").read_bytes() == b"one"
    assert Cache(tmp_path / "cache").get("key", fail) == entry
    assert Cache(tmp_path / "cache").get("other", writer(b"two")) != entry


def test_digest_keeps_borders_and_order():
    names = {digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("c", "ab"), digest("ab", "c", "")}
    assert len(names) == 5
    assert digest("ab", b"c") == digest("ab", "c")


@pytest.mark.parametrize("damage", ["truncated", "changed", "removed", "no manifest", "bad manifest", "a file"])
def test_damaged_entry_is_built_again(tmp_path, damage):
    cache = Cache(tmp_path)
    data = cache.get("key", writer(b"content")) / "data"
    manifest = data.parent / "manifest.json"
    if damage == "truncated":
        data.write_bytes(b"con")
    elif damage == "changed":
        data.write_bytes(b"CONTENT")
    elif damage == "removed":
        data.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "bad manifest":
        manifest.write_text('{"data": ', encoding="utf-8")
    else:
        data.unlink()
        manifest.unlink()
        data.parent.rmdir()
        data.parent.write_text("not a folder", encoding="utf-8")
    calls: list[int] = []
    again = cache.get("key", writer(b"content", calls))
    assert calls == [1]
    assert (again / "data").read_bytes() == b"content"
    assert cache.get("key", fail) == again
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".lock")] == ["key"]


def test_failed_build_leaves_nothing(tmp_path):
    cache = Cache(tmp_path)

    def build(folder: Path) -> None:
        (folder / "half").write_bytes(b"")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match=r"^no$"):
        cache.get("key", build)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".lock")] == []
    assert (cache.get("key", writer(b"now")) / "data").read_bytes() == b"now"


@posix
def test_folder_is_private(tmp_path):
    cache = Cache(tmp_path / "a" / "b")
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(cache.get("key", writer(b"")).stat().st_mode) == 0o700
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    assert stat.S_IMODE(Cache(open_folder).folder.stat().st_mode) == 0o700


@posix
def test_refuses_what_is_not_ours(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(PermissionError, match=r"link is not a folder \(links are not followed\)"):
        Cache(tmp_path / "link")
    cache = Cache(tmp_path / "cache")
    cache.get("key", writer(b"mine"))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(PermissionError, match=r"belongs to user .*, not to you .*CUPYFLASH_CACHE"):
        Cache(tmp_path / "cache")
    # An entry that somebody else put into our folder is built again. (To this process, all entries now are.)
    calls: list[int] = []
    with pytest.raises(AssertionError):
        cache.get("key", fail)
    cache.get("key", writer(b"ours", calls))
    assert calls == [1]


def _build_slowly(folder: str) -> int:
    """In a process of its own: 1 if it was the one to build."""
    calls: list[int] = []

    def build(workplace: Path) -> None:
        calls.append(1)
        (workplace / "data").write_bytes(b"half")
        time.sleep(0.2)
        (workplace / "data").write_bytes(b"all of it")

    entry = Cache(folder).get("key", build)
    assert (entry / "data").read_bytes() == b"all of it"
    return len(calls)


@posix
def test_concurrent_processes_build_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert sum(pool.map(_build_slowly, [str(tmp_path)] * 6, chunksize=1)) == 1


def test_concurrent_threads_build_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(_build_slowly, [str(tmp_path)] * 8)) == 1


def test_without_locks_the_first_wins(tmp_path, monkeypatch):
    """Where files cannot be locked, two may build; both get a whole entry."""
    monkeypatch.setattr("cupyflash.build.cache.fcntl", None)
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(_build_slowly, [str(tmp_path)] * 4)) >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_least_recently_used_goes_first(tmp_path):
    cache = Cache(tmp_path, max_bytes=3500)
    for seconds, name in ((500, "a"), (400, "b"), (300, "c")):
        age(cache.get(name, writer(bytes(1000))), seconds)
    cache.get("a", fail)  # used now
    cache.get("d", writer(bytes(1000)))
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"a", "c", "d"}


def test_fresh_entries_stay(tmp_path):
    """An entry may just have been handed to somebody who has not opened it yet."""
    cache = Cache(tmp_path, max_bytes=0)
    entries = [cache.get(name, writer(bytes(1000))) for name in "abc"]
    assert all(entry.exists() for entry in entries)
    for entry in entries[:2]:
        age(entry, 3600)
    cache.get("d", writer(b""))
    assert [entry.exists() for entry in entries] == [False, False, True]


def test_the_folder_is_looked_through_now_and_then(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(Cache, "_evict", lambda self, keep: looks.append(keep.name))
    cache = Cache(tmp_path, max_bytes=32 * 10_000)
    for name in "abcdefgh":
        cache.get(name, writer(bytes(3000)))  # and the manifest: the fourth after a look exceeds 10,000
    assert looks == ["a", "e"]


def test_abandoned_builds_are_removed(tmp_path):
    cache = Cache(tmp_path)
    for name, seconds in ((".dead", 2 * 24 * 3600), (".alive", 3600)):
        (tmp_path / name).mkdir()
        age(tmp_path / name, seconds)
    cache.get("key", writer(b""))
    assert not (tmp_path / ".dead").exists()
    assert (tmp_path / ".alive").exists()


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPYFLASH_CACHE", str(tmp_path / "x"))
    assert default_folder() == tmp_path / "x"
    assert Cache().folder == tmp_path / "x"
    monkeypatch.delenv("CUPYFLASH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "cupyflash"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "cupyflash"
    with pytest.raises(ValueError, match="max_bytes=-1 is negative"):
        Cache(tmp_path, max_bytes=-1)


@posix
def test_without_a_home(monkeypatch, tmp_path):
    """No folder that can be written: a temporary one, and a warning; but a folder the user chose is not replaced."""
    (tmp_path / "file").touch()
    monkeypatch.delenv("CUPYFLASH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="kept only until this process ends: .*CUPYFLASH_CACHE"):
        cache = default_cache()
    assert cache.folder != default_folder()
    assert (cache.get("key", writer(b"here")) / "data").read_bytes() == b"here"
    assert default_cache() is cache
    monkeypatch.setenv("CUPYFLASH_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        default_cache()


@posix
def test_nobody_knows_the_home(monkeypatch):
    """A container that runs as a user who is in no list, without HOME."""

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("CUPYFLASH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(OSError, match="HOME is not set"):
        default_folder()
    with pytest.warns(RuntimeWarning, match="kept only until this process ends: HOME is not set"):
        cache = default_cache()
    assert (cache.get("key", writer(b"here")) / "data").read_bytes() == b"here"


def test_what_can_only_be_read_serves(tmp_path, monkeypatch):
    Cache(tmp_path).get("key", writer(b"here"))

    def read_only(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", read_only)
    assert (Cache(tmp_path).get("key", fail) / "data").read_bytes() == b"here"


@posix
def test_a_default_that_can_only_be_read(monkeypatch, tmp_path):
    monkeypatch.delenv("CUPYFLASH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write everywhere
    with pytest.warns(RuntimeWarning, match="kept only until this process ends: .*can't be written"):
        assert default_cache().folder != default_folder()
    monkeypatch.setenv("CUPYFLASH_CACHE", str(tmp_path / "chosen"))
    assert default_cache().folder == tmp_path / "chosen"


def test_a_folder_that_goes_away_comes_back(tmp_path):
    cache = Cache(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert (cache.get("key", writer(b"here")) / "data").read_bytes() == b"here"


@posix
def test_a_child_of_fork_leaves_the_temporary_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("CUPYFLASH_CACHE", raising=False)
    (tmp_path / "file").touch()
    code = f"""
import os, sys, warnings
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
warnings.simplefilter("ignore")
from cupyflash.build.cache import default_cache
folder = default_cache().folder
child = os.fork()
if child == 0:
    sys.exit()
os.waitpid(child, 0)
print(folder.exists(), folder)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file")}
    there, folder = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).split()
    assert there == "True"
    assert not Path(folder).exists()
