// Page-locking through the CUDA runtime, found at run time: no CUDA header or library is needed to build.
#pragma once

#include <cstddef>
#include <string>

#include "pinned/fork_guard.h"

namespace zinfer::pinned {

enum class PageLockMode { automatic, on, off };

// "auto", "on" or "off"; throws OptionError for anything else.
PageLockMode parse_page_lock_mode(const std::string& name);

// Holds memory registered with the CUDA runtime (cudaHostRegister, portable to every device) for as long as it
// lives, slab by slab from the first, and the reason why the rest of it stays pageable:
//
//     base                        base + locked_bytes()          base + bytes
//     | slab 0 | slab 1 | ...     |  refused; not tried after it |
//
// Owned by the pool's memory, which it must not outlive. The constructor and the destructor belong to one thread
// each; in between nothing changes and any thread may read it. The destructor unregisters exactly what was
// registered, through the device that was current when it was registered, whatever thread it runs on and whatever
// that thread has chosen, which stays as it is; it does nothing in a forked child.
//
// The runtime is, in this order: the library that the environment variable ZINFER_CUDART names, and then no
// other; any libcudart the process has loaded (torch's CUDA build loads the one it ships); a libcudart on
// the loader's search path. It is never unloaded: CUDA does not survive that.
class PageLock {
 public:
  // With PageLockMode::on, throws BudgetError with the reason, and holds nothing, where not all can be locked.
  PageLock(std::byte* base, size_t bytes, size_t slab_bytes, PageLockMode mode);
  ~PageLock();
  PageLock(const PageLock&) = delete;
  PageLock& operator=(const PageLock&) = delete;

  bool locked() const { return locked_bytes_ == bytes_; }
  size_t locked_bytes() const { return locked_bytes_; }  // from the first byte on; whole slabs
  const std::string& reason() const { return reason_; }  // empty when all is locked

 private:
  std::string try_lock();
  void unlock() noexcept;
  void unregister_slabs() noexcept;

  ForkGuard guard_;
  std::byte* base_;
  size_t bytes_;
  size_t slab_bytes_;
  size_t locked_bytes_ = 0;
  int device_ = 0;  // current where it was registered
  int (*get_device_)(int*) = nullptr;
  int (*set_device_)(int) = nullptr;
  int (*unregister_)(void*) = nullptr;
  std::string reason_;
};

}  // namespace zinfer::pinned
