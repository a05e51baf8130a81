// Random reads and writes through the scripted-fault backend: short, zero, EINTR, EAGAIN, EIO, late, out of
// order, some cancelled. Every byte is right or its request failed, and nothing is left over: no region of the
// pinned pool, no descriptor, no request. Usage: aio_soak FOLDER REQUESTS SEED. Exit status 0 when all is well.

#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "aio/engine.h"
#include "pinned/pool.h"

namespace aio = zinfer::aio;
namespace pinned = zinfer::pinned;

namespace {

constexpr std::uint64_t kFileBytes = (256 << 10) + 777;
constexpr std::uint64_t kStripeBytes = 5003;  // neighbours share blocks
constexpr std::uint64_t kStripes = 64;
constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kLongest = 24 << 10;
constexpr long kRound = 10000;  // requests of one engine
constexpr std::size_t kWindow = 24;

struct Totals {
  long served = 0, failed = 0, cancelled = 0, wrong = 0, left = 0;
};
Totals totals;

void complain(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  totals.wrong += 1;
}

long open_descriptors() {
  DIR* const folder = ::opendir("/proc/self/fd");
  long count = 0;
  while (::readdir(folder) != nullptr) ++count;
  ::closedir(folder);
  return count;
}

// Every 8-byte word holds its own offset.
std::vector<char> words(std::uint64_t bytes) {
  std::vector<std::uint64_t> numbers(bytes / 8 + 1);
  for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = 8 * i;
  const char* const first = reinterpret_cast<const char*>(numbers.data());
  return std::vector<char>(first, first + bytes);
}

std::vector<aio::Fault> random_script(std::mt19937& random) {
  using Kind = aio::Fault::Kind;
  std::vector<aio::Fault> script;
  for (long i = 0; i < 3 * kRound; ++i) {
    const unsigned dice = random() % 100;
    if (dice < 10) script.push_back({Kind::short_transfer, static_cast<double>(random() % 9000 + 1)});
    else if (dice < 15) script.push_back({Kind::error, EINTR});
    else if (dice < 18) script.push_back({Kind::error, EAGAIN});
    else if (dice < 20) script.push_back({Kind::error, EIO});
    else if (dice < 22) script.push_back({Kind::zero, 0});
    else if (dice < 24) script.push_back({Kind::delay, 1e-6 * (random() % 50)});
    else if (dice < 36) script.push_back({Kind::hold, static_cast<double>(random() % 8 + 1)});
    else script.push_back({Kind::ok, 0});
  }
  return script;
}

// One request under way and what it must leave behind.
struct Flight {
  std::shared_ptr<aio::Request> request;
  std::unique_ptr<pinned::Region> region;
  const char* place = nullptr;
  std::uint64_t offset = 0, length = 0;
  long stripe = -1;  // of a write
  bool cancelled = false;
};

class Round {
 public:
  Round(const std::string& folder, const std::vector<char>& contents, pinned::Pool& pool, std::mt19937& random)
      : contents_(contents),
        pool_(pool),
        random_(random),
        direct_(random() % 4 ? aio::DirectMode::automatic : aio::DirectMode::off),
        path_(folder + "/soak-written"),
        source_(folder + "/soak-words", {aio::FileMode::read, direct_, 0}),
        target_(path_, {aio::FileMode::write, direct_, random() % 2 ? kStripes * kStripeBytes : 0}),
        stripes_(kStripes) {
    aio::EngineOptions options;
    options.backend = "faults";
    options.depth = static_cast<std::int64_t>(random() % 12 + 1);
    options.block_bytes = 8192;
    options.bounce_slot_bytes = 8192;
    options.faults = random_script(random);
    engine_ = std::make_unique<aio::Engine>(options);
  }

  void run(long requests) {
    for (long i = 0; i < requests; ++i) {
      if (flights_.size() == kWindow) end_oldest();
      random_() % 10 < 7 ? start_read() : start_write();
      if (random_() % 50 == 0) {
        flights_.back().cancelled = true;
        engine_->cancel(*flights_.back().request);
      }
    }
    while (!flights_.empty()) end_oldest();
    engine_->close();
    if (!engine_->check_integrity().empty()) complain("integrity: " + engine_->check_integrity());
    if (engine_->stats().requests != static_cast<std::uint64_t>(requests)) complain("requests were lost");
    engine_.reset();
    source_.close();
    target_.close();
    check_written();
  }

 private:
  enum class Stripe { empty, whole, unknown };
  struct StripeState {
    Stripe state = Stripe::empty;
    char value = 0;
    bool busy = false;
  };

  void start_read() {
    Flight flight;
    flight.offset = random_() % kFileBytes;
    flight.length = random_() % std::min(kFileBytes - flight.offset, kLongest) + 1;
    const bool slack = random_() % 3 == 0;
    char* const place = take_place(flight);
    flight.request = engine_->read({extent(source_, flight, place, slack)}, random_() % 5 == 0);
    flights_.push_back(std::move(flight));
  }

  void start_write() {
    Flight flight;
    do {
      flight.stripe = static_cast<long>(random_() % kStripes);
    } while (stripes_[static_cast<std::size_t>(flight.stripe)].busy);
    StripeState& stripe = stripes_[static_cast<std::size_t>(flight.stripe)];
    stripe.busy = true;
    stripe.value = static_cast<char>(random_() % 255 + 1);
    flight.offset = static_cast<std::uint64_t>(flight.stripe) * kStripeBytes;
    flight.length = kStripeBytes;
    char* const place = take_place(flight);
    std::memset(place, stripe.value, flight.length);
    flight.request = engine_->write({extent(target_, flight, place, false)}, random_() % 5 == 0);
    flights_.push_back(std::move(flight));
  }

  char* take_place(Flight& flight) {
    flight.region = pool_.try_acquire(static_cast<std::int64_t>(flight.length + 3 * kPage));
    if (!flight.region) std::exit(2);
    const std::uint64_t shift = random_() % 2 ? flight.offset % kPage : random_() % kPage;
    char* const place = reinterpret_cast<char*>(flight.region->data()) + kPage + shift;
    flight.place = place;
    return place;
  }

  static aio::MemoryExtent extent(const aio::File& file, const Flight& flight, char* place, bool slack) {
    return {&file, static_cast<std::int64_t>(flight.offset), static_cast<std::int64_t>(flight.length),
            static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(place)), slack};
  }

  void end_oldest() {
    const Flight flight = std::move(flights_.front());
    flights_.pop_front();
    if (!flight.request->wait_for(std::chrono::seconds(20))) {
      complain("a request hangs");
      std::_Exit(1);
    }
    const aio::DriveFailure* const failure = flight.request->failure();
    (failure == nullptr ? totals.served : failure->error == ECANCELED ? totals.cancelled : totals.failed) += 1;
    if (failure != nullptr && failure->error == ECANCELED && !flight.cancelled) complain("cancelled by nobody");
    if (flight.stripe >= 0) {
      StripeState& stripe = stripes_[static_cast<std::size_t>(flight.stripe)];
      stripe.busy = false;
      stripe.state = failure == nullptr ? Stripe::whole : Stripe::unknown;
    } else if (failure == nullptr &&
               std::memcmp(flight.place, contents_.data() + flight.offset, flight.length) != 0) {
      complain("wrong bytes were read at " + std::to_string(flight.offset));
    }
  }

  void check_written() {
    std::vector<char> bytes(kStripes * kStripeBytes);
    const int fd = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    const ssize_t got = ::pread(fd, bytes.data(), bytes.size(), 0);
    ::close(fd);
    for (std::uint64_t i = 0; i < kStripes; ++i) {
      const StripeState& stripe = stripes_[i];
      if (stripe.state == Stripe::unknown) continue;
      const char value = stripe.state == Stripe::whole ? stripe.value : '\0';
      const std::uint64_t first = i * kStripeBytes;
      if (stripe.state == Stripe::whole && static_cast<std::uint64_t>(got) < first + kStripeBytes)
        complain("the written file is too short");
      for (std::uint64_t at = first; at < first + kStripeBytes; ++at)
        if (bytes[at] != value) {
          complain("a wrong byte was written at " + std::to_string(at));
          break;
        }
    }
  }

  const std::vector<char>& contents_;
  pinned::Pool& pool_;
  std::mt19937& random_;
  const aio::DirectMode direct_;
  const std::string path_;
  aio::File source_;
  aio::File target_;
  std::vector<StripeState> stripes_;
  std::unique_ptr<aio::Engine> engine_;
  std::deque<Flight> flights_;
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  const std::string folder = arguments[1];
  const long requests = std::atol(arguments[2]);
  std::mt19937 random(static_cast<unsigned>(std::atol(arguments[3])));
  const std::vector<char> contents = words(kFileBytes);
  const int fd = ::open((folder + "/soak-words").c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  if (fd < 0 || ::write(fd, contents.data(), contents.size()) != static_cast<ssize_t>(contents.size())) return 2;
  ::close(fd);

  pinned::PoolOptions options;
  options.capacity = 4 << 20;
  options.page_lock = pinned::PageLockMode::off;
  const std::shared_ptr<pinned::Pool> pool = pinned::Pool::create(options);
  const long before = open_descriptors();
  for (long done = 0; done < requests; done += kRound) {
    Round(folder, contents, *pool, random).run(std::min(kRound, requests - done));
    pool->check_integrity();
    totals.left += static_cast<long>(pool->stats().regions) + std::labs(open_descriptors() - before);
  }
  ::unlink((folder + "/soak-words").c_str());
  ::unlink((folder + "/soak-written").c_str());
  std::printf("%ld served, %ld failed, %ld cancelled, %ld wrong, %ld left over\n", totals.served, totals.failed,
              totals.cancelled, totals.wrong, totals.left);
  return totals.wrong == 0 && totals.left == 0 ? 0 : 1;
}
