// Sampling row by row: what lies between the passes of sample_kernels.h.
#include "sample.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "../philox.h"
#include "kernels.h"
#include "parallel.h"
#include "sample_kernels.h"

namespace stars_fast::cpu {
namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kMostNoise = 23.0;
constexpr double kUlp = 0x1p-23;  // of a float, relative

// What the first pass leaves of a row.
struct Stats {
  explicit Stats(Index vocab_size)
      : maxima(static_cast<std::size_t>(parts_of(vocab_size))),
        blocks(static_cast<std::size_t>(blocks_of(vocab_size))) {}

  std::vector<float> maxima;  // of each part
  std::vector<BlockSums> blocks;
};

void reduce(const Sampling& t, Index row, Index block, Stats& stats) {
  const Index first = block * kBlock;
  stats.blocks[block] = kernels().sampling().reduce(t.logits + row * t.stride + first,
                                                    std::min(kBlock, t.vocab_size - first),
                                                    t.with_entropy, &stats.maxima[first / kPart]);
}

TokenDraws token_draws(const Sampling& t, Index row) {
  const PhiloxKey key = philox_key(static_cast<std::uint64_t>(t.seed[row]));
  return {static_cast<std::uint32_t>(t.position[row]),
          static_cast<std::uint32_t>(t.attempt[row]),
          static_cast<std::uint32_t>(t.stream[row]) << kPurposeBits |
              static_cast<std::uint32_t>(Purpose::kToken),
          {key[0], key[1]}};
}

std::uint32_t word_of(const TokenDraws& draws, std::int32_t index) {
  const auto i = static_cast<std::uint32_t>(index);
  return philox4x32({i / 4, draws.position, draws.attempt, draws.stream},
                    {draws.key[0], draws.key[1]})[i % 4];
}

// The largest of the scaled logits plus Gumbel noise, and whether the PyTorch form, which works in
// float32, is bound to find the same.
class Draw {
 public:
  void offer(float value, std::uint32_t word, Index index) {
    // v = (word + 1/2) / 2^32 has less noise than -log v.
    const int zeros = __builtin_clz(word | 1U);
    if (value + (zeros + 2) * 0.6931472 < needed()) {
      return;
    }
    const float uniform = std::min((static_cast<float>(word) + 0.5F) * 0x1p-32F, 1.0F - 0x1p-24F);
    const double noise = -std::log(-std::log1p(-static_cast<double>(uniform)));
    const double noisy = value + noise;
    // There, log and log1p are within 4 units in the last place, and the sum is rounded.
    const double error = kUlp * (4.0 + 4.0 * std::abs(noise) + std::abs(noisy));
    if (noisy > best_) {
      rival_ = std::max(rival_, best_ + error_);
      best_ = noisy;
      error_ = error;
      index_ = index;
    } else {
      rival_ = std::max(rival_, noisy + error);
    }
  }

  // What is less can be passed over.
  [[nodiscard]] double needed() const { return best_ - 1e-3 - 1e-6 * std::abs(best_); }
  [[nodiscard]] bool decided() const { return index_ >= 0 && best_ - error_ > rival_; }
  [[nodiscard]] Index index() const { return index_; }

 private:
  double best_ = -kInfinity;
  double error_ = 0.0;
  double rival_ = -kInfinity;  // the most that another may have
  Index index_ = -1;
};

// Most probable first; of equal ones the highest index, as the reverse of a stable ascending sort.
bool before(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.index > b.index);
}

// Draws rows one after the other.
class Sampler {
 public:
  explicit Sampler(const Sampling& task)
      : t_(task), store_(new Candidate[parts_of(task.vocab_size) * kPart]) {}

  void run(Index row, const Stats& stats) {
    row_ = row;
    x_ = t_.logits + row * t_.stride;
    stats_ = &stats;
    if (!sum_blocks()) {
      const float nan = std::numeric_limits<float>::quiet_NaN();
      write(false, 0, nan, nan, nan);
      return;
    }
    temperature_ = t_.temperature[row];
    peak_ = raw_peak_ / temperature_;
    if (temperature_ == 0.0F || !std::isfinite(peak_)) {
      finish(first_of_the_largest(), 0.0);
      return;
    }
    const bool by_top_k = t_.top_k[row] > 0;
    const bool by_top_p = t_.top_p[row] < 1.0F;
    if (!by_top_k && !by_top_p && t_.min_p[row] <= 0.0F) {
      draw_from_all();
      return;
    }
    bool decided = true;
    if (by_top_k) {
      take_top_k();
      decided = !by_top_p || keep_top_p(weigh());
    } else if (by_top_p) {
      decided = keep_top_p(take_top_p());
    } else {
      take_min_p();
    }
    decided = decided && keep_min_p();
    decided ? draw_from_candidates() : undecided();
  }

 private:
  // Returns whether there is a distribution.
  bool sum_blocks() {
    raw_peak_ = -std::numeric_limits<float>::infinity();
    for (const BlockSums& block : stats_->blocks) {
      if (block.bad) {
        return false;
      }
      raw_peak_ = std::max(raw_peak_, block.peak);
    }
    raw_mass_ = 0.0;
    raw_moment_ = 0.0;
    for (const BlockSums& block : stats_->blocks) {
      if (block.mass > 0.0F) {
        const double below = static_cast<double>(block.peak) - raw_peak_;
        const double weight = std::exp(below);
        raw_mass_ += weight * block.mass;
        raw_moment_ += weight * (block.moment + below * block.mass);
      }
    }
    return std::isfinite(raw_peak_);
  }

  [[nodiscard]] Index first_of_the_largest() const {
    const auto part = std::find(stats_->maxima.begin(), stats_->maxima.end(), raw_peak_);
    const Index first = (part - stats_->maxima.begin()) * kPart;
    return std::find(x_ + first, x_ + t_.vocab_size, raw_peak_) - x_;
  }

  [[nodiscard]] float scaled(Index i) const { return x_[i] / temperature_; }

  // As the PyTorch form has it, where it is divided and subtracted in float32.
  [[nodiscard]] float below(float value) const { return value - peak_; }

  // Candidates

  // Takes the entries of at least a scaled logit, in the order of the vocabulary; never -inf.
  void gather(float least) {
    count_ = kernels().sampling().gather(x_, t_.vocab_size, stats_->maxima.data(), temperature_,
                                         std::max(least, kLowest), store_.get());
  }

  [[nodiscard]] Candidate* begin() const { return store_.get(); }
  [[nodiscard]] Candidate* end() const { return store_.get() + count_; }

  template <class Test>
  void keep_where(Test test) {
    count_ = std::partition(begin(), end(), test) - begin();
  }

  double weigh() {
    double sum = 0.0;
    for (Candidate* one = begin(); one != end(); ++one) {
      one->weight = std::exp(static_cast<double>(below(one->value)));
      sum += one->weight;
    }
    return sum;
  }

  // Gathers from the peak downwards until there are enough, or all.
  template <class Enough>
  void gather_until(Enough enough) {
    for (const float depth : {3.0F, 6.0F, 10.0F, std::numeric_limits<float>::infinity()}) {
      gather(peak_ - depth);
      if (enough()) {
        return;
      }
    }
  }

  // The k largest, and those equal to the last of them.
  void take_top_k() {
    const Index k = std::min<Index>(t_.top_k[row_], t_.vocab_size);
    if (k < static_cast<Index>(stats_->maxima.size())) {
      // At least k entries reach the k-th largest of the parts' maxima.
      maxima_ = stats_->maxima;
      std::nth_element(maxima_.begin(), maxima_.begin() + (k - 1), maxima_.end(), std::greater<>());
      gather(maxima_[k - 1] / temperature_);
    } else {
      gather_until([&] { return count_ >= k; });
    }
    if (count_ > k) {
      std::nth_element(begin(), begin() + (k - 1), end(), before);
      const float last = begin()[k - 1].value;
      keep_where([last](const Candidate& one) { return one.value >= last; });
    }
  }

  // Entries that hold more than top_p of the mass; returns the whole mass.
  double take_top_p() {
    const double whole = kernels().sampling().mass(x_, t_.vocab_size, temperature_, peak_);
    gather_until([&] { return weigh() >= t_.top_p[row_] * whole + slack(whole); });
    return whole;
  }

  // What sums of float64 in different orders may differ by.
  [[nodiscard]] double slack(double whole) const {
    return whole * (5e-14 + 5e-16 * static_cast<double>(t_.vocab_size));
  }

  // Keeps candidates, weighed, while those before them are less than top_p of the whole mass;
  // returns whether rounding cannot decide.
  bool keep_top_p(double whole) {
    const double enough = t_.top_p[row_] * whole;
    // The last that is kept lies in [low, high), where all before `low` weigh `sum`.
    Candidate* low = begin();
    Candidate* high = end();
    double sum = 0.0;
    while (high - low > 1) {
      Candidate* middle = low + (high - low) / 2;
      std::nth_element(low, middle, high, before);
      double more = 0.0;
      for (const Candidate* one = low; one != middle; ++one) {
        more += one->weight;
      }
      if (sum + more < enough) {
        sum += more;
        low = middle;
      } else {
        high = middle;
      }
    }
    const bool last_is_kept = low == begin() || sum < enough - slack(whole);
    const bool next_is_not = low + 1 == end() || sum + low->weight >= enough + slack(whole);
    count_ = low + 1 - begin();
    return last_is_kept && next_is_not;
  }

  // Entries that may reach min_p, and a few more.
  void take_min_p() {
    const float least = peak_ + std::log(t_.min_p[row_]);
    gather(least - 1e-6F * (1.0F + std::abs(least) + std::abs(peak_)));
  }

  // Keeps candidates that reach min_p; returns whether rounding cannot decide.
  bool keep_min_p() {
    if (t_.min_p[row_] <= 0.0F) {
      return true;
    }
    const double least = std::log(static_cast<double>(t_.min_p[row_]));
    bool decided = true;
    keep_where([&](const Candidate& one) {
      const double at = below(one.value);
      decided = decided && (at == 0.0 || std::abs(at - least) > 1e-12);
      return at >= least;
    });
    return decided;
  }

  // Draws

  void draw_from_candidates() {
    const TokenDraws draws = token_draws(t_, row_);
    const double whole = weigh();
    Draw draw;
    for (Index i = 0; i < count_; ++i) {
      const Candidate& one = begin()[i];
      if (one.value + kMostNoise >= draw.needed()) {
        draw.offer(one.value, word_of(draws, one.index), i);
      }
    }
    if (!draw.decided()) {
      undecided();
      return;
    }
    const Candidate& drawn = begin()[draw.index()];
    finish(drawn.index, std::log(drawn.weight / whole));
  }

  // Noise over the vocabulary; of most parts only the largest is looked at.
  void draw_from_all() {
    const TokenDraws draws = token_draws(t_, row_);
    std::array<std::int32_t, kPart> entries{};
    std::array<std::uint32_t, kPart> words{};
    Draw draw;
    const auto look_at = [&](Index part) {
      // Words above this have too little noise for any of the part.
      const double most = 0x1p32 * std::exp(stats_->maxima[part] / temperature_ - draw.needed());
      if (most < 0.5) {
        return;
      }
      const std::uint32_t limit = most < 0x1p32 ? static_cast<std::uint32_t>(most) : ~0U;
      const Index found =
          kernels().sampling().hits(draws, part, limit, entries.data(), words.data());
      for (Index i = 0; i < found; ++i) {
        const Index index = part * kPart + entries[i];
        if (index < t_.vocab_size && scaled(index) >= kLowest) {
          draw.offer(scaled(index), words[i], index);
        }
      }
    };
    const Index likely = first_of_the_largest() / kPart;
    look_at(likely);
    for (Index part = 0; part < static_cast<Index>(stats_->maxima.size()); ++part) {
      if (part != likely) {
        look_at(part);
      }
    }
    if (!draw.decided()) {
      undecided();
      return;
    }
    const double whole = temperature_ == 1.0F ? raw_mass_
                                              : kernels().sampling().rough_mass(
                                                    x_, t_.vocab_size, temperature_, peak_);
    finish(draw.index(), below(scaled(draw.index())) - std::log(whole));
  }

  // Results

  void finish(Index token, double truncated_logprob) {
    const double log_mass = std::log(raw_mass_);
    const double logprob = static_cast<double>(x_[token]) - raw_peak_ - log_mass;
    const double entropy = t_.with_entropy ? log_mass - raw_moment_ / raw_mass_ : 0.0;
    write(true, token, static_cast<float>(logprob), static_cast<float>(truncated_logprob),
          static_cast<float>(entropy));
  }

  void undecided() const { t_.undecided[row_] = true; }

  void write(bool ok, Index token, float logprob, float truncated_logprob, float entropy) const {
    t_.ok[row_] = ok;
    t_.token[row_] = token;
    t_.logprob[row_] = logprob;
    t_.truncated_logprob[row_] = truncated_logprob;
    t_.entropy[row_] = entropy;
  }

  Sampling t_;
  std::unique_ptr<Candidate[]> store_;
  std::vector<float> maxima_;
  Index count_ = 0;  // of candidates
  // Of the row:
  Index row_ = 0;
  const float* x_ = nullptr;
  const Stats* stats_ = nullptr;
  float temperature_ = 1.0F;
  float raw_peak_ = 0.0F;
  float peak_ = 0.0F;  // of the scaled logits
  double raw_mass_ = 0.0;
  double raw_moment_ = 0.0;
};

}  // namespace

void sample(const Sampling& task) {
  constexpr Index kCost = 4;  // of an entry
  std::vector<Index> rows;
  for (Index row = 0; row < task.rows; ++row) {
    if (task.live == nullptr || task.live[row]) {
      rows.push_back(row);
    }
  }
  const auto count = static_cast<Index>(rows.size());
  const Index blocks = blocks_of(task.vocab_size);
  const Index cost = task.vocab_size * kCost;
  if (count >= threads_for(count * blocks, kBlock * kCost)) {
    parallel_for(count, cost, [&](Index begin, Index end) {
      Sampler sampler(task);
      Stats stats(task.vocab_size);
      for (Index i = begin; i < end; ++i) {
        for (Index block = 0; block < blocks; ++block) {
          reduce(task, rows[i], block, stats);
        }
        sampler.run(rows[i], stats);
      }
    });
    return;
  }
  // More threads than rows: first they share the rows' vocabularies.
  std::vector<Stats> stats(rows.size(), Stats(task.vocab_size));
  parallel_for(count * blocks, kBlock * kCost, [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      reduce(task, rows[i / blocks], i % blocks, stats[i / blocks]);
    }
  });
  parallel_for(count, cost, [&](Index begin, Index end) {
    Sampler sampler(task);
    for (Index i = begin; i < end; ++i) {
      sampler.run(rows[i], stats[i]);
    }
  });
}

}  // namespace stars_fast::cpu
