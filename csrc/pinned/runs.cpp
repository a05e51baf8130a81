#include "pinned/runs.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

namespace zinfer::pinned {

Runs::Runs(size_t capacity) : capacity_(capacity), free_bytes_(capacity) { free_.emplace(0, capacity); }

Runs::Map::iterator Runs::find_next_fit(size_t bytes) {
  const auto fits = [bytes](const auto& run) { return run.second >= bytes; };
  auto first = free_.upper_bound(cursor_);
  if (first != free_.begin()) {  // a run that begins before the cursor and reaches past it is used from its start
    const auto before = std::prev(first);
    if (before->first + before->second > cursor_) first = before;
  }
  const auto found = std::find_if(first, free_.end(), fits);
  if (found != free_.end()) return found;
  const auto wrapped = std::find_if(free_.begin(), first, fits);
  return wrapped != first ? wrapped : free_.end();
}

std::optional<size_t> Runs::take(size_t bytes) {
  const auto run = find_next_fit(bytes);
  if (run == free_.end()) return std::nullopt;
  const size_t offset = run->first;
  const size_t rest = run->second - bytes;
  held_.emplace(offset, bytes);  // the only step that can throw comes before anything has changed
  if (rest == 0) {
    free_.erase(run);
  } else {
    auto node = free_.extract(run);
    node.key() = offset + bytes;
    node.mapped() = rest;
    free_.insert(std::move(node));
  }
  free_bytes_ -= bytes;
  cursor_ = offset + bytes;
  return offset;
}

void Runs::give_back(size_t offset) noexcept {
  auto node = held_.extract(offset);
  free_bytes_ += node.mapped();
  const auto next = free_.upper_bound(offset);
  if (next != free_.end() && offset + node.mapped() == next->first) {
    node.mapped() += next->second;
    free_.erase(next);
  }
  const auto after = free_.upper_bound(offset);
  if (after != free_.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == offset) {
      before->second += node.mapped();
      return;
    }
  }
  free_.insert(std::move(node));
}

size_t Runs::largest_free() const {
  size_t largest = 0;
  for (const auto& run : free_) largest = std::max(largest, run.second);
  return largest;
}

void Runs::check_integrity() const {
  const auto fail = [](const std::string& what, size_t offset) {
    throw std::logic_error("pinned pool: " + what + " at offset " + std::to_string(offset));
  };
  size_t at = 0, free_sum = 0;
  bool previous_free = false;
  auto free_run = free_.begin();
  auto held_run = held_.begin();
  while (free_run != free_.end() || held_run != held_.end()) {
    const bool is_free =
        held_run == held_.end() || (free_run != free_.end() && free_run->first < held_run->first);
    const auto [offset, bytes] = is_free ? *free_run++ : *held_run++;
    if (offset != at) fail(offset < at ? "overlapping runs" : "bytes in no run", std::min(offset, at));
    if (bytes == 0) fail("an empty run", offset);
    if (is_free && previous_free) fail("two free runs that touch", offset);
    previous_free = is_free;
    free_sum += is_free ? bytes : 0;
    at = offset + bytes;
  }
  if (at != capacity_) fail("the last run does not end where the pool does", at);
  if (free_sum != free_bytes_) fail("the count of free bytes is wrong", free_sum);
}

}  // namespace zinfer::pinned
