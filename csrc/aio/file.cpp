#include "aio/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "aio/errors.h"

namespace zinfer::aio {

namespace {

constexpr mode_t kPermissions = 0666;  // less the umask

[[noreturn]] void throw_open(const FileFacts& file, int error, const std::string& cause,
                             const std::string& remedy) {
  const char* purpose = file.mode == FileMode::write ? "writing" : "reading";
  const std::string no_descriptor = descriptor_remedy(error);
  throw DriveFailure(file.path + ": cannot open for " + purpose + ": " + cause +
                         (no_descriptor.empty() ? "; " + remedy : no_descriptor),
                     file.path, 0, 0, error, "open");
}

std::int64_t nanoseconds(const timespec& time) { return time.tv_sec * 1000000000LL + time.tv_nsec; }

Identity identity_of(const struct stat& facts) {
  return {static_cast<std::int64_t>(facts.st_dev), static_cast<std::int64_t>(facts.st_ino),
          static_cast<std::int64_t>(facts.st_size), nanoseconds(facts.st_mtim), nanoseconds(facts.st_ctim)};
}

void refuse_unless_regular(const FileFacts& file, mode_t mode) {
  if (S_ISREG(mode)) return;
  const char* kind = S_ISDIR(mode) ? "it is a folder" : S_ISFIFO(mode) ? "it is a FIFO" : "it is a device or socket";
  throw_open(file, S_ISDIR(mode) ? EISDIR : EINVAL, kind, "give the path of a regular file");
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

Descriptor::Descriptor(const std::string& path, const FileOptions& options) : owner_(::getpid()) {
  facts_.path = path;
  facts_.mode = options.mode;
  const bool writing = options.mode == FileMode::write;
  // stat first: opening a device or a FIFO may have effects of its own.
  struct stat before {};
  const bool exists = ::stat(path.c_str(), &before) == 0;
  if (!exists && !(writing && errno == ENOENT))
    throw_open(facts_, errno, describe_errno(errno), "check the path and its permissions");
  if (exists) refuse_unless_regular(facts_, before.st_mode);
  try {
    if (writing && !exists) create(options.direct);
    if (fd_ < 0) open_file(options.direct);
    struct stat now {};
    if (::fstat(fd_, &now) != 0) throw_open(facts_, errno, describe_errno(errno), "check the drive");
    refuse_unless_regular(facts_, now.st_mode);
    facts_.size = writing ? options.size : static_cast<std::uint64_t>(now.st_size);
    facts_.links = now.st_nlink;
    if (writing) start_over();
    if (facts_.direct) settle_direct();
    if (options.direct == DirectMode::on && !facts_.direct)
      throw_open(facts_, EINVAL, facts_.direct_reason, "use direct=\"auto\" to fall back to the page cache");
    if (writing) reserve(options.size);
    facts_.identity = identity_of(status());
  } catch (...) {
    remove_if_made();
    if (fd_ >= 0) ::close(fd_);
    throw;
  }
  if (writing) writing_ = std::make_shared<WriteState>(options.size);
}

Descriptor::~Descriptor() {
  if (writing_ && !finished_ && ::getpid() == owner_ && size_now() != writing_->size())
    if (::ftruncate(fd_, static_cast<off_t>(writing_->size())) != 0) finished_ = true;  // finish() would have told
  ::close(fd_);
}

// Makes the file, if nobody else has since it was found missing: only then is it ours to remove on a failure. Any
// other outcome leaves fd_ at -1, and open_file() finds out what is there. O_DIRECT is set afterwards, for an open
// that is refused it may have made the file all the same.
void Descriptor::create(DirectMode mode) {
  fd_ = ::open(facts_.path.c_str(), O_CLOEXEC | O_NONBLOCK | O_RDWR | O_CREAT | O_EXCL, kPermissions);
  if (fd_ < 0) return;
  made_ = true;
  if (mode == DirectMode::off) {
    facts_.direct_reason = "direct=\"off\"";
    return;
  }
  const int flags = ::fcntl(fd_, F_GETFL);
  facts_.direct = flags >= 0 && ::fcntl(fd_, F_SETFL, flags | O_DIRECT) == 0;
  if (!facts_.direct) facts_.direct_reason = "O_DIRECT open: " + describe_errno(errno);
}

// Made for nothing; unless another file has the name by now.
void Descriptor::remove_if_made() const noexcept {
  struct stat ours {}, named {};
  if (!made_ || ::fstat(fd_, &ours) != 0 || ::lstat(facts_.path.c_str(), &named) != 0) return;
  if (ours.st_dev == named.st_dev && ours.st_ino == named.st_ino) ::unlink(facts_.path.c_str());
}

void Descriptor::open_file(DirectMode mode) {
  // O_NONBLOCK: a FIFO cannot hang the open.
  const int flags = O_CLOEXEC | O_NONBLOCK | (facts_.mode == FileMode::write ? O_RDWR | O_CREAT : O_RDONLY);
  if (mode == DirectMode::off) {
    facts_.direct_reason = "direct=\"off\"";
  } else {
    fd_ = ::open(facts_.path.c_str(), flags | O_DIRECT, kPermissions);
    facts_.direct = fd_ >= 0;
    if (fd_ < 0) facts_.direct_reason = "O_DIRECT open: " + describe_errno(errno);
  }
  if (fd_ < 0) fd_ = ::open(facts_.path.c_str(), flags, kPermissions);
  if (fd_ < 0) throw_open(facts_, errno, describe_errno(errno), "check the path and its permissions");
}

// Locked before it is emptied: two that write one file would undo each other's blocks.
void Descriptor::start_over() {
  if (::flock(fd_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    made_ = false;  // another was quicker to lock what we made: it is his
    throw_open(facts_, EWOULDBLOCK, "it is being written already", "close the File that writes it first");
  }
  if (::ftruncate(fd_, 0) != 0) throw_open(facts_, errno, describe_errno(errno), "check the path and its permissions");
}

void Descriptor::reserve(std::uint64_t bytes) {
  if (bytes == 0) return;
  const auto length = static_cast<off_t>(bytes);
  int error = 0;
  do {
    error = ::fallocate(fd_, 0, 0, length) == 0 ? 0 : errno;
  } while (error == EINTR);
  if (error == 0) return;
  if (::ftruncate(fd_, 0) != 0) error = errno;  // gives back what was had
  struct statvfs place {};
  const bool known = ::fstatvfs(fd_, &place) == 0;
  const std::uint64_t free = known ? std::uint64_t{place.f_bavail} * place.f_frsize : 0;
  if (error == EOPNOTSUPP) {  // no reservations here: then at least see that there is room
    if (known && free >= bytes && ::ftruncate(fd_, length) == 0) return;
    error = known && free < bytes ? ENOSPC : errno;
  }
  throw DriveFailure(facts_.path + ": cannot reserve " + std::to_string(bytes) + " bytes: " + describe_errno(error) +
                         " (errno " + std::to_string(error) + ", backend fallocate); " + std::to_string(free) +
                         " bytes are free: " +
                         (free < bytes ? "free " + std::to_string(bytes - free) + " more, or choose another folder"
                                       : "choose another folder or a smaller size"),
                     facts_.path, 0, bytes, error, "fallocate");
}

// Keeps O_DIRECT only if a real read, or write, by it works; otherwise turns it off on the same descriptor, so the
// file that was examined is the file that is read.
void Descriptor::settle_direct() {
  facts_.alignment = std::max(kDirectAlignment, kernel_alignment(fd_));
  const bool power_of_two = (facts_.alignment & (facts_.alignment - 1)) == 0;
  if (!power_of_two || facts_.alignment > kMaxAlignment)
    facts_.direct_reason = "O_DIRECT alignment of " + std::to_string(facts_.alignment) + " bytes is not supported";
  else
    facts_.direct_reason = facts_.mode == FileMode::write ? try_direct_write() : try_direct_read();
  if (facts_.direct_reason.empty()) return;
  facts_.direct = false;
  facts_.alignment = 1;
  const int flags = ::fcntl(fd_, F_GETFL);
  if (flags < 0 || ::fcntl(fd_, F_SETFL, flags & ~O_DIRECT) != 0)
    throw_open(facts_, errno, describe_errno(errno), "use direct=\"off\"");
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

// The file is empty, and is so again afterwards.
std::string Descriptor::try_direct_write() const {
  void* block = nullptr;
  if (::posix_memalign(&block, facts_.alignment, facts_.alignment) != 0) return "O_DIRECT write: no memory for a trial";
  std::memset(block, 0, facts_.alignment);
  ssize_t put = -1;
  do {
    put = ::pwrite(fd_, block, facts_.alignment, 0);
  } while (put < 0 && errno == EINTR);
  const int error = errno;
  std::free(block);
  if (::ftruncate(fd_, 0) != 0) throw_open(facts_, errno, describe_errno(errno), "check the drive");
  // A full drive says nothing against O_DIRECT; reserve() or the first write tells of it.
  if (put < 0 && error != ENOSPC && error != EDQUOT) return "O_DIRECT write: " + describe_errno(error);
  if (put >= 0 && static_cast<std::uint64_t>(put) < facts_.alignment)
    return "O_DIRECT write: took " + std::to_string(put) + " bytes of a block";
  return "";
}

void Descriptor::sync() const {
  if (::fdatasync(fd_) == 0) return;
  const int error = errno;
  throw DriveFailure(facts_.path + ": fdatasync failed: " + describe_errno(error) + " (errno " +
                         std::to_string(error) + "); what was written may be lost: write the file again",
                     facts_.path, 0, writing_ ? writing_->size() : facts_.size, error, "fdatasync");
}

void Descriptor::finish() const {
  if (::getpid() != owner_) return;  // the parent's file: its requests do not end here
  writing_->refuse_and_wait();
  finished_ = true;
  const std::uint64_t size = writing_->size();
  const char* call = "ftruncate";
  int error = size_now() == size || ::ftruncate(fd_, static_cast<off_t>(size)) == 0 ? 0 : errno;
  if (error == 0) {
    call = "fsync";
    error = ::fsync(fd_) == 0 ? 0 : errno;
  }
  ::flock(fd_, LOCK_UN);  // a forked child may have the descriptor for longer
  if (error == 0) return;
  throw DriveFailure(facts_.path + ": " + call + " at close failed: " + describe_errno(error) + " (errno " +
                         std::to_string(error) + "); the file may be damaged: write it again",
                     facts_.path, 0, size, error, call);
}

struct stat Descriptor::status() const {
  struct stat now {};
  if (::fstat(fd_, &now) != 0)
    throw DriveFailure(facts_.path + ": fstat failed: " + describe_errno(errno) + "; check the drive", facts_.path, 0,
                       0, errno, "fstat");
  return now;
}

bool Descriptor::changed() const {
  const struct stat now = status();
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

File::File(const std::string& path, const FileOptions& options)
    : descriptor_(std::make_shared<const Descriptor>(path, options)),
      facts_(descriptor_->facts()),
      writing_(descriptor_->writing()) {}

std::shared_ptr<const Descriptor> File::share() const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!descriptor_) throw ClosedFailure(facts_.path + ": the file was closed; open it again to use it");
  return descriptor_;
}

bool File::changed() const { return share()->changed(); }

void File::sync() const {
  if (!writing_) throw OptionFailure(facts_.path + " is open for reading: there is nothing to sync");
  share()->sync();
}

void File::close() {
  std::shared_ptr<const Descriptor> last;  // the descriptor is closed outside the lock
  {
    std::lock_guard<std::mutex> lock(mutex_);
    last.swap(descriptor_);
  }
  if (last && writing_) last->finish();
}

}  // namespace zinfer::aio
