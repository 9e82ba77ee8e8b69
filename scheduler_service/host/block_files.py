"""Blocks of bytes as files of one directory: how they are named, written, checked and found again. Knows no tensors.

    DIR/lock                     held by the one process that uses DIR
    DIR/<identity>/<key>.kv      a header and the block; identity and key are 40 hex digits
    DIR/rank<number>             the same of another rank of tensor parallel

The header names the identity and the key, and has a checksum over itself and the block, so a file that was cut,
damaged or renamed is recognised. A file is written under another name and renamed when it is whole. What does not look
like ours in DIR is left alone, symbolic links are never followed, and nothing of DIR is ever executed or unpickled.
Nothing is forced to the disk: what a crash of the machine leaves half written fails its check. Directories that
somebody deletes are made again with the next block.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
import struct
import threading
import time
from pathlib import Path

import xxhash

from quartet.runtime.errors import StartupError

log = logging.getLogger(__name__)

MAGIC = b"QRTKV\x00\x00\x01"  # the last byte: version of the format
HEADER = struct.Struct("<8s20s20sQ")  # magic, identity, key, bytes of the block
CHECKSUM_BYTES = 16
HEADER_BYTES = HEADER.size + CHECKSUM_BYTES
DISK_BLOCK = 4096  # files take whole ones
SUFFIX, UNFINISHED = ".kv", ".part"
OURS = re.compile(r"[0-9a-f]{40}")
RANK = re.compile(r"rank(\d{1,4})")
OUR_FILES = re.compile(r"[0-9a-f]{40}\.(kv|part)")
LOCK = "lock"
LOCK_WAIT_S = 5.0  # for a predecessor that is being killed
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
IN_USE = "--kv-cache-dir {} is in use by another server{}; give each server a directory of its own"
NOT_USABLE = "--kv-cache-dir {} cannot be used: {}"


def bytes_on_disk(block_bytes: int) -> int:
    """What one block takes."""
    return -(-(HEADER_BYTES + block_bytes) // DISK_BLOCK) * DISK_BLOCK


def drop_unused(directory: Path) -> None:
    """Delete the blocks of a directory that a server had, unless one has it now. Raises OSError."""
    if (directory / LOCK).exists():
        try:
            files = BlockFiles(directory, 0, lock_wait_s=0)
        except StartupError as error:
            log.warning("The blocks of KV in %s stay: %s.", directory, error)
        else:
            files.drop_all()


def drop_former_ranks(directory: Path, first: int) -> None:
    """Delete the blocks of ranks from this number on, but for those that a server has now. Raises OSError.

    For a machine whose ranks have directories in this one and not the directory itself.
    """
    for entry in list(os.scandir(directory)):
        found = RANK.fullmatch(entry.name)
        if found and int(found[1]) >= first and entry.is_dir(follow_symlinks=False):
            drop_unused(Path(entry.path))


class BlockFiles:
    """The files of one directory, which this process has for itself. Raises StartupError."""

    def __init__(self, directory: Path, block_bytes: int, lock_wait_s: float = LOCK_WAIT_S) -> None:
        self.directory = directory
        self.block_bytes = block_bytes
        self._identity = b""
        self._fd = -1  # of the identity's directory
        self._guard = threading.Lock()  # of both: one thread writes, another reads
        try:
            self._lock = self._locked(lock_wait_s)
        except OSError as error:
            raise StartupError(NOT_USABLE.format(directory, error.strerror)) from error

    def _locked(self, wait_s: float) -> int:
        """Make the directory where it is missing; its lock, taken. Raises OSError and StartupError."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self.directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(lock).st_mode):
                raise StartupError(NOT_USABLE.format(self.directory, "its lock is not a regular file"))
            if self.directory.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                log.warning("Others may write to %s: whoever does can change what this server answers.", self.directory)
            self._take(lock, time.monotonic() + wait_s)
        except (OSError, StartupError):
            os.close(lock)
            raise
        return lock

    def _take(self, lock: int, deadline: float) -> None:
        """A record lock: the kernel drops it with the process, and children do not inherit it. Raises OSError too."""
        while True:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                if time.monotonic() >= deadline:
                    holder = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
                    process = f" (process {holder})" if holder.isdecimal() else ""
                    raise StartupError(IN_USE.format(self.directory, process)) from error
                time.sleep(0.05)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)

    def _ensure(self) -> None:
        """Make the directory and its lock again where somebody has deleted them. Raises OSError.

        The lock that is held is never opened again: closing any descriptor of its file would give it up.
        """
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat((self.directory / LOCK).lstat(), os.fstat(self._lock)):
                return
        try:
            lock = self._locked(0)
        except StartupError as error:
            raise OSError(errno.EBUSY, str(error)) from error
        os.close(self._lock)
        self._lock = lock
        log.warning("%s was deleted and is made again; the KV that was in it is lost.", self.directory)

    def begin(self, identity: bytes) -> list[bytes]:
        """Use the blocks of this identity, and delete those of others. Returns their keys, least recently used first.

        Raises OSError.
        """
        self._ensure()
        self._drop_identities(identity.hex())
        return self._scan(self._use(identity))

    def _drop_identities(self, kept: str = "") -> None:
        for entry in list(os.scandir(self.directory)):
            if entry.name != kept and OURS.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                self._remove(entry.name)

    def drop_all(self) -> None:
        """Delete all blocks, those of ranks too, and leave the directory to others. Raises OSError."""
        try:
            self._drop_identities()
            self.drop_ranks(0)
        finally:
            os.close(self._lock)

    def _use(self, identity: bytes) -> int:
        """Make the directory of this identity where it is missing, and open it. Raises OSError."""
        place = self.directory / identity.hex()
        place.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(place, DIRECTORY_FLAGS)
        with self._guard:
            old, self._fd, self._identity = self._fd, fd, identity
        if old >= 0:
            os.close(old)
        return fd

    def forget(self, identity: bytes) -> None:
        """Delete all blocks, those of this identity too, and use it from now on. Raises OSError."""
        if identity == self._identity:
            with contextlib.suppress(FileNotFoundError):
                self._remove(identity.hex())
        self.begin(identity)

    def drop_ranks(self, first: int) -> None:
        """Delete the blocks of ranks from this number on, which a server before had. Raises OSError."""
        for rank in list(os.scandir(self.directory)):
            found = RANK.fullmatch(rank.name)
            if found and int(found[1]) >= first and rank.is_dir(follow_symlinks=False):
                for entry in list(os.scandir(rank.path)):
                    if OURS.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                        self._remove(f"{rank.name}/{entry.name}")

    def _remove(self, name: str) -> None:
        """Delete our files in a directory of DIR, and that too where nothing else is in it."""
        fd = os.open(self.directory / name, DIRECTORY_FLAGS)
        try:
            for entry in list(os.scandir(fd)):
                if OUR_FILES.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                        os.unlink(entry.name, dir_fd=fd)
            with contextlib.suppress(OSError):
                (self.directory / name).rmdir()
        finally:
            os.close(fd)

    def _scan(self, fd: int) -> list[bytes]:
        """The keys of the files that look whole; others of ours are deleted, all else is ignored."""
        found: list[tuple[int, bytes]] = []
        cut = ignored = 0
        for entry in list(os.scandir(fd)):
            name, status = entry.name, entry.stat(follow_symlinks=False)
            if not (OUR_FILES.fullmatch(name) and stat.S_ISREG(status.st_mode)):
                ignored += 1
            elif name.endswith(UNFINISHED) or status.st_size != HEADER_BYTES + self.block_bytes:
                cut += not name.endswith(UNFINISHED)
                os.unlink(name, dir_fd=fd)
            else:
                found.append((status.st_mtime_ns, bytes.fromhex(name.removesuffix(SUFFIX))))
        if cut or ignored:
            log.warning("In %s %d files were damaged and deleted, %d ignored.", self.directory, cut, ignored)
        return [key for _, key in sorted(found)]

    def write(self, key: bytes, block: memoryview) -> None:
        """Makes the directories again where somebody has deleted them. Raises OSError; then there is no such file."""
        try:
            self._write(key, block)
        except FileNotFoundError:
            self._ensure()
            self._use(self._identity)
            self._write(key, block)

    def _write(self, key: bytes, block: memoryview) -> None:
        with self._guard:
            fd, header = os.dup(self._fd), self._header(key)
        name = key.hex()
        try:
            file = os.open(name + UNFINISHED, WRITE_FLAGS, 0o600, dir_fd=fd)
            try:
                write_all(file, header + checksum(header, block))
                write_all(file, block)
            finally:
                os.close(file)
            os.rename(name + UNFINISHED, name + SUFFIX, src_dir_fd=fd, dst_dir_fd=fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name + UNFINISHED, dir_fd=fd)
            raise
        finally:
            os.close(fd)

    def read(self, key: bytes, block: memoryview) -> bool:
        """Fill `block` from the file of a key; whether it is there and whole. It counts as used then."""
        with self._guard:
            fd, header = os.dup(self._fd), self._header(key)
        try:
            file = os.open(key.hex() + SUFFIX, READ_FLAGS, dir_fd=fd)
        except OSError:
            return False
        finally:
            os.close(fd)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or status.st_size != HEADER_BYTES + len(block):
                return False
            head = os.pread(file, HEADER_BYTES, 0)
            if head[: HEADER.size] != header or not read_all(file, block, HEADER_BYTES):
                return False
            if head[HEADER.size :] != checksum(header, block):
                return False
            with contextlib.suppress(OSError):
                os.utime(file)
            return True
        except OSError as error:
            log.warning("A file of %s cannot be read: %s", self.directory, error.strerror)
            return False
        finally:
            os.close(file)

    def delete(self, key: bytes) -> None:
        """Raises OSError where a file stays."""
        with self._guard, contextlib.suppress(FileNotFoundError):
            os.unlink(key.hex() + SUFFIX, dir_fd=self._fd)

    def _header(self, key: bytes) -> bytes:
        return HEADER.pack(MAGIC, self._identity, key, self.block_bytes)


def checksum(header: bytes, block: memoryview) -> bytes:
    """xxh3 (128 bits) of both."""
    hash = xxhash.xxh3_128(header)
    hash.update(block)
    return hash.digest()


def write_all(file: int, data: bytes | memoryview) -> None:
    """Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def read_all(file: int, into: memoryview, offset: int) -> bool:
    """Whether there was as much to read. Raises OSError."""
    done = 0
    while done < len(into):
        count = os.preadv(file, [into[done:]], offset + done)
        if not count:
            return False
        done += count
    return True
