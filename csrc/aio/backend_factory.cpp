#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "aio/backend.h"
#include "aio/errors.h"
#include "aio/file.h"

#ifndef ZINFER_HAS_LIBURING
#define ZINFER_HAS_LIBURING 0
#endif

namespace zinfer::aio {

namespace {

constexpr std::uint64_t kTrialBytes = kDirectAlignment;

// A block of some file and memory for it. It outlives the backend that is tried with it.
class Trial {
 public:
  explicit Trial(bool direct) {
    if (::posix_memalign(&memory_, kTrialBytes, kTrialBytes) != 0) throw OptionFailure("no memory for a trial read");
    std::memset(memory_, 0, kTrialBytes);
    fd_ = direct ? open_direct() : -1;
    direct_ = fd_ >= 0;
    if (fd_ < 0) fd_ = ::open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    if (fd_ >= 0) return;
    const int error = errno;
    std::free(memory_);
    throw OptionFailure("no file for a trial read: " + describe_errno(error) + descriptor_remedy(error));
  }
  ~Trial() {
    ::close(fd_);
    std::free(memory_);
  }
  Trial(const Trial&) = delete;
  Trial& operator=(const Trial&) = delete;

  // A kernel version says little: seccomp and sysctl refuse io_uring and libaio on new kernels. So read.
  void read_through(Backend& backend) const {
    Op op;
    op.fd = fd_;
    op.direct = direct_;
    op.address = memory_;
    op.length = kTrialBytes;
    backend.submit({op});
    std::vector<Completion> completions;
    while (completions.empty()) backend.wait(completions);
    const std::int64_t result = completions.front().result;
    if (result < 0) throw OptionFailure("trial read: " + describe_errno(static_cast<int>(-result)));
    if (result != kTrialBytes) throw OptionFailure("trial read: gave " + std::to_string(result) + " bytes");
  }

 private:
  // A file without a name, gone when closed; the program's own file where none can be written. -1 if neither
  // takes O_DIRECT: a buffered trial still shows that the calls work, and every File tries its own.
  int open_direct() const {
    const char* wanted = std::getenv("TMPDIR");
    for (const char* folder : {wanted, "/tmp", "/var/tmp"}) {
      if (folder == nullptr) continue;
      const int fd = ::open(folder, O_TMPFILE | O_RDWR | O_DIRECT | O_CLOEXEC, 0600);
      if (fd < 0) continue;
      if (::pwrite(fd, memory_, kTrialBytes, 0) == static_cast<ssize_t>(kTrialBytes)) return fd;
      ::close(fd);
    }
    return ::open("/proc/self/exe", O_RDONLY | O_DIRECT | O_CLOEXEC);
  }

  int fd_ = -1;
  bool direct_ = false;
  void* memory_ = nullptr;
};

std::unique_ptr<Backend> make_tried_io_uring(unsigned depth) {
#if ZINFER_HAS_LIBURING
  const Trial trial(false);
  auto backend = make_io_uring_backend(depth);
  trial.read_through(*backend);
  return backend;
#else
  (void)depth;
  throw OptionFailure("built without liburing: install liburing-dev and build zinfer again");
#endif
}

std::unique_ptr<Backend> make_tried_libaio(unsigned depth) {
  const Trial trial(true);
  auto backend = make_libaio_backend(depth);
  trial.read_through(*backend);
  return backend;
}

// What "auto" takes, best first; threads work everywhere and come last.
std::unique_ptr<Backend> make_first_that_works(const BackendOptions& options, Fallbacks& fallbacks) {
  try {
    return make_tried_io_uring(options.depth);
  } catch (const OptionFailure& failure) {
    fallbacks.emplace_back("io_uring", failure.what());
  }
  try {
    return make_mixed_backend(make_tried_libaio(options.depth), options.workers);
  } catch (const OptionFailure& failure) {
    fallbacks.emplace_back("libaio", failure.what());
  }
  return make_threads_backend(options.workers);
}

}  // namespace

std::unique_ptr<Backend> make_backend(const std::string& name, const BackendOptions& options, Fallbacks& fallbacks) {
  if (name == "auto") return make_first_that_works(options, fallbacks);
  if (name == "threads") return make_threads_backend(options.workers);
  if (name == "faults") return make_faults_backend(options.faults);
  if (name != "io_uring" && name != "libaio")
    throw OptionFailure("backend must be \"auto\", \"io_uring\", \"libaio\", \"threads\" or \"faults\", not \"" + name +
                        "\"");
  try {
    return name == "io_uring" ? make_tried_io_uring(options.depth) : make_tried_libaio(options.depth);
  } catch (const OptionFailure& failure) {
    throw OptionFailure("backend \"" + name + "\" does not work here: " + failure.what() +
                        "; use backend=\"auto\" or \"threads\"");
  }
}

}  // namespace zinfer::aio
