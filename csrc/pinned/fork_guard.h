// Tells a forked child from the process that made an object.
#pragma once

#include <cstdint>

namespace zinfer::pinned {

// Remembers the process it was made in. The pool's mapping is not copied by fork() (MADV_DONTFORK), so in
// a child its addresses may already belong to something else, and a mutex may have been copied locked:
// whoever owns such things asks in_child() first and then does nothing.
// A member of what it guards, and lives as long. Any thread may call it; it counts forks in a pthread_atfork handler, so a reused process id cannot fool it.
class ForkGuard {
 public:
  ForkGuard();
  bool in_child() const noexcept;

 private:
  uint64_t generation_;
};

}  // namespace zinfer::pinned
