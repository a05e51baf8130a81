#include "pinned/fork_guard.h"

#include <pthread.h>

#include <atomic>
#include <system_error>

namespace zinfer::pinned {
namespace {

std::atomic<uint64_t> generation{0};

void count_fork() { generation.fetch_add(1, std::memory_order_relaxed); }

void watch_forks_once() {
  static const int error = pthread_atfork(nullptr, nullptr, count_fork);
  if (error != 0) throw std::system_error(error, std::generic_category(), "pthread_atfork");
}

}  // namespace

ForkGuard::ForkGuard() {
  watch_forks_once();
  generation_ = generation.load(std::memory_order_relaxed);
}

bool ForkGuard::in_child() const noexcept { return generation.load(std::memory_order_relaxed) != generation_; }

}  // namespace zinfer::pinned
