// The one seam between policy and the kernel: operations go in, completions come out.
//
// A backend knows nothing of alignment, retries, short reads or requests. One thread (the reactor) calls
// submit() and wait(); any thread may call wake(). The owner never has more than `depth` operations in
// flight and destroys a backend only when none is.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace zinfer::aio {

enum class OpKind : std::uint8_t { read, write };

// Plain value: made by the owner, copied by the backend during submit(). `address` stays valid until the
// operation's Completion has been handed back.
struct Op {
  OpKind kind = OpKind::read;
  int fd = -1;
  bool direct = false;        // fd is O_DIRECT, and the rest is aligned to suit
  void* address = nullptr;   // only read from by a write
  std::uint64_t length = 0;  // bytes, below 2 GiB
  std::uint64_t offset = 0;
  std::uint64_t token = 0;   // the owner's, handed back as it is
};

// Plain value, the reactor's once wait() has returned it; exactly one for each Op.
struct Completion {
  std::uint64_t token = 0;
  std::int64_t result = 0;  // bytes, or -errno
};

// Owned by one Reactor, which outlives it; threads and lifetime as above.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual const char* name() const = 0;
  // Whether a buffered operation would block submit(): the owner refuses buffered files.
  virtual bool direct_only() const { return false; }
  // Takes all of them; what cannot be submitted completes with its -errno.
  virtual void submit(const std::vector<Op>& ops) = 0;
  // Appends completions; blocks until there is one or wake() was called since the last return.
  virtual void wait(std::vector<Completion>& completions) = 0;
  virtual void wake() = 0;
};

// One line of the scripted backend: what happens to one operation. Plain value.
struct Fault {
  enum class Kind { ok, short_transfer, error, zero, delay, hold };
  Kind kind = Kind::ok;
  double value = 0;  // bytes, errno, seconds, or operations
};

// Plain value, read while a backend is made and not kept.
struct BackendOptions {
  unsigned depth = 16;
  unsigned workers = 4;
  std::vector<Fault> faults;
};

// Backends not taken, each with its reason.
using Fallbacks = std::vector<std::pair<std::string, std::string>>;

// name: "auto", "io_uring", "libaio", "threads" or "faults". "auto" takes the first of io_uring, libaio and
// threads that serves a real read; libaio taken that way has threads beside it for buffered files.
// Throws OptionFailure for an unknown name, or for a named backend that does not work here.
std::unique_ptr<Backend> make_backend(const std::string& name, const BackendOptions& options, Fallbacks& fallbacks);

// Throws OptionFailure with the failing call; only built with ZINFER_HAS_LIBURING=1.
std::unique_ptr<Backend> make_io_uring_backend(unsigned depth);
// Throws OptionFailure with the failing call. direct_only().
std::unique_ptr<Backend> make_libaio_backend(unsigned depth);
// on_completion is called by a worker after each operation, under a lock: it must not call back.
std::unique_ptr<Backend> make_threads_backend(unsigned workers, std::function<void()> on_completion = nullptr);
// Goes by the name of `direct`, which serves what is O_DIRECT; threads serve the rest.
std::unique_ptr<Backend> make_mixed_backend(std::unique_ptr<Backend> direct, unsigned workers);
std::unique_ptr<Backend> make_faults_backend(std::vector<Fault> script);

}  // namespace zinfer::aio
