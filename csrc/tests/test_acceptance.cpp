#include <cmath>

#include "acceptance.h"
#include "check.h"

void test_acceptance() {
  const stars_fast::Schedule soft{2.0, 0.25, 0.5, 100, false};
  // r0 = 0.75 * (-2) + 0.25 * 2 = -1; tau rises to r* over 100 tokens.
  CHECK(std::abs(soft.threshold(-2.0, 0) + 1.0) < 1e-12);
  CHECK(std::abs(soft.threshold(-2.0, 50) - 0.5) < 1e-12);
  CHECK(std::abs(soft.threshold(-2.0, 100) - 2.0) < 1e-12);
  CHECK(soft.threshold(5.0, 10) == 2.0);  // a prompt above the target is held to the target

  CHECK(soft.accepts(1.0, 1.0, 1.0 - 1e-9));
  const double chance = std::exp(-0.3 / 0.5);
  CHECK(soft.accepts(0.7, 1.0, chance - 1e-9));
  CHECK(!soft.accepts(0.7, 1.0, chance + 1e-9));

  const stars_fast::Schedule hard{2.0, 0.25, 0.5, 100, true};
  CHECK(hard.accepts(1.0, 1.0, 0.5));
  CHECK(!hard.accepts(1.0 - 1e-9, 1.0, 1e-300));
}
