#include "pinned/mapping.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "pinned/errors.h"
#include "pinned/numa.h"

namespace zinfer::pinned {
namespace {

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

[[noreturn]] void throw_refused(const char* call, size_t bytes, int error) {
  throw BudgetError("cannot map " + std::to_string(bytes) + " bytes for the pinned pool: " + call + ": " +
                    std::generic_category().message(error) + " (errno " + std::to_string(error) +
                    "); lower the host memory budget (max_memory[\"cpu\"]) or free memory");
}

void touch_range(std::byte* from, std::byte* to) {
  for (volatile std::byte* page = from; page < to; page += kPageBytes) *page = std::byte{0};
}

}  // namespace

Mapping::Mapping(size_t bytes, size_t slab_bytes, bool huge, std::optional<int> node) : size_(bytes) {
  const size_t alignment = huge && bytes >= kHugePageBytes ? kHugePageBytes : kPageBytes;
  reserved_bytes_ = bytes + alignment + kPageBytes;  // room to align, and an edge on either side
  // Not MAP_NORESERVE: the kernel shall refuse now what it could not give later.
  reserved_ = mmap(nullptr, reserved_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (reserved_ == MAP_FAILED) throw_refused("mmap", bytes, errno);
  const auto first = reinterpret_cast<uintptr_t>(reserved_) + kPageBytes;
  data_ = reinterpret_cast<std::byte*>(round_up(first, alignment));
  // In one call: that is what the kernel's overcommit heuristic weighs. Slab by slab it would grant more than there is.
  const char* refused = mprotect(data_, size_, PROT_READ | PROT_WRITE) == 0 ? nullptr : "mprotect";
  for (size_t at = 0; refused == nullptr && at < size_; at += slab_bytes)
    refused = make_slab(data_ + at, std::min(slab_bytes, size_ - at), huge, node);
  if (refused == nullptr) return;
  const int error = errno;
  munmap(reserved_, reserved_bytes_);
  throw_refused(refused, bytes, error);
}

// Returns nullptr, or the call that was refused, with errno.
const char* Mapping::make_slab(std::byte* slab, size_t bytes, bool huge, std::optional<int> node) {
  if (madvise(slab, bytes, MADV_DONTFORK) != 0) return "madvise(MADV_DONTFORK)";
  // Advice only: a kernel without transparent huge pages refuses it, and huge_bytes() then says 0.
  madvise(slab, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  // Before the first touch, which is when a page gets its place. Memory on the wrong node is slower, not wrong.
  if (node && numa_reason_.empty()) numa_reason_ = prefer_node(slab, bytes, *node);
  return nullptr;
}

Mapping::~Mapping() {
  if (!guard_.in_child()) munmap(reserved_, reserved_bytes_);
}

void Mapping::touch(int threads) {
  if (threads == 0) return;
  // Whole huge pages to each thread: two threads on one would fault it in twice.
  const size_t piece = round_up(std::max<size_t>(size_ / static_cast<size_t>(threads), 1), kHugePageBytes);
  std::vector<std::thread> helpers;
  helpers.reserve(size_ / piece);  // so that no running thread is lost for want of memory
  for (size_t at = piece; at < size_; at += piece) {
    std::byte* const from = data_ + at;
    std::byte* const to = data_ + std::min(at + piece, size_);
    try {
      helpers.emplace_back(touch_range, from, to);
    } catch (const std::system_error&) {  // no thread to be had: slower, and just as touched
      touch_range(from, to);
    }
  }
  touch_range(data_, data_ + std::min(piece, size_));
  for (auto& helper : helpers) helper.join();
}

std::optional<size_t> Mapping::huge_bytes() const {
  std::ifstream smaps("/proc/self/smaps");
  if (!smaps) return std::nullopt;
  const auto first = reinterpret_cast<uintptr_t>(data_);
  size_t total = 0;
  bool inside = false;
  std::string line;
  while (std::getline(smaps, line)) {
    uintptr_t from = 0, to = 0;
    size_t kib = 0;
    if (std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " ", &from, &to) == 2) {
      if (from >= first + size_) break;  // entries come in address order
      inside = from >= first;
    } else if (inside && std::sscanf(line.c_str(), "AnonHugePages: %zu kB", &kib) == 1) {
      total += kib * 1024;
    }
  }
  return total;
}

}  // namespace zinfer::pinned
