#include "aio/split.h"

#include <algorithm>

namespace zinfer::aio {

namespace {

// Below this, one bounced read beats a head, an interior and a tail read of their own.
constexpr std::uint64_t kSmallBytes = 64 << 10;

std::uint64_t down(std::uint64_t value, std::uint64_t unit) { return value / unit * unit; }
std::uint64_t up(std::uint64_t value, std::uint64_t unit) { return down(value + unit - 1, unit); }

// Cuts the wanted range [first, last) at multiples of `cut`; each span is its aligned superset.
void cut_range(const Extent& extent, std::uint64_t first, std::uint64_t last, std::uint64_t cut,
               std::uint64_t alignment, bool bounced, std::vector<Piece>& pieces) {
  for (std::uint64_t at = first; at < last;) {
    const std::uint64_t end = std::min(last, down(at, cut) + cut);
    Piece piece;
    piece.file = extent.file;
    piece.offset = at;
    piece.length = end - at;
    piece.address = extent.address + (at - extent.offset);
    piece.span_offset = down(at, alignment);
    piece.span_length = up(end, alignment) - piece.span_offset;
    piece.bounced = bounced;
    pieces.push_back(piece);
    at = end;
  }
}

}  // namespace

std::vector<Extent> merge(const std::vector<Extent>& extents) {
  std::vector<Extent> merged;
  merged.reserve(extents.size());
  for (const Extent& extent : extents) {
    if (extent.length == 0) continue;
    if (!merged.empty()) {
      Extent& last = merged.back();
      if (last.file == extent.file && last.slack == extent.slack &&
          last.offset + last.length == extent.offset && last.address + last.length == extent.address) {
        last.length += extent.length;
        continue;
      }
    }
    merged.push_back(extent);
  }
  return merged;
}

void split(const Extent& extent, const Geometry& geometry, std::vector<Piece>& pieces) {
  const std::uint64_t alignment = geometry.alignment;
  const std::uint64_t block = up(geometry.block_bytes, alignment);
  const std::uint64_t bounce_cut = std::min(block, down(geometry.slot_bytes, alignment));
  const std::uint64_t first = extent.offset;
  const std::uint64_t last = extent.offset + extent.length;
  if (extent.length == 0) return;

  if (extent.address % alignment != first % alignment) {
    cut_range(extent, first, last, bounce_cut, alignment, true, pieces);
    return;
  }
  const std::uint64_t inner_first = up(first, alignment);
  const std::uint64_t inner_last = down(last, alignment);
  const bool ragged = inner_first != first || inner_last != last;
  if (extent.slack || !ragged) {
    cut_range(extent, first, last, block, alignment, false, pieces);
    return;
  }
  const std::uint64_t superset = up(last, alignment) - down(first, alignment);
  if (inner_first >= inner_last || superset <= std::min(kSmallBytes, bounce_cut)) {
    cut_range(extent, first, last, bounce_cut, alignment, true, pieces);
    return;
  }
  cut_range(extent, first, inner_first, bounce_cut, alignment, true, pieces);
  cut_range(extent, inner_first, inner_last, block, alignment, false, pieces);
  cut_range(extent, inner_last, last, bounce_cut, alignment, true, pieces);
}

void split_write(const Extent& extent, const Geometry& geometry, std::vector<Piece>& pieces) {
  const std::uint64_t alignment = geometry.alignment;
  const std::uint64_t block = up(geometry.block_bytes, alignment);
  const std::uint64_t bounce_cut = std::min(block, down(geometry.slot_bytes, alignment));
  const std::uint64_t first = extent.offset;
  const std::uint64_t last = extent.offset + extent.length;
  const bool bounced = extent.address % alignment != first % alignment;
  const std::uint64_t inner_first = std::min(up(first, alignment), last);
  const std::uint64_t inner_last = std::max(down(last, alignment), inner_first);
  cut_range(extent, first, inner_first, alignment, alignment, true, pieces);
  cut_range(extent, inner_first, inner_last, bounced ? bounce_cut : block, alignment, bounced, pieces);
  cut_range(extent, inner_last, last, alignment, alignment, true, pieces);
}

}  // namespace zinfer::aio
