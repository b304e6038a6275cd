"""Compiled things on disk, found by what they were made from.

An entry is a folder named after a digest of everything that went into it, so it is never out of date and
never changed in place.  Beside the files lies a manifest with their sizes and SHA-256; an entry that does not
match it is thrown away and built again.  Entries are built in a folder of their own and renamed into place,
so a reader sees all of one or nothing, and two processes that want the same entry wait for one another rather
than building twice.

The cache holds code that will be loaded and run, so its folder must belong to the user, be closed to others
(mode 0700) and not be a link.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: renaming keeps entries whole, only the waiting for one another is lost
    fcntl = None  # type: ignore[assignment]

from ..interrupts import settle_after

__all__ = ["Cache", "default_cache", "default_folder", "digest"]

_MANIFEST = "manifest.json"
# An entry this fresh may be between its return to the caller and the caller's opening it: eviction leaves it
# alone.
_GRACE_SECONDS = 60.0
# A build this old was killed.
_ABANDONED_SECONDS = 24 * 3600.0


def default_folder() -> Path:
    """``$CUPYFLASH_CACHE``, else ``$XDG_CACHE_HOME/cupyflash``, else ``~/.cache/cupyflash``.

    Raises
    ------
    OSError
        nobody says where the home folder is: a container that runs as a user it does not know.
    """
    if explicit := os.environ.get("CUPYFLASH_CACHE"):
        return Path(explicit)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "cupyflash"
    try:
        return Path.home() / ".cache" / "cupyflash"
    except RuntimeError as error:
        raise FileNotFoundError(f"HOME is not set, and the system knows no home folder of yours ({error})") from error


def digest(*parts: str | bytes) -> str:
    """A name for what was made from ``parts``; their order and borders count."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()[:40]


class Cache:
    """A folder of entries.

    Parameters
    ----------
    folder
        created, with mode 0700, if it is not there.  None: ``default_folder()``.
    max_bytes
        what the entries may take together, or a little more; the least recently used go first.

    Raises
    ------
    PermissionError
        the folder belongs to somebody else, others may write to it, or it is a link.
    OSError
        the folder cannot be made or written.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, max_bytes: int = 1 << 30) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes={max_bytes} is negative")
        self.folder = Path(folder) if folder is not None else default_folder()
        self.max_bytes = max_bytes
        self._bytes_to_eviction = 0
        self._make_folder()

    def get(self, key: str, build: Callable[[Path], None]) -> Path:
        """The entry's folder, built if it is not there.

        Parameters
        ----------
        key
            a name from `digest`.
        build
            called with an empty folder, to put the entry's files into.  What it raises, and Ctrl-C, comes back
            to the caller, and nothing is stored.  The folder around that one is for what is needed on the way; both
            are gone afterwards.

        Returns
        -------
        A folder that holds the files.  It is not to be written to, and stays for a minute at least.
        """
        entry = self.folder / key
        if self._use(entry):
            return entry
        if not self.folder.exists():  # somebody emptied the caches while this process ran
            self._make_folder()
        with self.lock(key):
            if self._use(entry):  # built while this process waited
                return entry
            workplace = self.folder / f".{key[:8]}-{secrets.token_hex(8)}"

            def build_and_install() -> None:
                workplace.mkdir(mode=0o700)
                made = workplace / "made"
                made.mkdir(mode=0o700)
                build(made)
                _write_manifest(made)
                self._install(made, entry)

            settle_after(build_and_install, partial(shutil.rmtree, workplace, ignore_errors=True))
            self._evict_now_and_then(entry)
        return entry

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_private(self.folder)

    def _use(self, entry: Path) -> bool:
        """True if the entry is there and whole, and marks it as just used."""
        if not _is_whole(entry):
            return False
        try:
            os.utime(entry)
        except FileNotFoundError:  # evicted by another process in this moment
            return False
        except OSError:  # a file system that can't be written: what is there serves
            pass
        return True

    def _install(self, made: Path, entry: Path) -> None:
        # A rename does not replace a folder with files in it: without locks another process may have been quicker,
        # and then its entry serves and must not be touched.
        with contextlib.suppress(OSError):
            os.rename(made, entry)
            return
        if _is_whole(entry):
            return
        with contextlib.suppress(FileNotFoundError):  # what is damaged goes with the workplace
            os.rename(entry, made.with_name("damaged"))
        try:
            os.rename(made, entry)
        except OSError:
            if not _is_whole(entry):
                raise

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Waits until no other process or thread is within it with this key (or, rarely, with a neighbouring one)."""
        if fcntl is None:
            yield
            return
        with open(self.folder / f".lock-{key[:2]}", "w") as file:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _evict_now_and_then(self, new: Path) -> None:
        # Thousands of entries take longer to look through than a kernel takes to compile: the first build of a process
        # does, and then one for every 32nd of what the cache may hold.
        with contextlib.suppress(FileNotFoundError):
            self._bytes_to_eviction -= sum(file.stat().st_size for file in new.iterdir())
        if self._bytes_to_eviction <= 0:
            self._evict(keep=new)
            self._bytes_to_eviction = self.max_bytes // 32

    def _evict(self, keep: Path) -> None:
        now = time.time()
        entries = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # other processes evict too
                if not path.is_dir():
                    continue
                age = now - path.stat().st_mtime
                if path.name.startswith("."):
                    if age > _ABANDONED_SECONDS:
                        shutil.rmtree(path, ignore_errors=True)
                    continue
                size = sum(file.stat().st_size for file in path.iterdir())
                entries.append((age, size, path))
        total = sum(size for _, size, _ in entries)
        for age, size, path in sorted(entries, reverse=True):
            if total <= self.max_bytes or age < _GRACE_SECONDS:
                break
            if path == keep:
                continue
            shutil.rmtree(path, ignore_errors=True)
            total -= size


def default_cache() -> Cache:
    """The cache in `default_folder`.

    Where that is not the user's choice and cannot be written (a container without a home, say), a temporary folder
    takes its place until the process ends, with a warning.

    Raises
    ------
    OSError
        ``$CUPYFLASH_CACHE`` is set and cannot be used; see `Cache`.
    """
    folder = None
    with contextlib.suppress(OSError):  # without a folder `Cache` will say why
        folder = default_folder()
    return _default_cache(folder, bool(os.environ.get("CUPYFLASH_CACHE")))


@lru_cache(maxsize=8)
def _default_cache(folder: Path | None, is_chosen: bool) -> Cache:
    try:
        cache = Cache(folder)
        if not is_chosen and not os.access(cache.folder, os.W_OK):
            raise PermissionError(f"{cache.folder} can't be written")
        return cache
    except OSError as error:
        if is_chosen:
            raise
        temporary = tempfile.mkdtemp(prefix="cupyflash-")
        atexit.register(_remove_of, os.getpid(), temporary)
        warnings.warn(
            f"compiled kernels are kept only until this process ends: {error}; "
            "set CUPYFLASH_CACHE to a folder of your own",
            RuntimeWarning,
            stacklevel=2,
        )
        return Cache(temporary)


def _remove_of(process: int, folder: str) -> None:
    if os.getpid() == process:  # not at the end of a child of fork
        shutil.rmtree(folder, ignore_errors=True)


def _require_private(folder: Path) -> None:
    status = folder.lstat()
    problem = None
    if not stat.S_ISDIR(status.st_mode):
        problem = "is not a folder (links are not followed)"
    elif hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        problem = f"belongs to user {status.st_uid}, not to you (user {os.geteuid()})"
    elif os.name == "posix" and status.st_mode & 0o077:
        # Ours, but open: a folder that existed before.  Closing it is what the user would do.
        folder.chmod(0o700)
        if folder.lstat().st_mode & 0o022:
            problem = "can be written by others and could not be closed to them"
    if problem is not None:
        raise PermissionError(
            f"the cache folder {folder} {problem}, and code from it would be run; "
            "set CUPYFLASH_CACHE to a folder of your own"
        )


def _hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_manifest(folder: Path) -> None:
    files = {path.name: _hash_file(path) for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")


def _is_whole(entry: Path) -> bool:
    try:
        status = entry.lstat()
        if not stat.S_ISDIR(status.st_mode) or (hasattr(os, "geteuid") and status.st_uid != os.geteuid()):
            return False
        files = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
        return isinstance(files, dict) and all(_hash_file(entry / name) == sha for name, sha in files.items())
    except (OSError, ValueError):  # missing, unreadable, or no JSON
        return False
