// What sampling does to every entry of a vocabulary, for one instruction set.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace stars_fast::cpu {

// Entries that share a maximum, by which they are passed over together.
constexpr Index kPart = 128;
// Entries that are summed together, while they are in the nearest cache; a multiple of kPart.
constexpr Index kBlock = 4096;

constexpr Index parts_of(Index entries) { return (entries + kPart - 1) / kPart; }
constexpr Index blocks_of(Index entries) { return (entries + kBlock - 1) / kBlock; }

struct BlockSums {
  float peak;
  float mass;    // sum of exp(x - peak)
  float moment;  // sum of (x - peak) exp(x - peak)
  bool bad;      // a NaN or +inf among them
};

struct Candidate {
  double weight;  // relative to the most probable
  float value;    // scaled logit
  std::int32_t index;
};

// The token draws of a row: counter words 1 to 3, and the key, of csrc/philox.h.
struct TokenDraws {
  std::uint32_t position;
  std::uint32_t attempt;
  std::uint32_t stream;
  std::uint32_t key[2];
};

struct SampleKernels {
  // Of at most kBlock entries: their sums, and the maximum of each part.
  BlockSums (*reduce)(const float* x, Index count, bool with_moment, float* maxima);
  // The sum of exp(x / temperature - peak) in float64.
  double (*mass)(const float* x, Index count, float temperature, float peak);
  // The same to a few units in the last place of float32.
  double (*rough_mass)(const float* x, Index count, float temperature, float peak);
  // Writes value and index of the entries with x / temperature >= least; returns their number.
  Index (*gather)(const float* x, Index count, const float* maxima, float temperature, float least,
                  Candidate* out);
  // Writes the entries of a part whose word is at most `limit`, numbered from the part's first, and
  // their words; returns their number.
  Index (*hits)(const TokenDraws& draws, Index part, std::uint32_t limit, std::int32_t* entries,
                std::uint32_t* words);
};

}  // namespace stars_fast::cpu
