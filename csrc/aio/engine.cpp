#include "aio/engine.h"

#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <limits>
#include <stdexcept>

#include "aio/bounce.h"
#include "aio/errors.h"
#include "aio/split.h"

namespace zinfer::aio {

namespace {

constexpr std::int64_t kMaxDepth = 1024;
constexpr std::int64_t kMaxWorkers = 256;
constexpr std::int64_t kMinBlockBytes = kDirectAlignment;
constexpr std::int64_t kMaxBlockBytes = 1 << 30;
constexpr std::int64_t kMinSlotBytes = 8 << 10;
constexpr std::int64_t kMaxSlotBytes = 4 << 20;
constexpr std::int64_t kLookedAt = std::int64_t{1} << 36;  // bytes of an extent; its end is looked at from there on
static_assert(kMaxBlockBytes + kMaxAlignment <= std::numeric_limits<std::int32_t>::max(),
              "one operation is at most what a single read call takes");

std::int64_t in_range(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value >= least && value <= most) return value;
  throw OptionFailure(std::string(name) + " must be between " + std::to_string(least) + " and " +
                      std::to_string(most) + ", not " + std::to_string(value));
}

std::uint64_t checked_block(std::int64_t bytes) {
  in_range("block_bytes", bytes, kMinBlockBytes, kMaxBlockBytes);
  if (bytes % kMinBlockBytes != 0)
    throw OptionFailure("block_bytes must be a multiple of " + std::to_string(kMinBlockBytes) + ", not " +
                        std::to_string(bytes));
  return static_cast<std::uint64_t>(bytes);
}

std::uint64_t checked_slot(std::int64_t bytes) {
  in_range("bounce_slot_bytes", bytes, kMinSlotBytes, kMaxSlotBytes);
  if ((bytes & (bytes - 1)) != 0)
    throw OptionFailure("bounce_slot_bytes must be a power of two, not " + std::to_string(bytes));
  return static_cast<std::uint64_t>(bytes);
}

// Whether there is memory at `address`.
bool is_mapped(std::int64_t address) {
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  unsigned char resident = 0;
  return ::mincore(reinterpret_cast<void*>(static_cast<std::uintptr_t>(address) / page * page), 1, &resident) == 0;
}

std::invalid_argument bad_extent(const MemoryExtent& extent, const std::string& what) {
  return std::invalid_argument(extent.file->facts().path + ": " + what + " (offset " + std::to_string(extent.offset) +
                               ", length " + std::to_string(extent.length) + ", address " +
                               std::to_string(extent.address) + ")");
}

}  // namespace

Engine::Engine(const EngineOptions& options)
    : owner_(::getpid()),
      depth_(static_cast<unsigned>(in_range("depth", options.depth, 1, kMaxDepth))),
      block_bytes_(checked_block(options.block_bytes)),
      slot_bytes_(checked_slot(options.bounce_slot_bytes)) {
  if (!options.faults.empty() && options.backend != "faults")
    throw OptionFailure("faults has an effect only with backend=\"faults\", not \"" + options.backend + "\"");
  BackendOptions chosen;
  chosen.depth = depth_;
  chosen.workers = static_cast<unsigned>(in_range("workers", options.workers, 1, kMaxWorkers));
  chosen.faults = options.faults;
  std::unique_ptr<Backend> backend = make_backend(options.backend, chosen, fallbacks_);
  backend_name_ = backend->name();
  direct_only_ = backend->direct_only();
  event_fd_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (event_fd_ < 0)
    throw OptionFailure("eventfd: " + describe_errno(errno) + descriptor_remedy(errno));
  try {
    reactor_ = std::make_unique<Reactor>(std::move(backend), depth_, slot_bytes_, event_fd_);
  } catch (...) {
    ::close(event_fd_);
    throw;
  }
}

Engine::~Engine() {
  cancel_all();
  close();
}

void Engine::validate(const MemoryExtent& extent, bool writing) const {
  const FileFacts& file = extent.file->facts();
  const bool writable = file.mode == FileMode::write;
  if (writing && !writable) throw OptionFailure(file.path + " is open for reading; open it with mode=\"w\" to write");
  if (!writing && writable) throw OptionFailure(file.path + " is open for writing; open it again with mode=\"r\" to read");
  if (writing && extent.slack)
    throw OptionFailure(file.path + ": slack has no meaning for a write: the bytes around it belong to the file");
  if (direct_only_ && !file.direct)
    throw OptionFailure(file.path + " is not open for O_DIRECT (" + file.direct_reason + "), and " + backend_name_ +
                        " would silently block on it; use backend=\"auto\", \"io_uring\" or \"threads\"");
  validate_range(extent, writing);
  if (extent.length == 0) return;
  if (extent.address <= 0) throw bad_extent(extent, "the address must be positive");
  if (extent.length > std::numeric_limits<std::int64_t>::max() - extent.address)
    throw bad_extent(extent, "the memory wraps around the address space");
  // Before it is cut into more pieces than memory holds.
  if (extent.length > kLookedAt && !is_mapped(extent.address + extent.length - 1))
    throw bad_extent(extent, "there is no memory at the end of the range");
}

void Engine::validate_range(const MemoryExtent& extent, bool writing) const {
  const FileFacts& file = extent.file->facts();
  if (extent.offset < 0 || extent.length < 0) throw bad_extent(extent, "offset and length must not be negative");
  constexpr auto kLargestFile = std::numeric_limits<std::int64_t>::max() - static_cast<std::int64_t>(kMaxAlignment);
  const std::int64_t end = writing ? kLargestFile : static_cast<std::int64_t>(file.size);
  if (extent.offset <= end && extent.length <= end - extent.offset) return;
  if (writing) throw bad_extent(extent, "no file can be that long");
  throw DriveFailure(file.path + ": " + std::to_string(extent.length) + " bytes at offset " +
                         std::to_string(extent.offset) + " were asked for, but the file's size is " +
                         std::to_string(end) + " bytes; check that it was downloaded completely",
                     file.path, static_cast<std::uint64_t>(extent.offset), static_cast<std::uint64_t>(extent.length),
                     0, backend_name_);
}

std::shared_ptr<Request> Engine::read(const std::vector<MemoryExtent>& extents, bool urgent) {
  return submit(extents, urgent, false);
}

std::shared_ptr<Request> Engine::write(const std::vector<MemoryExtent>& extents, bool urgent) {
  return submit(extents, urgent, true);
}

std::shared_ptr<Request> Engine::submit(const std::vector<MemoryExtent>& extents, bool urgent, bool writing) {
  refuse_if_forked();
  auto work = std::make_shared<Work>();
  std::vector<Extent> wanted;
  wanted.reserve(extents.size());
  std::uint64_t nbytes = 0;
  const File* previous = nullptr;
  for (const MemoryExtent& extent : extents) {
    std::shared_ptr<const Descriptor> descriptor = extent.file->share();
    validate(extent, writing);
    if (extent.file != previous) {
      if (writing) work->claims.emplace_back(descriptor->writing(), descriptor->facts().path, this);
      work->files.push_back(std::move(descriptor));
    }
    previous = extent.file;
    wanted.push_back({static_cast<std::uint32_t>(work->files.size() - 1), static_cast<std::uint64_t>(extent.offset),
                      static_cast<std::uint64_t>(extent.length), static_cast<std::uint64_t>(extent.address),
                      extent.slack});
    nbytes += static_cast<std::uint64_t>(extent.length);
  }
  for (const Extent& extent : merge(wanted)) {
    const FileFacts& file = work->files[extent.file]->facts();
    if (file.alignment > slot_bytes_)
      throw OptionFailure(file.path + " takes blocks of " + std::to_string(file.alignment) +
                          " bytes; make the engine with bounce_slot_bytes of at least that");
    const Geometry geometry{file.alignment, block_bytes_, slot_bytes_};
    if (writing)
      split_write(extent, geometry, work->pieces);
    else
      split(extent, geometry, work->pieces);
  }
  work->request = std::make_shared<Request>(nbytes);
  work->urgent = urgent;
  work->writing = writing;
  std::shared_ptr<Request> request = work->request;
  reactor_->submit(std::move(work));
  return request;
}

void Engine::cancel(Request& request) {
  if (request.done()) return;
  request.mark_cancelled();
  reactor_->notice_cancelled();
}

void Engine::cancel_all() { reactor_->cancel_all(); }

void Engine::close() {
  reactor_->stop();  // joined: nobody writes to the descriptor any more
  const int descriptor = event_fd_.exchange(-1);
  if (descriptor >= 0) ::close(descriptor);
}

std::uint64_t Engine::bounce_bytes() const { return std::uint64_t{depth_} * slot_bytes_; }

bool Engine::forked() const { return ::getpid() != owner_; }

void Engine::refuse_if_forked() const {
  if (forked())
    throw ClosedFailure("the engine belongs to the parent of this forked process; make a new one here, or start "
                        "the process with the \"spawn\" method");
}

}  // namespace zinfer::aio
