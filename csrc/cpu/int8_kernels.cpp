// Products with 8-bit weights for one instruction set; compiled once for each, see vectors.h.
#include "int8.h"
#include "vectors.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace stars_fast::cpu::STARS_SET {
namespace {

// Where a rounded row keeps input k: all high bytes before all low ones for byte products,
// otherwise 16-bit numbers.
inline void put(std::uint8_t* row, [[maybe_unused]] Index inputs, Index k, std::int32_t q) {
#ifdef __AVX512VNNI__
  // (q + 128) / 256, rounded down
  const auto high = static_cast<std::int32_t>(static_cast<std::uint32_t>(q + 65664) / 256U) - 256;
  row[k] = static_cast<std::uint8_t>(high);
  row[inputs + k] = static_cast<std::uint8_t>(q - high * 256);
#else
  reinterpret_cast<std::int16_t*>(row)[k] = static_cast<std::int16_t>(q);
#endif
}

void round(const float* x, Index inputs, const Int8Rows& rows, Index begin, Index end) {
  for (Index r = begin; r < end; ++r) {
    const float* from = x + r * inputs;
    // The bits of |x| are ordered as |x| is, with infinity and NaN on top.
    std::uint32_t top = 0;
    for (Index k = 0; k < inputs; ++k) {
      const std::uint32_t bits = reinterpret_cast<const std::uint32_t*>(from)[k] & 0x7FFFFFFFU;
      top = bits > top ? bits : top;
    }
    float largest = 0.0F;
    __builtin_memcpy(&largest, &top, sizeof largest);
    constexpr std::uint32_t kInfinity = 0x7F800000U;
    constexpr float kSmallest = 1e-30F;  // what is below counts as 0: one over it is finite
    const bool zero = top >= kInfinity || largest < kSmallest;
    const float inverse = zero ? 0.0F : static_cast<float>(kLargest) / largest;
    rows.scale[r] = top >= kInfinity ? __builtin_nanf("") : largest / static_cast<float>(kLargest);
    std::uint8_t* to = rows.bytes + r * rows.inputs * 2;
    std::int64_t sum = 0;
    if (zero) {
      for (Index i = 0; i < rows.inputs * 2; ++i) {
        to[i] = 0;
      }
    } else {
      std::int32_t part = 0;  // at most 2^15 * kMostInputs
      for (Index k = 0; k < inputs; ++k) {
        // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even.
        const float shifted = from[k] * inverse + 12582912.0F;
        const auto q = static_cast<std::int32_t>(shifted - 12582912.0F);
        part += q;
        put(to, rows.inputs, k, q);
      }
      for (Index k = inputs; k < rows.inputs; ++k) {
        put(to, rows.inputs, k, 0);
      }
      sum = part;
    }
    rows.sum[r] = sum;
  }
}

// Rows that read a panel's weights together, as their sums fit the registers.
#ifdef __AVX512VNNI__
constexpr int kRowsTogether = 4;
#else
constexpr int kRowsTogether = 2;
#endif

// The sums of q * stored over the inputs, of kPanel outputs for each of R rows.
#ifdef __AVX512VNNI__
template <int R>
inline void sums(const std::uint8_t* weight, const std::uint8_t* first, Index inputs,
                 double (&total)[kRowsTogether][kPanel]) {
  __m512i high[R][2];
  __m512i low[R][2];
  for (Index r = 0; r < R; ++r) {
    for (Index half = 0; half < 2; ++half) {
      high[r][half] = low[r][half] = _mm512_setzero_si512();
    }
  }
  const auto four = [first, inputs](Index r, Index k) {
    std::int32_t bytes = 0;
    __builtin_memcpy(&bytes, first + r * inputs * 2 + k, sizeof bytes);
    return _mm512_set1_epi32(bytes);
  };
  for (Index k = 0; k < inputs; k += kTogether) {
    const __m512i w[2] = {_mm512_loadu_si512(weight + k * kPanel),
                          _mm512_loadu_si512(weight + k * kPanel + 64)};
    for (Index r = 0; r < R; ++r) {
      const __m512i h = four(r, k);
      const __m512i l = four(r, inputs + k);
      for (Index half = 0; half < 2; ++half) {
        high[r][half] = _mm512_dpbusd_epi32(high[r][half], w[half], h);
        low[r][half] = _mm512_dpbusd_epi32(low[r][half], w[half], l);
      }
    }
  }
  for (Index r = 0; r < R; ++r) {
    std::int32_t highs[kPanel];
    std::int32_t lows[kPanel];
    for (Index half = 0; half < 2; ++half) {
      _mm512_storeu_si512(highs + half * 16, high[r][half]);
      _mm512_storeu_si512(lows + half * 16, low[r][half]);
    }
    for (Index n = 0; n < kPanel; ++n) {
      total[r][n] = 256.0 * static_cast<double>(highs[n]) + static_cast<double>(lows[n]);
    }
  }
}
#else
// Adds the sums of a panel's inputs [begin, end), few enough to stay below 2^31.
#ifdef __AVX2__
template <int R>
inline void add_sums(const std::uint8_t* weight, const std::int16_t* q, Index inputs, Index begin,
                     Index end, Index from, double (&total)[kRowsTogether][kPanel]) {
  __m256i sum[R][4];
  for (auto& of_row : sum) {
    for (auto& x : of_row) {
      x = _mm256_setzero_si256();
    }
  }
  for (Index k = begin; k < end; k += kTogether) {
    const std::uint8_t* bytes = weight + k * kPanel + from * kTogether;
    __m256i x[R];
    for (Index r = 0; r < R; ++r) {
      std::int64_t four = 0;
      __builtin_memcpy(&four, q + r * inputs + k, sizeof four);
      x[r] = _mm256_set1_epi64x(four);
    }
    for (Index part = 0; part < 4; ++part) {
      const __m256i w = _mm256_cvtepu8_epi16(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + part * 16)));
      for (Index r = 0; r < R; ++r) {
        sum[r][part] = _mm256_add_epi32(sum[r][part], _mm256_madd_epi16(w, x[r]));
      }
    }
  }
  for (Index r = 0; r < R; ++r) {
    alignas(32) std::int32_t numbers[32];
    for (Index part = 0; part < 4; ++part) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(numbers + part * 8), sum[r][part]);
    }
    for (Index n = 0; n < 16; ++n) {
      total[r][from + n] +=
          static_cast<double>(numbers[2 * n]) + static_cast<double>(numbers[2 * n + 1]);
    }
  }
}

constexpr Index kOutputs = 16;  // of a panel, whose sums fit the registers
#else
template <int R>
inline void add_sums(const std::uint8_t* weight, const std::int16_t* q, Index inputs, Index begin,
                     Index end, Index /*from*/, double (&total)[kRowsTogether][kPanel]) {
  for (Index r = 0; r < R; ++r) {
    std::int32_t sum[2][kPanel] = {};
    for (Index k = begin; k < end; k += kTogether) {
      const std::uint8_t* bytes = weight + k * kPanel;
      const std::int16_t* x = q + r * inputs + k;
      for (Index n = 0; n < kPanel; ++n) {
        sum[0][n] += x[0] * bytes[4 * n] + x[1] * bytes[4 * n + 1];
        sum[1][n] += x[2] * bytes[4 * n + 2] + x[3] * bytes[4 * n + 3];
      }
    }
    for (Index n = 0; n < kPanel; ++n) {
      total[r][n] += static_cast<double>(sum[0][n]) + static_cast<double>(sum[1][n]);
    }
  }
}

constexpr Index kOutputs = kPanel;
#endif

template <int R>
inline void sums(const std::uint8_t* weight, const std::uint8_t* first, Index inputs,
                 double (&total)[kRowsTogether][kPanel]) {
  const auto* q = reinterpret_cast<const std::int16_t*>(first);
  for (Index r = 0; r < R; ++r) {
    for (double& sum : total[r]) {
      sum = 0.0;
    }
  }
  constexpr Index kInputs = 512;  // each number has the sum of two inputs in four
  for (Index begin = 0; begin < inputs; begin += kInputs) {
    const Index end = begin + kInputs < inputs ? begin + kInputs : inputs;
    for (Index from = 0; from < kPanel; from += kOutputs) {
      add_sums<R>(weight, q, inputs, begin, end, from, total);
    }
  }
}
#endif

template <int R>
inline void multiply_rows(const Int8Panel& panel, const Int8Rows& rows, Index row) {
  double total[kRowsTogether][kPanel];
  sums<R>(panel.weight, rows.bytes + row * rows.inputs * 2, rows.inputs, total);
  for (int r = 0; r < R; ++r) {
    float* out = panel.out + (row + r) * panel.out_stride;
    const float scale = rows.scale[row + r];
    // Stored numbers are 128 above the weights.
    const double above = 128.0 * static_cast<double>(rows.sum[row + r]);
    if (panel.bias == nullptr) {
      for (Index n = 0; n < panel.outputs; ++n) {
        out[n] = static_cast<float>(total[r][n] - above) * (scale * panel.scale[n]);
      }
    } else {
      for (Index n = 0; n < panel.outputs; ++n) {
        out[n] = static_cast<float>(total[r][n] - above) * (scale * panel.scale[n]) + panel.bias[n];
      }
    }
  }
}

void multiply(const Int8Panel& panel, const Int8Rows& rows, Index begin, Index end) {
  Index row = begin;
  for (; row + kRowsTogether <= end; row += kRowsTogether) {
    multiply_rows<kRowsTogether>(panel, rows, row);
  }
#ifdef __AVX512VNNI__
  if (row + 2 <= end) {
    multiply_rows<2>(panel, rows, row);
    row += 2;
  }
#endif
  if (row < end) {
    multiply_rows<1>(panel, rows, row);
  }
}

}  // namespace

extern const Int8Kernels int8_table;
const Int8Kernels int8_table{round, multiply};

}  // namespace stars_fast::cpu::STARS_SET
