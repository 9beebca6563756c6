// Paths of one request that are compared where their segments end: the particles of sequential
// Monte Carlo, or a Best-of-N batch that loses its worst part as it grows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "acceptance.h"

namespace stars_fast {

struct GroupOptions {
  // kResample: particles whose weight grows by exp((r_t - r_{t-1}) / beta) with each segment, r its
  // reward so far; systematic resampling when few carry the weight (Del Moral, Doucet and Jasra
  // 2006). At the end one path is drawn by weight.
  // kPrune: speculative rejection (arXiv 2410.20290): the worst part ends. At the end the path of
  // the best reward is taken.
  // A path that breaks a constraint at a boundary has no weight there, and is worse than any that
  // does not; if all do, they are compared as if none did.
  enum class Kind : std::int8_t { kResample = 0, kPrune = 1 };

  Kind kind = Kind::kResample;
  double beta = 1.0;            // kResample: units of reward
  double ess_threshold = 0.5;   // kResample: below this effective part of the paths, in [0, 1]
  double rejection_rate = 0.5;  // kPrune: part of the paths that ends at each boundary, in [0, 1)
  std::uint64_t seed = 0;       // kResample: key of the group's own draws
};

// Knows members by number and nothing of tokens or pages. In each generation every member that
// still grows reaches the end of a segment once; then turn() says what becomes of them.
class PathGroup {
 public:
  static constexpr std::int32_t kNone = -1;

  // What a generation leads to. Sources keep their own path, so no member is both.
  struct Turn {
    std::vector<std::int32_t> target;   // members that continue as a copy of ...
    std::vector<std::int32_t> source;   // ... these
    std::vector<std::int32_t> dropped;  // members that are over
    std::int32_t chosen = kNone;        // the member whose path is the group's; then it is over

    void clear();
  };

  PathGroup(const GroupOptions& options, std::size_t size);

  // The member's path has this reward; `ended`: and will not grow. Once a generation.
  void reach(std::int32_t member, const Merit& reward, bool ended);
  // Whether every member that grows has reached its boundary.
  [[nodiscard]] bool complete() const { return pending_ == 0; }
  // Ends a complete generation.
  void turn(Turn& into);
  [[nodiscard]] bool ended(std::int32_t member) const { return at(member).ended; }
  // Boundaries that have been turned.
  [[nodiscard]] std::uint32_t generation() const { return generation_; }

 private:
  struct Member {
    Merit reward;
    double even = 0.0;  // its reward when all weights were last the same
    bool alive = true;
    bool ended = false;
  };

  [[nodiscard]] const Member& at(std::int32_t member) const {
    return members_[static_cast<std::size_t>(member)];
  }
  void resample(Turn& into);
  void prune(Turn& into);
  [[nodiscard]] std::int32_t draw(double total) const;
  [[nodiscard]] double uniform(std::uint32_t what) const;
  void begin_generation();

  GroupOptions options_;
  std::vector<Member> members_;
  std::int32_t pending_ = 0;
  std::uint32_t generation_ = 0;
  std::vector<double> weights_;
  std::vector<std::int32_t> order_;
};

}  // namespace stars_fast
