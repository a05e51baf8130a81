#include "aio/errors.h"

#include <cerrno>
#include <system_error>

namespace zinfer::aio {

namespace {

const char* remedy(int error, bool direct) {
  switch (error) {
    case EINVAL:
      return direct ? "the file system refused an aligned O_DIRECT read: open the file with direct=\"off\""
                    : "the file system refused the read: copy the file to a local drive";
    case EIO:
      return "the drive reported a fault: look at `dmesg` and `smartctl -a`, then restore the file";
    case EFAULT:
      return "the destination is not writable memory: check the address and its length";
    case ENOMEM:
    case EAGAIN:
      return "the kernel has no memory for the read: lower depth or block_bytes, or free memory";
    case ECANCELED:
      return "submit the read again if the bytes are still wanted";
    case ESTALE:
    case ENODEV:
      return "the drive or share has gone: mount it again and reopen the file";
    default:
      return "check that the drive is mounted and the file is readable";
  }
}

std::string range(std::uint64_t offset, std::uint64_t length) {
  return std::to_string(length) + " bytes at offset " + std::to_string(offset);
}

}  // namespace

std::string describe_errno(int error) { return std::generic_category().message(error); }

DriveFailure read_failure(const std::string& path, std::uint64_t offset, std::uint64_t length, int error,
                          const std::string& backend, bool direct) {
  return DriveFailure(path + ": reading " + range(offset, length) + " failed: " + describe_errno(error) +
                          " (errno " + std::to_string(error) + ", backend " + backend +
                          (direct ? ", O_DIRECT" : ", buffered") + "); " + remedy(error, direct),
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
