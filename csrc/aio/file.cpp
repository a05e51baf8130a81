#include "aio/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "aio/errors.h"

namespace zinfer::aio {

namespace {

[[noreturn]] void throw_open(const std::string& path, int error, const std::string& cause,
                             const std::string& remedy) {
  throw DriveFailure(path + ": cannot open for reading: " + cause + "; " + remedy, path, 0, 0, error, "open");
}

std::int64_t nanoseconds(const timespec& time) { return time.tv_sec * 1000000000LL + time.tv_nsec; }

Identity identity_of(const struct stat& facts) {
  return {static_cast<std::int64_t>(facts.st_dev), static_cast<std::int64_t>(facts.st_ino),
          static_cast<std::int64_t>(facts.st_size), nanoseconds(facts.st_mtim), nanoseconds(facts.st_ctim)};
}

void refuse_unless_regular(const std::string& path, mode_t mode) {
  if (S_ISREG(mode)) return;
  const char* kind = S_ISDIR(mode) ? "it is a folder" : S_ISFIFO(mode) ? "it is a FIFO" : "it is a device or socket";
  throw_open(path, S_ISDIR(mode) ? EISDIR : EINVAL, kind, "give the path of a regular file");
}

// The kernel's own alignment (Linux 6.1+), by a raw call: libc's struct statx may be older than the kernel's.
std::uint64_t kernel_alignment(int fd) {
#ifdef SYS_statx
  constexpr std::uint32_t kDioAlign = 0x2000;  // STATX_DIOALIGN
  constexpr std::size_t kMemAlignAt = 152, kOffsetAlignAt = 156;
  unsigned char answer[256] = {};
  if (::syscall(SYS_statx, fd, "", AT_EMPTY_PATH, kDioAlign, answer) != 0) return 0;
  std::uint32_t mask = 0, memory = 0, offset = 0;
  std::memcpy(&mask, answer, sizeof mask);
  std::memcpy(&memory, answer + kMemAlignAt, sizeof memory);
  std::memcpy(&offset, answer + kOffsetAlignAt, sizeof offset);
  return (mask & kDioAlign) ? std::max(memory, offset) : 0;
#else
  (void)fd;
  return 0;
#endif
}

}  // namespace

Descriptor::Descriptor(const std::string& path, DirectMode mode) {
  facts_.path = path;
  // stat first: opening a device or a FIFO may have effects of its own.
  struct stat before {};
  if (::stat(path.c_str(), &before) != 0)
    throw_open(path, errno, describe_errno(errno), "check the path and its permissions");
  refuse_unless_regular(path, before.st_mode);
  try {
    open_file(mode);
    struct stat now {};
    if (::fstat(fd_, &now) != 0) throw_open(path, errno, describe_errno(errno), "check the drive");
    refuse_unless_regular(path, now.st_mode);
    facts_.size = static_cast<std::uint64_t>(now.st_size);
    facts_.identity = identity_of(now);
    facts_.links = now.st_nlink;
    if (facts_.direct) settle_direct();
    if (mode == DirectMode::on && !facts_.direct)
      throw_open(path, EINVAL, facts_.direct_reason, "use direct=\"auto\" to fall back to buffered reads");
  } catch (...) {
    if (fd_ >= 0) ::close(fd_);
    throw;
  }
}

Descriptor::~Descriptor() { ::close(fd_); }

void Descriptor::open_file(DirectMode mode) {
  constexpr int kFlags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;  // O_NONBLOCK: a FIFO cannot hang the open
  if (mode == DirectMode::off) {
    facts_.direct_reason = "direct=\"off\"";
  } else {
    fd_ = ::open(facts_.path.c_str(), kFlags | O_DIRECT);
    facts_.direct = fd_ >= 0;
    if (fd_ < 0) facts_.direct_reason = "O_DIRECT open: " + describe_errno(errno);
  }
  if (fd_ < 0) fd_ = ::open(facts_.path.c_str(), kFlags);
  if (fd_ < 0) throw_open(facts_.path, errno, describe_errno(errno), "check the path and its permissions");
}

// Keeps O_DIRECT only if a real read by it works; otherwise turns it off on the same descriptor, so the
// file that was examined is the file that is read.
void Descriptor::settle_direct() {
  facts_.alignment = std::max(kDirectAlignment, kernel_alignment(fd_));
  const bool power_of_two = (facts_.alignment & (facts_.alignment - 1)) == 0;
  if (!power_of_two || facts_.alignment > kMaxAlignment)
    facts_.direct_reason = "O_DIRECT alignment of " + std::to_string(facts_.alignment) + " bytes is not supported";
  else
    facts_.direct_reason = try_direct_read();
  if (facts_.direct_reason.empty()) return;
  facts_.direct = false;
  facts_.alignment = 1;
  const int flags = ::fcntl(fd_, F_GETFL);
  if (flags < 0 || ::fcntl(fd_, F_SETFL, flags & ~O_DIRECT) != 0)
    throw_open(facts_.path, errno, describe_errno(errno), "use direct=\"off\"");
}

std::string Descriptor::try_direct_read() const {
  void* block = nullptr;
  if (::posix_memalign(&block, facts_.alignment, facts_.alignment) != 0) return "O_DIRECT read: no memory for a trial";
  ssize_t got = -1;
  do {
    got = ::pread(fd_, block, facts_.alignment, 0);
  } while (got < 0 && errno == EINTR);
  const int error = errno;
  std::free(block);
  if (got < 0) return "O_DIRECT read: " + describe_errno(error);
  if (static_cast<std::uint64_t>(got) < std::min(facts_.size, facts_.alignment))
    return "O_DIRECT read: gave " + std::to_string(got) + " bytes of the first block";
  return "";
}

bool Descriptor::changed() const {
  struct stat now {};
  if (::fstat(fd_, &now) != 0)
    throw DriveFailure(facts_.path + ": fstat failed: " + describe_errno(errno) + "; check the drive", facts_.path, 0,
                       0, errno, "fstat");
  const Identity& then = facts_.identity;
  const Identity current = identity_of(now);
  static_assert(std::tuple_size<Identity>::value == 5);  // ctime is the last
  if (!std::equal(then.begin(), then.end() - 1, current.begin())) return true;
  return current.back() != then.back() && now.st_nlink == facts_.links;
}

std::uint64_t Descriptor::size_now() const noexcept {
  struct stat now {};
  return ::fstat(fd_, &now) == 0 ? static_cast<std::uint64_t>(now.st_size) : ~std::uint64_t{0};
}

File::File(const std::string& path, DirectMode mode)
    : descriptor_(std::make_shared<const Descriptor>(path, mode)), facts_(descriptor_->facts()) {}

std::shared_ptr<const Descriptor> File::share() const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!descriptor_) throw ClosedFailure(facts_.path + ": the file was closed; open it again to read it");
  return descriptor_;
}

bool File::changed() const { return share()->changed(); }

void File::close() {
  std::shared_ptr<const Descriptor> last;  // the descriptor is closed outside the lock
  std::lock_guard<std::mutex> lock(mutex_);
  last.swap(descriptor_);
}

}  // namespace zinfer::aio
