#include "int8.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "parallel.h"

namespace stars_fast::cpu {

namespace baseline {
extern const Int8Kernels int8_table;
}
#ifdef STARS_X86
namespace avx2 {
extern const Int8Kernels int8_table;
}
namespace avx512 {
extern const Int8Kernels int8_table;
}
#endif

namespace {

// Rows that pass over a panel before the next: with their 16 bits they fit the second cache.
constexpr Index kRows = 64;

const Int8Kernels& choose() {
#ifdef STARS_X86
  // As dispatch.cpp has it. The form of avx512 needs its byte products as well.
  const char* wanted = std::getenv("STARS_FAST_CPU");  // NOLINT(concurrency-mt-unsafe)
  const auto allows = [wanted](const char* name) {
    return wanted == nullptr || std::strcmp(wanted, name) == 0;
  };
  if (allows("avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512vnni")) {
    return avx512::int8_table;
  }
  if ((allows("avx2") || allows("avx512")) && __builtin_cpu_supports("avx2")) {
    return avx2::int8_table;
  }
#endif
  return baseline::int8_table;
}

const Int8Kernels& int8_kernels() {
  static const Int8Kernels& chosen = choose();
  return chosen;
}

// Calls f for the panels [begin, end) of all layers.
template <class F>
void each_panel(const std::vector<Int8Layer>& layers, const Int8Rows& rows, float* out,
                Index out_stride, Index begin, Index end, F&& f) {
  Index first = 0;  // panel of the layer
  for (const Int8Layer& layer : layers) {
    const Index count = round_up(layer.outputs, kPanel) / kPanel;
    for (Index p = std::max(begin - first, Index{0}); p < std::min(end - first, count); ++p) {
      const Index at = p * kPanel;
      f(Int8Panel{layer.weight + at * rows.inputs, layer.scale + at,
                  layer.bias == nullptr ? nullptr : layer.bias + at, out + at, out_stride,
                  std::min(layer.outputs - at, kPanel)});
    }
    first += count;
    out += layer.outputs;
  }
}

}  // namespace

void int8_product(const float* x, Index rows, Index inputs, const std::vector<Int8Layer>& layers,
                  float* out) {
  thread_local std::vector<std::uint8_t> bytes;
  thread_local std::vector<float> scales;
  thread_local std::vector<std::int64_t> sums;
  const Index padded = round_up(inputs, kTogether);
  bytes.resize(static_cast<std::size_t>(rows * padded * 2));
  scales.resize(static_cast<std::size_t>(rows));
  sums.resize(static_cast<std::size_t>(rows));
  const Int8Rows rounded{bytes.data(), scales.data(), sums.data(), padded};
  const Int8Kernels& forms = int8_kernels();
  parallel_for(rows, inputs,
               [&](Index begin, Index end) { forms.round(x, inputs, rounded, begin, end); });

  Index panels = 0;
  Index width = 0;
  for (const Int8Layer& layer : layers) {
    panels += round_up(layer.outputs, kPanel) / kPanel;
    width += layer.outputs;
  }
  parallel_for(panels, rows * padded * kPanel / 4, [&](Index begin, Index end) {
    for (Index row = 0; row < rows; row += kRows) {
      const Index last = std::min(rows, row + kRows);
      each_panel(layers, rounded, out, width, begin, end,
                 [&](const Int8Panel& panel) { forms.multiply(panel, rounded, row, last); });
    }
  });
}

}  // namespace stars_fast::cpu
