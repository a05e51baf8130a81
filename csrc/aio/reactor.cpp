#include "aio/reactor.h"

#include <pthread.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

namespace zinfer::aio {

namespace {

using Clock = std::chrono::steady_clock;

constexpr unsigned kMaxTries = 1000;  // EINTR and EAGAIN on one piece
constexpr unsigned kMaxStalls = 3;    // a direct read that ends mid-block again and again: the file's end
constexpr long kMaxNapNanoseconds = 1000000;

void nap(unsigned tries) {
  const timespec pause{0, std::min(kMaxNapNanoseconds, 20000L * static_cast<long>(tries))};
  ::nanosleep(&pause, nullptr);
}

bool failing(const Work& work) { return work.failure.has_value() || work.request->cancelled(); }

}  // namespace

Reactor::Reactor(std::unique_ptr<Backend> backend, unsigned depth, std::uint64_t bounce_slot_bytes, int event_fd)
    : depth_(depth),
      event_fd_(event_fd),
      backend_name_(backend->name()),
      backend_(std::move(backend)),
      bounce_(depth, bounce_slot_bytes),
      operations_(depth) {
  for (std::size_t token = depth; token-- > 0;) free_tokens_.push_back(token);
  // Signals belong to the program's own threads.
  sigset_t all, before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  std::string failure;
  try {
    thread_ = std::thread([this] { run(); });
  } catch (const std::system_error& error) {
    failure = error.what();
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (!failure.empty())
    throw OptionFailure("cannot start the engine's thread: " + failure + "; close engines or raise `ulimit -u`");
}

Reactor::~Reactor() { stop(); }

void Reactor::submit(std::shared_ptr<Work> work) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_) throw ClosedFailure("the engine was closed; make a new one");
  stats_.requests += 1;
  stats_.bytes_requested += work->request->nbytes();
  open_requests_ += 1;
  inbox_.push_back(std::move(work));
  backend_->wake();
}

void Reactor::notice_cancelled() {
  std::lock_guard<std::mutex> lock(mutex_);
  look_for_cancelled_ = true;
  if (backend_) backend_->wake();
}

void Reactor::cancel_all() {
  std::lock_guard<std::mutex> lock(mutex_);
  cancelling_all_ = true;
  if (backend_) backend_->wake();
}

void Reactor::stop() {
  std::lock_guard<std::mutex> one_at_a_time(stop_mutex_);
  if (!thread_.joinable()) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    backend_->wake();
  }
  thread_.join();
  std::unique_ptr<Backend> last;  // ends outside the lock: it may join threads of its own
  std::lock_guard<std::mutex> lock(mutex_);
  last.swap(backend_);
  bounce_.release();
  published_slots_mapped_ = published_slots_free_ = 0;
}

Stats Reactor::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  Stats now = stats_;
  if (busy_since_) now.busy_seconds += std::chrono::duration<double>(Clock::now() - *busy_since_).count();
  return now;
}

std::string Reactor::check_integrity() const {
  std::lock_guard<std::mutex> lock(mutex_);
  const std::size_t used = published_slots_mapped_ - published_slots_free_;
  if (used > depth_) return std::to_string(used) + " bounce slots in use, depth is " + std::to_string(depth_);
  if (published_in_flight_ > depth_) return std::to_string(published_in_flight_) + " pieces in flight exceed the depth";
  if (open_requests_ > 0) return "";
  if (published_in_flight_ > 0) return std::to_string(published_in_flight_) + " pieces in flight without a request";
  if (published_queued_ > 0 || !inbox_.empty()) return "requests are queued that have ended";
  if (used > 0) return std::to_string(used) + " bounce slots are missing";
  if (busy_since_) return "an idle engine counts itself busy";
  return "";
}

// One turn: take new work, drop what was cancelled, fill the backend up to the depth, tell the waiters,
// sleep until something completes or someone calls.
void Reactor::run() {
  ::pthread_setname_np(::pthread_self(), "zinfer-aio");
  while (true) {
    take_inbox();
    drop_cancelled();
    fill();
    publish();
    if (stop_ && urgent_.empty() && normal_.empty() && free_tokens_.size() == depth_) return;
    completions_.clear();
    backend_->wait(completions_);
    again_ = 0;
    now_ = Clock::now();
    for (const Completion& completion : completions_) complete(completion);
    if (again_ > 0) nap(again_);
  }
}

void Reactor::take_inbox() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (std::shared_ptr<Work>& work : inbox_) (work->urgent ? urgent_ : normal_).push_back(std::move(work));
  inbox_.clear();
  stop_ = stopping_;
  drop_all_ = std::exchange(cancelling_all_, false);
  look_ = std::exchange(look_for_cancelled_, false) || drop_all_;
}

void Reactor::drop_cancelled() {
  if (!look_) return;
  if (drop_all_) {
    for (const Operation& operation : operations_)
      if (operation.work) operation.work->request->mark_cancelled();
    for (auto* queue : {&urgent_, &normal_})
      for (const std::shared_ptr<Work>& work : *queue) work->request->mark_cancelled();
  }
  for (auto* queue : {&urgent_, &normal_}) {
    std::deque<std::shared_ptr<Work>> kept;
    for (std::shared_ptr<Work>& work : *queue) {
      if (!work->request->cancelled()) {  // looked at once: it may be set at any time
        kept.push_back(std::move(work));
        continue;
      }
      work->next = work->pieces.size();
      end_if_drained(work);
    }
    queue->swap(kept);
  }
}

void Reactor::fill() {
  now_ = Clock::now();
  ops_.clear();
  for (const std::size_t token : retries_) {
    if (failing(*operations_[token].work))
      end_operation(token);
    else
      issue(token);
  }
  retries_.clear();
  std::size_t kept = 0;
  for (const std::size_t token : parked_) {
    if (failing(*operations_[token].work))
      end_operation(token);
    else if (must_wait(operations_[token]))
      parked_[kept++] = token;
    else
      issue(token);
  }
  parked_.resize(kept);
  for (auto* queue : {&urgent_, &normal_}) {
    while (!queue->empty()) {
      const std::shared_ptr<Work> work = queue->front();
      while (work->next < work->pieces.size() && !failing(*work))
        if (!start(work)) break;
      const bool all_started = work->next == work->pieces.size() || failing(*work);
      if (!all_started) break;  // the depth is reached
      work->next = work->pieces.size();
      queue->pop_front();
      end_if_drained(work);
    }
  }
  if (!ops_.empty()) backend_->submit(ops_);
}

// Starts the next piece. False when the depth is reached.
bool Reactor::start(const std::shared_ptr<Work>& work) {
  if (free_tokens_.empty()) return false;
  const Piece& piece = work->pieces[work->next];
  // As many slots as operations: a piece never waits for a slot that another one holds.
  char* slot = piece.bounced ? bounce_.take() : nullptr;
  if (piece.bounced && slot == nullptr) {
    fail(*work, failure_of(*work, piece, ENOMEM));
    return true;
  }
  const std::size_t token = free_tokens_.back();
  free_tokens_.pop_back();
  Operation& operation = operations_[token];
  operation = Operation{};
  operation.work = work;
  operation.piece = piece;
  operation.slot = slot;
  operation.order = ++started_;
  work->next += 1;
  work->in_flight += 1;
  delta_.pieces += 1;
  if (work->writing) prepare_write(operation);
  if (work->writing && must_wait(operation))
    parked_.push_back(token);
  else
    issue(token);
  return true;
}

// Fills the slot of a bounced write; the block of an edge must be fetched first, unless it holds only zeros.
void Reactor::prepare_write(Operation& operation) {
  const Piece& piece = operation.piece;
  const Descriptor& file = *operation.work->files[piece.file];
  const bool fresh = file.writing()->touch(piece.span_offset, piece.span_offset + piece.span_length);
  if (operation.slot == nullptr) return;
  const bool edge = piece.span_length != piece.length;
  operation.fetching = edge && !fresh;
  if (operation.fetching) return;
  if (edge) std::memset(operation.slot, 0, piece.span_length);
  change_block(operation);
}

bool Reactor::must_wait(const Operation& operation) const {
  const Piece& piece = operation.piece;
  const Descriptor* const file = operation.work->files[piece.file].get();
  return std::any_of(operations_.begin(), operations_.end(), [&](const Operation& other) {
    return other.work && other.order < operation.order && other.work->writing &&
           other.work->files[other.piece.file].get() == file &&
           other.piece.span_offset < piece.span_offset + piece.span_length &&
           piece.span_offset < other.piece.span_offset + other.piece.span_length;
  });
}

// Queues the rest of the operation's transfer, from where it resumes.
void Reactor::issue(std::size_t token) {
  Operation& operation = operations_[token];
  operation.issued = now_;
  operation.work->request->mark_started(now_);
  const Piece& piece = operation.piece;
  const Descriptor& file = *operation.work->files[piece.file];
  char* const start = operation.slot != nullptr
                          ? operation.slot
                          : reinterpret_cast<char*>(piece.address - (piece.offset - piece.span_offset));
  Op op;
  op.kind = operation.work->writing && !operation.fetching ? OpKind::write : OpKind::read;
  op.fd = file.fd();
  op.direct = file.facts().direct;
  op.address = start + operation.resume_at;
  op.length = piece.span_length - operation.resume_at;
  op.offset = piece.span_offset + operation.resume_at;
  op.token = token;
  ops_.push_back(op);
}

void Reactor::complete(const Completion& completion) {
  const auto token = static_cast<std::size_t>(completion.token);
  Operation& operation = operations_[token];
  Work& work = *operation.work;
  const Piece& piece = operation.piece;
  if (completion.result < 0) {
    const int error = static_cast<int>(-completion.result);
    const bool transient = error == EINTR || error == EAGAIN;
    if (failing(work)) return end_operation(token);
    if (transient && operation.tries < kMaxTries) return retry(token);
    fail(work, failure_of(work, piece, error));
    return end_operation(token);
  }
  latencies_.add(static_cast<std::uint64_t>(std::chrono::nanoseconds(now_ - operation.issued).count()));
  const auto got = static_cast<std::uint64_t>(completion.result);
  delta_.bytes_transferred += got;
  work.transferred += got;
  if (failing(work)) return end_operation(token);
  const std::uint64_t arrived = operation.resume_at + got;
  // What a read brings behind the wanted bytes is of no interest.
  const std::uint64_t wanted = work.writing ? piece.span_length : piece.offset + piece.length - piece.span_offset;
  if (arrived >= wanted) return end_transfer(token);
  // A direct read that ends inside a block is the file's end, or a drive that came up short: ask again.
  const Descriptor& file = *work.files[piece.file];
  const bool stalled = arrived <= operation.delivered;
  if (stalled && operation.fetching && file.size_now() <= piece.span_offset + arrived) {
    std::memset(operation.slot + arrived, 0, piece.span_length - arrived);
    return end_transfer(token);
  }
  const bool hopeless = stalled && ++operation.stalls >= kMaxStalls;
  if (work.writing && hopeless) {
    fail(work, failure_of(work, piece, EIO));
    return end_operation(token);
  }
  if (!work.writing && (got == 0 || hopeless)) {
    const std::uint64_t seen = piece.span_offset + std::max(arrived, operation.delivered);
    const std::uint64_t end = std::min(seen, file.size_now());  // a read behind the end sees only zero
    fail(work, ended_early(file.facts().path, piece.offset, piece.length, end, backend_name_));
    return end_operation(token);
  }
  resume(token, arrived);
}

// All bytes of the span have been moved.
void Reactor::end_transfer(std::size_t token) {
  Operation& operation = operations_[token];
  const Piece& piece = operation.piece;
  if (!operation.work->writing) {
    deliver(operation);
    return end_operation(token);
  }
  if (!operation.fetching) {
    operation.work->files[piece.file]->writing()->wrote(piece.offset + piece.length);
    return end_operation(token);
  }
  change_block(operation);
  operation.fetching = false;
  operation.resume_at = operation.delivered = 0;
  operation.stalls = 0;
  retries_.push_back(token);
}

void Reactor::deliver(Operation& operation) {
  if (operation.slot == nullptr) return;
  const Piece& piece = operation.piece;
  std::memcpy(reinterpret_cast<char*>(piece.address), operation.slot + (piece.offset - piece.span_offset),
              piece.length);
  delta_.bounced_bytes += piece.length;
}

void Reactor::change_block(Operation& operation) {
  const Piece& piece = operation.piece;
  std::memcpy(operation.slot + (piece.offset - piece.span_offset), reinterpret_cast<const char*>(piece.address),
              piece.length);
  delta_.bounced_bytes += piece.length;
}

void Reactor::retry(std::size_t token) {
  Operation& operation = operations_[token];
  again_ = std::max(again_, ++operation.tries);
  delta_.retries += 1;
  retries_.push_back(token);
}

void Reactor::resume(std::size_t token, std::uint64_t arrived) {
  Operation& operation = operations_[token];
  const std::uint64_t alignment = operation.work->files[operation.piece.file]->facts().alignment;
  operation.delivered = std::max(operation.delivered, arrived);
  operation.resume_at = arrived / alignment * alignment;
  delta_.retries += 1;
  retries_.push_back(token);
}

// The first failure is the request's; the pieces not yet started are dropped by fill().
void Reactor::fail(Work& work, const DriveFailure& failure) {
  if (!work.failure) work.failure = failure;
}

void Reactor::end_operation(std::size_t token) {
  Operation& operation = operations_[token];
  if (operation.slot != nullptr) bounce_.give(operation.slot);
  const std::shared_ptr<Work> work = std::move(operation.work);
  operation = Operation{};
  free_tokens_.push_back(token);
  work->in_flight -= 1;
  end_if_drained(work);
}

void Reactor::end_if_drained(const std::shared_ptr<Work>& work) {
  if (work->in_flight > 0 || work->next < work->pieces.size()) return;
  if (!work->failure && work->request->cancelled()) work->failure = cancelled_failure(*work);
  if (work->failure && work->failure->error != ECANCELED) delta_.errors += 1;
  ended_.push_back(work);
}

// Brings the shared figures up to date, then tells the waiters: who sees done sees figures that include it.
void Reactor::publish() {
  const std::size_t in_flight = depth_ - free_tokens_.size();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const Clock::time_point now = Clock::now();
    if (in_flight > 0 && !busy_since_) busy_since_ = now;
    if (in_flight == 0 && busy_since_) {
      stats_.busy_seconds += std::chrono::duration<double>(now - *busy_since_).count();
      busy_since_.reset();
    }
    stats_.pieces += delta_.pieces;
    stats_.bytes_transferred += delta_.bytes_transferred;
    stats_.bounced_bytes += delta_.bounced_bytes;
    stats_.retries += delta_.retries;
    stats_.errors += delta_.errors;
    open_requests_ -= ended_.size();
    published_in_flight_ = in_flight;
    published_queued_ = urgent_.size() + normal_.size();
    published_slots_mapped_ = bounce_.mapped();
    published_slots_free_ = bounce_.free();
  }
  delta_ = Stats{};
  for (const std::shared_ptr<Work>& work : ended_) {
    work->files.clear();   // descriptors first: who sees done may count them
    work->claims.clear();  // then, so that who closes a written file holds the last of its descriptor
    work->request->finish(std::move(work->failure), work->transferred);
    const std::uint64_t one = 1;
    if (::write(event_fd_, &one, sizeof one) != sizeof one) continue;  // a full counter is readable anyway
  }
  ended_.clear();
}

DriveFailure Reactor::failure_of(const Work& work, const Piece& piece, int error) const {
  const FileFacts& file = work.files[piece.file]->facts();
  return transfer_failure(work.writing, file.path, piece.offset, piece.length, error, backend_name_, file.direct);
}

DriveFailure Reactor::cancelled_failure(const Work& work) const {
  if (work.pieces.empty()) return DriveFailure("an empty request was cancelled", "", 0, 0, ECANCELED, backend_name_);
  return failure_of(work, work.pieces.front(), ECANCELED);
}

}  // namespace zinfer::aio
