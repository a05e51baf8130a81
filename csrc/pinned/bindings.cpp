// zinfer.pinned._native: the Python face of the pinned pool, and the only file here that knows Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <limits>
#include <memory>
#include <optional>
#include <string>

#include "pinned/errors.h"
#include "pinned/numa.h"
#include "pinned/pool.h"

namespace py = pybind11;
using namespace zinfer::pinned;

namespace {

void translate(std::exception_ptr thrown) {
  const auto raise = [](const char* name, const std::exception& error) {
    py::set_error(py::module_::import("zinfer.errors").attr(name), error.what());
  };
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const OptionError& error) {
    raise("OptionError", error);
  } catch (const BudgetError& error) {
    raise("BudgetError", error);
  } catch (const ClosedError& error) {
    raise("ClosedError", error);
  }
}

void raise_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// A number of bytes; one that does not fit in 64 bits becomes the nearest that does, which is refused with its name.
int64_t bytes_of(const py::handle& number) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(number.ptr()));
  if (!index) throw py::error_already_set();
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  if (overflow == 0) return value;
  return overflow > 0 ? std::numeric_limits<int64_t>::max() : std::numeric_limits<int64_t>::min();
}

std::shared_ptr<Pool> make_pool(const py::object& capacity, const std::string& page_lock, bool huge_pages,
                                std::optional<int> touch_threads, std::optional<int> numa_node,
                                const py::object& slab_bytes) {
  const PoolOptions options{bytes_of(capacity), parse_page_lock_mode(page_lock), huge_pages, touch_threads, numa_node,
                            bytes_of(slab_bytes)};
  const py::gil_scoped_release no_gil;
  return Pool::create(options);
}

// The common case never waits and keeps the GIL: letting go of it may cost a thread switch (5 ms). That
// cannot deadlock, because nobody takes the GIL while holding the pool's mutex.
std::unique_ptr<Region> acquire(Pool& pool, const py::object& wanted, double timeout) {
  const int64_t nbytes = bytes_of(wanted);
  if (!(timeout > 0)) return pool.acquire(nbytes, timeout, [] {});
  if (auto region = pool.try_acquire(nbytes)) return region;
  const py::gil_scoped_release no_gil;
  return pool.acquire(nbytes, timeout, raise_signals);
}

py::dict stats(const Pool& pool) {
  const PoolStats stats = pool.stats();
  py::dict result;
  result["acquires"] = stats.acquires;
  result["releases"] = stats.releases;
  result["refusals"] = stats.refusals;
  result["waits"] = stats.waits;
  result["peak_in_use"] = stats.peak_in_use;
  result["regions"] = stats.regions;
  return result;
}

// The exported view holds a reference on the Python object, hence on the run. The format is unsigned bytes.
py::buffer_info view(Region& region) {
  return py::buffer_info(reinterpret_cast<uint8_t*>(region.data()), static_cast<py::ssize_t>(region.nbytes()));
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Pinned host memory: one contiguous mapping, handed out in regions that return by themselves.";
  py::register_local_exception_translator(translate);

  module.def("online_nodes", &online_nodes, py::arg("path") = kOnlineNodes);

  py::class_<Region>(module, "Region", py::buffer_protocol())
      .def_buffer(view)
      .def_property_readonly("address", &Region::address)
      .def_property_readonly("nbytes", &Region::nbytes);

  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<Pool, std::shared_ptr<Pool>>(module, "Pool")
      .def(py::init(&make_pool), py::arg("capacity"), py::kw_only(), py::arg("page_lock") = "auto",
           py::arg("huge_pages") = true, py::arg("touch_threads") = py::none(),
           py::arg("numa_node") = py::none(), py::arg("slab_bytes") = kSlabBytes)
      .def("acquire", &acquire, py::arg("nbytes"), py::arg("timeout") = 0.0)
      .def("check_integrity", &Pool::check_integrity)
      .def("close", &Pool::close, no_gil)
      .def_property_readonly("capacity", &Pool::capacity)
      .def_property_readonly("free_bytes", &Pool::free_bytes)
      .def_property_readonly("largest_free", &Pool::largest_free)
      .def_property_readonly("in_use", &Pool::in_use)
      .def_property_readonly("peak_in_use", [](const Pool& pool) { return pool.stats().peak_in_use; })
      .def_property_readonly("page_locked", &Pool::page_locked)
      .def_property_readonly("page_lock_reason", &Pool::page_lock_reason)
      .def_property_readonly("numa_reason", &Pool::numa_reason)
      .def_property_readonly("base_address", &Pool::base_address)
      .def_property_readonly("slab_bytes", &Pool::slab_bytes)
      .def_property_readonly("locked_bytes", &Pool::locked_bytes)
      .def_property_readonly("huge_bytes", py::cpp_function(&Pool::huge_bytes, no_gil))
      .def_property_readonly("stats", &stats);
}
