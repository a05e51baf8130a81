// A pool of threads that call pread and pwrite: works on every kernel, container and file system.

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "aio/backend.h"
#include "aio/errors.h"

namespace zinfer::aio {

namespace {

class ThreadsBackend final : public Backend {
 public:
  ThreadsBackend(unsigned workers, std::function<void()> on_completion) : on_completion_(std::move(on_completion)) {
    // Signals belong to the program's own threads.
    sigset_t all, before;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);
    std::string failure;
    try {
      for (unsigned i = 0; i < workers; ++i) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error& error) {
      failure = error.what();
    }
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (failure.empty()) return;
    join();
    throw OptionFailure("cannot start " + std::to_string(workers) + " threads: " + failure +
                        "; lower workers or raise `ulimit -u`");
  }

  ~ThreadsBackend() override { join(); }

  const char* name() const override { return "threads"; }

  void submit(const std::vector<Op>& ops) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ops_.insert(ops_.end(), ops.begin(), ops.end());
    }
    if (ops.size() == 1)
      ops_ready_.notify_one();
    else
      ops_ready_.notify_all();
  }

  void wait(std::vector<Completion>& completions) override {
    std::unique_lock<std::mutex> lock(mutex_);
    completions_ready_.wait(lock, [this] { return woken_ || !completed_.empty(); });
    woken_ = false;
    completions.insert(completions.end(), completed_.begin(), completed_.end());
    completed_.clear();
  }

  void wake() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      woken_ = true;
    }
    completions_ready_.notify_one();
  }

 private:
  void join() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    ops_ready_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  void work() {
    ::pthread_setname_np(::pthread_self(), "zinfer-pread");
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      ops_ready_.wait(lock, [this] { return stopping_ || !ops_.empty(); });
      if (ops_.empty()) return;
      const Op op = ops_.front();
      ops_.pop_front();
      lock.unlock();
      const auto offset = static_cast<off_t>(op.offset);
      const ssize_t got = op.kind == OpKind::write ? ::pwrite(op.fd, op.address, op.length, offset)
                                                   : ::pread(op.fd, op.address, op.length, offset);
      const std::int64_t result = got < 0 ? -errno : got;
      lock.lock();
      completed_.push_back({op.token, result});
      completions_ready_.notify_one();
      if (on_completion_) on_completion_();
    }
  }

  const std::function<void()> on_completion_;
  std::mutex mutex_;  // guards all below but workers_
  std::condition_variable ops_ready_;
  std::condition_variable completions_ready_;
  std::deque<Op> ops_;
  std::vector<Completion> completed_;
  bool woken_ = false;
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace

std::unique_ptr<Backend> make_threads_backend(unsigned workers, std::function<void()> on_completion) {
  return std::make_unique<ThreadsBackend>(workers, std::move(on_completion));
}

}  // namespace zinfer::aio
