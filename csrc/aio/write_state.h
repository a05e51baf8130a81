// What a file open for writing knows besides its descriptor: who writes it, how far, how long it will be.
//
//   file     |####|####|##..|    |         # = written, . = zeros that complete the last block
//                      ^size ^touched      close() cuts the file at size
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

namespace zinfer::aio {

// Shared by the descriptor, its File and the claims on it; gone with the last of them. Any thread may call any
// method; touch() is for the one engine that has claims.
class WriteState {
 public:
  explicit WriteState(std::uint64_t size) : size_(size) {}

  // Throws ClosedFailure once refused, OptionFailure while another engine has claims: blocks that two requests
  // share are kept whole by the one reactor that sees both.
  void claim(const std::string& path, const void* engine);
  void release();
  // No claim succeeds any more; returns when the last has been released.
  void refuse_and_wait();

  // Marks [first, last). Whether nothing at or behind `first` was marked before: there the file holds zeros.
  bool touch(std::uint64_t first, std::uint64_t last);
  // Bytes up to `end` are in the file.
  void wrote(std::uint64_t end);
  // Bytes: what was reserved or, if that is more, the end of what was written.
  std::uint64_t size() const;

 private:
  mutable std::mutex mutex_;
  std::condition_variable released_;
  std::uint64_t size_;
  std::uint64_t touched_ = 0;
  std::size_t claims_ = 0;
  const void* engine_ = nullptr;  // of the claims; only ever compared
  bool refused_ = false;
};

// One request's right to write to a file, from submission until the request has ended: owned by its Work, given
// back by the reactor's thread. Move-only.
class WriteClaim {
 public:
  WriteClaim(std::shared_ptr<WriteState> state, const std::string& path, const void* engine)
      : state_(std::move(state)) {
    state_->claim(path, engine);
  }
  ~WriteClaim() {
    if (state_) state_->release();
  }
  WriteClaim(WriteClaim&&) = default;
  WriteClaim& operator=(WriteClaim&&) = delete;

 private:
  std::shared_ptr<WriteState> state_;
};

}  // namespace zinfer::aio
