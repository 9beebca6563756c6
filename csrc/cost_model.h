// What a row costs: the time of a round as a plane over its requests and its rows, learned as it
// runs. A request costs apart from its rows, since its prefix is read once for all of them.
#pragma once

#include <algorithm>

namespace stars_fast {

// Least squares with exponential forgetting, drawn towards a prior (a round's fixed part costs as
// much as `fixed_rows` rows, a request nothing) as far as the numbers have hardly varied: a slope
// cannot be seen then.
class CostModel {
 public:
  explicit CostModel(double fixed_rows) : fixed_rows_(fixed_rows) {}

  void observe(double requests, double rows, double seconds) {
    if (!(seconds > 0.0) || !(rows > 0.0)) {
      return;
    }
    weight_ = kForget * weight_ + 1.0;
    const double rate = 1.0 / weight_;
    const double request_step = requests - mean_requests_;
    const double row_step = rows - mean_rows_;
    const double time_step = seconds - mean_seconds_;
    mean_requests_ += rate * request_step;
    mean_rows_ += rate * row_step;
    mean_seconds_ += rate * time_step;
    const auto add = [rate](double& moment, double product) {
      moment = (1.0 - rate) * (moment + rate * product);
    };
    add(requests_requests_, request_step * request_step);
    add(requests_rows_, request_step * row_step);
    add(rows_rows_, row_step * row_step);
    add(requests_seconds_, request_step * time_step);
    add(rows_seconds_, row_step * time_step);
  }

  // Time of a round beside that of its rows, in units of the time that one more row adds.
  [[nodiscard]] double fixed_part(double requests, double rows) const {
    if (weight_ == 0.0) {
      return fixed_rows_;
    }
    // The normal equations, with doubt on both slopes and the prior of the row's.
    const double prior = mean_seconds_ / (mean_rows_ + fixed_rows_);
    const double row_doubt = kDoubt * mean_rows_ * kDoubt * mean_rows_;
    const double request_doubt = kDoubt * mean_requests_ * kDoubt * mean_requests_;
    const double a = requests_requests_ + request_doubt;
    const double b = requests_rows_;
    const double d = rows_rows_ + row_doubt;
    const double v = rows_seconds_ + row_doubt * prior;
    const double per_row = std::clamp((a * v - b * requests_seconds_) / (a * d - b * b),
                                      mean_seconds_ / kFree, mean_seconds_ / mean_rows_);
    const double per_request = std::max(0.0, (requests_seconds_ - per_row * b) / a);
    const double seconds =
        mean_seconds_ + per_row * (rows - mean_rows_) + per_request * (requests - mean_requests_);
    return std::max(0.0, seconds / per_row - rows);
  }

 private:
  static constexpr double kForget = 0.97;
  static constexpr double kDoubt = 0.1;  // spread of the counts below which the prior rules
  static constexpr double kFree = 1e9;   // rows that cost as much as a round, at most

  double fixed_rows_;
  double weight_ = 0.0;
  double mean_requests_ = 0.0;
  double mean_rows_ = 0.0;
  double mean_seconds_ = 0.0;
  // Second moments about the means.
  double requests_requests_ = 0.0;
  double requests_rows_ = 0.0;
  double rows_rows_ = 0.0;
  double requests_seconds_ = 0.0;
  double rows_seconds_ = 0.0;
};

}  // namespace stars_fast
