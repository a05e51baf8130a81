#include "pinned/page_lock.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

#include "pinned/errors.h"

namespace zinfer::pinned {
namespace {

// Part of CUDA's stable interface: cudaError_t is an int with 0 for success, and the flag makes the range
// page-locked for every device of the process, not only the current one.
constexpr int kSuccess = 0;
constexpr unsigned kHostRegisterPortable = 1;

struct Runtime {
  int (*device_count)(int*);
  int (*host_register)(void*, size_t, unsigned);
  int (*host_unregister)(void*);
  const char* (*error_string)(int);
  int (*get_last_error)();  // may be missing

  // "message (cudaError N)". Also takes the error out of the runtime's memory, so that the next CUDA call
  // of somebody else is not blamed for it.
  std::string describe(int error) const {
    if (get_last_error != nullptr) get_last_error();
    return std::string(error_string(error)) + " (cudaError " + std::to_string(error) + ")";
  }
};

std::string last_dl_error() {
  const char* message = dlerror();
  return message != nullptr ? message : "unknown dlopen error";
}

int collect_loaded_runtime(dl_phdr_info* info, size_t, void* paths) {
  const char* slash = std::strrchr(info->dlpi_name, '/');
  const char* name = slash != nullptr ? slash + 1 : info->dlpi_name;
  // A wheel may rename it, as in libcudart-d0da41ae.so.11.0.
  if (std::strncmp(name, "libcudart", 9) == 0) {
    static_cast<std::vector<std::string>*>(paths)->emplace_back(info->dlpi_name);
  }
  return 0;
}

// A handle on the runtime library, or nullptr and why in `reason`.
void* open_library(std::string& reason) {
  if (const char* path = std::getenv("ZINFER_CUDART")) {
    void* const handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) reason = "cannot load the library that ZINFER_CUDART names: " + last_dl_error();
    return handle;
  }
  std::vector<std::string> loaded;
  dl_iterate_phdr(collect_loaded_runtime, &loaded);
  for (const auto& path : loaded) {
    if (void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD)) return handle;
  }
  for (const char* name : {"libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so"}) {
    if (void* const handle = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return handle;
  }
  reason =
      "no CUDA runtime found: libcudart is neither loaded nor on the loader's path "
      "(import a CUDA build of torch first, or set ZINFER_CUDART to its path)";
  return nullptr;
}

std::optional<Runtime> load_runtime(std::string& reason) {
  void* const handle = open_library(reason);
  if (handle == nullptr) return std::nullopt;
  const auto find = [&](auto& function, const char* name, bool required) {
    void* const symbol = dlsym(handle, name);
    if (symbol == nullptr && required) reason = std::string("the CUDA runtime has no ") + name;
    function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol);
  };
  Runtime runtime{};
  find(runtime.device_count, "cudaGetDeviceCount", true);
  find(runtime.host_register, "cudaHostRegister", true);
  find(runtime.host_unregister, "cudaHostUnregister", true);
  find(runtime.error_string, "cudaGetErrorString", true);
  find(runtime.get_last_error, "cudaGetLastError", false);
  if (!reason.empty()) return std::nullopt;
  return runtime;
}

}  // namespace

PageLockMode parse_page_lock_mode(const std::string& name) {
  if (name == "auto") return PageLockMode::automatic;
  if (name == "on") return PageLockMode::on;
  if (name == "off") return PageLockMode::off;
  throw OptionError("page_lock is \"auto\", \"on\" or \"off\", not \"" + name + "\"");
}

PageLock::PageLock(void* base, size_t bytes, PageLockMode mode) : base_(base) {
  reason_ = mode == PageLockMode::off ? "page_lock=\"off\"" : try_lock(bytes);
  if (mode == PageLockMode::on && !locked()) {
    throw BudgetError("cannot page-lock " + std::to_string(bytes) + " bytes for the pinned pool: " + reason_ +
                      "; use page_lock=\"auto\" to go on with pageable memory");
  }
}

// Registers the range and returns ""; or returns why it could not.
std::string PageLock::try_lock(size_t bytes) {
  std::string reason;
  const auto runtime = load_runtime(reason);
  if (!runtime) return reason;
  int devices = 0;
  if (const int error = runtime->device_count(&devices); error != kSuccess) {
    return "cudaGetDeviceCount: " + runtime->describe(error);
  }
  if (devices == 0) return "the CUDA runtime sees no device";
  if (const int error = runtime->host_register(base_, bytes, kHostRegisterPortable); error != kSuccess) {
    return "cudaHostRegister of " + std::to_string(bytes) + " bytes: " + runtime->describe(error);
  }
  unregister_ = runtime->host_unregister;
  return "";
}

PageLock::~PageLock() {
  // An error here means that CUDA is already shutting down, and has let go of the range itself.
  if (locked() && !guard_.in_child()) unregister_(base_);
}

}  // namespace zinfer::pinned
