// The front desk: validates, splits and queues reads and writes; a reactor thread carries them out.
//
// Lifetime. Memory given to read() or write() must stay valid, and that of a write unchanged, until its Request is
// done. The binding sees to it: a Python Request holds the caller's `keepalive`, and destroying an unfinished one
// cancels it and blocks until its pieces in flight have drained. A Python Request also holds its Engine. Destroying
// an Engine cancels and drains whatever is left, so no backend ever touches memory whose owner has gone.
//
// Threads. Any thread may call any method.
//
// Fork. The reactor does not exist in a forked child: every use there throws ClosedFailure, and the child
// must leak the Engine and its Requests rather than destroy them (a lock may be held, forever).
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "aio/backend.h"
#include "aio/file.h"
#include "aio/reactor.h"
#include "aio/request.h"

namespace zinfer::aio {

// Plain value, read while an Engine is made and not kept.
struct EngineOptions {
  std::string backend = "auto";
  std::int64_t depth = 16;             // operations in flight at most
  std::int64_t block_bytes = 4 << 20;  // bytes of one operation at most
  std::int64_t workers = 4;            // threads of the threads backend
  std::int64_t bounce_slot_bytes = 1 << 20;  // one of `depth` slots for what cannot land in place
  std::vector<Fault> faults;           // script of the faults backend
};

// What one transfer wants: file[offset, offset + length) to or from `address`; slack as in split.h, reads only.
// Plain value; `file` need only live as long as the call.
struct MemoryExtent {
  const File* file = nullptr;
  std::int64_t offset = 0;
  std::int64_t length = 0;
  std::int64_t address = 0;
  bool slack = false;
};

// Shared by the user and by each Python Request on it; lives as long as the longest of them. See above.
class Engine {
 public:
  // Throws OptionFailure.
  explicit Engine(const EngineOptions& options);
  // cancel_all(), then close().
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Nothing is read if one extent is bad: std::invalid_argument for a negative or absurd number,
  // DriveFailure for bytes beyond the file's size at open, ClosedFailure for a closed file or engine,
  // OptionFailure for a buffered file that the backend would block on.
  std::shared_ptr<Request> read(const std::vector<MemoryExtent>& extents, bool urgent);
  // The same for files open for writing; OptionFailure for slack and for a file another engine is writing.
  // Writes of one engine that overlap land in submission order, urgent ones aside. After a failure or a
  // cancellation any part of the request may have been written.
  std::shared_ptr<Request> write(const std::vector<MemoryExtent>& extents, bool urgent);

  // Pieces not started are dropped, those in flight drain. Harmless when done or cancelled already.
  void cancel(Request& request);
  void cancel_all();
  // Refuses new work, waits for what was accepted, ends the thread. Idempotent.
  void close();

  const std::string& backend() const { return backend_name_; }
  const Fallbacks& fallbacks() const { return fallbacks_; }
  std::uint64_t block_bytes() const { return block_bytes_; }
  unsigned depth() const { return depth_; }
  std::uint64_t bounce_bytes() const;
  int event_fd() const { return event_fd_; }  // counts completed requests; -1 once closed
  Stats stats() const { return reactor_->stats(); }
  const LatencyHistogram& latencies() const { return reactor_->latencies(); }
  std::string check_integrity() const { return reactor_->check_integrity(); }

  bool forked() const;
  // Throws ClosedFailure in a forked child.
  void refuse_if_forked() const;

 private:
  std::shared_ptr<Request> submit(const std::vector<MemoryExtent>& extents, bool urgent, bool writing);
  void validate(const MemoryExtent& extent, bool writing) const;
  void validate_range(const MemoryExtent& extent, bool writing) const;

  const pid_t owner_;
  const unsigned depth_;
  const std::uint64_t block_bytes_;
  const std::uint64_t slot_bytes_;
  std::string backend_name_;
  bool direct_only_ = false;
  Fallbacks fallbacks_;
  std::atomic<int> event_fd_{-1};
  std::unique_ptr<Reactor> reactor_;
};

}  // namespace zinfer::aio
