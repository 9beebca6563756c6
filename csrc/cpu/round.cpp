#include "round.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "parallel.h"

namespace stars_fast::cpu {

namespace {
// Queries that read a prefix together: what they add up fits the first cache.
constexpr Index kMaxRows = 16;
constexpr Index kFewBlocks = 8;
}  // namespace

Round::Round(std::vector<std::int32_t> prefix, std::vector<Index> prefix_begin,
             const std::vector<std::int32_t>& row_group, std::vector<std::int32_t> slots,
             Index width)
    : prefix_(std::move(prefix)),
      slots_(std::move(slots)),
      rows_(static_cast<Index>(row_group.size())),
      width_(width) {
  for (Index row = 0; row < rows_;) {
    const std::int32_t group = row_group[static_cast<std::size_t>(row)];
    Index end = row + 1;
    while (end < rows_ && end - row < kMaxRows &&
           row_group[static_cast<std::size_t>(end)] == group) {
      ++end;
    }
    const Index begin = prefix_begin[static_cast<std::size_t>(group)];
    const Index length = prefix_begin[static_cast<std::size_t>(group) + 1] - begin;
    blocks_.push_back({prefix_.data() + begin, length, row, end - row});
    row = end;
  }
}

void Round::attend(const Step& data, Index step) {
  const Kernels& forms = kernels();
  if (data.rotary.dim > 0) {
    forms.rotate({data.query, rows_, data.heads, data.key_dim, data.query_stride, data.rotary}, 0,
                 rows_);
    forms.rotate({data.key, rows_, data.kv_heads, data.key_dim, data.key_stride, data.rotary}, 0,
                 rows_);
  }
  const Index key_size = data.kv_heads * data.key_dim;
  const Index value_size = data.kv_heads * data.value_dim;
  for (Index row = 0; row < rows_; ++row) {
    const Index slot = slots_[static_cast<std::size_t>(row * width_ + step)];
    std::copy_n(data.key + row * data.key_stride, key_size, data.k_pages + slot * key_size);
    std::copy_n(data.value + row * data.value_stride, value_size, data.v_pages + slot * value_size);
  }

  const Attention task{data.query,        data.out,      data.k_pages, data.v_pages,
                       data.sinks,        slots_.data(), width_,       step + 1,
                       data.heads,        data.kv_heads, data.key_dim, data.value_dim,
                       data.query_stride, data.scaling,  data.softcap, data.window};
  const Index group = data.heads / data.kv_heads;
  Index most_rows = 0;
  Index reads = 0;  // of keys by queries
  for (const Block& block : blocks_) {
    most_rows = std::max(most_rows, block.rows);
    reads += block.rows * group * (block.prefix_length + step + 1);
  }
  // Few blocks are divided among the threads by heads.
  const auto blocks = static_cast<Index>(blocks_.size());
  const Index parts = blocks < kFewBlocks ? data.kv_heads : 1;
  const Index heads = data.kv_heads / parts;
  const Index scratch = heads * scratch_floats(most_rows * group, data.value_dim);
  scratch_.resize(std::max(scratch_.size(), static_cast<std::size_t>(scratch * blocks * parts)));
  const Index cost = reads * (data.key_dim + data.value_dim) * data.kv_heads / (blocks * parts);
  parallel_for(blocks * parts, cost, [&](Index begin, Index end) {
    for (Index unit = begin; unit < end; ++unit) {
      forms.attend(task, blocks_[static_cast<std::size_t>(unit / parts)],
                   {unit % parts * heads, heads}, scratch_.data() + unit * scratch);
    }
  });
}

}  // namespace stars_fast::cpu
