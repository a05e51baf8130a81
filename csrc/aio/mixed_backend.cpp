// Direct operations to a backend that can do nothing else, buffered ones to a pool of threads beside it.

#include <utility>

#include "aio/backend.h"

namespace zinfer::aio {

namespace {

class MixedBackend final : public Backend {
 public:
  MixedBackend(std::unique_ptr<Backend> direct, unsigned workers)
      : direct_(std::move(direct)), threads_(make_threads_backend(workers, [this] { direct_->wake(); })) {}

  const char* name() const override { return direct_->name(); }

  void submit(const std::vector<Op>& ops) override {
    direct_ops_.clear();
    buffered_ops_.clear();
    for (const Op& op : ops) (op.direct ? direct_ops_ : buffered_ops_).push_back(op);
    if (!direct_ops_.empty()) direct_->submit(direct_ops_);
    if (buffered_ops_.empty()) return;
    buffered_in_flight_ += buffered_ops_.size();
    threads_->submit(buffered_ops_);
  }

  // One place to sleep: a buffered operation that ends wakes the direct backend.
  void wait(std::vector<Completion>& completions) override {
    direct_->wait(completions);
    if (buffered_in_flight_ == 0) return;
    const std::size_t before = completions.size();
    threads_->wake();  // take what there is, do not sleep
    threads_->wait(completions);
    buffered_in_flight_ -= completions.size() - before;
  }

  void wake() override { direct_->wake(); }

 private:
  std::unique_ptr<Backend> direct_;
  std::unique_ptr<Backend> threads_;  // after direct_: its workers, which wake direct_, end first
  std::size_t buffered_in_flight_ = 0;
  std::vector<Op> direct_ops_;
  std::vector<Op> buffered_ops_;
};

}  // namespace

std::unique_ptr<Backend> make_mixed_backend(std::unique_ptr<Backend> direct, unsigned workers) {
  return std::make_unique<MixedBackend>(std::move(direct), workers);
}

}  // namespace zinfer::aio
