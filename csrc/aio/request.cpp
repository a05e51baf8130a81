#include "aio/request.h"

namespace zinfer::aio {

Request::Request(std::uint64_t nbytes) : nbytes_(nbytes) {}

double Request::seconds() const {
  const Clock::time_point end = done() ? finished_ : Clock::now();
  return std::chrono::duration<double>(end - submitted_).count();
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

void Request::finish(std::optional<DriveFailure> failure) {
  std::lock_guard<std::mutex> lock(mutex_);
  failure_ = std::move(failure);
  finished_ = Clock::now();
  done_.store(true, std::memory_order_release);
  // Under the lock: a waiter may destroy the request as soon as it sees done().
  ended_.notify_all();
}

}  // namespace zinfer::aio
