// The exceptions of the pinned pool; bindings.cpp turns each into the one of the same name in zinfer.errors.
#pragma once

#include <stdexcept>

namespace zinfer::pinned {

struct OptionError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

struct BudgetError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct ClosedError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace zinfer::pinned
