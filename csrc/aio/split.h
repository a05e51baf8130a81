// Extents -> pieces. Pure functions on plain data: no descriptor, no memory is touched.
//
// Reads:
//
//   file     |----A----|----A----|----A----|----A----|        A = alignment
//   wanted         [=========================)
//   slack    [-----================================--)        one aligned superset, straight to memory
//   exact    [head)    [===== interior =====)[tail)           head and tail through a bounce slot
//
// Writes, where a block that is wanted in part must keep the rest of what it holds:
//
//   wanted         [=========================)
//   congruent      [edge)[=== interior ==)[edge)          the interior straight from memory; an edge is one
//   otherwise      [edge)[--- bounced ---)[edge)          block, read, changed in a bounce slot and written
//
// Pieces are cut at multiples of block_bytes of the FILE offset, so two readers of neighbouring ranges
// never read the same block twice and every cut is aligned.
#pragma once

#include <cstdint>
#include <vector>

namespace zinfer::aio {

// Bytes [offset, offset + length) of file number `file`, wanted at `address`.
// slack: the bytes around the destination, out to the aligned superset, are scratch. Plain value.
struct Extent {
  std::uint32_t file = 0;
  std::uint64_t offset = 0;
  std::uint64_t length = 0;
  std::uint64_t address = 0;
  bool slack = false;
};

// One operation: move [span_offset, +span_length) so that [offset, +length) comes to, or from, `address`.
// Not bounced: the span in memory starts at address - (offset - span_offset). Plain value.
struct Piece {
  std::uint32_t file = 0;
  std::uint64_t offset = 0;
  std::uint64_t length = 0;
  std::uint64_t address = 0;
  std::uint64_t span_offset = 0;
  std::uint64_t span_length = 0;
  bool bounced = false;
};

// All in bytes; a plain value. alignment is a power of two (1: no constraint); slot_bytes is a multiple of it.
struct Geometry {
  std::uint64_t alignment = 1;
  std::uint64_t block_bytes = 0;
  std::uint64_t slot_bytes = 0;
};

// Joins neighbours that are contiguous in file and in memory; drops empty extents; keeps the order.
std::vector<Extent> merge(const std::vector<Extent>& extents);

// Appends the pieces of one extent in file order, to read it.
void split(const Extent& extent, const Geometry& geometry, std::vector<Piece>& pieces);
// The same, to write it: a piece is an edge or its span is exactly what is wanted.
void split_write(const Extent& extent, const Geometry& geometry, std::vector<Piece>& pieces);

}  // namespace zinfer::aio
