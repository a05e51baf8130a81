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

  // On std::chrono::steady_clock, which is Python's time.perf_counter: when its first operation was submitted (none
  // while queued, and for ever when it was cancelled there or had no bytes) and when it ended (none until done()).
  std::optional<double> started() const;
  std::optional<double> finished() const;
  // Bytes the drive moved for it, aligned supersets and repetitions included; none until done().
  std::optional<std::uint64_t> transferred() const;

  // Returns done(); whether the read failed is failure()'s to say.
  bool wait_for(std::chrono::nanoseconds timeout) const;
  void wait() const;
  // Why the request failed or was cancelled; null when it did not, or is not done. Lives as long as this.
  const DriveFailure* failure() const { return done() && failure_ ? &*failure_ : nullptr; }

  // Only marks it; Engine::cancel() is the one to call.
  void mark_cancelled() { cancelled_.store(true, std::memory_order_release); }
  bool cancelled() const { return cancelled_.load(std::memory_order_acquire); }

  // The reactor's, at each operation; the first counts.
  void mark_started(std::chrono::steady_clock::time_point now);
  // The reactor's, once, when no piece is in flight any more.
  void finish(std::optional<DriveFailure> failure, std::uint64_t transferred);

 private:
  using Clock = std::chrono::steady_clock;

  const std::uint64_t nbytes_;
  const Clock::time_point submitted_ = Clock::now();
  std::atomic<bool> cancelled_{false};
  std::atomic<bool> done_{false};
  std::atomic<Clock::rep> started_{0};  // ticks; 0: not yet
  mutable std::mutex mutex_;  // guards what is below until done_
  mutable std::condition_variable ended_;
  std::optional<DriveFailure> failure_;
  Clock::time_point finished_;
  std::uint64_t transferred_ = 0;
};

}  // namespace zinfer::aio
