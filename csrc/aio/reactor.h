// One thread that owns a backend and holds all policy on operations: order, depth, retries, short reads,
// bounce copies, draining. See the loop in reactor.cpp.
//
// The reactor never calls back: it ends requests (Request::finish) and counts them on an eventfd, so it
// needs no lock of its users, least of all Python's.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "aio/backend.h"
#include "aio/bounce.h"
#include "aio/file.h"
#include "aio/latency.h"
#include "aio/request.h"
#include "aio/split.h"
#include "aio/write_state.h"

namespace zinfer::aio {

// Plain value: totals under the reactor's lock, handed out as copies.
struct Stats {
  std::uint64_t requests = 0;
  std::uint64_t pieces = 0;
  std::uint64_t bytes_requested = 0;
  std::uint64_t bytes_transferred = 0;  // what the drive delivered and took, aligned supersets included
  std::uint64_t bounced_bytes = 0;      // copied out of and into bounce slots
  std::uint64_t retries = 0;            // operations submitted again: EINTR, EAGAIN, short reads and writes
  std::uint64_t errors = 0;             // failed requests; cancelled ones are not counted
  double busy_seconds = 0;              // with at least one operation in flight
};

// A request and what remains of it. Made by the submitting thread; after submission the reactor's alone, which
// drops it when the request has ended.
struct Work {
  std::shared_ptr<Request> request;
  std::vector<std::shared_ptr<const Descriptor>> files;  // Piece::file indexes this
  std::vector<WriteClaim> claims;  // on those files; empty for a read
  std::vector<Piece> pieces;
  bool writing = false;
  bool urgent = false;
  std::size_t next = 0;       // first piece not submitted yet
  std::size_t in_flight = 0;  // pieces submitted and not ended
  std::uint64_t transferred = 0;  // bytes moved by its operations
  std::optional<DriveFailure> failure;
};

// Owned by one Engine. Who may call what is said at each method; its thread ends in stop(), at the latest in the
// destructor.
class Reactor {
 public:
  // Takes over the backend and starts the thread; completed requests are counted on event_fd. Throws OptionFailure.
  Reactor(std::unique_ptr<Backend> backend, unsigned depth, std::uint64_t bounce_slot_bytes, int event_fd);
  // stop()s.
  ~Reactor();

  // Any thread. Throws ClosedFailure after stop().
  void submit(std::shared_ptr<Work> work);
  // Any thread: look at the cancelled marks of the queued requests.
  void notice_cancelled();
  // Any thread: cancels all that is queued or in flight; does not wait.
  void cancel_all();
  // Any thread: refuses new work, drains, joins, gives back the backend and the slots. Idempotent.
  void stop();

  Stats stats() const;
  const LatencyHistogram& latencies() const { return latencies_; }
  // What is wrong, or "" when nothing is.
  std::string check_integrity() const;

 private:
  // An operation slot, one of `depth` that live as long as the reactor, whose thread alone touches them. Its index
  // is the token the backend hands back.
  //
  //   free -> [parked ->] in flight -> (retry -> in flight)* -> free
  //
  // A write is parked while an earlier one overlaps its blocks: so overlapping writes land in the order in
  // which they were started, and an edge is read, changed and written with nobody in between.
  struct Operation {
    std::shared_ptr<Work> work;
    Piece piece;
    char* slot = nullptr;          // bounce memory, or null
    std::uint64_t order = 0;       // counts operations as they start
    bool fetching = false;         // an edge whose block is being read, to be changed and written
    std::uint64_t resume_at = 0;   // bytes of the span that need not be moved again (aligned)
    std::uint64_t delivered = 0;   // bytes of the span that have been moved
    std::chrono::steady_clock::time_point issued{};
    unsigned tries = 0;            // EINTR and EAGAIN so far
    unsigned stalls = 0;           // resumed transfers that brought nothing new
  };

  void run();
  void take_inbox();
  void drop_cancelled();
  void fill();
  bool start(const std::shared_ptr<Work>& work);
  void prepare_write(Operation& operation);
  bool must_wait(const Operation& operation) const;
  void issue(std::size_t token);
  void complete(const Completion& completion);
  void end_transfer(std::size_t token);
  void deliver(Operation& operation);
  void change_block(Operation& operation);
  void retry(std::size_t token);
  void resume(std::size_t token, std::uint64_t arrived);
  void fail(Work& work, const DriveFailure& failure);
  void end_operation(std::size_t token);
  void end_if_drained(const std::shared_ptr<Work>& work);
  void publish();
  DriveFailure failure_of(const Work& work, const Piece& piece, int error) const;
  DriveFailure cancelled_failure(const Work& work) const;

  const unsigned depth_;
  const int event_fd_;
  const std::string backend_name_;

  mutable std::mutex mutex_;  // guards the block below
  std::unique_ptr<Backend> backend_;  // replaced only by stop(), after the thread has ended
  std::deque<std::shared_ptr<Work>> inbox_;
  bool stopping_ = false;
  bool cancelling_all_ = false;
  bool look_for_cancelled_ = false;
  std::size_t open_requests_ = 0;
  Stats stats_;
  std::size_t published_in_flight_ = 0;
  std::size_t published_queued_ = 0;
  std::size_t published_slots_mapped_ = 0;
  std::size_t published_slots_free_ = 0;
  std::optional<std::chrono::steady_clock::time_point> busy_since_;

  // The reactor thread's alone.
  BouncePool bounce_;
  std::deque<std::shared_ptr<Work>> urgent_;
  std::deque<std::shared_ptr<Work>> normal_;
  std::vector<Operation> operations_;
  std::vector<std::size_t> free_tokens_;
  std::vector<std::size_t> retries_;   // in operations_, to be issued again
  std::vector<std::size_t> parked_;    // in operations_, in their order
  std::uint64_t started_ = 0;          // operations
  std::chrono::steady_clock::time_point now_{};  // of this turn
  LatencyHistogram latencies_;         // others may read it
  std::vector<Op> ops_;                // to be submitted this turn
  std::vector<Completion> completions_;
  std::vector<std::shared_ptr<Work>> ended_;
  Stats delta_;                        // since the last publish()
  bool drop_all_ = false;
  bool look_ = false;
  bool stop_ = false;
  unsigned again_ = 0;                 // the longest run of EAGAIN this turn, for the back-off

  std::mutex stop_mutex_;  // one stop() at a time
  std::thread thread_;     // last: everything above exists when it starts
};

}  // namespace zinfer::aio
