// Aligned memory for reads that cannot land where their bytes are wanted.
#pragma once

#include <cstddef>
#include <vector>

namespace zinfer::aio {

// At most `capacity` slots of `slot_bytes` (a power of two), aligned to their own size, each mapped when first needed,
// then reused. Owned by one reactor, its thread's alone: no locking. A slot is either free here or owned by the one
// operation that took it; all are unmapped with the pool.
class BouncePool {
 public:
  BouncePool(std::size_t capacity, std::size_t slot_bytes) : capacity_(capacity), slot_bytes_(slot_bytes) {
    free_.reserve(capacity);
  }
  ~BouncePool() { release(); }
  BouncePool(const BouncePool&) = delete;
  BouncePool& operator=(const BouncePool&) = delete;

  // Null when the kernel has no memory, or all slots are taken.
  char* take();
  void give(char* slot) { free_.push_back(slot); }

  // Unmaps every slot; none may be taken.
  void release();

  std::size_t mapped() const { return all_.size(); }
  std::size_t free() const { return free_.size(); }

 private:
  const std::size_t capacity_;
  const std::size_t slot_bytes_;
  std::vector<char*> all_;
  std::vector<char*> free_;
};

}  // namespace zinfer::aio
