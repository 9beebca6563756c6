#include "batch.h"

#include <algorithm>

namespace stars_fast {

void Batch::begin(std::int32_t columns, std::int32_t width, std::int32_t page_size) {
  num_tokens = 0;
  max_new = columns;
  table_width = width;
  page_size_ = page_size;
  for (auto* array :
       {&group_pages, &extent, &padding_start, &padding_end, &row_group, &start, &lengths}) {
    array->clear();
  }
  slots.clear();
}

void Batch::add_group(const Sequence& sequence, std::int32_t tokens) {
  const std::int32_t slots_read = sequence.extent(tokens);
  const bool padded = tokens > sequence.padding_start;
  extent.push_back(slots_read);
  padding_start.push_back(padded ? sequence.padding_start : slots_read);
  padding_end.push_back(padded ? sequence.padding_start + sequence.padding_length : slots_read);
  const auto first = sequence.pages.begin();
  const std::size_t row = group_pages.size();
  group_pages.insert(group_pages.end(), first, first + pages_for(slots_read));
  group_pages.resize(row + static_cast<std::size_t>(table_width), 0);
}

std::int64_t* Batch::open_row(std::int32_t row_start, std::int32_t length) {
  row_group.push_back(num_groups() - 1);
  start.push_back(row_start);
  lengths.push_back(length);
  num_tokens += length;
  const std::size_t row = slots.size();
  slots.resize(row + static_cast<std::size_t>(max_new), 0);
  return slots.data() + row;
}

void Batch::add_row(std::int32_t row_start, std::int32_t length, std::int32_t first_slot,
                    const std::int32_t* pages) {
  std::int64_t* out = open_row(row_start, length);
  std::int32_t offset = first_slot % page_size_;
  for (std::int32_t left = length; left > 0; ++pages, offset = 0) {
    const std::int32_t run = std::min(left, page_size_ - offset);
    const std::int64_t slot = std::int64_t{*pages} * page_size_ + offset;
    for (std::int32_t i = 0; i < run; ++i) {
      *out++ = slot + i;
    }
    left -= run;
  }
}

void Batch::add_extension(const Sequence& sequence, std::int32_t row_start, std::int32_t length) {
  std::int64_t* out = open_row(row_start, length);
  for (std::int32_t token = row_start; token < row_start + length; ++token) {
    const std::int32_t slot = sequence.slot(token);
    const std::int32_t page = sequence.pages[static_cast<std::size_t>(slot / page_size_)];
    *out++ = std::int64_t{page} * page_size_ + slot % page_size_;
  }
}

}  // namespace stars_fast
