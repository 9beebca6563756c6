// The Python module stars_fast._cpu. Tensors come as addresses: the module does not know torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "int8.h"
#include "kernels.h"
#include "parallel.h"
#include "round.h"
#include "sample.h"

namespace py = pybind11;

namespace stars_fast::cpu {
namespace {

using Address = std::uintptr_t;
template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

float* at(Address address) { return reinterpret_cast<float*>(address); }

template <class T>
std::vector<T> copy(const Array<T>& array) {
  return {array.data(), array.data() + array.size()};
}

void norm(Address x, Address residual, Address weight, Address sum, Address out, Index tokens,
          Index heads, Index dim, Index x_stride, Index residual_stride, Index out_stride,
          float eps, float offset) {
  const Norm task{at(x), at(residual), at(weight),      at(sum),     at(out),    tokens, heads,
                  dim,   x_stride,     residual_stride, heads * dim, out_stride, eps,    offset};
  const py::gil_scoped_release release;
  parallel_for(tokens, 2 * heads * dim,
               [&](Index begin, Index end) { kernels().norm(task, begin, end); });
}

void gated(Address gate, Address up, Address out, Index tokens, Index dim, Index stride, int act) {
  const Gated task{at(gate), at(up), at(out), tokens, dim, stride, static_cast<Gate>(act)};
  const py::gil_scoped_release release;
  parallel_for(tokens, 4 * dim, [&](Index begin, Index end) { kernels().gated(task, begin, end); });
}

void rotate(Address x, Index tokens, Index heads, Index head_dim, Index stride, Address cos,
            Address sin, Index dim, bool interleaved) {
  const Rotated task{at(x), tokens, heads, head_dim, stride, {at(cos), at(sin), dim, interleaved}};
  const py::gil_scoped_release release;
  parallel_for(tokens, heads * dim,
               [&](Index begin, Index end) { kernels().rotate(task, begin, end); });
}

// Layers are (weight, scale, bias, outputs).
void int8_linear(Address x, Index rows, Index inputs,
                 const std::vector<std::tuple<Address, Address, Address, Index>>& layers,
                 Address out) {
  if (inputs > kMostInputs) {
    throw std::invalid_argument("inputs must be at most " + std::to_string(kMostInputs) + ", got " +
                                std::to_string(inputs));
  }
  std::vector<Int8Layer> tasks;
  tasks.reserve(layers.size());
  for (const auto& [weight, scale, bias, outputs] : layers) {
    tasks.push_back({reinterpret_cast<const std::uint8_t*>(weight), at(scale), at(bias), outputs});
  }
  const py::gil_scoped_release release;
  int8_product(at(x), rows, inputs, tasks, at(out));
}

Round make_round(const Array<std::int32_t>& prefix, const Array<Index>& prefix_begin,
                 const Array<std::int32_t>& row_group, const Array<std::int32_t>& slots) {
  if (slots.ndim() != 2 || slots.shape(0) != row_group.size()) {
    throw std::invalid_argument("slots must have shape (rows, width), rows = len(row_group)");
  }
  const Index groups = static_cast<Index>(prefix_begin.size()) - 1;
  for (const std::int32_t group : copy(row_group)) {
    if (group < 0 || group >= groups) {
      throw std::invalid_argument("row_group must lie in [0, " + std::to_string(groups) +
                                  "), got " + std::to_string(group));
    }
  }
  if (groups < 0 || prefix_begin.at(groups) != prefix.size()) {
    throw std::invalid_argument("prefix_begin must end with len(prefix)");
  }
  return {copy(prefix), copy(prefix_begin), copy(row_group), copy(slots), slots.shape(1)};
}

void attend(Round& round, Index step, Address query, Address key, Address value, Address out,
            Address k_pages, Address v_pages, Address sinks, Index heads, Index kv_heads,
            Index key_dim, Index value_dim, Index query_stride, Index key_stride,
            Index value_stride, float scaling, float softcap, Index window, Address cos,
            Address sin, Index rotary_dim, bool interleaved) {
  if (step < 0 || step >= round.width()) {
    throw std::invalid_argument("step must be in [0, " + std::to_string(round.width()) + "), got " +
                                std::to_string(step));
  }
  const Step data{at(query),  at(key),      at(value),
                  at(out),    at(k_pages),  at(v_pages),
                  at(sinks),  heads,        kv_heads,
                  key_dim,    value_dim,    query_stride,
                  key_stride, value_stride, scaling,
                  softcap,    window,       {at(cos), at(sin), rotary_dim, interleaved}};
  const py::gil_scoped_release release;
  round.attend(data, step);
}

void draw(Address logits, Index rows, Index vocab_size, Index stride, Address temperature,
          Address top_k, Address top_p, Address min_p, Address seed, Address position,
          Address attempt, Address stream, Address live, bool with_entropy, Address token,
          Address logprob, Address truncated_logprob, Address entropy, Address ok,
          Address undecided) {
  if (vocab_size < 1 || vocab_size > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument("vocab_size must be in [1, 2^31), got " +
                                std::to_string(vocab_size));
  }
  const auto longs = [](Address address) { return reinterpret_cast<std::int64_t*>(address); };
  const Sampling task{at(logits),
                      rows,
                      vocab_size,
                      stride,
                      at(temperature),
                      reinterpret_cast<const std::int32_t*>(top_k),
                      at(top_p),
                      at(min_p),
                      longs(seed),
                      longs(position),
                      longs(attempt),
                      longs(stream),
                      reinterpret_cast<const bool*>(live),
                      with_entropy,
                      longs(token),
                      at(logprob),
                      at(truncated_logprob),
                      at(entropy),
                      reinterpret_cast<bool*>(ok),
                      reinterpret_cast<bool*>(undecided)};
  const py::gil_scoped_release release;
  sample(task);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Operators of a decode step on a CPU, float32; addresses and strides in floats.";
  m.def(
      "instruction_set", [] { return std::string(kernels().name); },
      "The instruction set whose form runs here.");
  m.def("norm", &norm);
  m.def("gated", &gated);
  m.def("rotate", &rotate);
  m.def("sample", &draw);
  m.def("int8_linear", &int8_linear);
  py::class_<Round>(m, "Round")
      .def(py::init(&make_round), py::arg("prefix"), py::arg("prefix_begin"), py::arg("row_group"),
           py::arg("slots"))
      .def("attend", &attend);
}

}  // namespace stars_fast::cpu
