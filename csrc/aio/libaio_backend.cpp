// libaio: the kernel's older asynchronous interface, by its system calls; one io_getevents call a turn, woken
// by an eventfd that the same context polls. For O_DIRECT files: io_submit of a buffered read silently blocks.

#include <linux/aio_abi.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <string>
#include <type_traits>
#include <vector>

#include "aio/backend.h"
#include "aio/errors.h"

namespace zinfer::aio {

namespace {

constexpr std::uint64_t kWakeToken = ~std::uint64_t{0};
constexpr long kUnarmedNapNanoseconds = 1000000;

// libaio.h has it unsigned, and whoever trusts that takes EIO for a very long read.
static_assert(std::is_signed<decltype(io_event::res)>::value, "results are bytes or -errno");

std::string limit_of(const char* name) {
  std::string value = "?";
  std::ifstream(std::string("/proc/sys/fs/") + name) >> value;
  return value;
}

std::string setup_hint(int error) {
  if (error == EAGAIN)
    return " (" + limit_of("aio-nr") + " of fs.aio-max-nr = " + limit_of("aio-max-nr") +
           " events are taken: close other programs' contexts or raise it, `sysctl fs.aio-max-nr=1048576`)";
  if (error == EPERM || error == ENOSYS) return " (refused by the kernel or a container's seccomp profile)";
  return "";
}

class LibaioBackend final : public Backend {
 public:
  explicit LibaioBackend(unsigned depth) : events_(depth + 1) {
    if (::syscall(SYS_io_setup, depth + 1, &context_) != 0) {  // + 1: the poll on the wake descriptor
      const int error = errno;
      throw OptionFailure("io_setup: " + describe_errno(error) + setup_hint(error));
    }
    wake_fd_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    const int no_eventfd = wake_fd_ < 0 ? errno : 0;
    const int not_armed = no_eventfd != 0 ? 0 : arm_wake();
    if (no_eventfd == 0 && not_armed == 0) return;
    end();
    if (no_eventfd != 0) throw OptionFailure("eventfd: " + describe_errno(no_eventfd) + descriptor_remedy(no_eventfd));
    throw OptionFailure("io_submit of a poll: " + describe_errno(not_armed) +
                        (not_armed == EINVAL ? " (Linux 4.18 or later is needed)" : setup_hint(not_armed)));
  }

  ~LibaioBackend() override { end(); }

  const char* name() const override { return "libaio"; }
  bool direct_only() const override { return true; }

  void submit(const std::vector<Op>& ops) override {
    blocks_.clear();
    pointers_.clear();
    if (broken_ != 0) {
      for (const Op& op : ops) refused_.push_back({op.token, -broken_});
      return;
    }
    for (const Op& op : ops) {
      iocb block{};
      block.aio_data = op.token;
      block.aio_lio_opcode = op.kind == OpKind::write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
      block.aio_fildes = static_cast<std::uint32_t>(op.fd);
      block.aio_buf = reinterpret_cast<std::uintptr_t>(op.address);
      block.aio_nbytes = op.length;
      block.aio_offset = static_cast<std::int64_t>(op.offset);
      blocks_.push_back(block);
    }
    for (iocb& block : blocks_) pointers_.push_back(&block);
    for (std::size_t next = 0; next < pointers_.size();) {
      const long taken = ::syscall(SYS_io_submit, context_, pointers_.size() - next, &pointers_[next]);
      if (taken > 0) {
        for (long i = 0; i < taken; ++i) in_flight_.push_back(ops[next++].token);
        continue;
      }
      // The first of the rest was refused, and only that one: EAGAIN is the owner's to retry, as any other.
      refused_.push_back({ops[next].token, taken == 0 ? -EAGAIN : -static_cast<std::int64_t>(errno)});
      ++next;
    }
  }

  void wait(std::vector<Completion>& completions) override {
    while (true) {
      completions.insert(completions.end(), refused_.begin(), refused_.end());
      refused_.clear();
      const bool sleeps = completions.empty();
      if (broken_ != 0) {
        if (sleeps) sleep_without_poll();
        return;
      }
      const bool unarmed = sleeps && arm_wake() != 0;
      if (unarmed && in_flight_.empty()) return sleep_without_poll();
      timespec soon{0, kUnarmedNapNanoseconds};
      const long count = ::syscall(SYS_io_getevents, context_, sleeps ? 1L : 0L, static_cast<long>(events_.size()),
                                   events_.data(), unarmed ? &soon : nullptr);
      if (count < 0 && errno != EINTR) {
        if (!proven_) throw OptionFailure("io_getevents: " + describe_errno(errno));  // the trial read's answer
        give_up(errno);
        continue;
      }
      proven_ = true;
      const bool woken = reap(count, completions) || (unarmed && drain_wake());
      if (woken || !completions.empty()) return;
    }
  }

  void wake() override {
    const std::uint64_t one = 1;
    // A full counter means a wake-up is pending anyway.
    if (::write(wake_fd_, &one, sizeof one) != sizeof one) return;
  }

 private:
  // io_destroy cancels the poll and waits for the rest.
  void end() {
    if (broken_ == 0) ::syscall(SYS_io_destroy, context_);
    if (wake_fd_ >= 0) ::close(wake_fd_);
  }

  // Somebody forbade the call after the trial read. What is in flight fails, but only once the kernel is through
  // with its memory; nothing more is taken.
  void give_up(int error) {
    // Neither reaped nor waited for: whoever goes on would let the kernel write to memory that was freed.
    if (::syscall(SYS_io_destroy, context_) != 0) throw OptionFailure("io_getevents: " + describe_errno(error));
    broken_ = error;
    for (const std::uint64_t token : in_flight_) refused_.push_back({token, -error});
    in_flight_.clear();
  }

  // Returns 0 or an errno value.
  int arm_wake() {
    if (armed_) return 0;
    iocb block{};
    block.aio_data = kWakeToken;
    block.aio_lio_opcode = IOCB_CMD_POLL;
    block.aio_fildes = static_cast<std::uint32_t>(wake_fd_);
    block.aio_buf = POLLIN;
    iocb* pointer = &block;
    const long taken = ::syscall(SYS_io_submit, context_, 1L, &pointer);
    armed_ = taken == 1;
    return armed_ ? 0 : taken == 0 ? EAGAIN : errno;
  }

  // Returns whether the wake descriptor was among the events.
  bool reap(long count, std::vector<Completion>& completions) {
    bool woken = false;
    for (long i = 0; i < count; ++i) {
      const io_event& event = events_[static_cast<std::size_t>(i)];
      if (event.data == kWakeToken) {
        armed_ = false;
        drain_wake();
        woken = true;
      } else {
        in_flight_.erase(std::find(in_flight_.begin(), in_flight_.end(), event.data));
        completions.push_back({event.data, event.res});
      }
    }
    return woken;
  }

  // Returns whether there was a wake-up to take.
  bool drain_wake() {
    std::uint64_t count = 0;
    return ::read(wake_fd_, &count, sizeof count) == sizeof count;
  }

  void sleep_without_poll() {
    pollfd watched{wake_fd_, POLLIN, 0};
    ::poll(&watched, 1, -1);
    drain_wake();
  }

  aio_context_t context_ = 0;
  int wake_fd_ = -1;
  bool armed_ = false;
  bool proven_ = false;  // io_getevents has worked
  int broken_ = 0;       // errno with which it no longer does; the context is gone then
  std::vector<std::uint64_t> in_flight_;  // tokens of operations the kernel has
  std::vector<io_event> events_;
  std::vector<iocb> blocks_;  // copied by the kernel in io_submit
  std::vector<iocb*> pointers_;
  std::vector<Completion> refused_;
};

}  // namespace

std::unique_ptr<Backend> make_libaio_backend(unsigned depth) { return std::make_unique<LibaioBackend>(depth); }

}  // namespace zinfer::aio
