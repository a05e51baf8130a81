// A regular file open for reading or writing, by O_DIRECT where a trial shows that it works.
#pragma once

#include <sys/stat.h>
#include <sys/types.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "aio/write_state.h"

namespace zinfer::aio {

// O_DIRECT offsets, lengths and addresses are kept to multiples of at least this many bytes.
constexpr std::uint64_t kDirectAlignment = 4096;
// A file that asks for more than this is read buffered: a bounce slot must hold one aligned block.
constexpr std::uint64_t kMaxAlignment = 1 << 20;
static_assert(kMaxAlignment % kDirectAlignment == 0);

enum class DirectMode { automatic, on, off };
enum class FileMode { read, write };

// Plain value, read while a file is opened and not kept.
struct FileOptions {
  FileMode mode = FileMode::read;
  DirectMode direct = DirectMode::automatic;
  std::uint64_t size = 0;  // bytes to reserve; a file open for writing only
};

// st_dev, st_ino, size, mtime in ns, ctime in ns.
using Identity = std::array<std::int64_t, 5>;

// What was true of the file when it was opened. Plain value, owned by its Descriptor; File keeps a copy.
struct FileFacts {
  std::string path;
  FileMode mode = FileMode::read;
  bool direct = false;
  std::string direct_reason;    // why not direct; empty when direct
  std::uint64_t alignment = 1;  // bytes; 1 when buffered
  std::uint64_t size = 0;       // bytes; what was reserved, of a file open for writing
  Identity identity{};
  std::uint64_t links = 1;  // names it has
};

// Owns one file descriptor; immutable, any thread may use it. File and the requests on it share it: it is
// closed when the last of them lets go. One open for writing is locked (flock) against a second such, and cut
// at its size when it is finished or, without a word about failures, destroyed; not by a forked child.
class Descriptor {
 public:
  // Throws DriveFailure (backend "open"): missing, not a regular file, being written, or O_DIRECT demanded and
  // refused; (backend "fallocate"): no room.
  Descriptor(const std::string& path, const FileOptions& options);
  ~Descriptor();
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  int fd() const { return fd_; }
  const FileFacts& facts() const { return facts_; }
  // Whether its contents may be others than at open: size or mtime differ, or ctime does and no link that
  // came or went (the file was deleted, replaced by a rename) accounts for it. Throws DriveFailure ("fstat").
  bool changed() const;
  // Bytes, now; the largest number when it cannot be told.
  std::uint64_t size_now() const noexcept;

  // Null when open for reading.
  const std::shared_ptr<WriteState>& writing() const { return writing_; }
  // fdatasync. Throws DriveFailure.
  void sync() const;
  // Refuses writes, waits for those in flight, cuts the file at its size, makes it durable, unlocks it. Throws
  // DriveFailure. Once, and of a file open for writing only.
  void finish() const;

 private:
  struct stat status() const;  // throws DriveFailure ("fstat")
  void create(DirectMode mode);
  void open_file(DirectMode mode);
  void remove_if_made() const noexcept;
  void start_over();
  void reserve(std::uint64_t bytes);
  void settle_direct();
  std::string try_direct_read() const;
  std::string try_direct_write() const;

  const pid_t owner_;
  int fd_ = -1;
  bool made_ = false;  // the file is new, and nobody else's yet
  FileFacts facts_;
  std::shared_ptr<WriteState> writing_;
  mutable std::atomic<bool> finished_{false};
};

// What a user holds, for as long as he likes: the Descriptor outlives it while requests need it. Any thread may
// call any method.
class File {
 public:
  File(const std::string& path, const FileOptions& options);

  const FileFacts& facts() const { return facts_; }  // valid after close() too
  // Throws ClosedFailure after close().
  std::shared_ptr<const Descriptor> share() const;
  // As Descriptor::changed(). Throws ClosedFailure after close().
  bool changed() const;
  // Bytes: at open or, of a file open for writing, so far.
  std::uint64_t size() const { return writing_ ? writing_->size() : facts_.size; }
  // What has been written is durable. Throws DriveFailure, OptionFailure when open for reading.
  void sync() const;
  // Refuses later requests; those in flight finish, and close() waits for writes. A file open for writing gets
  // its true size and is durable afterwards; throws DriveFailure if not, and is closed all the same. Idempotent.
  void close();

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const Descriptor> descriptor_;  // null once closed
  const FileFacts facts_;
  const std::shared_ptr<WriteState> writing_;  // null when open for reading
};

}  // namespace zinfer::aio
