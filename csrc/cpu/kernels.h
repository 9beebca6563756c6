// Operators of a decode step on a CPU, in float32. Tensors are pointers with strides in floats.
#pragma once

#include <cstdint>

namespace stars_fast::cpu {

using Index = std::int64_t;

// out = x / rms(x) * (weight + offset) over the last dimension, tokens x heads of them.
// With a residual, x + residual is written to `sum` first and takes the place of x.
struct Norm {
  const float* x;
  const float* residual;  // null: none
  const float* weight;
  float* sum;
  float* out;  // may be x
  Index tokens;
  Index heads;
  Index dim;
  Index x_stride;  // from token to token; likewise below
  Index residual_stride;
  Index sum_stride;
  Index out_stride;
  float eps;
  float offset;
};

enum class Gate : int { kSilu = 0, kGeluTanh = 1 };

// out = act(gate) * up, tokens x dim.
struct Gated {
  const float* gate;
  const float* up;
  float* out;
  Index tokens;
  Index dim;
  Index stride;  // of gate and up; out is contiguous
  Gate act;
};

// Rotary embedding of the first `dim` channels of each head, in place. Channels i and i + dim / 2
// turn together, or 2 i and 2 i + 1 if interleaved; cos and sin are [tokens, dim].
struct Rotary {
  const float* cos;
  const float* sin;
  Index dim;
  bool interleaved;
};

struct Rotated {
  float* x;
  Index tokens;
  Index heads;
  Index head_dim;
  Index stride;  // from token to token
  Rotary rotary;
};

// One query a row: the queries of `rows` rows of one group, that read its prefix together.
struct Block {
  const std::int32_t* prefix;  // slots of the group's prefix tokens
  Index prefix_length;
  Index first_row;
  Index rows;
};

// Attention of one decode step in one layer, see `round.h`.
struct Attention {
  const float* query;
  float* out;
  const float* k_pages;
  const float* v_pages;
  const float* sinks;       // per head; null: none
  const std::int32_t* own;  // [rows, own_width], slots of each row's new tokens
  Index own_width;
  Index own_length;  // how many of them are there
  Index heads;
  Index kv_heads;
  Index key_dim;
  Index value_dim;
  Index query_stride;  // from row to row; out is contiguous
  float scaling;
  float softcap;  // 0: none
  Index window;   // 0: none
};

// Adjacent KV heads.
struct Heads {
  Index first;
  Index count;
};

struct SampleKernels;

// The forms for one instruction set. They run a range of the work on the calling thread.
struct Kernels {
  const char* name;
  void (*norm)(const Norm&, Index begin, Index end);       // of tokens
  void (*gated)(const Gated&, Index begin, Index end);     // of tokens
  void (*rotate)(const Rotated&, Index begin, Index end);  // of tokens
  // `scratch` has `scratch_floats` of the block's queries for each of the heads.
  void (*attend)(const Attention&, const Block&, Heads, float* scratch);
  const SampleKernels& (*sampling)();
};

// Keys that are scored before their values are read.
constexpr Index kChunk = 128;
// Room for their scores; two are written at a time, from any of them on.
constexpr Index kScores = kChunk + 1;

// Floats that `attend` needs for a number of queries of a KV head: accumulators, scores, and two
// numbers each.
constexpr Index scratch_floats(Index queries, Index value_dim) {
  return queries * (value_dim + kScores + 2);
}

// The form for this processor, the widest that it runs.
const Kernels& kernels();

}  // namespace stars_fast::cpu
