// Passes over logits for one instruction set; compiled once for each, see vectors.h.
#include "sample_kernels.h"

#include <cstdint>

#include "vectors.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace stars_fast::cpu::STARS_SET {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr Index kPair = Index{2} * kLanes;  // two sums do not wait for each other
constexpr float kLargest = 3.40282347e38F;

// One bit for each lane that is set.
inline std::uint32_t bits(VecInt mask) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return static_cast<std::uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif defined(__SSE2__)
  return static_cast<std::uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#else
  std::uint32_t found = 0;
  for (int i = 0; i < kLanes; ++i) {
    found |= static_cast<std::uint32_t>(mask[i] & 1) << i;
  }
  return found;
#endif
}

inline float highest(Vec x) {
  float found = x[0];
  for (int i = 1; i < kLanes; ++i) {
    found = x[i] > found ? x[i] : found;
  }
  return found;
}

// The entries of a part that may be the last one, -inf behind them.
inline const float* whole_part(const float* x, Index count, float* padded) {
  if (count >= kPart) {
    return x;
  }
  for (Index i = 0; i < kPart; ++i) {
    padded[i] = i < count ? x[i] : -kInfinity;
  }
  return padded;
}

BlockSums reduce(const float* x, Index count, bool with_moment, float* maxima) {
  float padded[kPart];
  VecInt fine = ~VecInt{};
  Vec top = spread(-kInfinity);
  for (Index at = 0; at < count; at += kPart) {
    const float* part = whole_part(x + at, count - at, padded);
    Vec first = spread(-kInfinity);
    Vec second = first;
    for (Index i = 0; i < kPart; i += kPair) {
      const Vec a = load(part + i);
      const Vec b = load(part + i + kLanes);
      fine &= (a <= kLargest) & (b <= kLargest);
      first = a > first ? a : first;
      second = b > second ? b : second;
    }
    first = second > first ? second : first;
    maxima[at / kPart] = highest(first);
    top = first > top ? first : top;
  }
  BlockSums sums{highest(top), 0.0F, 0.0F, bits(~fine) != 0};
  if (sums.bad || sums.peak == -kInfinity) {
    return sums;
  }
  Vec mass[2] = {};
  Vec moment[2] = {};
  for (Index at = 0; at < count; at += kPart) {
    const float* part = whole_part(x + at, count - at, padded);
    for (Index i = 0; i < kPart; i += kPair) {
      for (int j = 0; j < 2; ++j) {
        const Vec below = load(part + i + j * Index{kLanes}) - sums.peak;
        const Vec weight = exp(below);
        mass[j] += weight;
        if (with_moment) {
          moment[j] += at_least(below, spread(-100.0F)) * weight;
        }
      }
    }
  }
  sums.mass = total(mass[0] + mass[1]);
  sums.moment = total(moment[0] + moment[1]);
  return sums;
}

double rough_mass(const float* x, Index count, float temperature, float peak) {
  float padded[kPart];
  double result = 0.0;
  for (Index at = 0; at < count; at += kPart) {
    const float* part = whole_part(x + at, count - at, padded);
    Vec first{};
    Vec second{};
    for (Index i = 0; i < kPart; i += kPair) {
      first += exp(load(part + i) / temperature - peak);
      second += exp(load(part + i + kLanes) / temperature - peak);
    }
    result += total(first + second);
  }
  return result;
}

constexpr Index kHalf = kLanes / 2;
using Double __attribute__((vector_size(kLanes * 4))) = double;
using Long __attribute__((vector_size(kLanes * 4))) = std::int64_t;
using HalfUnaligned __attribute__((vector_size(kLanes * 2), aligned(4), may_alias)) = float;

// exp to 1e-14 of itself, of numbers in [-700, 0]: Taylor's polynomial times 2^n.
inline Double exp(Double x) {
  const Double shifted = x * 1.4426950408889634 + 6755399441055744.0;
  const Double n = shifted - 6755399441055744.0;
  const Double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  Double p = r * (1.0 / 39916800.0) + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const Long power = (reinterpret_cast<Long>(shifted) << 52) + 0x3FF0000000000000;
  return p * reinterpret_cast<Double>(power);
}

double mass(const float* x, Index count, float temperature, float peak) {
  float padded[kPart];
  Double sums[2] = {};
  for (Index at = 0; at < count; at += kPart) {
    const float* part = whole_part(x + at, count - at, padded);
    for (Index i = 0; i < kPart; i += kLanes) {
      for (int j = 0; j < 2; ++j) {
        const auto scaled =
            *reinterpret_cast<const HalfUnaligned*>(part + i + j * kHalf) / temperature;
        const auto below = __builtin_convertvector(scaled - peak, Double);
        sums[j] += exp(below < -700.0 ? Double{} - 700.0 : below);
      }
    }
  }
  const Double sum = sums[0] + sums[1];
  double result = 0.0;
  for (int i = 0; i < kHalf; ++i) {
    result += sum[i];
  }
  return result;
}

Index gather(const float* x, Index count, const float* maxima, float temperature, float least,
             Candidate* out) {
  float padded[kPart];
  Index found = 0;
  for (Index at = 0; at < count; at += kPart) {
    if (maxima[at / kPart] / temperature < least) {
      continue;
    }
    const float* part = whole_part(x + at, count - at, padded);
    for (Index i = 0; i < kPart; i += kLanes) {
      const Vec scaled = load(part + i) / temperature;
      for (std::uint32_t left = bits(scaled >= least); left != 0; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        out[found].value = part[i + lane] / temperature;
        out[found].index = static_cast<std::int32_t>(at + i + lane);
        ++found;
      }
    }
  }
  return found;
}

using Word __attribute__((vector_size(kLanes * 4))) = std::uint64_t;

// The product of the low halves.
inline Word times(Word x, std::uint64_t factor) {
#ifdef __AVX512F__
  // Without a mask, GCC 12 warns of its own header.
  return reinterpret_cast<Word>(_mm512_maskz_mul_epu32(
      0xFF, reinterpret_cast<__m512i>(x), _mm512_set1_epi64(static_cast<std::int64_t>(factor))));
#elif defined(__AVX2__)
  return reinterpret_cast<Word>(_mm256_mul_epu32(
      reinterpret_cast<__m256i>(x), _mm256_set1_epi64x(static_cast<std::int64_t>(factor))));
#elif defined(__SSE2__)
  return reinterpret_cast<Word>(_mm_mul_epu32(reinterpret_cast<__m128i>(x),
                                              _mm_set1_epi64x(static_cast<std::int64_t>(factor))));
#else
  return (x & 0xFFFFFFFFU) * factor;
#endif
}

Index hits(const TokenDraws& draws, Index part, std::uint32_t limit, std::int32_t* entries,
           std::uint32_t* words) {
  constexpr std::uint64_t kLow = 0xFFFFFFFFU;
  Word number;
  for (int i = 0; i < kHalf; ++i) {
    number[i] = static_cast<std::uint64_t>(i);
  }
  Index found = 0;
  for (Index group = 0; group < kPart / 4; group += kHalf) {
    // Each word in the low half of a lane; what is above is never read.
    Word c0 = number + static_cast<std::uint64_t>(part * (kPart / 4) + group);
    Word c1 = Word{} + draws.position;
    Word c2 = Word{} + draws.attempt;
    Word c3 = Word{} + draws.stream;
    std::uint32_t k0 = draws.key[0];
    std::uint32_t k1 = draws.key[1];
    for (int round = 0; round < 10; ++round) {
      const Word low = times(c0, 0xD2511F53U);
      const Word high = times(c2, 0xCD9E8D57U);
      c0 = (high >> 32) ^ c1 ^ k0;
      c2 = (low >> 32) ^ c3 ^ k1;
      c1 = high;
      c3 = low;
      k0 += 0x9E3779B9U;
      k1 += 0xBB67AE85U;
    }
    const Word drawn[4] = {c0 & kLow, c1 & kLow, c2 & kLow, c3 & kLow};
    Long hit{};
    for (const Word word : drawn) {
      hit |= reinterpret_cast<Long>(word) <= std::int64_t{limit};
    }
    if (bits(reinterpret_cast<VecInt>(hit)) == 0) {
      continue;
    }
    for (int i = 0; i < kHalf; ++i) {
      for (int j = 0; j < 4; ++j) {
        if (drawn[j][i] <= limit) {
          entries[found] = static_cast<std::int32_t>(4 * (group + i) + j);
          words[found] = static_cast<std::uint32_t>(drawn[j][i]);
          ++found;
        }
      }
    }
  }
  return found;
}

}  // namespace

extern const SampleKernels& sampling();
const SampleKernels& sampling() {
  static constexpr SampleKernels kTable{reduce, mass, rough_mass, gather, hits};
  return kTable;
}

}  // namespace stars_fast::cpu::STARS_SET
