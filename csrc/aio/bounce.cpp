#include "aio/bounce.h"

#include <sys/mman.h>

#include <cstdint>

namespace zinfer::aio {

void BouncePool::release() {
  for (char* slot : all_) ::munmap(slot, slot_bytes_);
  all_.clear();
  free_.clear();
}

char* BouncePool::take() {
  if (!free_.empty()) {
    char* slot = free_.back();
    free_.pop_back();
    return slot;
  }
  if (all_.size() == capacity_) return nullptr;
  // Twice the size, then trimmed: a slot aligned to its own size suits every file's alignment.
  void* mapped = ::mmap(nullptr, 2 * slot_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const auto start = reinterpret_cast<std::uintptr_t>(mapped);
  const std::uintptr_t aligned = (start + slot_bytes_ - 1) / slot_bytes_ * slot_bytes_;
  const std::size_t head = aligned - start;
  if (head > 0) ::munmap(mapped, head);
  if (head < slot_bytes_) ::munmap(reinterpret_cast<void*>(aligned + slot_bytes_), slot_bytes_ - head);
  all_.push_back(reinterpret_cast<char*>(aligned));
  return all_.back();
}

}  // namespace zinfer::aio
