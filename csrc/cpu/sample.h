// Draws a token of each row of logits on a CPU, by the rules of stars_fast/ops/sample.py.
//
// Its PyTorch form works with logarithms and exponentials that differ by processor in their last
// digits. Here they are more precise, and where those digits could decide (which of two tokens has
// more noise, whether a sum reaches top_p), the row is returned as undecided, about one in 10^5:
// the PyTorch form draws it. So both give the same tokens always.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace stars_fast::cpu {

struct Sampling {
  const float* logits;  // [rows, vocab_size]
  Index rows;
  Index vocab_size;          // at least 1, below 2^31
  Index stride;              // from row to row
  const float* temperature;  // [rows], as all that follows
  const std::int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const std::int64_t* seed;
  const std::int64_t* position;
  const std::int64_t* attempt;
  const std::int64_t* stream;
  const bool* live;  // null: all
  bool with_entropy;
  std::int64_t* token;  // rows that are not live are not written
  float* logprob;
  float* truncated_logprob;
  float* entropy;
  bool* ok;         // whether there is a distribution
  bool* undecided;  // then the others mean nothing
};

// A row's results depend on the row alone, not on the others or on the number of threads.
void sample(const Sampling& task);

}  // namespace stars_fast::cpu
