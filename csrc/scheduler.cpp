// Requests in and out of the scheduler, and what holds at every time.
#include "scheduler.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "scheduler_detail.h"

namespace stars_fast {

namespace {

constexpr std::int32_t kMaxTokens = 1 << 28;  // of a request: keeps slot arithmetic in 32 bits

}  // namespace

std::int32_t Scheduler::Request::draft_length() const {
  const std::int32_t left = options.schedule.max_tokens - response_length();
  return options.overrun ? options.segment_length : std::min(options.segment_length, left);
}

std::int32_t Scheduler::Request::attempts_left() const {
  const bool drafts = attempt < options.draft_attempts;
  return (drafts ? options.draft_attempts : most_attempts()) - attempt;
}

Scheduler::Scheduler(const SchedulerOptions& options)
    : options_(options),
      pool_(options.num_pages, options.page_size),
      cost_(options.fixed_cost_rows),
      newest_(options.lanes == 2 ? 1 : 0) {
  require(options.max_rows >= 1, "max_rows", options.max_rows, "at least 1");
  require(options.max_prefill_tokens >= 1, "max_prefill_tokens", options.max_prefill_tokens,
          "at least 1");
  require(options.fixed_cost_rows >= 0.0, "fixed_cost_rows", options.fixed_cost_rows, "at least 0");
  require(options.lanes == 1 || options.lanes == 2, "lanes", options.lanes, "1 or 2");
  in_flight_plans_.resize(static_cast<std::size_t>(options.lanes));
  newest().lane = newest_;  // so that the first plan serves lane 0
}

void Scheduler::validate(const std::int64_t* prompt, std::size_t prompt_length,
                         const RequestOptions& options) const {
  require(prompt_length >= 1 && prompt_length < kMaxTokens, "prompt length", prompt_length,
          "in [1, 2**28)");
  const Schedule& schedule = options.schedule;
  require(options.segment_length >= 1, "segment_length", options.segment_length, "at least 1");
  require(schedule.max_tokens >= 1 && schedule.max_tokens < kMaxTokens, "max_tokens",
          schedule.max_tokens, "in [1, 2**28)");
  require(!options.overrun || options.segment_length < kMaxTokens, "segment_length",
          options.segment_length, "below 2**28");
  require(options.max_attempts >= 1, "max_attempts", options.max_attempts, "at least 1");
  require(options.attempts_span >= 1, "attempts_span", options.attempts_span, "at least 1");
  require(options.plain_from >= 0, "plain_from", options.plain_from, "at least 0");
  for (const std::int32_t attempts : options.attempts_at) {
    require(attempts >= 1, "attempts_at", attempts, "at least 1");
  }
  require(options.candidates >= 0, "candidates", options.candidates, "at least 0 (0: auto)");
  if (options.rule == Rule::kTest) {
    require(std::isfinite(schedule.target), "target_reward", schedule.target, "finite");
    require(schedule.alpha >= 0.0 && schedule.alpha <= 1.0, "alpha", schedule.alpha, "in [0, 1]");
  }
  if (options.rule != Rule::kAlways) {
    require(schedule.hard || (std::isfinite(schedule.beta) && schedule.beta > 0.0), "beta",
            schedule.beta, "above 0 with soft acceptance");
  }
  require(options.draft_attempts >= 0 && options.draft_attempts < options.max_attempts,
          "draft_attempts", options.draft_attempts, "in [0, max_attempts)");
  if (options.draft_attempts > 0) {
    require(options.rule == Rule::kChoose, "draft_attempts", options.draft_attempts,
            "0 unless choosing");
    require(options.attempts_at.empty(), "draft_attempts", options.draft_attempts,
            "0 with attempts_at");
    require(std::isfinite(schedule.target), "target_reward", schedule.target, "finite");
  }
  // A segment that starts inside a page, as one may that follows a shorter one, holds that page
  // twice while it is tried.
  const std::int32_t twice = options_.page_size > 1 ? 1 : 0;
  const std::int32_t needed = pool_.pages_for(static_cast<std::int32_t>(prompt_length) - 1) +
                              pool_.pages_for(options.longest_response()) + twice;
  if (needed > pool_.num_pages() - 1) {
    throw RequestTooLarge(
        "a prompt of " + std::to_string(prompt_length) + " tokens with max_tokens " +
        std::to_string(options.longest_response()) + " needs " + std::to_string(needed) +
        " pages of " + std::to_string(options_.page_size) + " tokens; the pool has " +
        std::to_string(pool_.num_pages() - 1) + ": raise num_pages, or shorten the request");
  }
  for (std::size_t i = 0; i < prompt_length; ++i) {
    require(prompt[i] >= 0 && prompt[i] <= std::numeric_limits<std::int32_t>::max(),
            "prompt token id", prompt[i], "in [0, 2**31)");
  }
}

void Scheduler::check_new(std::int64_t id) const {
  require(by_id_.count(id) == 0, "request id", id, "new");
}

void Scheduler::add(std::int64_t id, const std::int64_t* prompt, std::size_t prompt_length,
                    const RequestOptions& options) {
  validate(prompt, prompt_length, options);
  check_new(id);
  enter(id, prompt, prompt_length, options);
}

Scheduler::Slot Scheduler::enter(std::int64_t id, const std::int64_t* prompt,
                                 std::size_t prompt_length, const RequestOptions& options) {
  Slot slot = 0;
  if (free_slots_.empty()) {
    slot = static_cast<Slot>(requests_.size());
    requests_.emplace_back();
  } else {
    slot = free_slots_.back();
    free_slots_.pop_back();
  }
  by_id_.emplace(id, slot);
  Request& request = at(slot);
  request.id = id;
  request.options = options;
  request.tokens.reserve(prompt_length + static_cast<std::size_t>(options.longest_response()));
  request.tokens.assign(prompt, prompt + prompt_length);
  request.prompt_length = static_cast<std::int32_t>(prompt_length);
  request.attempt = 0;
  request.stream = 0;
  request.prompt_reward =
      options.needs_prompt_reward() ? std::numeric_limits<double>::quiet_NaN() : 0.0;
  request.pass_rate = global_pass_rate_;
  request.finishing = false;
  request.parked = false;
  request.ended = false;
  request.group = kNoGroup;
  request.best.any = false;
  request.sequence.cached = 0;
  request.sequence.set_padding(request.prompt_length - 1, options_.page_size);
  waiting_.push_back({slot, request.generation});
  ++num_waiting_;
  return slot;
}

Scheduler::Request& Scheduler::find(std::int64_t id) {
  const auto found = by_id_.find(id);
  if (found == by_id_.end()) {
    throw std::out_of_range("no request " + std::to_string(id));
  }
  return at(found->second);
}

const std::vector<std::int32_t>& Scheduler::tokens(std::int64_t id) const {
  const auto found = by_id_.find(id);
  if (found == by_id_.end()) {
    throw std::out_of_range("no request " + std::to_string(id));
  }
  return at(found->second).tokens;
}

bool Scheduler::abort(std::int64_t id) {
  const auto found = by_id_.find(id);
  if (found == by_id_.end()) {
    return false;
  }
  const Slot slot = found->second;
  if (at(slot).group == kNoGroup) {
    remove(slot);
  } else {
    end_group(at(slot).group);
  }
  return true;
}

void Scheduler::remove(Slot slot) {
  Request& request = at(slot);
  if (request.in_flight) {
    request.finishing = true;  // the device may still write to its pages
    by_id_.erase(request.id);
    return;
  }
  if (request.running) {
    running_.erase(std::find(running_.begin(), running_.end(), slot));
  } else {
    --num_waiting_;
  }
  forget(slot);
}

void Scheduler::set_prompt_reward(std::int64_t id, double reward) {
  require(std::isfinite(reward), "prompt reward", reward, "finite");
  find(id).prompt_reward = reward;
}

std::int32_t Scheduler::row_pages(const Request& request) const {
  return branch_pages(pool_, request.sequence, request.prefix_length(), request.draft_length());
}

std::int32_t Scheduler::pages_to_draft(const Request& request) const {
  const Sequence& sequence = request.sequence;
  const std::int32_t prefix = pool_.pages_for(sequence.extent(request.prefix_length()));
  const std::int32_t row = request.carried.empty() ? row_pages(request) : 0;
  return prefix - static_cast<std::int32_t>(sequence.pages.size()) + row;
}

void Scheduler::cancel() {
  if (num_out_ == 0) {
    throw std::logic_error("cancel: there is no plan to cancel");
  }
  // The copies may have run or not, and cannot be owed again: once they have run, the drafts may
  // have written over their sources. Whoever holds a target starts over, and so does everyone in
  // flight beside a prefill, for what that would have written may have been matched.
  std::vector<bool> doubtful(static_cast<std::size_t>(pool_.num_pages()));
  bool prefilled = false;
  for (std::int32_t i = 0; i < num_out_; ++i) {
    const InFlightPlan& flight =
        in_flight_plans_[static_cast<std::size_t>(i == 0 ? newest_ : other(newest_))];
    for (const std::int32_t page : flight.plan->copies.target) {
      doubtful[static_cast<std::size_t>(page)] = true;
    }
    prefilled = prefilled || !flight.prefilling.empty();
  }
  for (const Slot slot : running_) {
    Request& request = at(slot);
    drop_carried(request);
    const std::vector<std::int32_t>& pages = request.sequence.pages;
    const bool holds = std::any_of(pages.begin(), pages.end(), [&doubtful](std::int32_t page) {
      return doubtful[static_cast<std::size_t>(page)];
    });
    if (holds || (prefilled && request.in_flight)) {
      release(request);
    }
  }
  while (num_out_ > 0) {
    end_oldest();
  }
  pool_.clear_cache();
}

void Scheduler::clear_cache() {
  if (has_unfinished()) {
    throw std::logic_error("clear_cache: requests are unfinished");
  }
  pool_.clear_cache();
}

void Scheduler::drop_best_pages(Request& request) {
  pool_.release_from(request.best.branch.pages, 0);
  request.best.has_pages = false;
}

void Scheduler::drop_carried(Request& request) {
  for (Row& row : request.carried) {
    pool_.release_from(row.branch.pages, 0);
  }
  request.carried.clear();
}

void Scheduler::release(Request& request) {
  drop_best_pages(request);
  drop_carried(request);
  pool_.release_from(request.sequence.pages, 0);
  request.sequence.cached = 0;
}

void Scheduler::forget(Slot slot) {
  Request& request = at(slot);
  release(request);
  const auto found = by_id_.find(request.id);
  if (found != by_id_.end() && found->second == slot) {
    by_id_.erase(found);
  }
  request.running = false;
  ++request.generation;
  free_slots_.push_back(slot);
  if (request.group != kNoGroup) {
    Group& own = group(request.group);
    own.members[static_cast<std::size_t>(request.member)] = Group::kGone;
    if (--own.num_left == 0) {
      groups_[static_cast<std::size_t>(request.group)].reset();
    }
    request.group = kNoGroup;
  }
}

void Scheduler::check() const {
  const auto num_pages = static_cast<std::size_t>(pool_.num_pages());
  std::vector<std::int32_t> held(num_pages, 0);
  const auto hold = [&held](const std::vector<std::int32_t>& pages) {
    for (const std::int32_t page : pages) {
      ++held[static_cast<std::size_t>(page)];
    }
  };
  for (const Request& request : requests_) {
    hold(request.sequence.pages);
    hold(request.best.branch.pages);
    for (const Row& row : request.carried) {
      hold(row.branch.pages);
    }
    if (!request.running && !request.sequence.pages.empty()) {
      throw std::logic_error("request " + std::to_string(request.id) + " holds pages and waits");
    }
  }
  const auto check_copies = [num_pages](const Copies& copies) {
    std::vector<std::int32_t> targets(num_pages, 0);
    for (const std::int32_t page : copies.target) {
      if (++targets[static_cast<std::size_t>(page)] > 1) {
        throw std::logic_error("page " + std::to_string(page) + " is the target of two copies");
      }
    }
    for (const std::int32_t page : copies.source) {
      if (targets[static_cast<std::size_t>(page)] > 0) {
        throw std::logic_error("page " + std::to_string(page) + " is copied and copied to");
      }
    }
  };
  check_copies(copies_);
  for (const InFlightPlan& flight : in_flight_plans_) {
    for (std::size_t row = 0; row < flight.num_rows; ++row) {
      hold(flight.rows[row].branch.pages);
    }
    if (flight.plan != nullptr) {
      check_copies(flight.plan->copies);
    }
  }
  pool_.check(held);
}

}  // namespace stars_fast
