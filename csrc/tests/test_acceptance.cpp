#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "acceptance.h"
#include "check.h"
#include "philox.h"

namespace {

// The arg max of the keys is a draw with probability proportional to exp(r / beta).
void choices_follow_the_rewards() {
  const stars_fast::Schedule soft{0.0, 0.5, 0.5, 1, false};
  const std::vector<double> rewards{0.0, 1.0, -0.5, 0.7};
  constexpr int kDraws = 20000;
  std::vector<int> chosen(rewards.size(), 0);
  double total = 0.0;
  for (const double reward : rewards) {
    total += std::exp(reward / 0.5);
  }
  for (std::uint32_t draw = 0; draw < kDraws; ++draw) {
    std::vector<double> keys;
    for (const double reward : rewards) {
      const auto attempt = static_cast<std::uint32_t>(keys.size());
      keys.push_back(soft.choice_key(
          reward, stars_fast::purpose_uniform(9, draw, attempt, 0, stars_fast::Purpose::kChoose)));
    }
    ++chosen[static_cast<std::size_t>(std::max_element(keys.begin(), keys.end()) - keys.begin())];
  }
  for (std::size_t i = 0; i < rewards.size(); ++i) {
    const double share = std::exp(rewards[i] / 0.5) / total;
    CHECK(std::abs(chosen[i] / double{kDraws} - share) <
          5.0 * std::sqrt(share * (1.0 - share) / kDraws));
  }
  const stars_fast::Schedule hard{0.0, 0.5, 0.0, 1, true};
  CHECK(hard.choice_key(1.5, 1e-9) == 1.5);
}

}  // namespace

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

  const stars_fast::Schedule flat{2.0, 1.0, 0.5, 100, false};
  CHECK(!flat.needs_prompt_reward() && soft.needs_prompt_reward());
  CHECK(flat.threshold(std::numeric_limits<double>::quiet_NaN(), 10) == 2.0);

  const stars_fast::Merit keeps{true, -5.0};
  const stars_fast::Merit breaks{false, 5.0};
  CHECK(keeps.beats(breaks) && !breaks.beats(keeps));
  CHECK(keeps.beats({true, -6.0}) && breaks.beats({false, 4.0}) && !keeps.beats(keeps));

  choices_follow_the_rewards();
}
