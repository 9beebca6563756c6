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
  bool hard = false;            // no chance in it: the test is r >= tau, the choice the largest r

  // With alpha = 1 the schedule is flat, and r(x) is not asked for.
  [[nodiscard]] bool needs_prompt_reward() const { return alpha < 1.0; }

  // tau(t) = min(r*, r0 + (r* - r0) t / M), r0 = (1 - alpha) r(x) + alpha r*;
  // t: response tokens, those of the segment under test included.
  [[nodiscard]] double threshold(double prompt_reward, std::int32_t tokens) const {
    if (!needs_prompt_reward()) {
      return target;
    }
    const double start = (1.0 - alpha) * prompt_reward + alpha * target;
    return std::min(target, start + (target - start) * tokens / max_tokens);
  }

  // Soft: with probability min(1, exp((r - tau) / beta)), `uniform` in (0, 1) deciding.
  // Hard: iff r >= tau.
  [[nodiscard]] bool accepts(double reward, double tau, double uniform) const {
    return reward >= tau || (!hard && std::log(uniform) < (reward - tau) / beta);
  }

  // Key of a choice among candidates: the arg max of r / beta + Gumbel noise is a draw with
  // probability proportional to exp(r / beta), whatever the number and order of the candidates.
  [[nodiscard]] double choice_key(double reward, double uniform) const {
    return hard ? reward : reward / beta - std::log(-std::log(uniform));
  }
};

// What attempts or paths are compared by: any that keeps all constraints beats any that does not.
struct Merit {
  bool keeps = true;
  double value = 0.0;

  [[nodiscard]] bool beats(const Merit& other) const {
    return keeps != other.keeps ? keeps : value > other.value;
  }
};

}  // namespace stars_fast
