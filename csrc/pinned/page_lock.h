// Page-locking through the CUDA runtime, found at run time: no CUDA header or library is needed to build.
#pragma once

#include <cstddef>
#include <string>

#include "pinned/fork_guard.h"

namespace zinfer::pinned {

enum class PageLockMode { automatic, on, off };

// "auto", "on" or "off"; throws OptionError for anything else.
PageLockMode parse_page_lock_mode(const std::string& name);

// Holds one range registered with the CUDA runtime (cudaHostRegister, portable to every device) for as long
// as it lives, or the reason why the range stays pageable. The range must outlive it. Does not change after
// the constructor; the destructor does nothing in a forked child.
//
// The runtime is, in this order: the library that the environment variable ZINFER_CUDART names, and then no
// other; any libcudart the process has loaded (torch's CUDA build loads the one it ships); a libcudart on
// the loader's search path. It is never unloaded: CUDA does not survive that.
class PageLock {
 public:
  // With PageLockMode::on, throws BudgetError with the reason where the range cannot be locked.
  PageLock(void* base, size_t bytes, PageLockMode mode);
  ~PageLock();
  PageLock(const PageLock&) = delete;
  PageLock& operator=(const PageLock&) = delete;

  bool locked() const { return unregister_ != nullptr; }
  const std::string& reason() const { return reason_; }  // empty when locked

 private:
  std::string try_lock(size_t bytes);

  ForkGuard guard_;
  void* base_;
  int (*unregister_)(void*) = nullptr;
  std::string reason_;
};

}  // namespace zinfer::pinned
