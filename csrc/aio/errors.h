// The three ways the library refuses or fails; the binding turns them into zinfer.errors.
//
// Plain values: may be created, copied and thrown on any thread.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace zinfer::aio {

// A read or write failed, came up short or was cancelled. `error` is an errno value, 0 when the file ended early.
// One that ended a request lives in the Request.
struct DriveFailure : std::runtime_error {
  DriveFailure(const std::string& message, std::string path_, std::uint64_t offset_, std::uint64_t length_,
               int error_, std::string backend_)
      : std::runtime_error(message),
        path(std::move(path_)),
        offset(offset_),
        length(length_),
        error(error_),
        backend(std::move(backend_)) {}

  std::string path;
  std::uint64_t offset;
  std::uint64_t length;
  int error;
  std::string backend;
};

// Use after close(), or in a forked child.
struct ClosedFailure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An option that is unknown, out of range or cannot be had on this machine.
struct OptionFailure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// strerror() that is safe on any thread.
std::string describe_errno(int error);

// "; raise `ulimit -n`..." where `error` is that of a process, or machine, out of descriptors; else "".
std::string descriptor_remedy(int error);

// The message every failed read or write carries: path, offset, length, cause, backend and remedy.
DriveFailure transfer_failure(bool writing, const std::string& path, std::uint64_t offset, std::uint64_t length,
                              int error, const std::string& backend, bool direct);

// The file holds fewer bytes than were wanted; `ended_at` is the first offset that has none.
DriveFailure ended_early(const std::string& path, std::uint64_t offset, std::uint64_t length,
                         std::uint64_t ended_at, const std::string& backend);

}  // namespace zinfer::aio
