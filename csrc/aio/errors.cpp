#include "aio/errors.h"

#include <cerrno>
#include <system_error>

namespace zinfer::aio {

namespace {

std::string remedy(bool writing, int error, bool direct) {
  const std::string what = writing ? "write" : "read";
  switch (error) {
    case EINVAL:
      return direct ? "the file system refused an aligned O_DIRECT " + what + ": open the file with direct=\"off\""
                    : "the file system refused the " + what + ": use a local drive";
    case EIO:
      return std::string("the drive reported a fault: look at `dmesg` and `smartctl -a`, then ") +
             (writing ? "write the file again, on another drive" : "restore the file");
    case EFAULT:
      return writing ? "the source is not readable memory: check the address and its length"
                     : "the destination is not writable memory: check the address and its length";
    case ENOMEM:
    case EAGAIN:
      return "the kernel has no memory for the " + what + ": lower depth or block_bytes, or free memory";
    case ECANCELED:
      return "submit the " + what + " again if the bytes are still wanted";
    case EPERM:
    case ENOSYS:
      return "the kernel, or a container's seccomp profile, refuses such calls: use backend=\"threads\"";
    case ENOSPC:
    case EDQUOT:
      return "the drive, or its quota, is full: free space or choose another folder, then write the file again";
    case EFBIG:
      return "files may not be that long here: look at `ulimit -f` and the file system's limit";
    case ESTALE:
    case ENODEV:
      return "the drive or share has gone: mount it again and reopen the file";
    default:
      return std::string("check that the drive is mounted and the file is ") + (writing ? "writable" : "readable");
  }
}

std::string range(std::uint64_t offset, std::uint64_t length) {
  return std::to_string(length) + " bytes at offset " + std::to_string(offset);
}

}  // namespace

std::string describe_errno(int error) { return std::generic_category().message(error); }

std::string descriptor_remedy(int error) {
  if (error == EMFILE) return "; raise `ulimit -n`, or close files and engines";
  if (error == ENFILE) return "; raise `sysctl fs.file-max`, or close other programs";
  return "";
}

DriveFailure transfer_failure(bool writing, const std::string& path, std::uint64_t offset, std::uint64_t length,
                              int error, const std::string& backend, bool direct) {
  return DriveFailure(path + (writing ? ": writing " : ": reading ") + range(offset, length) + " failed: " +
                          describe_errno(error) + " (errno " + std::to_string(error) + ", backend " + backend +
                          (direct ? ", O_DIRECT" : ", buffered") + "); " + remedy(writing, error, direct),
                      path, offset, length, error, backend);
}

DriveFailure ended_early(const std::string& path, std::uint64_t offset, std::uint64_t length,
                         std::uint64_t ended_at, const std::string& backend) {
  return DriveFailure(path + ": reading " + range(offset, length) + " failed: file ended early at " +
                          std::to_string(ended_at) + " (backend " + backend +
                          "); it was truncated while open: restore the file and reopen it",
                      path, offset, length, 0, backend);
}

}  // namespace zinfer::aio
