#include "pinned/page_lock.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <system_error>
#include <thread>
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
  int (*get_device)(int*);
  int (*set_device)(int);
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
  find(runtime.get_device, "cudaGetDevice", true);
  find(runtime.set_device, "cudaSetDevice", true);
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

PageLock::PageLock(std::byte* base, size_t bytes, size_t slab_bytes, PageLockMode mode)
    : base_(base), bytes_(bytes), slab_bytes_(slab_bytes) {
  reason_ = mode == PageLockMode::off ? "page_lock=\"off\"" : try_lock();
  if (mode == PageLockMode::on && !locked()) {
    unlock();
    throw BudgetError("cannot page-lock " + std::to_string(bytes) + " bytes for the pinned pool: " + reason_ +
                      "; use page_lock=\"auto\" to go on with pageable memory");
  }
}

// Registers slab after slab and returns "", or why the first that failed did.
std::string PageLock::try_lock() {
  std::string reason;
  const auto runtime = load_runtime(reason);
  if (!runtime) return reason;
  int devices = 0;
  if (const int error = runtime->device_count(&devices); error != kSuccess) {
    return "cudaGetDeviceCount: " + runtime->describe(error);
  }
  if (devices == 0) return "the CUDA runtime sees no device";
  if (const int error = runtime->get_device(&device_); error != kSuccess) {
    return "cudaGetDevice: " + runtime->describe(error);
  }
  get_device_ = runtime->get_device;
  set_device_ = runtime->set_device;
  unregister_ = runtime->host_unregister;
  while (!locked()) {
    const size_t slab = std::min(slab_bytes_, bytes_ - locked_bytes_);
    const int error = runtime->host_register(base_ + locked_bytes_, slab, kHostRegisterPortable);
    if (error != kSuccess) {
      const size_t number = locked_bytes_ / slab_bytes_ + 1;
      const size_t slabs = (bytes_ + slab_bytes_ - 1) / slab_bytes_;
      return "cudaHostRegister of slab " + std::to_string(number) + " of " + std::to_string(slabs) + ", " +
             std::to_string(slab) + " bytes: " + runtime->describe(error);
    }
    locked_bytes_ += slab;
  }
  return "";
}

void PageLock::unlock() noexcept {
  if (locked_bytes_ == 0) return;
  int current = 0;
  if (get_device_(&current) == kSuccess && current == device_) return unregister_slabs();
  // On a thread of its own: this one's device is somebody else's choice, and setting it back would give a device
  // that nobody has used yet a context, which takes hundreds of megabytes there.
  try {
    std::thread([this] {
      set_device_(device_);
      unregister_slabs();
    }).join();
  } catch (const std::system_error&) {  // no thread to be had: better through another device than not at all
    unregister_slabs();
  }
}

void PageLock::unregister_slabs() noexcept {
  for (size_t at = 0; at < locked_bytes_; at += slab_bytes_) {
    // An error here means that CUDA is already shutting down, and has let go of the range itself.
    unregister_(base_ + at);
  }
  locked_bytes_ = 0;
}

PageLock::~PageLock() {
  if (!guard_.in_child()) unlock();
}

}  // namespace zinfer::pinned
