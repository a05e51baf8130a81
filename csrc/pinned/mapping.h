// One contiguous anonymous mapping in slabs: on huge pages where the kernel gives them, near a NUMA node if
// asked, touched, kept out of children.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

#include "pinned/fork_guard.h"

namespace zinfer::pinned {

constexpr size_t kPageBytes = 4096;              // what O_DIRECT and a region's start are aligned to
constexpr size_t kHugePageBytes = size_t{2} << 20;
static_assert(kHugePageBytes % kPageBytes == 0, "a huge page holds whole pages");
// A page lock of tens of gigabytes is refused as a whole, and holds the driver's lock for seconds.
constexpr size_t kSlabBytes = size_t{1} << 30;
static_assert(kSlabBytes % kHugePageBytes == 0, "no huge page straddles a slab's edge");

// Owns the mapping: made by the constructor, unmapped by the destructor (which does nothing in a child).
// The constructor and touch() belong to one thread; afterwards nothing here changes and any thread may read it.
//
//     reserved:  | PROT_NONE | slab 0 | slab 1 | ... | the last, maybe shorter | PROT_NONE |
//                            ^ data()       read and write        data() + size() ^
//
// The addresses are one range, so that a weight longer than a slab is contiguous. It is made accessible at once
// and advised and bound slab by slab. The inaccessible edges stay: they trap an overrun, and they keep
// the kernel from merging this mapping with a neighbour's, so that its entries in /proc/self/smaps speak of
// this mapping alone.
class Mapping {
 public:
  // `bytes` is a multiple of kPageBytes, `slab_bytes` of kHugePageBytes. With `huge` and at least one huge
  // page of room, data() is aligned to kHugePageBytes and the kernel is asked for huge pages; without `huge`
  // it is told to give none. `node`: the NUMA node to take memory from first, see prefer_node().
  // Throws BudgetError, with the size and errno, when the address space or the memory is refused.
  Mapping(size_t bytes, size_t slab_bytes, bool huge, std::optional<int> node);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  // Makes every page of every slab present, with `threads` threads (0: not at all): the first use of fresh memory is
  // slow, and a read should not pay for it.
  void touch(int threads);

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  const std::string& numa_reason() const { return numa_reason_; }  // empty when bound, or when nothing was asked

  // Bytes that are on huge pages now: AnonHugePages of the mapping in /proc/self/smaps; nothing where that
  // file cannot be read.
  std::optional<size_t> huge_bytes() const;

 private:
  const char* make_slab(std::byte* slab, size_t bytes, bool huge, std::optional<int> node);

  ForkGuard guard_;
  void* reserved_;
  size_t reserved_bytes_;
  std::byte* data_;
  size_t size_;
  std::string numa_reason_;
};

}  // namespace zinfer::pinned
