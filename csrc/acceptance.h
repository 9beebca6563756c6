// The threshold schedule and the accept test of STARS (arXiv 2511.03827, section 3).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace stars_fast {

struct Schedule {
  double target = 0.0;          // r*
  double alpha = 0.5;           // where the schedule starts, between r(x) and r*
  double beta = 1.0;            // softness of the test, in units of reward
  std::int32_t max_tokens = 1;  // M
  bool hard = false;

  // tau(t) = min(r*, r0 + (r* - r0) t / M), r0 = (1 - alpha) r(x) + alpha r*;
  // t: response tokens, those of the segment under test included.
  [[nodiscard]] double threshold(double prompt_reward, std::int32_t tokens) const {
    const double start = (1.0 - alpha) * prompt_reward + alpha * target;
    return std::min(target, start + (target - start) * tokens / max_tokens);
  }

  // Soft: with probability min(1, exp((r - tau) / beta)), `uniform` in (0, 1) deciding.
  // Hard: iff r >= tau.
  [[nodiscard]] bool accepts(double reward, double tau, double uniform) const {
    return reward >= tau || (!hard && std::log(uniform) < (reward - tau) / beta);
  }
};

}  // namespace stars_fast
