"""A file system of Linux's FUSE that shows a folder, and lacks what those over a network or of object stores may lack.

    python -S odd_file_system.py FOLDER MOUNT LACKING [LACKING ...]

LACKING is `locks`, `flush` (of a folder, so that names last), `links` (hard ones), `folders` (to rename them), `append`
or `replace` (of a file by another's rename), with the error after a colon: `locks:ENOLCK`. It speaks the kernel's
protocol (linux/fuse.h, version 7.31) itself, in one thread, and has names and attributes kept nowhere. Needs root; ends
with the mount. Prints `ready`.
"""

import ctypes
import errno
import os
import stat
import struct
import sys
from typing import Any

ATTRIBUTES = struct.Struct("<6Q10I")
OPENED = struct.Struct("<QII")
MAX_WRITE = 1 << 17
POSIX_LOCKS, FLOCK_LOCKS, BIG_WRITES = 1 << 1, 1 << 10, 1 << 5  # locks come here instead of being the kernel's
SIZE, MODE, ATIME, MTIME = 1 << 3, 1 << 0, 1 << 4, 1 << 5  # of what SETATTR sets


class OddFileSystem:
    """Answers the kernel's requests; each node is an `O_PATH` descriptor, which renames do not disturb."""

    def __init__(self, folder: str, lacking: dict[str, int]) -> None:
        self.lacking = lacking
        self.nodes = {1: os.open(folder, os.O_PATH)}
        self.numbers: dict[tuple[int, int], int] = {}

    def require(self, what: str) -> None:
        if what in self.lacking:
            raise OSError(self.lacking[what], os.strerror(self.lacking[what]))

    def path(self, node: int) -> str:
        return f"/proc/self/fd/{self.nodes[node]}"

    def attributes(self, node: int) -> bytes:
        about = os.fstat(self.nodes[node])
        times = (about.st_atime_ns, about.st_mtime_ns, about.st_ctime_ns)
        seconds, rest = [time // 10**9 for time in times], [time % 10**9 for time in times]
        owner = (about.st_mode, about.st_nlink, about.st_uid, about.st_gid, 0, 4096, 0)
        return ATTRIBUTES.pack(about.st_ino, about.st_size, about.st_blocks, *seconds, *rest, *owner)

    def entry(self, parent: int, name: bytes) -> bytes:
        descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self.nodes[parent])
        about = os.fstat(descriptor)
        key = (about.st_dev, about.st_ino)
        node = self.numbers.get(key)
        if node is None or os.fstat(self.nodes[node]).st_nlink == 0:  # else the number may be that of a removed file
            node = self.numbers[key] = len(self.nodes) + 1
            self.nodes[node] = descriptor
        else:
            os.close(descriptor)
        return struct.pack("<4Q2I", node, 0, 0, 0, 0, 0) + self.attributes(node)

    def answer(self, operation: int, node: int, body: bytes) -> bytes | None:
        """What to say to a request; None = nothing. An `OSError` is said as its number."""
        method = OPERATIONS.get(operation)
        if method is None:
            raise OSError(errno.ENOSYS, "")
        return method(self, node, body)

    def init(self, node: int, body: bytes) -> bytes:
        flags = BIG_WRITES | POSIX_LOCKS | FLOCK_LOCKS
        return struct.pack("<4I2H2I2H", 7, 31, 1 << 17, flags, 16, 12, MAX_WRITE, 1, 32, 0).ljust(64, b"\0")

    def lookup(self, node: int, body: bytes) -> bytes:
        return self.entry(node, body[:-1])

    def getattr(self, node: int, body: bytes) -> bytes:
        return struct.pack("<QII", 0, 0, 0) + self.attributes(node)

    def setattr(self, node: int, body: bytes) -> bytes:
        valid, _, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode = struct.unpack_from("<2I6Q4I", body)
        if valid & SIZE:
            os.truncate(self.path(node), size)
        if valid & MODE:
            os.chmod(self.path(node), stat.S_IMODE(mode))
        if valid & (ATIME | MTIME):
            now = os.stat(self.path(node))
            times = [now.st_atime_ns, now.st_mtime_ns]
            for place, (bit, seconds, rest) in enumerate(((ATIME, atime, atime_ns), (MTIME, mtime, mtime_ns))):
                times[place] = seconds * 10**9 + rest if valid & bit else times[place]
            os.utime(self.path(node), ns=(times[0], times[1]))
        return self.getattr(node, body)

    def readlink(self, node: int, body: bytes) -> bytes:
        return os.readlink(b"", dir_fd=self.nodes[node])

    def symlink(self, node: int, body: bytes) -> bytes:
        name, target = body.split(b"\0")[:2]
        os.symlink(target, name, dir_fd=self.nodes[node])
        return self.entry(node, name)

    def mkdir(self, node: int, body: bytes) -> bytes:
        os.mkdir(body[8:-1], struct.unpack_from("<I", body)[0], dir_fd=self.nodes[node])
        return self.entry(node, body[8:-1])

    def unlink(self, node: int, body: bytes) -> bytes:
        os.unlink(body[:-1], dir_fd=self.nodes[node])
        return b""

    def rmdir(self, node: int, body: bytes) -> bytes:
        os.rmdir(body[:-1], dir_fd=self.nodes[node])
        return b""

    def rename(self, node: int, body: bytes, head: int = 8) -> bytes:
        target = self.nodes[struct.unpack_from("<Q", body)[0]]
        old, new = body[head:].split(b"\0")[:2]
        if stat.S_ISDIR(os.stat(old, dir_fd=self.nodes[node], follow_symlinks=False).st_mode):
            self.require("folders")
        elif os.access(new, os.F_OK, dir_fd=target):
            self.require("replace")
        os.rename(old, new, src_dir_fd=self.nodes[node], dst_dir_fd=target)
        return b""

    def rename2(self, node: int, body: bytes) -> bytes:
        return self.rename(node, body, 16)

    def link(self, node: int, body: bytes) -> bytes:
        self.require("links")
        source = self.path(struct.unpack_from("<Q", body)[0])
        os.link(source, body[8:-1], dst_dir_fd=self.nodes[node], follow_symlinks=True)
        return self.entry(node, body[8:-1])

    def open(self, node: int, body: bytes) -> bytes:
        flags = struct.unpack_from("<I", body)[0]
        if flags & os.O_APPEND:
            self.require("append")
        kept = flags & ~(os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_TRUNC)  # the kernel does these
        return OPENED.pack(os.open(self.path(node), kept), 0, 0)

    def create(self, node: int, body: bytes) -> bytes:
        flags, mode = struct.unpack_from("<2I", body)
        name = body[16:-1]
        if flags & os.O_APPEND and "append" in self.lacking:
            flags &= ~os.O_APPEND  # a new file is written as any other
        handle = os.open(name, (flags & ~os.O_APPEND) | os.O_CREAT, stat.S_IMODE(mode), dir_fd=self.nodes[node])
        return self.entry(node, name) + OPENED.pack(handle, 0, 0)

    def read(self, node: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<2QI", body)
        return os.pread(handle, size, offset)

    def write(self, node: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<2QI", body)
        return struct.pack("<II", os.pwrite(handle, body[40 : 40 + size], offset), 0)

    def statfs(self, node: int, body: bytes) -> bytes:
        about = os.statvfs(self.path(node))
        numbers = (about.f_blocks, about.f_bfree, about.f_bavail, about.f_files, about.f_ffree)
        return struct.pack("<5Q4I24x", *numbers, about.f_bsize, about.f_namemax, about.f_frsize, 0)

    def release(self, node: int, body: bytes) -> bytes:
        os.close(struct.unpack_from("<Q", body)[0])
        return b""

    def fsync(self, node: int, body: bytes) -> bytes:
        os.fsync(struct.unpack_from("<Q", body)[0])
        return b""

    def fsyncdir(self, node: int, body: bytes) -> bytes:
        self.require("flush")
        return b""

    def lock(self, node: int, body: bytes) -> bytes:
        self.require("locks")
        return b""

    def readdir(self, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<2QI", body)
        names, found = sorted(map(os.fsencode, os.listdir(self.path(node)))), b""
        for place, name in enumerate(names[offset:], offset + 1):
            padded = name.ljust(-(-len(name) // 8) * 8, b"\0")
            if len(found) + 24 + len(padded) > size:
                break
            found += struct.pack("<QQII", place, place, len(name), 0) + padded
        return found

    def opendir(self, node: int, body: bytes) -> bytes:
        return OPENED.pack(0, 0, 0)

    def nothing(self, node: int, body: bytes) -> bytes:
        return b""

    def silence(self, node: int, body: bytes) -> None:
        return None


OPERATIONS: dict[int, Any] = {
    1: OddFileSystem.lookup,
    **dict.fromkeys((2, 36, 42), OddFileSystem.silence),  # FORGET, INTERRUPT, BATCH_FORGET
    3: OddFileSystem.getattr,
    4: OddFileSystem.setattr,
    5: OddFileSystem.readlink,
    6: OddFileSystem.symlink,
    9: OddFileSystem.mkdir,
    10: OddFileSystem.unlink,
    11: OddFileSystem.rmdir,
    12: OddFileSystem.rename,
    13: OddFileSystem.link,
    14: OddFileSystem.open,
    15: OddFileSystem.read,
    16: OddFileSystem.write,
    17: OddFileSystem.statfs,
    18: OddFileSystem.release,
    20: OddFileSystem.fsync,
    **dict.fromkeys((25, 29, 38), OddFileSystem.nothing),  # FLUSH, RELEASEDIR, DESTROY
    26: OddFileSystem.init,
    27: OddFileSystem.opendir,
    28: OddFileSystem.readdir,
    30: OddFileSystem.fsyncdir,
    **dict.fromkeys((31, 32, 33), OddFileSystem.lock),
    35: OddFileSystem.create,
    45: OddFileSystem.rename2,
}


def main(folder: str, mount: str, *lacking: str) -> None:
    """Mount, and serve until the mount is gone."""
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},default_permissions"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"odd", os.fsencode(mount), b"fuse", 0, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), mount)
    print("ready", flush=True)  # noqa: T201 (what the test waits for)
    pairs = (word.partition(":") for word in lacking)
    system = OddFileSystem(folder, {what: getattr(errno, name or "EOPNOTSUPP") for what, _, name in pairs})
    while True:
        try:
            request = os.read(device, MAX_WRITE + 4096)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # of a request that was taken back
                continue
            return  # ENODEV: it is unmounted
        _, operation, unique, node = struct.unpack_from("<IIQQ", request)
        number, said = 0, b""
        try:
            answer = system.answer(operation, node, request[40:])
            if answer is None:
                continue
            said = answer
        except OSError as error:
            number = -(error.errno or errno.EIO)
        try:
            os.write(device, struct.pack("<IiQ", 16 + len(said), number, unique) + said)
        except FileNotFoundError:  # who asked was killed
            continue


if __name__ == "__main__":
    main(*sys.argv[1:])
