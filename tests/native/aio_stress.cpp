// Drives the engine without Python, for the sanitizers: several threads read, write, cancel and drop
// requests at once; every word must hold its own offset. Usage: aio_stress FILE BACKEND...
// Exit status 0 when all is well.

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "aio/engine.h"

namespace aio = zinfer::aio;

namespace {

constexpr std::uint64_t kFileBytes = (2 << 20) + 776;
constexpr int kThreads = 4;
constexpr int kTurns = 80;

std::atomic<int> wrong{0};

void complain(const char* what, std::uint64_t number) {
  std::fprintf(stderr, "%s: %llu\n", what, static_cast<unsigned long long>(number));
  wrong += 1;
}

void write_file(const char* path) {
  std::vector<std::uint64_t> words(kFileBytes / 8);
  for (std::size_t i = 0; i < words.size(); ++i) words[i] = 8 * i;
  const int fd = ::open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  if (fd < 0 || ::write(fd, words.data(), kFileBytes) != static_cast<ssize_t>(kFileBytes)) std::exit(2);
  ::close(fd);
}

// Reads [offset, +length) to a place `shift` bytes into aligned memory, perhaps cancelling, and checks it.
void one_read(aio::Engine& engine, const aio::File& file, std::mt19937& random) {
  const std::uint64_t offset = random() % (kFileBytes / 8) * 8;
  const std::uint64_t length = (random() % (kFileBytes - offset) + 1) & ~std::uint64_t{7};
  const bool slack = random() % 2;
  const std::uint64_t shift = random() % 2 ? offset % 4096 : random() % 4096;
  void* block = nullptr;
  if (::posix_memalign(&block, 4096, kFileBytes + 3 * 4096) != 0) std::exit(2);
  char* const place = static_cast<char*>(block) + shift;
  const bool cancelled = random() % 4 == 0;
  const std::shared_ptr<aio::Request> request =
      engine.read({{&file, static_cast<std::int64_t>(offset), static_cast<std::int64_t>(length),
                    static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(place)), slack}},
                  random() % 3 == 0);
  if (cancelled) engine.cancel(*request);
  request->wait();
  if (const aio::DriveFailure* failure = request->failure()) {
    if (!cancelled) complain(failure->what(), offset);
  } else {
    for (std::uint64_t at = 0; at < length; at += 8) {
      std::uint64_t word = 0;
      std::memcpy(&word, place + at, 8);
      if (word != offset + at) complain("misplaced word at", offset + at);
    }
  }
  std::free(block);
}

// Several threads write every other stripe of a new file; neighbours share blocks. Then it is read back.
void stress_writes(const aio::EngineOptions& options, const std::string& path, aio::DirectMode mode) {
  constexpr std::uint64_t kStripe = 3000, kStripes = 200;
  std::vector<std::uint64_t> words(kStripe * kStripes / 8), seen(words.size());
  for (std::size_t i = 0; i < words.size(); ++i) words[i] = 8 * i;
  aio::File file(path, {aio::FileMode::write, mode, 0});
  {
    aio::Engine engine(options);
    std::vector<std::thread> threads;
    for (std::uint64_t first = 0; first < kThreads; ++first)
      threads.emplace_back([&, first] {
        for (std::uint64_t stripe = first; stripe < kStripes; stripe += kThreads) {
          const auto request = engine.write(
              {{&file, static_cast<std::int64_t>(stripe * kStripe), static_cast<std::int64_t>(kStripe),
                static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(words.data()) + stripe * kStripe), false}},
              stripe % 3 == 0);
          if (stripe % 5 == 0) continue;  // its engine, or close(), waits for it
          request->wait();
          if (request->failure() != nullptr) complain(request->failure()->what(), stripe);
        }
      });
    for (std::thread& thread : threads) thread.join();
    file.close();
    if (!engine.check_integrity().empty()) complain("integrity after writes", 0);
  }
  const int fd = ::open(path.c_str(), O_RDONLY);
  const auto bytes = static_cast<ssize_t>(8 * words.size());
  if (fd < 0 || ::read(fd, seen.data(), 8 * seen.size()) != bytes || seen != words) complain("wrong bytes written", 0);
  ::close(fd);
  ::unlink(path.c_str());
}

void stress(const std::string& backend, const char* path, aio::DirectMode mode) {
  aio::EngineOptions options;
  options.backend = backend;
  options.depth = 5;
  options.block_bytes = 64 << 10;
  if (backend == "faults")
    for (int i = 0; i < 400; ++i) {
      using Kind = aio::Fault::Kind;
      const aio::Fault lines[] = {{Kind::ok, 0},       {Kind::short_transfer, 8192}, {Kind::error, 4},
                                  {Kind::delay, 1e-3}, {Kind::hold, 3},          {Kind::error, 11}};
      options.faults.push_back(lines[i % 6]);
    }
  stress_writes(options, std::string(path) + "-written", mode);
  const aio::File file(path, {aio::FileMode::read, mode, 0});
  aio::Engine engine(options);
  std::vector<std::thread> threads;
  for (int seed = 0; seed < kThreads; ++seed)
    threads.emplace_back([&, seed] {
      std::mt19937 random(static_cast<unsigned>(seed));
      for (int turn = 0; turn < kTurns; ++turn) {
        one_read(engine, file, random);
        if (!engine.check_integrity().empty()) complain("integrity, turn", static_cast<std::uint64_t>(turn));
        if (engine.stats().requests == 0) complain("no requests, turn", static_cast<std::uint64_t>(turn));
      }
    });
  for (std::thread& thread : threads) thread.join();

  // Destroyed with reads queued and in flight: what they write to must stay valid until then.
  std::vector<std::vector<char>> places(20, std::vector<char>(kFileBytes));
  std::vector<std::shared_ptr<aio::Request>> requests;
  {
    aio::Engine last(options);
    for (std::vector<char>& place : places)
      requests.push_back(last.read(
          {{&file, 0, static_cast<std::int64_t>(kFileBytes),
            static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(place.data())), false}},
          false));
  }
  for (const auto& request : requests)
    if (!request->done()) complain("unfinished after its engine", 0);
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) return 2;
  write_file(arguments[1]);
  for (int i = 2; i < count; ++i) {
    stress(arguments[i], arguments[1], aio::DirectMode::automatic);
    if (std::string(arguments[i]) != "libaio") stress(arguments[i], arguments[1], aio::DirectMode::off);
  }
  ::unlink(arguments[1]);
  return wrong == 0 ? 0 : 1;
}
