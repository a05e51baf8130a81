// zinfer.aio._native: the only file that knows Python.
//
// The interpreter lock is released around everything that may block, with the C macros' own functions and
// not pybind11's guard: a daemon thread that comes back during finalization is unwound by Python, which
// must not happen inside a destructor.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "aio/engine.h"
#include "aio/errors.h"
#include "aio/file.h"
#include "aio/split.h"

namespace py = pybind11;

namespace zinfer::aio {
namespace {

template <typename Function>
void without_gil(Function&& function) {
  PyThreadState* state = PyEval_SaveThread();
  std::exception_ptr thrown;
  try {
    function();
  } catch (...) {
    thrown = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (thrown) std::rethrow_exception(thrown);
}

// ---- errors -------------------------------------------------------------------------------------------

// Borrowed for ever: looked up when the module is imported, for a raise must not import at interpreter exit.
struct ErrorClasses {
  PyObject* drive = nullptr;
  PyObject* closed = nullptr;
  PyObject* option = nullptr;
};
ErrorClasses error_classes;

void look_up_error_classes() {
  const py::module_ errors = py::module_::import("zinfer.errors");
  error_classes.drive = errors.attr("DriveError").cast<py::object>().release().ptr();
  error_classes.closed = errors.attr("ClosedError").cast<py::object>().release().ptr();
  error_classes.option = errors.attr("OptionError").cast<py::object>().release().ptr();
}

// A path, or a message with a path in it, as os.fsdecode() has it: a name on a drive need not be UTF-8. For the
// "O&" of PyObject_CallFunction.
PyObject* decoded(void* text) { return PyUnicode_DecodeFSDefault(static_cast<const char*>(text)); }

// Plain C: Python code runs in here, and a daemon thread may be unwound from it when the interpreter ends.
void set_drive_error(const DriveFailure& failure) {
  PyObject* error = PyObject_CallFunction(error_classes.drive, "O&O&KKis", &decoded, failure.what(), &decoded,
                                          failure.path.c_str(), static_cast<unsigned long long>(failure.offset),
                                          static_cast<unsigned long long>(failure.length), failure.error,
                                          failure.backend.c_str());
  if (error == nullptr) return;  // Python's own error is set
  PyErr_SetObject(error_classes.drive, error);
  Py_DECREF(error);
}

void set_error(PyObject* error_class, const std::exception& thrown) {
  PyObject* message = PyUnicode_DecodeFSDefault(thrown.what());
  if (message == nullptr) return;  // Python's own error is set
  PyErr_SetObject(error_class, message);
  Py_DECREF(message);
}

void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const DriveFailure& failure) {
    set_drive_error(failure);
  } catch (const ClosedFailure& failure) {
    set_error(error_classes.closed, failure);
  } catch (const OptionFailure& failure) {
    set_error(error_classes.option, failure);
  } catch (const std::invalid_argument& failure) {  // pybind11 would take the path in it for UTF-8
    set_error(PyExc_ValueError, failure);
  }
}

// ---- options ------------------------------------------------------------------------------------------

DirectMode direct_mode(const std::string& text) {
  if (text == "auto") return DirectMode::automatic;
  if (text == "on") return DirectMode::on;
  if (text == "off") return DirectMode::off;
  throw OptionFailure("direct must be \"auto\", \"on\" or \"off\", not \"" + text + "\"");
}

// An OptionError is a ValueError; Python's own would be an OverflowError.
std::int64_t integer(const py::handle& number, const char* name) {
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  if (overflow != 0)
    throw OptionFailure(std::string(name) + " must fit in 64 bits, which " + std::string(py::repr(number)) +
                        " does not");
  return value;
}

// As open() takes one: a str, bytes or a path object. What comes after a NUL the kernel would not see.
std::string path_bytes(const py::handle& path) {
  py::object plain = py::reinterpret_steal<py::object>(PyOS_FSPath(path.ptr()));  // a str or bytes
  if (!plain) throw py::error_already_set();
  if (PyUnicode_Check(plain.ptr())) {
    plain = py::reinterpret_steal<py::object>(PyUnicode_EncodeFSDefault(plain.ptr()));
    if (!plain) throw py::error_already_set();
  }
  std::string bytes = py::reinterpret_borrow<py::bytes>(plain);
  if (bytes.find('\0') != std::string::npos)
    throw OptionFailure("path must not contain a NUL character, but is " + std::string(py::repr(path)));
  return bytes;
}

FileOptions file_options(const std::string& mode, const py::object& size, const std::string& direct) {
  FileOptions options;
  options.direct = direct_mode(direct);
  if (mode != "r" && mode != "w") throw OptionFailure("mode must be \"r\" or \"w\", not \"" + mode + "\"");
  options.mode = mode == "w" ? FileMode::write : FileMode::read;
  if (size.is_none()) return options;
  if (options.mode == FileMode::read) throw OptionFailure("size has an effect only with mode=\"w\"");
  const std::int64_t bytes = integer(size, "size");
  if (bytes < 0) throw OptionFailure("size must not be negative, but is " + std::to_string(bytes));
  options.size = static_cast<std::uint64_t>(bytes);
  return options;
}

Fault parse_fault(const py::tuple& line) {
  const auto name = line.empty() ? std::string() : line[0].cast<std::string>();
  const bool bare = name == "ok" || name == "zero";
  Fault fault;
  if (name == "short") fault.kind = Fault::Kind::short_transfer;
  else if (name == "error") fault.kind = Fault::Kind::error;
  else if (name == "zero") fault.kind = Fault::Kind::zero;
  else if (name == "delay") fault.kind = Fault::Kind::delay;
  else if (name == "hold") fault.kind = Fault::Kind::hold;
  else if (name != "ok") throw OptionFailure("unknown fault \"" + name + "\"");
  if (line.size() != (bare ? 1 : 2)) throw OptionFailure("fault \"" + name + "\" has the wrong number of values");
  if (!bare) fault.value = line[1].cast<double>();
  if (!(fault.value >= 0)) throw OptionFailure("fault \"" + name + "\" needs a value that is not negative");
  return fault;
}

// The row holds the File while this is in use.
MemoryExtent parse_extent(const py::tuple& row) {
  if (row.size() != 5) throw py::value_error("an extent is (file, offset, length, address, slack)");
  if (!py::isinstance<File>(row[0]))
    throw py::type_error(std::string("an extent's first item is a File of this engine's kind, not ") +
                         Py_TYPE(py::object(row[0]).ptr())->tp_name);
  const int slack = PyObject_IsTrue(py::object(row[4]).ptr());
  if (slack < 0) throw py::error_already_set();
  return {row[0].cast<const File*>(), integer(row[1], "offset"), integer(row[2], "length"), integer(row[3], "address"),
          slack != 0};
}

// ---- what Python holds --------------------------------------------------------------------------------

// Lets go of a shared object without the interpreter lock, for its destructor may wait for a thread. In a
// forked child it is leaked: one of its locks may be held there for ever.
template <typename T>
void let_go(std::shared_ptr<T>& owned, bool forked) {
  if (forked) {
    new std::shared_ptr<T>(std::move(owned));
  } else if (owned.use_count() == 1) {
    without_gil([&] { owned.reset(); });
  } else {
    owned.reset();
  }
}

class PyEngine {
 public:
  PyEngine(const std::string& backend, const py::object& depth, const py::object& block_bytes,
           const py::object& workers, const py::object& bounce_slot_bytes,
           const std::optional<std::vector<py::tuple>>& faults) {
    EngineOptions options{backend,
                          integer(depth, "depth"),
                          integer(block_bytes, "block_bytes"),
                          integer(workers, "workers"),
                          integer(bounce_slot_bytes, "bounce_slot_bytes"),
                          {}};
    if (faults && backend != "faults") throw OptionFailure("faults has an effect only with backend=\"faults\"");
    if (faults)
      for (const py::tuple& line : *faults) options.faults.push_back(parse_fault(line));
    without_gil([&] { engine_ = std::make_shared<Engine>(options); });
    alive().insert(this);
  }
  PyEngine(const PyEngine&) = delete;
  PyEngine& operator=(const PyEngine&) = delete;

  ~PyEngine() {
    alive().erase(this);
    let_go(engine_, engine_->forked());
  }

  Engine& usable() const {
    engine_->refuse_if_forked();
    return *engine_;
  }
  const Engine& facts() const { return *engine_; }
  const std::shared_ptr<Engine>& shared() const { return engine_; }

  void close() {
    const std::shared_ptr<Engine> engine = engine_;
    engine->refuse_if_forked();
    without_gil([&] { engine->close(); });
  }

  void check_integrity() const {
    const std::string wrong = usable().check_integrity();
    if (!wrong.empty()) throw std::runtime_error("engine integrity: " + wrong);
  }

  // At interpreter exit: afterwards nothing writes to memory that Python is about to free.
  static void close_all() {
    std::vector<std::shared_ptr<Engine>> engines;
    for (const PyEngine* engine : alive())
      if (!engine->engine_->forked()) engines.push_back(engine->engine_);
    without_gil([&] {
      for (const auto& engine : engines) engine->cancel_all();
      for (const auto& engine : engines) engine->close();
      engines.clear();
    });
  }

 private:
  // Guarded by the interpreter lock; never destroyed, for engines that outlive static destruction.
  static std::set<PyEngine*>& alive() {
    static auto* engines = new std::set<PyEngine*>;
    return *engines;
  }

  std::shared_ptr<Engine> engine_;
};

// When a request ran. It holds neither the keepalive nor the engine, and so may be kept.
class PyTiming {
 public:
  explicit PyTiming(std::shared_ptr<const Request> request) : request_(std::move(request)) {}
  PyTiming(const PyTiming&) = delete;
  PyTiming& operator=(const PyTiming&) = delete;
  ~PyTiming() { let_go(request_, ::getpid() != owner_); }

  const Request& request() const { return *request_; }

 private:
  const pid_t owner_ = ::getpid();
  std::shared_ptr<const Request> request_;
};

class PyRequest {
 public:
  PyRequest(std::shared_ptr<Request> request, std::shared_ptr<Engine> engine, py::object keepalive)
      : request_(std::move(request)), engine_(std::move(engine)), keepalive_(std::move(keepalive)) {}
  PyRequest(const PyRequest&) = delete;
  PyRequest& operator=(const PyRequest&) = delete;

  ~PyRequest() {
    drain();
    const bool forked = engine_->forked();
    let_go(request_, forked);
    let_go(engine_, forked);
  }

  const Request& usable() const {
    engine_->refuse_if_forked();
    return *request_;
  }

  std::unique_ptr<PyTiming> timing() const {
    engine_->refuse_if_forked();
    return std::make_unique<PyTiming>(request_);
  }

  bool wait(std::optional<double> timeout) const {
    using Clock = std::chrono::steady_clock;
    constexpr std::chrono::nanoseconds kSlice = std::chrono::milliseconds(100);  // how late Ctrl-C may be
    constexpr double kForever = 1e9;
    const Request& request = usable();
    if (timeout && std::isnan(*timeout)) throw py::value_error("timeout must be a number of seconds");
    const double seconds = std::clamp(timeout.value_or(kForever), 0.0, kForever);
    const auto deadline =
        Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    while (!request.done()) {
      const std::chrono::nanoseconds left = deadline - Clock::now();
      if (left <= std::chrono::nanoseconds::zero()) return false;
      without_gil([&] { request.wait_for(std::min(left, kSlice)); });
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
    if (const DriveFailure* failure = request.failure()) {
      set_drive_error(*failure);
      throw py::error_already_set();
    }
    return true;
  }

  void cancel() {
    engine_->refuse_if_forked();
    engine_->cancel(*request_);
  }

  // Cancels and blocks until nothing of it is in flight; at once in a forked child, whose memory is its own.
  void drain() const noexcept {
    if (engine_->forked() || request_->done()) return;
    engine_->cancel(*request_);
    without_gil([&] { request_->wait(); });
  }

  // For the cycle collector: a keepalive that refers back to its request is the usual case.
  PyObject* keepalive() const { return keepalive_.ptr(); }
  void drop_keepalive() {
    drain();
    const py::object last = std::move(keepalive_);
  }

 private:
  std::shared_ptr<Request> request_;
  std::shared_ptr<Engine> engine_;
  py::object keepalive_;
};

// transfer: Engine::read or Engine::write.
template <std::shared_ptr<Request> (Engine::*transfer)(const std::vector<MemoryExtent>&, bool)>
std::unique_ptr<PyRequest> submit(const PyEngine& engine, const py::iterable& extents, py::object keepalive,
                                  bool urgent) {
  std::vector<MemoryExtent> wanted;
  std::vector<py::tuple> held;  // the File objects, should the iterable make its tuples on the fly
  for (const py::handle item : extents) {
    held.emplace_back(py::reinterpret_borrow<py::object>(item));
    wanted.push_back(parse_extent(held.back()));
  }
  std::shared_ptr<Request> request = (engine.usable().*transfer)(wanted, urgent);
  return std::make_unique<PyRequest>(std::move(request), engine.shared(), std::move(keepalive));
}

py::list latencies(const PyEngine& engine) {
  py::list result;
  for (const auto& [bound, count] : engine.usable().latencies().buckets())
    result.append(py::make_tuple(static_cast<double>(bound) * 1e-9, count));
  return result;
}

py::dict stats(const PyEngine& engine) {
  const Stats now = engine.usable().stats();
  py::dict figures;
  figures["requests"] = now.requests;
  figures["pieces"] = now.pieces;
  figures["bytes_requested"] = now.bytes_requested;
  figures["bytes_transferred"] = now.bytes_transferred;
  figures["bounced_bytes"] = now.bounced_bytes;
  figures["retries"] = now.retries;
  figures["errors"] = now.errors;
  figures["busy_seconds"] = now.busy_seconds;
  return figures;
}

py::list split_for_tests(const std::vector<std::tuple<std::uint32_t, std::uint64_t, std::uint64_t, std::uint64_t, bool>>&
                             extents,
                         std::uint64_t alignment, std::uint64_t block_bytes, std::uint64_t slot_bytes, bool writing) {
  std::vector<Extent> wanted;
  for (const auto& [file, offset, length, address, slack] : extents)
    wanted.push_back({file, offset, length, address, slack});
  std::vector<Piece> pieces;
  const Geometry geometry{alignment, block_bytes, slot_bytes};
  for (const Extent& extent : merge(wanted)) (writing ? split_write : split)(extent, geometry, pieces);
  py::list rows;
  for (const Piece& p : pieces)
    rows.append(py::make_tuple(p.file, p.offset, p.length, p.address, p.span_offset, p.span_length, p.bounced));
  return rows;
}

// ---- the cycle collector's view of a Request -----------------------------------------------------------

int traverse_request(PyObject* self, visitproc visit, void* arg) {
#if PY_VERSION_HEX >= 0x03090000
  Py_VISIT(Py_TYPE(self));
#endif
  if (py::detail::is_holder_constructed(self)) {
    const auto& request = py::cast<const PyRequest&>(py::handle(self));
    Py_VISIT(request.keepalive());
  }
  return 0;
}

int clear_request(PyObject* self) {
  if (py::detail::is_holder_constructed(self)) py::cast<PyRequest&>(py::handle(self)).drop_keepalive();
  return 0;
}

void collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = traverse_request;
  type.tp_clear = clear_request;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Asynchronous file reads and writes, straight to and from memory.";
  look_up_error_classes();
  py::register_local_exception_translator(translate);

  py::class_<File, std::shared_ptr<File>>(module, "File", "A regular file open for reading or writing; see zinfer.aio.")
      .def(py::init([](const py::object& path, const std::string& mode, const py::object& size,
                       const std::string& direct) {
             const FileOptions options = file_options(mode, size, direct);
             const std::string bytes = path_bytes(path);
             std::shared_ptr<File> file;
             without_gil([&] { file = std::make_shared<File>(bytes, options); });
             return file;
           }),
           py::arg("path"), py::arg("mode") = "r", py::kw_only(), py::arg("size") = py::none(),
           py::arg("direct") = "auto")
      .def_property_readonly("path",
                             [](const File& file) {
                               PyObject* path = PyUnicode_DecodeFSDefault(file.facts().path.c_str());
                               if (path == nullptr) throw py::error_already_set();
                               return py::reinterpret_steal<py::str>(path);
                             })
      .def_property_readonly("size", &File::size)
      .def_property_readonly("direct", [](const File& file) { return file.facts().direct; })
      .def_property_readonly("direct_reason", [](const File& file) { return file.facts().direct_reason; })
      .def_property_readonly("alignment", [](const File& file) { return file.facts().alignment; })
      .def_property_readonly("identity",
                             [](const File& file) {
                               const Identity& i = file.facts().identity;
                               return py::make_tuple(i[0], i[1], i[2], i[3], i[4]);
                             })
      .def("changed", &File::changed)
      .def("sync", [](const File& file) { without_gil([&] { file.sync(); }); })
      .def("close", [](File& file) { without_gil([&] { file.close(); }); });

  py::class_<PyTiming>(module, "Timing", "When a request ran; see zinfer.aio.")
      .def_property_readonly("started", [](const PyTiming& timing) { return timing.request().started(); })
      .def_property_readonly("finished", [](const PyTiming& timing) { return timing.request().finished(); })
      .def_property_readonly("transferred", [](const PyTiming& timing) { return timing.request().transferred(); });

  py::class_<PyRequest>(module, "Request", "One read or write in progress; see zinfer.aio.",
                        py::custom_type_setup(collectable))
      .def_property_readonly("done", [](const PyRequest& request) { return request.usable().done(); })
      .def_property_readonly("nbytes", [](const PyRequest& request) { return request.usable().nbytes(); })
      .def_property_readonly("seconds", [](const PyRequest& request) { return request.usable().seconds(); })
      .def_property_readonly("timing", &PyRequest::timing)
      .def("wait", &PyRequest::wait, py::arg("timeout") = py::none())
      .def("cancel", &PyRequest::cancel);

  py::class_<PyEngine>(module, "Engine", "Carries out reads and writes on a thread of its own; see zinfer.aio.")
      .def(py::init<const std::string&, const py::object&, const py::object&, const py::object&, const py::object&,
                    const std::optional<std::vector<py::tuple>>&>(),
           py::arg("backend") = "auto", py::kw_only(), py::arg("depth") = 16, py::arg("block_bytes") = 4 << 20,
           py::arg("workers") = 4, py::arg("bounce_slot_bytes") = 1 << 20, py::arg("faults") = py::none())
      .def_property_readonly("backend", [](const PyEngine& engine) { return engine.usable().backend(); })
      .def_property_readonly("fallbacks", [](const PyEngine& engine) { return engine.usable().fallbacks(); })
      .def_property_readonly("block_bytes", [](const PyEngine& engine) { return engine.usable().block_bytes(); })
      .def_property_readonly("depth", [](const PyEngine& engine) { return engine.usable().depth(); })
      .def_property_readonly("eventfd", [](const PyEngine& engine) { return engine.usable().event_fd(); })
      .def_property_readonly("bounce_bytes", [](const PyEngine& engine) { return engine.usable().bounce_bytes(); })
      .def_property_readonly("stats", &stats)
      .def_property_readonly("latencies", &latencies)
      .def("read", &submit<&Engine::read>, py::arg("extents"), py::arg("keepalive") = py::none(), py::kw_only(),
           py::arg("urgent") = false)
      .def("write", &submit<&Engine::write>, py::arg("extents"), py::arg("keepalive") = py::none(), py::kw_only(),
           py::arg("urgent") = false)
      .def("check_integrity", &PyEngine::check_integrity)
      .def("close", &PyEngine::close);

  module.def("_split", &split_for_tests, py::arg("extents"), py::arg("alignment"), py::arg("block_bytes"),
             py::arg("slot_bytes"), py::kw_only(), py::arg("writing") = false);

  py::module_::import("atexit").attr("register")(py::cpp_function(&PyEngine::close_all));
}

}  // namespace zinfer::aio
