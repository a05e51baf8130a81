// How long operations took: a histogram of fixed size, cheap enough to be always on.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace zinfer::aio {

// Buckets of nanoseconds: kParts to each power of two, so a bound is at most 1/kParts above what it stands for.
//
//   value  0 1 ... 15 | 16 17 ... 31 | 32 34 ... 62 | 64 68 ... 124 | ...
//
// add() is for one thread, the reactor's; any thread may read meanwhile. Owned by the Reactor, as old as it.
class LatencyHistogram {
 public:
  void add(std::uint64_t nanoseconds) {
    std::atomic<std::uint64_t>& count = counts_[bucket_of(nanoseconds)];
    count.store(count.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }

  // (upper bound in nanoseconds, operations) of the buckets that are not empty, shortest first.
  std::vector<std::pair<std::uint64_t, std::uint64_t>> buckets() const {
    std::vector<std::pair<std::uint64_t, std::uint64_t>> filled;
    for (std::size_t i = 0; i < kBuckets; ++i)
      if (const std::uint64_t count = counts_[i].load(std::memory_order_relaxed)) filled.emplace_back(bound_of(i), count);
    return filled;
  }

 private:
  static constexpr unsigned kPartBits = 4;
  static constexpr std::size_t kParts = std::size_t{1} << kPartBits;
  static constexpr std::size_t kBuckets = (64 - kPartBits + 1) * kParts;

  static std::size_t bucket_of(std::uint64_t value) {
    if (value < kParts) return value;
    const unsigned power = 63 - static_cast<unsigned>(__builtin_clzll(value));
    const std::size_t part = (value >> (power - kPartBits)) & (kParts - 1);
    return (power - kPartBits + 1) * kParts + part;
  }
  // The largest value of a bucket.
  static std::uint64_t bound_of(std::size_t bucket) {
    if (bucket < kParts) return bucket;
    const auto shift = static_cast<unsigned>(bucket / kParts - 1);
    const std::uint64_t first = (kParts + bucket % kParts) << shift;
    return first + ((std::uint64_t{1} << shift) - 1);
  }
  static_assert(kBuckets == 976, "the last bucket ends at 2^64 - 1");

  std::array<std::atomic<std::uint64_t>, kBuckets> counts_{};
};

}  // namespace zinfer::aio
