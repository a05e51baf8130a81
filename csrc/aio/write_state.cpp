#include "aio/write_state.h"

#include "aio/errors.h"

namespace zinfer::aio {

void WriteState::claim(const std::string& path, const void* engine) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (refused_) throw ClosedFailure(path + ": the file was closed; open it again to write it");
  if (claims_ > 0 && engine_ != engine)
    throw OptionFailure(path + ": another engine is writing to this file; wait for its requests, or use that engine");
  engine_ = engine;
  claims_ += 1;
}

void WriteState::release() {
  std::lock_guard<std::mutex> lock(mutex_);
  claims_ -= 1;
  if (claims_ == 0) released_.notify_all();
}

void WriteState::refuse_and_wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  refused_ = true;
  released_.wait(lock, [this] { return claims_ == 0; });
}

bool WriteState::touch(std::uint64_t first, std::uint64_t last) {
  std::lock_guard<std::mutex> lock(mutex_);
  const bool fresh = first >= touched_;
  touched_ = std::max(touched_, last);
  return fresh;
}

void WriteState::wrote(std::uint64_t end) {
  std::lock_guard<std::mutex> lock(mutex_);
  size_ = std::max(size_, end);
}

std::uint64_t WriteState::size() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return size_;
}

}  // namespace zinfer::aio
