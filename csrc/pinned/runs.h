// Which bytes of the pool are free and which are held: plain bookkeeping, no memory is touched.
#pragma once

#include <cstddef>
#include <map>
#include <optional>

namespace zinfer::pinned {

// Divides [0, capacity) into runs.
//
//     free --take()--> held --give_back()--> free, joined with a free neighbour on either side
//
// take() is next-fit: it looks from the cursor (the end of the last run taken) to the end, then wraps around
// to the start. The streaming window takes and gives back in nearly first-in first-out order, and next-fit
// then is a ring buffer: what is held lies in one arc behind the cursor, what is free in one arc before it.
//
//     0                                       capacity
//     |  free  | oldest ... held ... newest |  free  |
//              give_back() ->        cursor ^ take()
//
// The arc is cut at the end of the ring, where a request too long for what is left wraps and leaves a gap.
// Requests of one size are refused only when fewer free bytes than that and the gap are left. Of mixed sizes,
// a short one may slip into the gap that a long one left, out of order, and return later than its neighbours.
// No bound is known for that; measured (tests/native/pool_soak.cpp, 5 million refusals of windows of real models'
// weights in pools of 2 to 16 times the longest), first-in first-out:
//
//     free beyond the request   6.8 times the longest at most
//     in use at a refusal       91% on average, and no less after millions of operations than at their start
//
// Several readers at different places do not return in one order: 80 to 85% on average then, and up to 12 times
// the longest free. First-fit and best-fit fare the same with one reader; with several, best-fit keeps about 5%
// more in use.
//
// Owned by the pool and lives as long; not thread safe: the pool's mutex guards it.
class Runs {
 public:
  explicit Runs(size_t capacity);

  // A run of `bytes` (> 0), as its offset; nothing when no free run is long enough.
  std::optional<size_t> take(size_t bytes);
  // `offset` came from take() and was not given back since. Allocates nothing, so a destructor may call it.
  void give_back(size_t offset) noexcept;

  size_t capacity() const { return capacity_; }
  size_t free_bytes() const { return free_bytes_; }
  size_t held_bytes() const { return capacity_ - free_bytes_; }
  size_t held_runs() const { return held_.size(); }
  size_t largest_free() const;

  // Throws std::logic_error unless the runs tile [0, capacity) without gap or overlap, no two free runs
  // touch, and the counts agree.
  void check_integrity() const;

 private:
  using Map = std::map<size_t, size_t>;  // offset -> bytes; one type, so a node can move between the two

  Map::iterator find_next_fit(size_t bytes);

  const size_t capacity_;
  size_t free_bytes_;
  size_t cursor_ = 0;
  Map free_;
  Map held_;
};

}  // namespace zinfer::pinned
