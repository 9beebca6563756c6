// The choice among the forms that were compiled.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace stars_fast::cpu {

namespace baseline {
extern const Kernels table;
}
#ifdef STARS_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

const Kernels& choose() {
#ifdef STARS_X86
  // For tests: a narrower set than the processor has.
  const char* wanted = std::getenv("STARS_FAST_CPU");
  const auto runs = [&](const Kernels& form, bool supported) {
    return supported && (wanted == nullptr || std::strcmp(wanted, form.name) == 0);
  };
  if (runs(avx512::table, __builtin_cpu_supports("avx512f") != 0)) {
    return avx512::table;
  }
  if (runs(avx2::table,
           __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0)) {
    return avx2::table;
  }
#endif
  return baseline::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace stars_fast::cpu
