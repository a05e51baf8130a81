// io_uring: one ring, one submit-and-wait call a turn; an eventfd polled by the ring wakes the waiter.

#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <deque>

#include "aio/backend.h"
#include "aio/errors.h"

namespace zinfer::aio {

namespace {

constexpr std::uint64_t kWakeToken = ~std::uint64_t{0};
constexpr std::uint64_t kNoToken = kWakeToken - 1;  // of an entry withdrawn

class IoUringBackend final : public Backend {
 public:
  explicit IoUringBackend(unsigned depth) {
    const int error = ::io_uring_queue_init(depth + 1, &ring_, 0);  // + 1: the poll on the wake descriptor
    if (error < 0) {
      const char* hint = error == -EPERM || error == -ENOSYS
                             ? " (refused by the kernel, kernel.io_uring_disabled or a container's seccomp profile)"
                             : error == -ENOMEM ? " (raise `ulimit -l`)" : "";
      throw OptionFailure("io_uring_setup: " + describe_errno(-error) + hint + descriptor_remedy(-error));
    }
    wake_fd_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (wake_fd_ < 0) {
      const int failed = errno;
      ::io_uring_queue_exit(&ring_);
      throw OptionFailure("eventfd: " + describe_errno(failed) + descriptor_remedy(failed));
    }
  }

  ~IoUringBackend() override {
    ::io_uring_queue_exit(&ring_);
    ::close(wake_fd_);
  }

  const char* name() const override { return "io_uring"; }

  void submit(const std::vector<Op>& ops) override {
    for (const Op& op : ops) {
      io_uring_sqe* const entry = next_entry(op.token);
      if (entry == nullptr) {
        refused_.push_back({op.token, -EAGAIN});
        continue;
      }
      const auto length = static_cast<unsigned>(op.length);
      if (op.kind == OpKind::write)
        ::io_uring_prep_write(entry, op.fd, op.address, length, op.offset);
      else
        ::io_uring_prep_read(entry, op.fd, op.address, length, op.offset);
      entry->user_data = op.token;
    }
  }

  void wait(std::vector<Completion>& completions) override {
    while (true) {
      take_refused(completions);
      if (!completions.empty() && queued_.empty()) return;
      arm_wake();
      bool woken = false;
      const int taken = ::io_uring_submit_and_wait(&ring_, completions.empty() ? 1 : 0);
      if (taken >= 0) {
        queued_.erase(queued_.begin(), queued_.begin() + taken);
      } else if (taken != -EINTR) {
        withdraw(taken == -EBUSY ? EAGAIN : -taken);
        if (completions.empty() && refused_.empty()) woken = sleep_without_ring();
      }
      woken = reap(completions) || woken;
      take_refused(completions);
      if (woken || !completions.empty()) return;
    }
  }

  void wake() override {
    const std::uint64_t one = 1;
    // A full counter means a wake-up is pending anyway.
    if (::write(wake_fd_, &one, sizeof one) != sizeof one) return;
  }

 private:
  struct Queued {
    io_uring_sqe* entry;
    std::uint64_t token;
  };

  // One of the submission queue's, a withdrawn one first; null when it is full.
  io_uring_sqe* next_entry(std::uint64_t token) {
    for (Queued& queued : queued_) {
      if (queued.token != kNoToken) continue;
      queued.token = token;
      return queued.entry;
    }
    io_uring_sqe* const entry = ::io_uring_get_sqe(&ring_);
    if (entry != nullptr) queued_.push_back({entry, token});
    return entry;
  }

  void arm_wake() {
    if (armed_) return;
    io_uring_sqe* const entry = next_entry(kWakeToken);
    if (entry == nullptr) return;  // the queue is full of operations: their completions end the wait
    ::io_uring_prep_poll_add(entry, wake_fd_, POLLIN);
    entry->user_data = kWakeToken;
    armed_ = true;
  }

  // Returns whether the wake descriptor was among the completions.
  bool reap(std::vector<Completion>& completions) {
    bool woken = false;
    io_uring_cqe* entry = nullptr;
    while (::io_uring_peek_cqe(&ring_, &entry) == 0) {
      if (entry->user_data == kWakeToken) {
        armed_ = false;
        drain_wake();
        woken = true;
      } else if (entry->user_data != kNoToken) {
        completions.push_back({entry->user_data, entry->res});
      }
      ::io_uring_cqe_seen(&ring_, entry);
    }
    return woken;
  }

  void drain_wake() {
    std::uint64_t count = 0;
    if (::read(wake_fd_, &count, sizeof count) < 0) return;  // EAGAIN: drained already
  }

  void take_refused(std::vector<Completion>& completions) {
    completions.insert(completions.end(), refused_.begin(), refused_.end());
    refused_.clear();
  }

  // The kernel took none of the queue: its operations fail, and the owner says whether to try again. Their
  // entries, which cannot be had back, ask for nothing now.
  void withdraw(int error) {
    for (Queued& queued : queued_) {
      if (queued.token == kWakeToken)
        armed_ = false;
      else if (queued.token != kNoToken)
        refused_.push_back({queued.token, -error});
      queued.token = kNoToken;
      ::io_uring_prep_nop(queued.entry);
      queued.entry->user_data = kNoToken;
    }
  }

  // Until something in flight completes or somebody calls; returns whether somebody did.
  bool sleep_without_ring() {
    pollfd watched[2] = {{ring_.ring_fd, POLLIN, 0}, {wake_fd_, POLLIN, 0}};
    ::poll(watched, 2, -1);
    if ((watched[1].revents & POLLIN) == 0) return false;
    drain_wake();
    return true;
  }

  io_uring ring_{};
  int wake_fd_ = -1;
  bool armed_ = false;
  std::deque<Queued> queued_;  // not yet taken by the kernel, in order
  std::vector<Completion> refused_;
};

}  // namespace

std::unique_ptr<Backend> make_io_uring_backend(unsigned depth) { return std::make_unique<IoUringBackend>(depth); }

}  // namespace zinfer::aio
