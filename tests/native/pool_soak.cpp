// Random acquires and releases of the pinned pool, in the shapes of its use. Live regions never overlap, what is
// written into one is there until it is released, the pool's own account holds, and what is left in the end is
// one free run. Usage: pool_soak OPERATIONS SEED. Prints, for each shape, how full the pool was at refusals (soon
// after the start and at the end, so that fragmentation that grows would be seen) and how many times the longest
// region was free beyond the request. Exit status 0 when all is well.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "pinned/pool.h"

using namespace zinfer::pinned;

namespace {

constexpr int64_t kMiB = 1 << 20;
constexpr int64_t kShrink = 64;  // of the weights' sizes, so that a pool of a few megabytes holds a window of them
constexpr int kReaders = 4;
constexpr long kPools = 8;  // of each shape, of random capacity and model
constexpr long kOperationsPerAudit = 500;

using Random = std::mt19937_64;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

// The weights that one sweep uses, in order: bytes / kShrink.
std::vector<int64_t> sweep_of(std::initializer_list<int64_t> layer, int layers, int64_t head) {
  std::vector<int64_t> sizes;
  for (int i = 0; i < layers; ++i) sizes.insert(sizes.end(), layer);
  sizes.push_back(head);
  for (auto& bytes : sizes) bytes = std::max<int64_t>(1, bytes / kShrink);
  return sizes;
}

const std::vector<std::vector<int64_t>>& sweeps() {
  static const std::vector<std::vector<int64_t>> known = {
      // 8B Llama, bfloat16: norm, q, k, v, o, norm, gate, up, down
      sweep_of({8192, 32 * kMiB, 8 * kMiB, 8 * kMiB, 32 * kMiB, 8192, 112 * kMiB, 112 * kMiB, 112 * kMiB}, 32,
               250 * kMiB),  // a quarter of its head
      // 7B Llama, bfloat16
      sweep_of({8192, 32 * kMiB, 32 * kMiB, 32 * kMiB, 32 * kMiB, 8192, 86 * kMiB, 86 * kMiB, 86 * kMiB}, 32,
               250 * kMiB),
      // 30B mixture of 128 experts, each by itself: attention, router, the 8 chosen
      sweep_of({4096, 16 * kMiB, 2 * kMiB, 2 * kMiB, 16 * kMiB, 512 << 10, 6 * kMiB, 3 * kMiB, 6 * kMiB, 3 * kMiB,
                6 * kMiB, 3 * kMiB, 6 * kMiB, 3 * kMiB, 6 * kMiB, 3 * kMiB, 6 * kMiB, 3 * kMiB, 6 * kMiB, 3 * kMiB,
                6 * kMiB, 3 * kMiB},
               48, 64 * kMiB),
      // GPT-2, float32: biases and norms between the matrices
      sweep_of({3072, 3072, 7077888, 9216, 2359296, 3072, 3072, 3072, 9437184, 12288, 9437184, 3072}, 12,
               int64_t{50257} * 768 * 4),
  };
  return known;
}

struct Held {
  std::unique_ptr<Region> region;
  uint64_t stamp;
};

uint64_t* first_word(const Region& region) { return reinterpret_cast<uint64_t*>(region.data()); }
uint64_t* last_word(const Region& region) {
  return reinterpret_cast<uint64_t*>(region.data() + region.nbytes()) - 1;
}

Held stamped(std::unique_ptr<Region> region, uint64_t stamp) {
  *first_word(*region) = stamp;
  *last_word(*region) = ~stamp;
  return {std::move(region), stamp};
}

void check_stamp(const Held& held) {
  if (*first_word(*held.region) != held.stamp || *last_word(*held.region) != ~held.stamp) {
    fail("region " + std::to_string(held.stamp) + " does not hold what was written into it");
  }
}

struct Mean {
  double sum = 0;
  long count = 0;
  void add(double value) { sum += value, count += 1; }
  double value() const { return count > 0 ? sum / static_cast<double>(count) : 0; }
};

struct Figures {
  long per_pool = 0;  // operations
  long operations = 0, refusals = 0;
  Mean full, full_early, full_late;  // shares of the pool in use at refusals; in its second and in its last quarter
  double least_full = 1;
  double most_spare = 0;  // bytes free beyond a refused request, in lengths of the longest region
};

// A pool with a second account of what is live, kept by address.
class Watched {
 public:
  Watched(int64_t capacity, int64_t longest, Figures& figures)
      : longest_(longest), figures_(figures), pool_(Pool::create(options(capacity))) {}

  // One that fails counts no operation.
  bool acquire(int64_t nbytes, std::deque<Held>& into) {
    auto region = pool_->try_acquire(nbytes);
    if (region == nullptr) {
      note_refusal(nbytes);
      return false;
    }
    const uintptr_t first = region->address(), end = first + region->nbytes();
    const uintptr_t base = pool_->base_address();
    if (first < base || end > base + pool_->capacity()) fail("a region outside the pool");
    const auto next = live_.lower_bound(first);
    if (next != live_.end() && next->first < end) fail("a region overlaps the next");
    if (next != live_.begin() && std::prev(next)->second > first) fail("a region overlaps the one before");
    live_.emplace(first, end);
    into.push_back(stamped(std::move(region), ++serial_));
    audit_sometimes();
    return true;
  }

  void release(std::deque<Held>& from, size_t index) {
    check_stamp(from[index]);
    live_.erase(from[index].region->address());
    from.erase(from.begin() + static_cast<long>(index));
    audit_sometimes();
  }

  void finish() {
    pool_->check_integrity();
    if (!live_.empty() || pool_->in_use() != 0) fail("regions are left over");
    if (pool_->largest_free() != pool_->capacity()) fail("the empty pool is not one free run");
    const PoolStats stats = pool_->stats();
    if (stats.acquires != stats.releases || stats.acquires != serial_) fail("the pool counted wrong");
  }

  bool has_more() const { return operations_ < figures_.per_pool; }

 private:
  static PoolOptions options(int64_t capacity) {
    PoolOptions options;
    options.capacity = capacity;
    options.page_lock = PageLockMode::off;
    options.slab_bytes = kHugePageBytes;  // many edges
    return options;
  }

  void note_refusal(int64_t nbytes) {
    const auto free = static_cast<double>(pool_->free_bytes());
    const double full = 1 - free / static_cast<double>(pool_->capacity());
    const double spare = (free - static_cast<double>(nbytes)) / static_cast<double>(longest_);
    figures_.refusals += 1;
    figures_.full.add(full);
    if (const long quarter = 4 * operations_ / figures_.per_pool; quarter == 1) {
      figures_.full_early.add(full);
    } else if (quarter == 3) {
      figures_.full_late.add(full);
    }
    figures_.least_full = std::min(figures_.least_full, full);
    figures_.most_spare = std::max(figures_.most_spare, spare);
  }

  void audit_sometimes() {
    figures_.operations += 1;
    if (++operations_ % kOperationsPerAudit != 0) return;
    pool_->check_integrity();
    size_t held = 0;
    for (const auto& [first, end] : live_) held += end - first;
    if (held != pool_->in_use()) fail("the pool's account of bytes in use is wrong");
  }

  const int64_t longest_;
  Figures& figures_;
  std::shared_ptr<Pool> pool_;
  std::map<uintptr_t, uintptr_t> live_;  // first byte -> end
  uint64_t serial_ = 0;
  long operations_ = 0;
};

const std::vector<int64_t>& random_sweep(Random& random) { return sweeps()[random() % sweeps().size()]; }

// One reader: regions come in the order of the sweep and return oldest first, at refusals only.
void first_in_first_out(Random& random, Figures& figures) {
  const auto& sizes = random_sweep(random);
  const int64_t longest = *std::max_element(sizes.begin(), sizes.end());
  Watched pool(longest * 2 + static_cast<int64_t>(random() % static_cast<uint64_t>(longest * 14)), longest, figures);
  std::deque<Held> window;
  for (size_t at = random(); pool.has_more(); ++at) {
    while (!pool.acquire(sizes[at % sizes.size()], window)) pool.release(window, 0);
  }
  while (!window.empty()) pool.release(window, 0);
  pool.finish();
}

// Several readers of one model, each at its own place and pace. At a refusal one of them ends an operator, mostly its
// oldest; now and then one was wrong about what comes next, drops all that it read ahead and goes on elsewhere.
void nearly_first_in_first_out(Random& random, Figures& figures) {
  const auto& sizes = random_sweep(random);
  const int64_t longest = *std::max_element(sizes.begin(), sizes.end());
  Watched pool(longest * 8 + static_cast<int64_t>(random() % static_cast<uint64_t>(longest * 8)), longest, figures);
  std::deque<Held> windows[kReaders];
  size_t places[kReaders];
  for (auto& place : places) place = random();
  const auto release_one = [&](std::deque<Held>& window) {
    const size_t late = random() % 100 < 5 ? random() % std::min<size_t>(3, window.size()) : 0;
    pool.release(window, late);
  };
  while (pool.has_more()) {
    const auto reader = random() % kReaders;
    if (random() % 500 == 0) {
      while (!windows[reader].empty()) pool.release(windows[reader], windows[reader].size() - 1);
      places[reader] = random();
    }
    while (!pool.acquire(sizes[places[reader] % sizes.size()], windows[reader])) {
      auto* window = &windows[random() % kReaders];
      while (window->empty()) window = &windows[random() % kReaders];
      release_one(*window);
    }
    ++places[reader];
  }
  for (auto& window : windows) {
    while (!window.empty()) pool.release(window, 0);
  }
  pool.finish();
}

// Any size, released in any order.
void uniform(Random& random, Figures& figures) {
  const int64_t longest = 1 + static_cast<int64_t>(random() % (1 << 20));
  Watched pool(longest * static_cast<int64_t>(1 + random() % 8), longest, figures);
  std::deque<Held> held;
  while (pool.has_more()) {
    const bool full = !pool.acquire(1 + static_cast<int64_t>(random() % static_cast<uint64_t>(longest)), held);
    while (!held.empty() && (full || random() % 100 < 48)) {
      pool.release(held, random() % held.size());
      if (full) break;
    }
  }
  while (!held.empty()) pool.release(held, random() % held.size());
  pool.finish();
}

// Readers on threads of their own share a pool and wait for each other's releases.
void threads(Random& random, Figures& figures) {
  const auto& sizes = random_sweep(random);
  const int64_t longest = *std::max_element(sizes.begin(), sizes.end());
  PoolOptions options;
  options.capacity = longest * 8;
  options.page_lock = PageLockMode::off;
  options.slab_bytes = kHugePageBytes;
  const auto pool = Pool::create(options);
  const auto read = [&](uint64_t seed) {
    Random own(seed);
    std::deque<Held> window;
    size_t at = own();
    for (long acquired = 0; acquired < figures.per_pool / 2 / kReaders;) {
      auto region = pool->acquire(sizes[at % sizes.size()], window.empty() ? 60 : 0.0, [] {});
      if (region == nullptr) {
        if (window.empty()) fail("a reader that held nothing waited for a minute in vain");
        check_stamp(window.front());
        window.pop_front();
        continue;
      }
      window.push_back(stamped(std::move(region), seed + static_cast<uint64_t>(++acquired)));
      ++at;
    }
    for (const auto& held : window) check_stamp(held);
  };
  std::vector<std::thread> readers;
  for (int i = 0; i < kReaders; ++i) readers.emplace_back(read, random());
  for (auto& reader : readers) reader.join();
  pool->check_integrity();
  if (pool->largest_free() != pool->capacity()) fail("the pool that threads shared is not one free run");
  const PoolStats stats = pool->stats();
  figures.operations += static_cast<long>(stats.acquires + stats.releases);
}

void run(const char* name, void (*shape)(Random&, Figures&), long operations, Random& random) {
  Figures figures;
  figures.per_pool = operations / kPools;
  for (long i = 0; i < kPools; ++i) shape(random, figures);
  std::printf("%s: operations=%ld", name, figures.operations);
  if (figures.refusals > 0) {
    std::printf(" refusals=%ld full=%.3f early=%.3f late=%.3f least=%.3f spare=%.3f", figures.refusals,
                figures.full.value(), figures.full_early.value(), figures.full_late.value(), figures.least_full,
                figures.most_spare);
  }
  std::printf("\n");
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) fail("usage: pool_soak OPERATIONS SEED");
  const long operations = std::atol(arguments[1]) / 4;  // of each shape
  if (operations < 100 * kPools) fail("OPERATIONS must be at least " + std::to_string(400 * kPools));
  Random random(static_cast<uint64_t>(std::atol(arguments[2])));
  run("fifo", first_in_first_out, operations, random);
  run("nearly fifo", nearly_first_in_first_out, operations, random);
  run("uniform", uniform, operations, random);
  run("threads", threads, operations, random);
  return 0;
}
