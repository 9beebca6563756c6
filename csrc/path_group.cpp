#include "path_group.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "philox.h"

namespace stars_fast {

void PathGroup::Turn::clear() {
  target.clear();
  source.clear();
  dropped.clear();
  chosen = kNone;
}

PathGroup::PathGroup(const GroupOptions& options, std::size_t size)
    : options_(options), members_(size) {
  begin_generation();
}

void PathGroup::begin_generation() {
  pending_ = static_cast<std::int32_t>(
      std::count_if(members_.begin(), members_.end(),
                    [](const Member& member) { return member.alive && !member.ended; }));
}

void PathGroup::reach(std::int32_t member, const Merit& reward, bool ended) {
  Member& reached = members_[static_cast<std::size_t>(member)];
  reached.reward = reward;
  reached.ended = ended;
  --pending_;
}

void PathGroup::turn(Turn& into) {
  into.clear();
  if (options_.kind == GroupOptions::Kind::kPrune) {
    prune(into);
  } else {
    resample(into);
  }
  ++generation_;
  begin_generation();
}

double PathGroup::uniform(std::uint32_t what) const {
  return purpose_uniform(options_.seed, generation_, what, 0, Purpose::kResample);
}

void PathGroup::resample(Turn& into) {
  const std::size_t size = members_.size();
  // The factors exp((r_t - r_{t-1}) / beta) of a weight multiply up to the ends of their sum. All
  // begin at the prompt's reward, one and the same, which therefore need not be known.
  const bool any_keeps = std::any_of(members_.begin(), members_.end(),
                                     [](const Member& member) { return member.reward.keeps; });
  double most = -std::numeric_limits<double>::infinity();
  for (const Member& member : members_) {
    if (member.reward.keeps == any_keeps) {
      most = std::max(most, member.reward.value - member.even);
    }
  }
  weights_.resize(size);
  std::size_t last = 0;  // of those with a weight
  double total = 0.0;
  double squares = 0.0;
  bool grows = false;
  for (std::size_t i = 0; i < size; ++i) {
    weights_[i] = 0.0;
    if (members_[i].reward.keeps == any_keeps) {
      weights_[i] = std::exp((members_[i].reward.value - members_[i].even - most) / options_.beta);
      last = i;
    }
    total += weights_[i];
    squares += weights_[i] * weights_[i];
    grows = grows || !members_[i].ended;
  }
  if (!grows) {
    into.chosen = draw(total);
    return;
  }
  const auto paths = static_cast<double>(size);
  if (total * total / squares >= options_.ess_threshold * paths) {
    return;
  }
  // Systematic: one uniform for all, path i gets the points u, u + 1, ... in its share of the line.
  order_.assign(size, 0);  // copies of each path
  const double offset = uniform(0);
  double sum = 0.0;
  double points = 0.0;
  for (std::size_t i = 0; i < size; ++i) {
    sum += weights_[i] / total * paths;
    while (points < paths && (points + offset < sum || i == last)) {
      ++order_[i];
      points += 1.0;
    }
  }
  std::size_t source = 0;
  for (std::size_t i = 0; i < size; ++i) {
    if (order_[i] > 0) {
      continue;
    }
    while (order_[source] < 2) {
      ++source;
    }
    --order_[source];
    into.target.push_back(static_cast<std::int32_t>(i));
    into.source.push_back(static_cast<std::int32_t>(source));
    members_[i] = members_[source];
  }
  grows = false;
  for (std::size_t i = 0; i < size; ++i) {
    members_[i].even = members_[i].reward.value;
    weights_[i] = 1.0;
    grows = grows || !members_[i].ended;
  }
  if (!grows) {  // those that grew have gone, and so no boundary would come
    into.chosen = draw(static_cast<double>(size));
  }
}

// A member with probability proportional to weights_, which sum up to `total`.
std::int32_t PathGroup::draw(double total) const {
  const double point = uniform(1) * total;
  double sum = 0.0;
  std::size_t chosen = 0;
  for (std::size_t i = 0; i < weights_.size() && sum < point; ++i) {
    if (weights_[i] > 0.0) {  // whatever the sum's rounding
      chosen = i;
      sum += weights_[i];
    }
  }
  return static_cast<std::int32_t>(chosen);
}

void PathGroup::prune(Turn& into) {
  order_.clear();
  for (std::size_t i = 0; i < members_.size(); ++i) {
    if (members_[i].alive) {
      order_.push_back(static_cast<std::int32_t>(i));
    }
  }
  std::sort(order_.begin(), order_.end(), [this](std::int32_t a, std::int32_t b) {
    const Merit& one = at(a).reward;
    const Merit& other = at(b).reward;
    return one.beats(other) || (!other.beats(one) && a < b);
  });
  const auto count = static_cast<double>(order_.size());
  const auto keep = static_cast<std::size_t>(
      std::max(1.0, std::nearbyint((1.0 - options_.rejection_rate) * count)));
  bool grows = false;
  for (std::size_t i = 0; i < order_.size(); ++i) {
    Member& member = members_[static_cast<std::size_t>(order_[i])];
    if (i < keep) {
      grows = grows || !member.ended;
    } else {
      member.alive = false;
      into.dropped.push_back(order_[i]);
    }
  }
  if (!grows) {
    into.chosen = order_.front();
  }
}

}  // namespace stars_fast
