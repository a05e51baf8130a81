// Scripted faults, for tests: real preads and pwrites, done at the moment each operation completes, so that
// memory is used as late as a slow drive would use it. One script line an operation, in submission order.

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <list>
#include <mutex>

#include "aio/backend.h"
#include "aio/file.h"

namespace zinfer::aio {

namespace {

using Clock = std::chrono::steady_clock;

struct Pending {
  Op op;
  Fault fault;
  Clock::time_point due;
  long held_for = 0;  // later operations that must complete first
};

// Reports `most` bytes at most. A direct write takes whole blocks only: the last one, reported in part, is left
// as it was, so that whoever does not write it again is found out.
std::int64_t perform_write(const Op& op, std::uint64_t most) {
  const std::uint64_t reported = std::min(most, op.length);
  const std::uint64_t taken = op.direct && reported < op.length ? reported / kDirectAlignment * kDirectAlignment : reported;
  if (taken == 0) return static_cast<std::int64_t>(reported);
  const ssize_t put = ::pwrite(op.fd, op.address, taken, static_cast<off_t>(op.offset));
  if (put < 0) return -errno;
  return static_cast<std::uint64_t>(put) < taken ? put : static_cast<std::int64_t>(reported);
}

std::int64_t perform(const Pending& pending) {
  const Op& op = pending.op;
  if (pending.fault.kind == Fault::Kind::error) return -static_cast<std::int64_t>(pending.fault.value);
  if (pending.fault.kind == Fault::Kind::zero) return 0;
  const bool cut = pending.fault.kind == Fault::Kind::short_transfer;
  if (op.kind == OpKind::write) return perform_write(op, cut ? static_cast<std::uint64_t>(pending.fault.value) : op.length);
  const ssize_t got = ::pread(op.fd, op.address, op.length, static_cast<off_t>(op.offset));
  if (got < 0) return -errno;
  if (!cut) return got;
  const auto kept = std::min<std::int64_t>(got, static_cast<std::int64_t>(pending.fault.value));
  // What was not reported as read must not look as if it had been.
  std::memset(static_cast<char*>(op.address) + kept, 0xDB, static_cast<std::size_t>(got - kept));
  return kept;
}

class FaultsBackend final : public Backend {
 public:
  explicit FaultsBackend(std::vector<Fault> script) : script_(std::move(script)) {}

  const char* name() const override { return "faults"; }

  void submit(const std::vector<Op>& ops) override {
    for (const Op& op : ops) {
      Pending pending{op, {}, Clock::now(), 0};
      if (next_ < script_.size()) pending.fault = script_[next_++];
      if (pending.fault.kind == Fault::Kind::delay)
        pending.due += std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(pending.fault.value));
      if (pending.fault.kind == Fault::Kind::hold) pending.held_for = static_cast<long>(pending.fault.value);
      pending_.push_back(pending);
    }
  }

  void wait(std::vector<Completion>& completions) override {
    while (true) {
      complete_due(completions);
      // Held operations with nothing left to wait for would never end: let the oldest go.
      if (completions.empty() && !pending_.empty() && all_held()) {
        pending_.front().held_for = 0;
        continue;
      }
      std::unique_lock<std::mutex> lock(mutex_);
      if (woken_ || !completions.empty()) {
        woken_ = false;
        return;
      }
      if (pending_.empty())
        wake_.wait(lock, [this] { return woken_; });
      else
        wake_.wait_until(lock, earliest_due(), [this] { return woken_; });
    }
  }

  void wake() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      woken_ = true;
    }
    wake_.notify_one();
  }

 private:
  void complete_due(std::vector<Completion>& completions) {
    const Clock::time_point now = Clock::now();
    bool progress = true;
    while (progress) {
      progress = false;
      for (auto it = pending_.begin(); it != pending_.end();) {
        if (it->held_for > 0 || it->due > now) {
          ++it;
          continue;
        }
        completions.push_back({it->op.token, perform(*it)});
        for (auto earlier = pending_.begin(); earlier != it; ++earlier) --earlier->held_for;
        it = pending_.erase(it);
        progress = true;
      }
    }
  }

  bool all_held() const {
    return std::all_of(pending_.begin(), pending_.end(), [](const Pending& p) { return p.held_for > 0; });
  }

  // Of those not held: a held one is due long since.
  Clock::time_point earliest_due() const {
    Clock::time_point earliest = Clock::time_point::max();
    for (const Pending& p : pending_)
      if (p.held_for <= 0) earliest = std::min(earliest, p.due);
    return earliest;
  }

  // The reactor's alone.
  const std::vector<Fault> script_;
  std::size_t next_ = 0;
  std::list<Pending> pending_;
  // Shared with wake().
  std::mutex mutex_;
  std::condition_variable wake_;
  bool woken_ = false;
};

}  // namespace

std::unique_ptr<Backend> make_faults_backend(std::vector<Fault> script) {
  return std::make_unique<FaultsBackend>(std::move(script));
}

}  // namespace zinfer::aio
