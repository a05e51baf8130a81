// Where memory lies on a machine with several NUMA nodes. Raw system calls, so that libnuma is not needed.
// Free functions without state; any thread may call them.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace zinfer::pinned {

constexpr const char* kOnlineNodes = "/sys/devices/system/node/online";

// The nodes online, ascending, from a list as the kernel writes it ("0-1,4"); node 0 alone where the kernel
// does not tell, as one built without NUMA does not.
std::vector<int> online_nodes(const std::string& list = kOnlineNodes);

// Makes the kernel take the pages of [base, base + bytes), page aligned and not yet touched, from `node` as
// long as it has any: MPOL_PREFERRED. Not MPOL_BIND, which kills the process when the node is full while
// another has room; memory further away is only slower. Returns "", or why the kernel refused: it has no such
// call (ENOSYS), a container forbids it (EPERM), the node has no memory or lies outside the cpuset (EINVAL).
std::string prefer_node(void* base, size_t bytes, int node);

}  // namespace zinfer::pinned
