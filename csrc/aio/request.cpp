#include "aio/request.h"

namespace zinfer::aio {

namespace {

double on_clock(std::chrono::steady_clock::duration ticks) { return std::chrono::duration<double>(ticks).count(); }

}  // namespace

Request::Request(std::uint64_t nbytes) : nbytes_(nbytes) {}

double Request::seconds() const {
  const Clock::time_point end = done() ? finished_ : Clock::now();
  return std::chrono::duration<double>(end - submitted_).count();
}

std::optional<double> Request::started() const {
  const Clock::rep ticks = started_.load(std::memory_order_relaxed);
  return ticks == 0 ? std::nullopt : std::optional(on_clock(Clock::duration(ticks)));
}

std::optional<double> Request::finished() const {
  return done() ? std::optional(on_clock(finished_.time_since_epoch())) : std::nullopt;
}

std::optional<std::uint64_t> Request::transferred() const {
  return done() ? std::optional(transferred_) : std::nullopt;
}

void Request::mark_started(Clock::time_point now) {
  if (started_.load(std::memory_order_relaxed) == 0)
    started_.store(now.time_since_epoch().count(), std::memory_order_relaxed);
}

bool Request::wait_for(std::chrono::nanoseconds timeout) const {
  if (done()) return true;
  std::unique_lock<std::mutex> lock(mutex_);
  return ended_.wait_for(lock, timeout, [this] { return done(); });
}

void Request::wait() const {
  std::unique_lock<std::mutex> lock(mutex_);
  ended_.wait(lock, [this] { return done(); });
}

void Request::finish(std::optional<DriveFailure> failure, std::uint64_t transferred) {
  std::lock_guard<std::mutex> lock(mutex_);
  failure_ = std::move(failure);
  transferred_ = transferred;
  finished_ = Clock::now();
  done_.store(true, std::memory_order_release);
  // Under the lock: a waiter may destroy the request as soon as it sees done().
  ended_.notify_all();
}

}  // namespace zinfer::aio
