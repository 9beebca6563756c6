// What one more row costs: the time of a round as a line in its number of rows, learned as it runs.
#pragma once

#include <algorithm>

namespace stars_fast {

// Least squares with exponential forgetting, drawn towards a prior slope while the number of rows
// has hardly varied (a slope cannot be seen then).
class CostModel {
 public:
  // `prior_share`: the part of a round's time taken to grow with its rows until observed, in [0,
  // 1].
  explicit CostModel(double prior_share) : fixed_rows_(prior_share) {}

  void observe(double rows, double seconds) {
    if (!(seconds > 0.0) || !(rows > 0.0)) {
      return;
    }
    weight_ = kForget * weight_ + 1.0;
    const double rate = 1.0 / weight_;
    const double row_step = rows - mean_rows_;
    const double time_step = seconds - mean_seconds_;
    mean_rows_ += rate * row_step;
    mean_seconds_ += rate * time_step;
    variance_ = (1.0 - rate) * (variance_ + rate * row_step * row_step);
    covariance_ = (1.0 - rate) * (covariance_ + rate * row_step * time_step);
  }

  // Time of a round of `rows` rows, in units of the time that one more row adds.
  // What an extra row must gain is the round's gain divided by this.
  [[nodiscard]] double relative_time(double rows) const {
    if (weight_ == 0.0) {
      return rows + fixed_rows_;
    }
    const double prior = mean_seconds_ / (mean_rows_ + fixed_rows_);
    const double doubt = kDoubt * mean_rows_ * kDoubt * mean_rows_;
    const double slope = std::clamp((covariance_ + doubt * prior) / (variance_ + doubt),
                                    mean_seconds_ / kFree, mean_seconds_ / mean_rows_);
    return (mean_seconds_ + slope * (rows - mean_rows_)) / slope;
  }

 private:
  static constexpr double kForget = 0.97;
  static constexpr double kDoubt = 0.1;  // spread of the row counts below which the prior rules
  static constexpr double kFree = 1e9;   // rows that cost as much as a round, at most

  double fixed_rows_;
  double weight_ = 0.0;
  double mean_rows_ = 0.0;
  double mean_seconds_ = 0.0;
  double variance_ = 0.0;
  double covariance_ = 0.0;
};

}  // namespace stars_fast
