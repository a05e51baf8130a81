"""One open file: O_DIRECT where a trial shows that it works, locked, reserved and cut where it is written."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from typing import Literal, NoReturn

from zinfer.aio.portable.memory import AlignedBlock, view_at
from zinfer.aio.portable.write_state import WriteState
from zinfer.aio.remedy import descriptor_remedy
from zinfer.errors import DriveError

DIRECT_ALIGNMENT = 4096  # O_DIRECT offsets, lengths and addresses are kept to multiples of at least this
MAX_ALIGNMENT = 1 << 20  # a file that asks for more is read buffered: a bounce slot must hold one block
STATX_DIOALIGN = 0x2000  # Linux 6.1+
AT_EMPTY_PATH = 0x1000
PERMISSIONS = 0o666  # less the umask

_libc = ctypes.CDLL(None, use_errno=True)

Mode = Literal["r", "w"]
Direct = Literal["auto", "on", "off"]
Identity = tuple[int, int, int, int, int]


class Descriptor:
    """Owns one file descriptor; any thread may use it. File and the requests on it share it.

    It is closed with the last of them. One open for writing is locked (flock) against a second such, and cut at its
    size when it is finished or, without a word about failures, dropped; not by a forked child.

    Raises DriveError (backend "open"): missing, not a regular file, being written, or O_DIRECT demanded and
    refused; (backend "fallocate"): no room.
    """

    def __init__(self, path: str, mode: Mode, size: int, direct: Direct) -> None:
        self.path = path
        self.mode = mode
        self.direct = False
        self.direct_reason = ""  # why not direct
        self.alignment = 1
        self.size = size  # bytes at open; what was reserved, of a file open for writing
        self.writing: WriteState | None = None
        self.fd = -1
        self._owner = os.getpid()
        self._finished = False
        self._made = False  # the file is new, and nobody else's yet
        existed = self._look()
        try:
            if mode == "w" and not existed:
                self._create(direct)
            if self.fd < 0:
                self._open(direct)
            self._settle(direct)
        except BaseException:
            if self._made:
                self._remove()
            if (
                self.fd >= 0
            ):  # now: the error's traceback holds this object, for as long as anybody holds the error
                os.close(self.fd)
                self.fd = -1
            raise
        if mode == "w":
            self.writing = WriteState(size)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) < 0:
            return
        if self.writing is not None and not self._finished and os.getpid() == self._owner:
            with contextlib.suppress(OSError):  # finish() would have told
                if self.size_now() != self.writing.size:
                    os.ftruncate(self.fd, self.writing.size)
        os.close(self.fd)

    def changed(self) -> bool:
        """Whether its contents may be others than at open: see `File.changed`. Raises DriveError ("fstat")."""
        now = self._status()
        current = _identity_of(now)
        if current[:-1] != self.identity[:-1]:
            return True
        return current[-1] != self.identity[-1] and now.st_nlink == self._links

    def size_now(self) -> int:
        """Bytes, now; a huge number when it cannot be told."""
        try:
            return os.fstat(self.fd).st_size
        except OSError:
            return 2**63 - 1

    def sync(self) -> None:
        """Raises DriveError if fdatasync fails."""
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            length = self.writing.size if self.writing else self.size
            raise self._failed(
                "fdatasync", error, "failed", "what was written may be lost: write the file again", length
            ) from error

    def finish(self) -> None:
        """Refuse writes, wait for those in flight, cut the file at its size, make it durable, unlock it; once.

        Raises DriveError. Does nothing in a forked child, whose parent's requests do not end there.
        """
        if self.writing is None or os.getpid() != self._owner:
            return
        self.writing.refuse_and_wait()
        self._finished = True
        size, call = self.writing.size, "ftruncate"
        try:
            if self.size_now() != size:
                os.ftruncate(self.fd, size)
            call = "fsync"
            os.fsync(self.fd)
        except OSError as error:
            remedy = "the file may be damaged: write it again"
            raise self._failed(call, error, "at close failed", remedy, size) from error
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(self.fd, fcntl.LOCK_UN)  # a forked child may have the descriptor for longer

    # ---- opening ----------------------------------------------------------------------------------------

    def _look(self) -> bool:
        """Whether it exists. Looked at first: opening a device or a FIFO may have effects of its own."""
        try:
            self._refuse_unless_regular(os.stat(self.path).st_mode)
        except OSError as error:
            if isinstance(error, DriveError):
                raise
            if self.mode == "w" and error.errno == errno.ENOENT:
                return False
            self._cannot_open(error, "check the path and its permissions")
        return True

    def _create(self, direct: Direct) -> None:
        """Make the file, if nobody else has since it was found missing: only then is it ours to remove on a failure.

        Any other outcome leaves `fd` at -1, and `_open` finds out what is there. O_DIRECT is set afterwards, for an
        open that is refused it may have made the file all the same.
        """
        flags = os.O_CLOEXEC | os.O_NONBLOCK | os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            self.fd = os.open(self.path, flags, PERMISSIONS)
        except OSError:
            return
        self._made = True
        if direct == "off":
            self.direct_reason = 'direct="off"'
            return
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) | os.O_DIRECT)
            self.direct = True
        except OSError as error:
            self.direct_reason = f"O_DIRECT open: {error.strerror}"

    def _remove(self) -> None:
        """Made for nothing; unless another file has the name by now."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.fd), os.lstat(self.path)):
                os.unlink(self.path)

    def _open(self, direct: Direct) -> None:
        # O_NONBLOCK: a FIFO cannot hang the open.
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDWR | os.O_CREAT if self.mode == "w" else os.O_RDONLY)
        if direct == "off":
            self.direct_reason = 'direct="off"'
        else:
            try:
                self.fd = os.open(self.path, flags | os.O_DIRECT, PERMISSIONS)
                self.direct = True
            except OSError as error:
                self.direct_reason = f"O_DIRECT open: {error.strerror}"
        if self.fd < 0:
            try:
                self.fd = os.open(self.path, flags, PERMISSIONS)
            except OSError as error:
                self._cannot_open(error, "check the path and its permissions")

    def _settle(self, direct: Direct) -> None:
        status = self._status()
        self._refuse_unless_regular(status.st_mode)
        self._links = status.st_nlink
        if self.mode == "w":
            self._start_over()
        else:
            self.size = status.st_size
        if self.direct:
            self._settle_direct()
        if direct == "on" and not self.direct:
            refusal = OSError(errno.EINVAL, self.direct_reason)
            self._cannot_open(refusal, 'use direct="auto" to fall back to the page cache')
        if self.mode == "w" and self.size:
            self._reserve(self.size)
        self.identity = _identity_of(self._status())

    def _start_over(self) -> None:
        """Locked before it is emptied: two that write one file would undo each other's blocks."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._made = False  # another was quicker to lock what we made: it is his
            taken = OSError(errno.EWOULDBLOCK, "it is being written already")
            self._cannot_open(taken, "close the File that writes it first")
        except OSError:
            pass  # a file system without locks: nothing to wait for there
        try:
            os.ftruncate(self.fd, 0)
        except OSError as error:
            self._cannot_open(error, "check the path and its permissions")

    def _settle_direct(self) -> None:
        """Keep O_DIRECT only if a real transfer by it works; otherwise turn it off on the same descriptor.

        So the file that was examined is the file that is read.
        """
        self.alignment = max(DIRECT_ALIGNMENT, _kernel_alignment(self.fd))
        if self.alignment & (self.alignment - 1) or self.alignment > MAX_ALIGNMENT:
            self.direct_reason = f"O_DIRECT alignment of {self.alignment} bytes is not supported"
        elif self.mode == "w":
            self.direct_reason = self._try_direct_write()
        else:
            self.direct_reason = self._try_direct_read()
        if not self.direct_reason:
            return
        self.direct, self.alignment = False, 1
        try:
            flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
            fcntl.fcntl(self.fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        except OSError as error:
            self._cannot_open(error, 'use direct="off"')

    def _try_direct_read(self) -> str:
        try:
            block = AlignedBlock(self.alignment)
            got = os.preadv(self.fd, [view_at(block.address, self.alignment)], 0)
        except OSError as error:
            return f"O_DIRECT read: {error.strerror}"
        if got < min(self.size, self.alignment):
            return f"O_DIRECT read: gave {got} bytes of the first block"
        return ""

    def _try_direct_write(self) -> str:
        """The file is empty, and is so again afterwards."""
        reason = ""
        try:
            block = AlignedBlock(self.alignment)
            put = os.pwritev(self.fd, [view_at(block.address, self.alignment)], 0)
            if put < self.alignment:
                reason = f"O_DIRECT write: took {put} bytes of a block"
        except OSError as error:
            # A full drive says nothing against O_DIRECT; _reserve() or the first write tells of it.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                reason = f"O_DIRECT write: {error.strerror}"
        try:
            os.ftruncate(self.fd, 0)
        except OSError as error:
            self._cannot_open(error, "check the drive")
        return reason

    def _reserve(self, length: int) -> None:
        code = _fallocate(self.fd, length)
        if code == 0:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self.fd, 0)  # gives back what was had
        place = os.fstatvfs(self.fd)
        free = place.f_bavail * place.f_frsize
        if code == errno.EOPNOTSUPP:  # no reservations here: then at least see that there is room
            if free < length:
                code = errno.ENOSPC
            else:
                try:
                    return os.ftruncate(self.fd, length)
                except OSError as error:
                    code = error.errno or errno.EIO
        remedy = "choose another folder or a smaller size"
        if free < length:
            remedy = f"free {length - free} more, or choose another folder"
        raise DriveError(
            f"{self.path}: cannot reserve {length} bytes: {os.strerror(code)} (errno {code}, backend fallocate); "
            f"{free} bytes are free: {remedy}",
            self.path, 0, length, code, "fallocate",
        )  # fmt: skip

    # ---- failures ---------------------------------------------------------------------------------------

    def _status(self) -> os.stat_result:
        try:
            return os.fstat(self.fd)
        except OSError as error:
            raise self._failed("fstat", error, "failed", "check the drive", 0) from error

    def _refuse_unless_regular(self, mode: int) -> None:
        if stat.S_ISREG(mode):
            return
        kind = "it is a device or socket"
        if stat.S_ISDIR(mode):
            kind = "it is a folder"
        elif stat.S_ISFIFO(mode):
            kind = "it is a FIFO"
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        self._cannot_open(OSError(code, kind), "give the path of a regular file")

    def _cannot_open(self, error: OSError, remedy: str) -> NoReturn:
        purpose = "writing" if self.mode == "w" else "reading"
        what_to_do = descriptor_remedy(error.errno) or f"; {remedy}"
        message = f"{self.path}: cannot open for {purpose}: {error.strerror}{what_to_do}"
        raise DriveError(message, self.path, 0, 0, error.errno or 0, "open")

    def _failed(self, call: str, error: OSError, how: str, remedy: str, length: int) -> DriveError:
        message = f"{self.path}: {call} {how}: {error.strerror} (errno {error.errno}); {remedy}"
        return DriveError(message, self.path, 0, length, error.errno or 0, call)


def _identity_of(facts: os.stat_result) -> Identity:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def _kernel_alignment(fd: int) -> int:
    """Bytes, by statx; 0 where the kernel does not tell. Offsets into its structure are the kernel's for good."""
    statx = getattr(_libc, "statx", None)
    answer = ctypes.create_string_buffer(256)
    if statx is None or statx(fd, b"", AT_EMPTY_PATH, STATX_DIOALIGN, answer) != 0:
        return 0
    mask, memory, offset = (int.from_bytes(answer.raw[at : at + 4], "little") for at in (0, 152, 156))
    return max(memory, offset) if mask & STATX_DIOALIGN else 0


def _fallocate(fd: int, length: int) -> int:
    """0 or an errno value. Not os.posix_fallocate, which writes every block where there are no reservations."""
    _libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while _libc.fallocate(fd, 0, 0, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            return code
    return 0
