// A regular file open for reading, by O_DIRECT where a trial read shows that it works.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

namespace zinfer::aio {

// O_DIRECT offsets, lengths and addresses are kept to multiples of at least this many bytes.
constexpr std::uint64_t kDirectAlignment = 4096;
// A file that asks for more than this is read buffered: a bounce slot must hold one aligned block.
constexpr std::uint64_t kMaxAlignment = 1 << 20;
static_assert(kMaxAlignment % kDirectAlignment == 0);

enum class DirectMode { automatic, on, off };

// st_dev, st_ino, size, mtime in ns, ctime in ns.
using Identity = std::array<std::int64_t, 5>;

// What was true of the file when it was opened.
struct FileFacts {
  std::string path;
  bool direct = false;
  std::string direct_reason;    // why not direct; empty when direct
  std::uint64_t alignment = 1;  // bytes; 1 when buffered
  std::uint64_t size = 0;       // bytes
  Identity identity{};
  std::uint64_t links = 1;  // names it has
};

// Owns one file descriptor; immutable, any thread may use it. File and the requests that read from it
// share it: it is closed when the last of them lets go.
class Descriptor {
 public:
  // Throws DriveFailure (backend "open"): missing, not a regular file, or O_DIRECT demanded and refused.
  Descriptor(const std::string& path, DirectMode mode);
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

 private:
  void open_file(DirectMode mode);
  void settle_direct();
  std::string try_direct_read() const;

  int fd_ = -1;
  FileFacts facts_;
};

// What a user holds. Any thread may call any method.
class File {
 public:
  File(const std::string& path, DirectMode mode);

  const FileFacts& facts() const { return facts_; }  // valid after close() too
  // Throws ClosedFailure after close().
  std::shared_ptr<const Descriptor> share() const;
  // As Descriptor::changed(). Throws ClosedFailure after close().
  bool changed() const;
  // Reads in flight finish; later ones are refused. Idempotent.
  void close();

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const Descriptor> descriptor_;  // null once closed
  const FileFacts facts_;
};

}  // namespace zinfer::aio
