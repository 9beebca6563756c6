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

// An int or a bool, as compilers have it.
template <class T>
bool is_set(T supported) {
  return static_cast<bool>(supported);
}

const Kernels& choose() {
#ifdef STARS_X86
  // For tests: a narrower set than the processor has.
  const char* wanted = std::getenv("STARS_FAST_CPU");  // NOLINT(concurrency-mt-unsafe)
  const auto runs = [&](const Kernels& form, bool supported) {
    return supported && (wanted == nullptr || std::strcmp(wanted, form.name) == 0);
  };
  if (runs(avx512::table, is_set(__builtin_cpu_supports("avx512f")))) {
    return avx512::table;
  }
  if (runs(avx2::table,
           is_set(__builtin_cpu_supports("avx2")) && is_set(__builtin_cpu_supports("fma")))) {
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
