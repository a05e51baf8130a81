#include "pinned/numa.h"

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <fstream>
#include <system_error>

namespace zinfer::pinned {

std::vector<int> online_nodes(const std::string& list) {
  std::ifstream file(list);
  std::vector<int> nodes;
  int first = 0;
  while (file >> first) {
    int last = first;
    if (file.peek() == '-') {
      file.ignore();
      file >> last;
    }
    for (int node = first; node <= last; ++node) nodes.push_back(node);
    if (file.peek() == ',') file.ignore();
  }
  return nodes.empty() ? std::vector<int>{0} : nodes;
}

std::string prefer_node(void* base, size_t bytes, int node) {
  constexpr size_t kBits = sizeof(unsigned long) * CHAR_BIT;
  const auto number = static_cast<size_t>(node);
  std::vector<unsigned long> mask(number / kBits + 1);
  mask[number / kBits] = 1UL << number % kBits;
  // The kernel reads one bit fewer than it is told: see mbind(2), BUGS.
  if (syscall(SYS_mbind, base, bytes, MPOL_PREFERRED, mask.data(), mask.size() * kBits + 1, 0) == 0) return "";
  const int error = errno;
  return "mbind to node " + std::to_string(node) + ": " + std::generic_category().message(error) + " (errno " +
         std::to_string(error) + ")";
}

}  // namespace zinfer::pinned
