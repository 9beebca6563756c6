// Products with 8-bit weights, w = scale[output] * (stored - 128).
//
// Activations are rounded to 16 bits with a scale per row, x = row scale * q, and the products are
// summed as integers: exactly, so that a result depends on its own row alone, and neither on the
// rows beside it nor on threads, tiles or the instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace stars_fast::cpu {

// Outputs whose weights lie together: bytes [panel][input / 4][kPanel][4], padded with 128.
constexpr Index kPanel = 32;
constexpr Index kTogether = 4;  // inputs of an output that lie together
// The largest |q|: its two bytes, q = 256 high + low, are signed.
constexpr Index kLargest = 127 * 256 + 127;
// Sums of kLargest's bytes times 255 stay below 2^31.
constexpr Index kMostInputs = 65536;

constexpr Index round_up(Index count, Index unit) { return (count + unit - 1) / unit * unit; }

// A linear layer.
struct Int8Layer {
  const std::uint8_t* weight;
  const float* scale;
  const float* bias;  // null: none
  Index outputs;
};

// Rounded rows, each in the order that the instruction set reads: 2 bytes an input.
struct Int8Rows {
  std::uint8_t* bytes;
  float* scale;       // [rows]
  std::int64_t* sum;  // [rows], of q
  Index inputs;       // rounded up to kTogether, zeros behind the last
};

// Some outputs of one panel.
struct Int8Panel {
  const std::uint8_t* weight;
  const float* scale;
  const float* bias;
  float* out;  // of row 0
  Index out_stride;
  Index outputs;  // at most kPanel
};

// The forms for one instruction set, for rows [begin, end).
struct Int8Kernels {
  void (*round)(const float* x, Index inputs, const Int8Rows&, Index begin, Index end);
  void (*multiply)(const Int8Panel&, const Int8Rows&, Index begin, Index end);
};

// out[row] = all layers' results side by side; x is [rows, inputs], contiguous.
void int8_product(const float* x, Index rows, Index inputs, const std::vector<Int8Layer>& layers,
                  float* out);

}  // namespace stars_fast::cpu
