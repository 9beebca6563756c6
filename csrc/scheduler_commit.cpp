// What the rewards of a round decide: tests, winners, fallbacks, ends.
#include <algorithm>
#include <cmath>
#include <utility>

#include "philox.h"
#include "scheduler.h"
#include "scheduler_detail.h"

namespace stars_fast {

namespace {

constexpr double kPassRateStep = 0.2;  // weight of the newest attempt in a request's estimate
constexpr double kGlobalPassRateStep = 0.01;  // and in the estimate that new requests begin with
constexpr double kRowsPerRequestStep = 0.05;
constexpr double kPassRateLow = 0.02;
constexpr double kPassRateHigh = 0.98;

void step_towards(double& estimate, bool passed, double step) {
  estimate += step * ((passed ? 1.0 : 0.0) - estimate);
  estimate = std::clamp(estimate, kPassRateLow, kPassRateHigh);
}

bool goes_on(const RoundResult& result, std::size_t row) {
  return result.unfinished != nullptr && result.unfinished[row] != 0;
}

}  // namespace

void Decision::clear() {
  outcome.clear();
  threshold.clear();
  request.clear();
  kind.clear();
  row.clear();
  start.clear();
  length.clear();
  attempts.clear();
  finish.clear();
  copy_target.clear();
  copy_source.clear();
  dropped.clear();
  chosen.clear();
}

std::shared_ptr<const Decision> Scheduler::commit(const RoundResult& result) {
  if (num_out_ == 0) {
    throw std::logic_error("commit: there is no plan to commit");
  }
  InFlightPlan& flight = oldest();
  const std::size_t num_rows = flight.num_rows;
  require(result.rows == num_rows, "number of rows", result.rows, "that of the plan");
  for (std::size_t row = 0; row < num_rows; ++row) {
    const Row& planned = flight.rows[row];
    const std::int32_t length = result.lengths[row];
    require(length >= 1 && length <= planned.branch.length, "row length", length,
            "in [1, the planned length]");
    require(static_cast<std::size_t>(length) <= result.stride, "tokens per row", result.stride,
            "at least the longest row's length");
    require(!goes_on(result, row) || (length > planned.drawn && length < planned.branch.length &&
                                      row < flight.plan->request.size()),
            "length of an unfinished row", length, "above what was drawn, below what is planned");
  }
  for (const Slot slot : flight.drafting) {
    const Request& request = at(slot);
    if (!request.finishing && std::isnan(request.prompt_reward)) {
      throw std::invalid_argument("request " + std::to_string(request.id) +
                                  " has no prompt reward: call set_prompt_reward first");
    }
  }
  recycle(decision_);
  decision_->outcome.assign(num_rows, static_cast<std::int8_t>(RowOutcome::kPruned));
  decision_->threshold.assign(num_rows, std::numeric_limits<double>::quiet_NaN());
  turning_.clear();
  for (const Slot slot : flight.drafting) {
    decide(flight, at(slot), result);
  }
  const auto num_requests = static_cast<double>(flight.drafting.size());
  if (num_rows > 0) {
    const double ratio = static_cast<double>(num_rows) / num_requests;
    rows_per_request_ += kRowsPerRequestStep * (ratio - rows_per_request_);
  }
  cost_.observe(num_requests, flight.plan->draft.num_rows(), result.seconds);
  stats_.rounds += flight.plan->empty() ? 0 : 1;
  end_oldest();
  turn_groups();
  return decision_;
}

void Scheduler::decide(InFlightPlan& flight, Request& request, const RoundResult& result) {
  constexpr auto kNone = std::numeric_limits<std::size_t>::max();
  for (const std::size_t row : request.rows) {
    // None if a row is cut within what earlier rounds drew.
    stats_.drafted_tokens += std::max(0, result.lengths[row] - flight.rows[row].drawn);
  }
  if (request.finishing) {
    return;
  }
  std::size_t improved = kNone;  // row that is now the best of the rejected attempts
  for (std::size_t i = 0; i < request.rows.size(); ++i) {
    const std::size_t row = request.rows[i];
    if (goes_on(result, row)) {
      carry(flight, request, i, result);
      break;
    }
    const double reward = result.rewards[row];
    ++request.attempt;
    ++stats_.attempts;
    if (!std::isfinite(reward)) {
      fail(request, row);
      return;
    }
    const bool keeps = result.breaks == nullptr || result.breaks[row] == 0;
    if (passes(request, {keeps, reward}, result.lengths[row], row)) {
      accept(flight, request, row, result);
      return;
    }
    const Merit merit{keeps, merit_of(request, reward)};
    if (!request.best.any || merit.beats(request.best.merit)) {
      request.best.any = true;
      request.best.merit = merit;
      request.best.reward = reward;
      improved = row;
    }
  }
  if (improved != kNone) {
    keep_best(request, flight.rows[improved].branch, improved, result);
  }
  const std::int32_t row = improved == kNone ? -1 : static_cast<std::int32_t>(improved);
  if (request.attempt == request.most_attempts()) {
    const bool chosen =
        request.options.rule == Rule::kChoose && request.options.draft_attempts == 0;
    take_best(request, row, chosen ? EventKind::kChosen : EventKind::kFallback);
  } else if (request.attempt == request.options.draft_attempts && request.best.any) {
    end_draft(request, row);
  }
}

// The draft's attempts have all been made: the one chosen is taken if its reward is enough.
void Scheduler::end_draft(Request& request, std::int32_t row) {
  Best& best = request.best;
  if (best.merit.keeps && best.reward >= request.options.schedule.target) {
    take_best(request, row, EventKind::kAccepted);
    return;
  }
  drop_best_pages(request);
  best.any = false;
  if (row >= 0) {
    decision_->outcome[static_cast<std::size_t>(row)] =
        static_cast<std::int8_t>(RowOutcome::kPruned);
  }
}

// Keeps the rows from number `first` on for the next round.
void Scheduler::carry(InFlightPlan& flight, Request& request, std::size_t first,
                      const RoundResult& result) {
  for (std::size_t i = first; i < request.rows.size(); ++i) {
    const std::size_t number = request.rows[i];
    Row& row = flight.rows[number];
    row.ended = !goes_on(result, number);
    row.drawn = result.lengths[number];
    row.last_token =
        result.tokens[number * result.stride + static_cast<std::size_t>(row.drawn) - 1];
    if (!row.ended) {
      join(pool_, request.sequence, row.branch, copies_);
      ++stats_.rows_carried;
    }
    request.carried.emplace_back();
    std::swap(request.carried.back(), row);
  }
}

void Scheduler::fail(Request& request, std::size_t row) {
  record(request, EventKind::kFailed, static_cast<std::int32_t>(row), request.response_length(), 0,
         Finish::kNone);
  request.finishing = true;
  if (request.group != kNoGroup) {
    group(request.group).failed = true;
    turning_.push_back(request.group);
  }
}

// Tests the attempt just counted, whose segment has `tokens` tokens.
bool Scheduler::passes(Request& request, const Merit& reward, std::int32_t tokens,
                       std::size_t row) {
  const RequestOptions& options = request.options;
  const Rule rule = request.rule();
  if (rule != Rule::kTest) {
    if (rule == Rule::kChoose && request.attempt <= options.draft_attempts) {
      decision_->threshold[row] = options.schedule.target;
    }
    return rule == Rule::kAlways;
  }
  const std::int32_t start = request.response_length();
  const double tau = options.schedule.threshold(request.prompt_reward, start + tokens);
  decision_->threshold[row] = tau;
  const double uniform =
      accept_uniform(options.seed, static_cast<std::uint32_t>(start),
                     static_cast<std::uint32_t>(request.attempt - 1), request.stream);
  const bool tested = !options.last_untested || request.attempt < request.most_attempts();
  const bool passed =
      tested && reward.keeps && options.schedule.accepts(reward.value, tau, uniform);
  step_towards(request.pass_rate, passed, kPassRateStep);
  step_towards(global_pass_rate_, passed, kGlobalPassRateStep);
  return passed;
}

// What the best of attempts that did not pass is best in.
double Scheduler::merit_of(const Request& request, double reward) {
  if (request.options.rule != Rule::kChoose) {
    return reward;
  }
  return request.options.schedule.choice_key(
      reward,
      purpose_uniform(request.options.seed, static_cast<std::uint32_t>(request.response_length()),
                      static_cast<std::uint32_t>(request.attempt - 1), request.stream,
                      Purpose::kChoose));
}

void Scheduler::accept(InFlightPlan& flight, Request& request, std::size_t row,
                       const RoundResult& result) {
  const std::int64_t* drafted = result.tokens + row * result.stride;
  token_scratch_.assign(drafted, drafted + result.lengths[row]);
  promote(pool_, request.sequence, flight.rows[row].branch, result.lengths[row], copies_);
  advance(request, token_scratch_, result.stopped[row] != 0, EventKind::kAccepted,
          static_cast<std::int32_t>(row));
  if (request.group != kNoGroup) {
    PathGroup& paths = group(request.group).paths;
    const bool keeps = result.breaks == nullptr || result.breaks[row] == 0;
    paths.reach(request.member, {keeps, result.rewards[row]}, request.ended);
    if (paths.complete()) {
      turning_.push_back(request.group);
    }
  }
}

// The attempts that there are to choose from have all been made.
void Scheduler::take_best(Request& request, std::int32_t row, EventKind kind) {
  Best& best = request.best;
  if (best.has_pages) {
    promote(pool_, request.sequence, best.branch, static_cast<std::int32_t>(best.tokens.size()),
            copies_);
    best.has_pages = false;
  }
  stats_.fallbacks += kind == EventKind::kFallback ? 1 : 0;
  advance(request, best.tokens, best.stopped, kind, row);
}

void Scheduler::keep_best(Request& request, Branch& branch, std::size_t row,
                          const RoundResult& result) {
  drop_best_pages(request);
  const std::int64_t* drafted = result.tokens + row * result.stride;
  request.best.tokens.assign(drafted, drafted + result.lengths[row]);
  request.best.stopped = result.stopped[row] != 0;
  request.best.has_pages = true;
  std::swap(request.best.branch, branch);
  decision_->outcome[row] = static_cast<std::int8_t>(RowOutcome::kKept);
}

void Scheduler::advance(Request& request, const std::vector<std::int32_t>& segment, bool stopped,
                        EventKind kind, std::int32_t row) {
  const std::int32_t start = request.response_length();
  request.tokens.insert(request.tokens.end(), segment.begin(), segment.end());
  const bool full = request.response_length() >= request.options.schedule.max_tokens;
  const Finish finish = stopped ? Finish::kStop : full ? Finish::kLength : Finish::kNone;
  if (row >= 0) {
    decision_->outcome[static_cast<std::size_t>(row)] =
        static_cast<std::int8_t>(RowOutcome::kWinner);
  }
  record(request, kind, row, start, static_cast<std::int32_t>(segment.size()), finish);
  stats_.accepted_tokens += static_cast<std::int64_t>(segment.size());
  ++stats_.segments;
  request.attempt = 0;
  request.stream += request.options.may_reject() ? 1 : 0;
  drop_best_pages(request);
  request.best.any = false;
  const bool over = finish != Finish::kNone;
  request.parked = request.group != kNoGroup;
  request.ended = request.parked && over;
  request.finishing = !request.parked && over;
}

void Scheduler::record(const Request& request, EventKind kind, std::int32_t row, std::int32_t start,
                       std::int32_t length, Finish finish) {
  decision_->request.push_back(request.id);
  decision_->kind.push_back(static_cast<std::int8_t>(kind));
  decision_->row.push_back(row);
  decision_->start.push_back(start);
  decision_->length.push_back(length);
  decision_->attempts.push_back(request.attempt);
  decision_->finish.push_back(static_cast<std::int8_t>(finish));
}

void Scheduler::end_oldest() {
  InFlightPlan& flight = oldest();
  for (std::size_t row = 0; row < flight.num_rows; ++row) {
    pool_.release_from(flight.rows[row].branch.pages, 0);
  }
  flight.num_rows = 0;
  for (const Slot slot : running_) {
    Request& request = at(slot);
    if (request.in_flight && request.lane == flight.lane) {
      request.in_flight = false;
      request.rows.clear();
      request.wanted_rows = 0;
      if (request.finishing) {
        forget(slot);
      } else if (request.ended) {
        release(request);
      }
    }
  }
  running_.erase(std::remove_if(running_.begin(), running_.end(),
                                [this](Slot slot) { return !at(slot).running; }),
                 running_.end());
  --num_out_;
}

}  // namespace stars_fast
