#include <fcntl.h>
#include <unistd.h>

#include "aio/backend.h"
#include "aio/errors.h"

#ifndef ZINFER_HAS_LIBURING
#define ZINFER_HAS_LIBURING 0
#endif

namespace zinfer::aio {

namespace {

// A kernel version says little: seccomp and sysctl refuse io_uring on new kernels. So read something.
void try_read(Backend& backend) {
  const int fd = ::open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw OptionFailure("no file for a trial read: " + describe_errno(errno));
  char bytes[64] = {};
  Op op;
  op.fd = fd;
  op.address = bytes;
  op.length = sizeof bytes;
  backend.submit({op});
  std::vector<Completion> completions;
  while (completions.empty()) backend.wait(completions);
  ::close(fd);
  const std::int64_t result = completions.front().result;
  if (result < 0) throw OptionFailure("trial read: " + describe_errno(static_cast<int>(-result)));
  if (result != sizeof bytes) throw OptionFailure("trial read: gave " + std::to_string(result) + " bytes");
}

std::unique_ptr<Backend> make_tried_io_uring(unsigned depth) {
#if ZINFER_HAS_LIBURING
  auto backend = make_io_uring_backend(depth);
  try_read(*backend);
  return backend;
#else
  (void)depth;
  throw OptionFailure("built without liburing: install liburing-dev and build zinfer again");
#endif
}

}  // namespace

std::unique_ptr<Backend> make_backend(const std::string& name, const BackendOptions& options, Fallbacks& fallbacks) {
  if (name == "threads") return make_threads_backend(options.workers);
  if (name == "faults") return make_faults_backend(options.faults);
  if (name == "auto" || name == "io_uring") {
    try {
      return make_tried_io_uring(options.depth);
    } catch (const OptionFailure& failure) {
      if (name == "io_uring")
        throw OptionFailure(std::string("backend \"io_uring\" does not work here: ") + failure.what() +
                            "; use backend=\"auto\" or \"threads\"");
      fallbacks.emplace_back("io_uring", failure.what());
    }
    return make_threads_backend(options.workers);
  }
  throw OptionFailure("backend must be \"auto\", \"io_uring\", \"threads\" or \"faults\", not \"" + name + "\"");
}

}  // namespace zinfer::aio
