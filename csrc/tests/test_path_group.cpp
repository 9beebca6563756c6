#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "path_group.h"

namespace {

using stars_fast::GroupOptions;
using stars_fast::PathGroup;
using Members = std::vector<std::int32_t>;

GroupOptions resampling(double ess_threshold, std::uint64_t seed, double beta = 1.0) {
  return {GroupOptions::Kind::kResample, beta, ess_threshold, 0.5, seed};
}

GroupOptions pruning(double rejection_rate) {
  return {GroupOptions::Kind::kPrune, 1.0, 0.5, rejection_rate, 0};
}

// One generation of members that all grow; `ended`: those that will not; `breaking`: those that
// break a constraint.
PathGroup::Turn turn(PathGroup& group, const std::vector<double>& rewards,
                     const Members& ended = {}, const Members& breaking = {}) {
  for (std::size_t i = 0; i < rewards.size(); ++i) {
    CHECK(!group.complete());
    const auto member = static_cast<std::int32_t>(i);
    const bool keeps = std::count(breaking.begin(), breaking.end(), member) == 0;
    group.reach(member, {keeps, rewards[i]}, std::count(ended.begin(), ended.end(), member) > 0);
  }
  CHECK(group.complete());
  PathGroup::Turn made;
  group.turn(made);
  return made;
}

std::vector<double> logs(const std::vector<double>& weights, double beta = 1.0) {
  std::vector<double> rewards;
  rewards.reserve(weights.size());
  for (const double weight : weights) {
    rewards.push_back(beta * std::log(weight) + 3.0);  // the reward all began at matters not
  }
  return rewards;
}

// How many paths are that of each member after the turn.
std::vector<int> copies(const PathGroup::Turn& made, std::size_t size) {
  std::vector<int> counts(size, 1);
  CHECK(made.target.size() == made.source.size());
  for (std::size_t i = 0; i < made.target.size(); ++i) {
    CHECK(std::count(made.source.begin(), made.source.end(), made.target[i]) == 0);
    CHECK(std::count(made.target.begin(), made.target.end(), made.target[i]) == 1);
    --counts[static_cast<std::size_t>(made.target[i])];
    ++counts[static_cast<std::size_t>(made.source[i])];
  }
  return counts;
}

void counts_are_within_one_of_their_means_and_unbiased() {
  const std::vector<double> weights{0.5, 4.0, 0.05, 1.7, 0.8, 0.95};
  const std::size_t size = weights.size();
  double total = 0.0;
  for (const double weight : weights) {
    total += weight;
  }
  constexpr int kSeeds = 4000;
  std::vector<double> sums(size, 0.0);
  for (int seed = 0; seed < kSeeds; ++seed) {
    PathGroup group(resampling(1.0, static_cast<std::uint64_t>(seed), 0.3), size);
    const auto made = turn(group, logs(weights, 0.3));
    CHECK(made.dropped.empty() && made.chosen == PathGroup::kNone);
    const std::vector<int> counts = copies(made, size);
    for (std::size_t i = 0; i < size; ++i) {
      const double mean = weights[i] / total * static_cast<double>(size);
      CHECK(std::abs(counts[i] - mean) < 1.0);
      sums[i] += counts[i];
    }
  }
  for (std::size_t i = 0; i < size; ++i) {
    const double mean = weights[i] / total * static_cast<double>(size);
    // A count takes one of two neighbouring values: its deviation is at most a half. Five of them.
    CHECK(std::abs(sums[i] / kSeeds - mean) < 5.0 * 0.5 / std::sqrt(kSeeds));
  }
}

void resamples_below_the_effective_number_and_not_before() {
  // Weights 1, 1, 1, 5: 64 / 28 of 4 paths are effective.
  constexpr double kEffective = 64.0 / 28.0 / 4.0;
  for (const double threshold : {0.0, kEffective - 1e-9, kEffective + 1e-9, 1.0}) {
    PathGroup group(resampling(threshold, 1), 4);
    CHECK(turn(group, logs({1.0, 1.0, 1.0, 5.0})).target.empty() == (threshold < kEffective));
  }
  PathGroup even(resampling(1.0, 1), 4);
  CHECK(turn(even, {2.0, 2.0, 2.0, 2.0}).target.empty());  // all are effective: not below
}

void weights_multiply_until_they_are_made_equal() {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    // exp(r_t - r_{t-1}) multiplies up to exp(r_t): back at equal rewards, weights are equal.
    PathGroup group(resampling(0.75, seed), 4);
    CHECK(turn(group, logs({2.0, 2.0, 1.0, 1.0})).target.empty());
    CHECK(turn(group, logs({4.0, 4.0, 4.0, 4.0})).target.empty());
    std::vector<double> rewards = logs({1.0, 1.0, 1.0, 5.0});
    const auto made = turn(group, rewards);
    CHECK(copies(made, 4)[3] == 2 || copies(made, 4)[3] == 3);  // of 2.5
    // All weigh the same now, whatever their rewards: what counts is what they gain from here.
    for (std::size_t i = 0; i < made.target.size(); ++i) {
      rewards[static_cast<std::size_t>(made.target[i])] =
          rewards[static_cast<std::size_t>(made.source[i])];
    }
    CHECK(turn(group, rewards).target.empty());
    rewards[2] += std::log(1000.0);
    CHECK(copies(turn(group, rewards), 4)[2] >= 3);
  }
}

void one_is_chosen_by_weight() {
  const std::vector<double> weights{1.0, 2.0, 3.0, 4.0};
  constexpr int kSeeds = 4000;
  std::vector<int> chosen(4, 0);
  for (int seed = 0; seed < kSeeds; ++seed) {
    PathGroup group(resampling(1.0, static_cast<std::uint64_t>(seed)), 4);
    const auto made = turn(group, logs(weights), {0, 1, 2, 3});
    CHECK(made.target.empty() && made.dropped.empty());
    ++chosen[static_cast<std::size_t>(made.chosen)];
  }
  for (std::size_t i = 0; i < 4; ++i) {
    const double share = weights[i] / 10.0;
    const double deviation = std::sqrt(share * (1.0 - share) / kSeeds);
    CHECK(std::abs(chosen[i] / double{kSeeds} - share) < 5.0 * deviation);
  }
}

void paths_that_grew_and_are_gone_end_the_group() {
  Members chosen(4, 0);
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    PathGroup group(resampling(0.9, seed), 4);
    // Those that have ended carry all the weight, and so no boundary would come after this one.
    const auto made = turn(group, {50.0, -50.0, 50.0, -50.0}, {0, 2});
    CHECK((made.target == Members{1, 3} && made.source == Members{0, 2}));
    CHECK(group.ended(1) && group.ended(3));
    ++chosen[static_cast<std::size_t>(made.chosen)];
  }
  CHECK(*std::min_element(chosen.begin(), chosen.end()) > 20);  // any of four equal ones
}

void ended_paths_stay_and_may_be_left_for_others() {
  PathGroup group(resampling(0.9, 5), 2);
  CHECK(turn(group, {0.0, 0.0}, {1}).chosen == PathGroup::kNone);
  group.reach(0, {true, 50.0}, false);  // the one that grows: the other is not waited for
  CHECK(group.complete());
  PathGroup::Turn made;
  group.turn(made);
  CHECK((made.target == Members{1} && made.source == Members{0}));
  CHECK(!group.ended(1));
  CHECK(!group.complete());
}

void extreme_rewards_are_no_trouble() {
  PathGroup group(resampling(0.5, 5, 1e-300), 3);
  const auto made = turn(group, {-1e300, 1e300, -1e300});
  CHECK((copies(made, 3) == std::vector<int>{0, 3, 0}));
}

void random_groups_end_with_one_path() {
  std::mt19937 random(7);
  for (int round = 0; round < 300; ++round) {
    const std::size_t size = 1 + random() % 9;
    const bool prunes = round % 2 == 0;
    const double rate = static_cast<double>(random() % 10) / 10.0;
    PathGroup group(prunes ? pruning(rate) : resampling(0.9, random(), 0.5), size);
    std::vector<char> alive(size, 1);
    PathGroup::Turn made;
    for (int generation = 0; made.chosen == PathGroup::kNone; ++generation) {
      CHECK(generation < 200);
      for (std::size_t i = 0; i < size; ++i) {
        const auto member = static_cast<std::int32_t>(i);
        if (alive[i] != 0 && !group.ended(member)) {
          const double reward = static_cast<double>(random() % 1000) / 100.0;
          group.reach(member, {true, reward}, random() % 8 == 0);
        }
      }
      CHECK(group.complete());
      group.turn(made);
      copies(made, size);
      CHECK(prunes ? made.target.empty() : made.dropped.empty());
      for (const std::int32_t member : made.dropped) {
        CHECK(alive[static_cast<std::size_t>(member)] != 0);
        alive[static_cast<std::size_t>(member)] = 0;
      }
    }
    CHECK(alive[static_cast<std::size_t>(made.chosen)] != 0 && group.ended(made.chosen));
  }
}

void the_best_stay_half_to_even_and_ties_in_order() {
  const auto kept = [](double rate, std::size_t size) {
    PathGroup group(pruning(rate), size);
    return size - turn(group, std::vector<double>(size, 1.0)).dropped.size();
  };
  for (const auto& [size, expected] :
       std::vector<std::pair<std::size_t, std::size_t>>{{1, 1}, {2, 1}, {3, 2}, {5, 2}, {7, 4}}) {
    CHECK(kept(0.5, size) == expected);  // of 0.5, 1, 1.5, 2.5 and 3.5
  }
  CHECK(kept(0.0, 5) == 5);
  CHECK(kept(0.99, 5) == 1);

  PathGroup group(pruning(0.5), 5);
  CHECK((turn(group, {1.0, 3.0, 2.0, 3.0, 2.0}).dropped == Members{2, 4, 0}));
  group.reach(1, {true, 0.0}, true);
  CHECK(!group.complete());
  group.reach(3, {true, 0.0}, false);
  PathGroup::Turn made;
  group.turn(made);  // equal now: the first stays, and has ended
  CHECK((made.dropped == Members{3} && made.chosen == 1));
}

void those_that_break_a_constraint_have_no_weight() {
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    PathGroup group(resampling(1.0, seed), 4);
    const auto made = turn(group, {9.0, 0.0, 0.0, 9.0}, {}, {0, 3});
    CHECK((copies(made, 4) == std::vector<int>{0, 2, 2, 0}));
    // None is left that keeps them: weights are as if there were no constraint.
    const auto all = turn(group, {50.0, 0.0, 0.0, 0.0}, {}, {0, 1, 2, 3});
    CHECK((copies(all, 4) == std::vector<int>{4, 0, 0, 0}));

    PathGroup last(resampling(0.0, seed), 3);  // never resampled: a path may come to keep them
    CHECK(turn(last, {0.0, 0.0, 50.0}, {}, {1, 2}).target.empty());
    CHECK(turn(last, {0.0, 50.0, 90.0}, {0, 1, 2}, {2}).chosen == 1);
  }
}

void those_that_break_a_constraint_end_first() {
  PathGroup group(pruning(0.4), 5);
  CHECK((turn(group, {9.0, 1.0, 8.0, 2.0, 3.0}, {}, {0, 2, 4}).dropped == Members{2, 4}));
  PathGroup end(pruning(0.0), 3);
  CHECK(turn(end, {9.0, 1.0, 2.0}, {0, 1, 2}, {0}).chosen == 2);
  PathGroup none(pruning(0.0), 3);
  CHECK(turn(none, {1.0, 9.0, 2.0}, {0, 1, 2}, {0, 1, 2}).chosen == 1);
}

}  // namespace

void test_group() {
  counts_are_within_one_of_their_means_and_unbiased();
  resamples_below_the_effective_number_and_not_before();
  weights_multiply_until_they_are_made_equal();
  one_is_chosen_by_weight();
  paths_that_grew_and_are_gone_end_the_group();
  ended_paths_stay_and_may_be_left_for_others();
  extreme_rewards_are_no_trouble();
  random_groups_end_with_one_path();
  the_best_stay_half_to_even_and_ties_in_order();
  those_that_break_a_constraint_have_no_weight();
  those_that_break_a_constraint_end_first();
}
