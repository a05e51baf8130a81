#include "pinned/pool.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <utility>

#include "pinned/errors.h"
#include "pinned/numa.h"

namespace zinfer::pinned {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kPollInterval = std::chrono::milliseconds(100);
constexpr double kLongestWait = 1e9;  // seconds; an infinite timeout must not overflow the clock
static_assert(kLongestWait * Clock::period::den / Clock::period::num < INT64_MAX / 2.0, "now + kLongestWait fits");

size_t round_up_to_page(int64_t bytes) {
  return (static_cast<size_t>(bytes) + kPageBytes - 1) / kPageBytes * kPageBytes;
}

void check_node(int node) {
  const auto online = online_nodes();
  if (std::find(online.begin(), online.end(), node) != online.end()) return;
  std::string names;
  for (const int known : online) names += (names.empty() ? "" : ", ") + std::to_string(known);
  throw OptionError("numa_node is " + std::to_string(node) + ", but the nodes online are: " + names);
}

const PoolOptions& checked(const PoolOptions& options) {
  if (options.capacity < 1) {
    throw OptionError("capacity must be at least 1 byte, not " + std::to_string(options.capacity));
  }
  if (options.touch_threads && *options.touch_threads < 0) {
    throw OptionError("touch_threads must be at least 0, not " + std::to_string(*options.touch_threads));
  }
  const bool in_range = options.slab_bytes > 0 && options.slab_bytes <= static_cast<int64_t>(kSlabBytes);
  if (!in_range || options.slab_bytes % static_cast<int64_t>(kHugePageBytes) != 0) {
    throw OptionError("slab_bytes must be a multiple of " + std::to_string(kHugePageBytes) + ", at most " +
                      std::to_string(kSlabBytes) + ", not " + std::to_string(options.slab_bytes));
  }
  if (options.numa_node) check_node(*options.numa_node);
  return options;
}

int touch_threads(const PoolOptions& options) {
  if (options.touch_threads) return *options.touch_threads;
  // Clearing pages is bound by memory, which a few cores keep busy.
  return static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1U, 8U));
}

}  // namespace

Region::~Region() {
  if (pool_ != nullptr) pool_->release(data_);
}

std::byte* Region::data() const {
  if (pool_ != nullptr && pool_->guard_.in_child()) {
    throw ClosedError("the pinned pool belongs to the parent process: its regions do not exist in a forked child");
  }
  return data_;
}

Pool::Memory::Memory(size_t bytes, const PoolOptions& options)
    : mapping(bytes, static_cast<size_t>(options.slab_bytes), options.huge_pages, options.numa_node),
      lock((mapping.touch(touch_threads(options)), mapping.data()), bytes,
           static_cast<size_t>(options.slab_bytes), options.page_lock) {}

Pool::Pool(const PoolOptions& options)
    : capacity_(round_up_to_page(checked(options).capacity)),
      slab_bytes_(static_cast<size_t>(options.slab_bytes)),
      memory_(std::make_shared<Memory>(capacity_, options)),
      runs_(capacity_) {}

std::shared_ptr<Pool> Pool::create(const PoolOptions& options) { return std::shared_ptr<Pool>(new Pool(options)); }

std::unique_lock<std::mutex> Pool::lock() const {
  if (guard_.in_child()) {  // asked before the mutex, which may have been copied locked
    throw ClosedError("the pinned pool belongs to the parent process: make a new one in a forked child");
  }
  return std::unique_lock<std::mutex>(mutex_);
}

size_t Pool::checked_bytes(int64_t nbytes) const {
  if (nbytes < 1) throw std::invalid_argument("nbytes must be at least 1, not " + std::to_string(nbytes));
  const size_t bytes = round_up_to_page(nbytes);
  if (bytes > capacity_) {
    throw BudgetError("a region of " + std::to_string(bytes) + " bytes cannot fit a pinned pool of " +
                      std::to_string(capacity_) + " bytes; raise the host memory budget (max_memory[\"cpu\"])");
  }
  return bytes;
}

bool Pool::take(Region& region, size_t bytes) {
  if (closed_) throw ClosedError("the pinned pool is closed");
  const auto offset = runs_.take(bytes);
  if (!offset) return false;
  region.pool_ = shared_from_this();
  region.data_ = memory_->mapping.data() + *offset;
  region.nbytes_ = bytes;
  ++stats_.acquires;
  stats_.peak_in_use = std::max(stats_.peak_in_use, runs_.held_bytes());
  return true;
}

std::unique_ptr<Region> Pool::try_acquire(int64_t nbytes) {
  auto region = std::make_unique<Region>();  // made first: once the run is taken nothing can throw
  const auto guard = lock();
  if (!take(*region, checked_bytes(nbytes))) return nullptr;
  return region;
}

std::unique_ptr<Region> Pool::acquire(int64_t nbytes, double timeout,
                                      const std::function<void()>& poll) {
  if (!(timeout >= 0)) throw std::invalid_argument("timeout must be 0 or more seconds");
  const auto patience = std::chrono::duration<double>(std::min(timeout, kLongestWait));
  auto now = Clock::now();
  const auto deadline = now + std::chrono::duration_cast<Clock::duration>(patience);
  auto next_poll = now + kPollInterval;
  auto region = std::make_unique<Region>();
  auto guard = lock();
  const size_t bytes = checked_bytes(nbytes);
  for (bool waited = false; !take(*region, bytes); now = Clock::now()) {
    if (now >= deadline) {
      ++stats_.refusals;
      return nullptr;
    }
    if (!std::exchange(waited, true)) ++stats_.waits;
    if (now >= next_poll) {
      guard.unlock();
      poll();
      guard.lock();
      next_poll = now + kPollInterval;
      continue;  // something may have returned while the lock was open
    }
    changed_.wait_until(guard, std::min(deadline, next_poll));
  }
  return region;
}

void Pool::release(std::byte* data) noexcept {
  if (guard_.in_child()) return;
  std::shared_ptr<Memory> unmapped;  // dies after the lock: unmapping gigabytes takes a while
  {
    const std::lock_guard<std::mutex> guard(mutex_);
    runs_.give_back(static_cast<size_t>(data - memory_->mapping.data()));
    ++stats_.releases;
    if (closed_ && runs_.held_runs() == 0) unmapped = std::move(memory_);
  }
  changed_.notify_all();
}

void Pool::close() {
  if (guard_.in_child()) return;
  std::shared_ptr<Memory> unmapped;
  {
    const std::lock_guard<std::mutex> guard(mutex_);
    closed_ = true;
    if (runs_.held_runs() == 0) unmapped = std::move(memory_);
  }
  changed_.notify_all();
}

size_t Pool::free_bytes() const {
  const auto guard = lock();
  return runs_.free_bytes();
}

size_t Pool::largest_free() const {
  const auto guard = lock();
  return runs_.largest_free();
}

size_t Pool::in_use() const {
  const auto guard = lock();
  return runs_.held_bytes();
}

uintptr_t Pool::base_address() const {
  const auto guard = lock();
  return memory_ != nullptr ? reinterpret_cast<uintptr_t>(memory_->mapping.data()) : 0;
}

std::optional<size_t> Pool::huge_bytes() const {
  std::shared_ptr<Memory> memory;
  {
    const auto guard = lock();
    memory = memory_;
  }
  return memory != nullptr ? memory->mapping.huge_bytes() : 0;
}

size_t Pool::locked_bytes() const {
  const auto guard = lock();
  return memory_ != nullptr ? memory_->lock.locked_bytes() : 0;
}

bool Pool::page_locked() const {
  const auto guard = lock();
  return memory_ != nullptr && memory_->lock.locked();
}

std::string Pool::page_lock_reason() const {
  const auto guard = lock();
  return memory_ != nullptr ? memory_->lock.reason() : "the pool is closed";
}

std::string Pool::numa_reason() const {
  const auto guard = lock();
  return memory_ != nullptr ? memory_->mapping.numa_reason() : "the pool is closed";
}

bool Pool::closed() const {
  const auto guard = lock();
  return closed_;
}

PoolStats Pool::stats() const {
  const auto guard = lock();
  PoolStats stats = stats_;
  stats.regions = runs_.held_runs();
  return stats;
}

void Pool::check_integrity() const {
  const auto guard = lock();
  runs_.check_integrity();
  if (stats_.acquires - stats_.releases != runs_.held_runs()) {
    throw std::logic_error("pinned pool: the count of regions is wrong");
  }
}

}  // namespace zinfer::pinned
