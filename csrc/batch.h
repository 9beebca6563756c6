// The arrays that one forward pass over paged rows needs.
#pragma once

#include <cstdint>
#include <vector>

#include "sequence.h"

namespace stars_fast {

// Rows of new tokens; the rows of a group share the prefix that the group reads. Filled once, read
// by the caller as flat row-major arrays. Starting again keeps the memory.
class Batch {
 public:
  // Empties the batch; `columns` is the length of its longest row, `table_width` the number of
  // pages of its longest prefix.
  void begin(std::int32_t columns, std::int32_t width, std::int32_t page_size);
  // Opens a group that reads the first `tokens` tokens of `sequence`.
  void add_group(const Sequence& sequence, std::int32_t tokens);
  // Adds a row of `length` tokens to the last group. Its tokens take the slots from `first_slot` on
  // of a table whose pages begin at `pages` (which stands for the page that holds first_slot).
  void add_row(std::int32_t row_start, std::int32_t length, std::int32_t first_slot,
               const std::int32_t* pages);
  // As above for tokens that extend the sequence itself, the padding skipped.
  void add_extension(const Sequence& sequence, std::int32_t row_start, std::int32_t length);

  [[nodiscard]] std::int32_t num_groups() const { return static_cast<std::int32_t>(extent.size()); }
  [[nodiscard]] std::int32_t num_rows() const { return static_cast<std::int32_t>(start.size()); }
  // Pages that a prefix of `slots` slots takes.
  [[nodiscard]] std::int32_t pages_for(std::int32_t slots_read) const {
    return (slots_read + page_size_ - 1) / page_size_;
  }

  std::int32_t num_tokens = 0;              // sum of lengths
  std::int32_t max_new = 0;                 // L
  std::int32_t table_width = 0;             // P
  std::vector<std::int32_t> group_pages;    // [G, P]
  std::vector<std::int32_t> extent;         // [G]
  std::vector<std::int32_t> padding_start;  // [G]
  std::vector<std::int32_t> padding_end;    // [G]
  std::vector<std::int32_t> row_group;      // [R]
  std::vector<std::int32_t> start;          // [R]
  std::vector<std::int32_t> lengths;        // [R]
  std::vector<std::int64_t> slots;          // [R, L]

 private:
  // Appends a padded row of slots for the caller to fill.
  std::int64_t* open_row(std::int32_t row_start, std::int32_t length);

  std::int32_t page_size_ = 1;
};

}  // namespace stars_fast
