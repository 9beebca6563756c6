// Work on the threads that PyTorch's own operators use: those of OpenMP, whose number
// torch.set_num_threads sets.
#pragma once

#include <algorithm>

#include "kernels.h"

#ifdef _OPENMP
// All of omp.h that is needed; compilers that check the code may lack the file.
extern "C" int omp_get_max_threads();
#endif

namespace stars_fast::cpu {

// Threads for `count` pieces of work of a cost in floats: one if the whole is small, for to start
// another, and to wait for one that another process keeps from running, costs more.
inline Index threads_for([[maybe_unused]] Index count, [[maybe_unused]] Index cost) {
#ifdef _OPENMP
  constexpr Index kWorthAThread = 32768;
  const Index most = std::min<Index>(omp_get_max_threads(), count);
  return std::clamp<Index>(count * cost / kWorthAThread, 1, std::max<Index>(1, most));
#else
  return 1;
#endif
}

// Calls f(begin, end) on parts of [0, count) that cover it.
template <class F>
void parallel_for(Index count, Index cost, F&& f) {
  const Index threads = threads_for(count, cost);
  if (threads == 1) {
    f(Index{0}, count);
    return;
  }
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static, 1)
  for (Index part = 0; part < threads; ++part) {
    f(count * part / threads, count * (part + 1) / threads);
  }
}

}  // namespace stars_fast::cpu
