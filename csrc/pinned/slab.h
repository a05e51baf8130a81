// One anonymous mapping: aligned, on huge pages where the kernel gives them, touched, kept out of children.
#pragma once

#include <cstddef>

#include "pinned/fork_guard.h"

namespace zinfer::pinned {

constexpr size_t kPageBytes = 4096;              // what O_DIRECT and a region's start are aligned to
constexpr size_t kHugePageBytes = size_t{2} << 20;
static_assert(kHugePageBytes % kPageBytes == 0, "a huge page holds whole pages");

// Owns the mapping: made by the constructor, unmapped by the destructor (which does nothing in a child).
// The constructor and touch() belong to one thread; afterwards the slab does not change and any thread may
// read it.
//
//     reserved:  | PROT_NONE | data() ... data() + size(), read and write | PROT_NONE |
//
// The inaccessible edges stay: they trap an overrun, and they keep the kernel from merging this mapping
// with a neighbour's, so that its entry in /proc/self/smaps speaks of this slab alone.
class Slab {
 public:
  // `bytes` is a multiple of kPageBytes. With `huge` and at least one huge page of room, data() is aligned
  // to kHugePageBytes and the kernel is asked for huge pages; without `huge` it is told to give none.
  // Throws BudgetError, with the size and errno, when the address space or the memory is refused.
  Slab(size_t bytes, bool huge);
  ~Slab();
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  // Makes every page present, with `threads` >= 1 threads: the first use of fresh memory is slow, and a
  // read should not pay for it.
  void touch(int threads);

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

  // Bytes that are on huge pages now: AnonHugePages of the mapping in /proc/self/smaps.
  // Throws std::runtime_error when that file cannot be read.
  size_t huge_bytes() const;

 private:
  ForkGuard guard_;
  void* reserved_;
  size_t reserved_bytes_;
  std::byte* data_;
  size_t size_;
};

}  // namespace zinfer::pinned
