// The shared face of one read or write: who submitted it waits on it, the reactor ends it, exactly once.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>

#include "aio/errors.h"

namespace zinfer::aio {

// Shared by whoever waits and by the reactor until it has ended it. Any thread may call any method.
class Request {
 public:
  explicit Request(std::uint64_t nbytes);

  std::uint64_t nbytes() const { return nbytes_; }
  bool done() const { return done_.load(std::memory_order_acquire); }
  // From submission to completion; so far, while it is not done.
  double seconds() const;

  // Returns done(); whether the read failed is failure()'s to say.
  bool wait_for(std::chrono::nanoseconds timeout) const;
  void wait() const;
  // Why the request failed or was cancelled; null when it did not, or is not done. Lives as long as this.
  const DriveFailure* failure() const { return done() && failure_ ? &*failure_ : nullptr; }

  // Only marks it; Engine::cancel() is the one to call.
  void mark_cancelled() { cancelled_.store(true, std::memory_order_release); }
  bool cancelled() const { return cancelled_.load(std::memory_order_acquire); }

  // The reactor's, once, when no piece is in flight any more.
  void finish(std::optional<DriveFailure> failure);

 private:
  using Clock = std::chrono::steady_clock;

  const std::uint64_t nbytes_;
  const Clock::time_point submitted_ = Clock::now();
  std::atomic<bool> cancelled_{false};
  std::atomic<bool> done_{false};
  mutable std::mutex mutex_;  // guards the two below until done_
  mutable std::condition_variable ended_;
  std::optional<DriveFailure> failure_;
  Clock::time_point finished_;
};

}  // namespace zinfer::aio
