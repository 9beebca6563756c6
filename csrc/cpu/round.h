// Attention of the decode steps of one round, straight from the pages.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace stars_fast::cpu {

// What a layer reads and writes in one step. Rows are adjacent; strides are in floats.
struct Step {
  float* query;  // turned in place
  float* key;
  const float* value;
  float* out;
  float* k_pages;
  float* v_pages;
  const float* sinks;
  Index heads;
  Index kv_heads;
  Index key_dim;
  Index value_dim;
  Index query_stride;
  Index key_stride;
  Index value_stride;
  float scaling;
  float softcap;
  Index window;
  Rotary rotary;  // dim 0: none
};

// The rows of a round: which prefix each reads, and where its new tokens go.
class Round {
 public:
  // prefix: slots of the groups' prefixes, one after the other, group g in
  // [prefix_begin[g], prefix_begin[g + 1]). row_group: rows of a group are adjacent.
  // slots: [rows, width], of the rows' new tokens.
  Round(std::vector<std::int32_t> prefix, std::vector<Index> prefix_begin,
        const std::vector<std::int32_t>& row_group, std::vector<std::int32_t> slots, Index width);

  // Stores the keys and values of every row's token number `step`, counted from 0, and attends.
  void attend(const Step& data, Index step);

  [[nodiscard]] Index rows() const { return rows_; }
  [[nodiscard]] Index width() const { return width_; }

 private:
  std::vector<std::int32_t> prefix_;
  std::vector<std::int32_t> slots_;
  std::vector<Block> blocks_;
  std::vector<float> scratch_;
  Index rows_;
  Index width_;
};

}  // namespace stars_fast::cpu
