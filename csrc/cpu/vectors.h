// Vectors of the width that the file is compiled for, by the compiler's own vector types.
//
// Files that include this are compiled once for each instruction set, each into a namespace of its
// own. They use no templates of the standard library: the linker would keep one copy of each, made
// for any of the sets.
#pragma once

#include <cstdint>

#ifdef __AVX512F__
#define STARS_SET avx512
#elif defined(__AVX2__)
#define STARS_SET avx2
#else
#define STARS_SET baseline
#endif

namespace stars_fast::cpu::STARS_SET {

#ifdef __AVX512F__
constexpr int kLanes = 16;
constexpr const char* kName = "avx512";
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr const char* kName = "avx2";
#else
constexpr int kLanes = 4;
constexpr const char* kName = "baseline";
#endif

using Vec __attribute__((vector_size(kLanes * 4))) = float;
using VecInt __attribute__((vector_size(kLanes * 4))) = std::int32_t;
using Unaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias)) = float;
using Quad __attribute__((vector_size(16), may_alias)) = float;

static inline Vec load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
static inline void store(float* p, Vec x) { *reinterpret_cast<Unaligned*>(p) = x; }
static inline Vec spread(float x) { return x - Vec{}; }

// The sum of the lanes, halving: a loop would wait for each addition.
static inline float total(Vec x) {
  const Quad* quads = reinterpret_cast<const Quad*>(&x);
  Quad sum = quads[0];
  for (int i = 1; i < kLanes / 4; ++i) {
    sum += quads[i];
  }
  sum += __builtin_shufflevector(sum, sum, 2, 3, 0, 1);
  return sum[0] + sum[1];
}

// The first `count` floats, 0 behind them.
static inline Vec load_some(const float* p, int count) {
  Vec x{};
  for (int i = 0; i < count; ++i) {
    x[i] = p[i];
  }
  return x;
}

static inline void store_some(float* p, Vec x, int count) {
  for (int i = 0; i < count; ++i) {
    p[i] = x[i];
  }
}

// NaN stays NaN.
static inline Vec at_least(Vec x, Vec bound) { return bound > x ? bound : x; }
static inline Vec at_most(Vec x, Vec bound) { return bound < x ? bound : x; }

// exp to 2 units in the last place; 0 below -87. A polynomial on [-ln 2 / 2, ln 2 / 2] times 2^n.
static inline Vec exp(Vec x) {
  const Vec low = spread(-87.3F);
  const Vec clamped = at_most(at_least(x, low), spread(88.3F));
  // Adding 1.5 * 2^23 rounds to an integer, which stands in the lowest bits then.
  const Vec shifted = clamped * 1.44269504F + 12582912.0F;
  const Vec n = shifted - 12582912.0F;
  const Vec r = clamped - n * 0.693359375F + n * 2.12194440e-4F;
  Vec p = r * 1.9875691500e-4F + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * r * r + r + 1.0F;
  const VecInt power = (reinterpret_cast<VecInt>(shifted) << 23) + (127 << 23);
  const Vec result = p * reinterpret_cast<Vec>(power);
  return x < low ? Vec{} : result;
}

}  // namespace stars_fast::cpu::STARS_SET
