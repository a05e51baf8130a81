// The pinned pool: one contiguous mapping in slabs, handed out in regions that return by themselves.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "pinned/fork_guard.h"
#include "pinned/mapping.h"
#include "pinned/page_lock.h"
#include "pinned/runs.h"

namespace zinfer::pinned {

class Pool;

// A run of the pool's memory, held from Pool::acquire() until it is destroyed, by any thread; owned by whoever
// acquired it. It keeps the pool's memory alive. Nothing but the bytes changes meanwhile, so any thread may read
// it; the bytes are whatever was there before: nothing is zeroed between two holders.
class Region {
 public:
  Region() = default;  // holds nothing
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // The first byte, aligned to kPageBytes. Throws ClosedError in a forked child, where nothing is mapped.
  std::byte* data() const;
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data_); }
  size_t nbytes() const { return nbytes_; }  // a multiple of kPageBytes

 private:
  friend class Pool;
  std::shared_ptr<Pool> pool_;
  std::byte* data_ = nullptr;
  size_t nbytes_ = 0;
};

struct PoolOptions {
  int64_t capacity = 0;  // bytes, rounded up to kPageBytes
  PageLockMode page_lock = PageLockMode::automatic;
  bool huge_pages = true;
  std::optional<int> touch_threads;  // nothing: one for each CPU of this process, 8 at most; 0: none
  std::optional<int> numa_node;      // preferred, see numa.h
  int64_t slab_bytes = kSlabBytes;   // a multiple of kHugePageBytes, at most kSlabBytes; smaller ones are for tests
};

struct PoolStats {
  uint64_t acquires = 0;  // regions handed out
  uint64_t releases = 0;  // regions that came back
  uint64_t refusals = 0;  // calls of acquire() that ended with no region
  uint64_t waits = 0;     // calls of acquire() that had to wait, whatever came of it
  size_t peak_in_use = 0;
  size_t regions = 0;  // out now
};

// Thread safe: any thread may call anything, and a region may die on any thread. Shared by its owner and
// every region, so the memory outlives them all:
//
//     open --close()--> closed, still mapped --the last region dies--> unmapped
//       |                        (straight through when no region is out)  ^
//       +----- owner and every region gone ---------------------------------+
//
// In a forked child close() and the destructors do nothing, and every other call throws ClosedError.
// How runs are placed is told in runs.h. They are placed without regard to slabs, so a region may straddle the
// edge of one, at base_address() + n * slab_bytes(). Each slab is a page lock of its own, and a CUDA copy must
// not span two of them: whoever copies to a device splits there.
class Pool : public std::enable_shared_from_this<Pool> {
 public:
  // Maps, binds, touches and page-locks. Throws OptionError, or BudgetError where memory or the lock is refused.
  static std::shared_ptr<Pool> create(const PoolOptions& options);

  // A region of at least `nbytes` (rounded up to kPageBytes), or nullptr when no run is long enough.
  // Never waits. Throws std::invalid_argument (nbytes < 1), BudgetError (nbytes > capacity), ClosedError.
  // A nullptr from here is not counted as a refusal.
  std::unique_ptr<Region> try_acquire(int64_t nbytes);

  // The same, waiting up to `timeout` seconds (>= 0, infinity allowed) for a region to return. `poll` runs
  // at least every 100 ms of the wait, without the lock; what it throws ends the wait. Waiters are not
  // queued: a small request may overtake a large one.
  std::unique_ptr<Region> acquire(int64_t nbytes, double timeout,
                                  const std::function<void()>& poll);

  void close();  // idempotent; wakes every waiter with ClosedError

  size_t capacity() const { return capacity_; }
  size_t free_bytes() const;
  size_t largest_free() const;
  size_t in_use() const;
  uintptr_t base_address() const;  // of the first byte; 0 once unmapped
  size_t slab_bytes() const { return slab_bytes_; }
  std::optional<size_t> huge_bytes() const;  // 0 once unmapped; nothing where the kernel does not tell
  size_t locked_bytes() const;               // page-locked now, from the first byte on
  bool page_locked() const;                  // all of it
  std::string page_lock_reason() const;      // empty while all is page-locked
  std::string numa_reason() const;           // why not bound to the node asked for; empty when bound or not asked
  bool closed() const;
  PoolStats stats() const;
  void check_integrity() const;  // throws std::logic_error

 private:
  friend class Region;

  // The mapping and its page lock; members die in reverse order, so the lock goes first.
  struct Memory {
    Memory(size_t bytes, const PoolOptions& options);
    Mapping mapping;
    PageLock lock;
  };

  explicit Pool(const PoolOptions& options);
  std::unique_lock<std::mutex> lock() const;  // throws ClosedError in a child
  size_t checked_bytes(int64_t nbytes) const;
  bool take(Region& region, size_t bytes);  // the mutex is held
  void release(std::byte* data) noexcept;

  const ForkGuard guard_;
  const size_t capacity_;
  const size_t slab_bytes_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;  // a region returned, or the pool was closed
  // All below is guarded by mutex_.
  std::shared_ptr<Memory> memory_;  // null once unmapped; shared with a huge_bytes() under way
  Runs runs_;
  PoolStats stats_;
  bool closed_ = false;
};

}  // namespace zinfer::pinned
