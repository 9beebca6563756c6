#include "scheduler.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "philox.h"

namespace stars_fast {

namespace {

constexpr double kPassRateStep = 0.2;  // weight of the newest attempt in a request's estimate
constexpr double kGlobalPassRateStep = 0.01;  // and in the estimate that new requests begin with
constexpr double kRowsPerRequestStep = 0.05;
constexpr double kPassRateLow = 0.02;
constexpr double kPassRateHigh = 0.98;
constexpr std::int32_t kMaxTokens = 1 << 28;  // of a request: keeps slot arithmetic in 32 bits

void step_towards(double& estimate, bool passed, double step) {
  estimate += step * ((passed ? 1.0 : 0.0) - estimate);
  estimate = std::clamp(estimate, kPassRateLow, kPassRateHigh);
}

template <typename Value>
void require(bool holds, const char* name, Value value, const char* allowed) {
  if (!holds) {
    throw std::invalid_argument(std::string(name) + " must be " + allowed + ", got " +
                                std::to_string(value));
  }
}

// Reuses the buffers unless the caller still holds them.
template <typename Buffers>
std::shared_ptr<Buffers>& recycle(std::shared_ptr<Buffers>& buffers) {
  if (buffers == nullptr || buffers.use_count() > 1) {
    buffers = std::make_shared<Buffers>();
  }
  buffers->clear();
  return buffers;
}

}  // namespace

void Plan::clear() {
  copies.clear();
  prefill_tokens.clear();
  request.clear();
  attempt.clear();
  seed.clear();
  position.clear();
  stream.clear();
  first_token.clear();
  unscored.clear();
  preempted.clear();
}

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

std::int32_t Scheduler::Request::draft_length() const {
  const std::int32_t left = options.schedule.max_tokens - response_length();
  return options.overrun ? options.segment_length : std::min(options.segment_length, left);
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
  require(options.candidates >= 0, "candidates", options.candidates, "at least 0 (0: auto)");
  if (options.rule == Rule::kTest) {
    require(std::isfinite(schedule.target), "target_reward", schedule.target, "finite");
    require(schedule.alpha >= 0.0 && schedule.alpha <= 1.0, "alpha", schedule.alpha, "in [0, 1]");
  }
  if (options.rule != Rule::kAlways) {
    require(schedule.hard || (std::isfinite(schedule.beta) && schedule.beta > 0.0), "beta",
            schedule.beta, "above 0 with soft acceptance");
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

void Scheduler::add_group(const std::vector<std::int64_t>& ids,
                          const std::vector<std::uint64_t>& seeds, const std::int64_t* prompt,
                          std::size_t prompt_length, const RequestOptions& options,
                          const GroupOptions& group) {
  validate(prompt, prompt_length, options);
  require(!ids.empty() && ids.size() <= static_cast<std::size_t>(options_.max_rows),
          "number of paths", ids.size(), "at least 1 and at most max_rows");
  require(seeds.size() == ids.size(), "number of seeds", seeds.size(), "that of the paths");
  require(options.rule == Rule::kAlways, "rule of a group's paths", static_cast<int>(options.rule),
          "that every segment is accepted");
  require(std::isfinite(group.beta) && group.beta > 0.0, "beta", group.beta, "above 0");
  require(group.ess_threshold >= 0.0 && group.ess_threshold <= 1.0, "ess_threshold",
          group.ess_threshold, "in [0, 1]");
  require(group.rejection_rate >= 0.0 && group.rejection_rate < 1.0, "rejection_rate",
          group.rejection_rate, "in [0, 1)");
  for (std::size_t i = 0; i < ids.size(); ++i) {
    check_new(ids[i]);
    require(std::find(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(i), ids[i]) ==
                ids.begin() + static_cast<std::ptrdiff_t>(i),
            "request id", ids[i], "given once");
  }
  const auto free = std::find(parties_.begin(), parties_.end(), nullptr);
  const auto number = static_cast<std::int32_t>(free - parties_.begin());
  auto party = std::make_unique<Party>(
      Party{Group(group, ids.size()), {}, static_cast<std::int32_t>(ids.size()), false});
  for (std::size_t i = 0; i < ids.size(); ++i) {
    RequestOptions own = options;
    own.seed = seeds[i];
    const Slot slot = enter(ids[i], prompt, prompt_length, own);
    at(slot).group = number;
    at(slot).member = static_cast<std::int32_t>(i);
    party->members.push_back(slot);
  }
  if (free == parties_.end()) {
    parties_.push_back(std::move(party));
  } else {
    *free = std::move(party);
  }
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
  request.sequence.set_hole(request.prompt_length - 1, options_.page_size);
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
  return prefix - static_cast<std::int32_t>(sequence.pages.size()) + row_pages(request);
}

std::shared_ptr<const Plan> Scheduler::plan() {
  if (num_out_ == options_.lanes) {
    throw std::logic_error("plan: the last plan has not been committed or cancelled");
  }
  const std::int32_t lane = other(newest().lane);  // with two lanes, one that has no plan out
  newest_ = other(newest_);
  InFlightPlan& flight = newest();
  flight.lane = lane;
  flight.drafting.clear();
  flight.prefilling.clear();
  flight.num_rows = 0;
  Plan& plan = *recycle(flight.plan);
  // Sources and targets of the copies owed were held until the commit that owes them, so no plan
  // that is out reads or writes them by another name; pages freed since are given out by this plan
  // at the earliest, whose copies run first. Two commits owe copies to one plan only if theirs were
  // out at once, each holding its pages: no page is a target twice, or both source and target.
  std::swap(plan.copies, copies_);
  copies_.clear();
  stats_.page_copies += static_cast<std::int64_t>(plan.copies.count.size());
  short_of_pages_ = false;
  prefill_budget_ = options_.max_prefill_tokens;

  keep_running();
  admit();
  if (num_out_ == 0 && flight.drafting.empty() && flight.prefilling.empty()) {
    flight.lane = other(lane);
    keep_running();
    admit();
  }
  list_prefill();
  allot_rows();
  open_rows();
  stats_.prefill_tokens += plan.prefill.num_tokens;
  ++num_out_;
  return flight.plan;
}

void Scheduler::keep_running() {
  const std::int32_t lane = newest().lane;
  reserved_ = 0;
  returning_ = 0;
  // Oldest first, of both lanes, so that the oldest of all waits for pages one round at most; the
  // younger ones, further back, may be preempted under way.
  for (std::size_t i = 0; i < running_.size(); ++i) {
    const Slot slot = running_[i];
    const Request& request = at(slot);
    if (request.idle() && !request.in_flight) {
      continue;
    }
    if (request.in_flight) {
      // One of several rows may win and keep its pages: the others leave enough for the next.
      returning_ += request.finishing || request.wanted_rows > 1 ? 0
                    : request.wanted_rows == 1                   ? row_pages(request)
                                                                 : pages_to_draft(request);
    } else if (const std::int32_t pages = pages_to_draft(request); make_room(pages, slot)) {
      if (request.lane == lane) {
        start(slot);
      } else {
        reserved_ += pages;
      }
    }
  }
}

bool Scheduler::make_room(std::int32_t pages, Slot for_request) {
  while (pool_.available() - reserved_ < pages) {
    const auto holder = std::find_if(running_.rbegin(), running_.rend(), [this](Slot slot) {
      return at(slot).best.any && at(slot).best.has_pages;
    });
    if (holder != running_.rend()) {
      drop_best_pages(at(*holder));
      continue;
    }
    short_of_pages_ = true;
    const auto youngest = std::find_if(running_.rbegin(), running_.rend(), [this](Slot slot) {
      return !at(slot).in_flight && !at(slot).idle();
    });
    const bool itself = *youngest == for_request;
    if (itself && release_idle()) {
      continue;
    }
    if (itself && youngest != running_.rbegin()) {
      return false;  // sits out, its pages kept: a younger one in flight gives way when it is back
    }
    preempt(std::prev(youngest.base()));
    if (itself) {
      return false;
    }
  }
  return true;
}

// Takes the pages of the youngest member that waits for its group; it will be prefilled again.
bool Scheduler::release_idle() {
  const auto holder = std::find_if(running_.rbegin(), running_.rend(), [this](Slot slot) {
    const Request& request = at(slot);
    return request.idle() && !request.in_flight && !request.sequence.pages.empty();
  });
  if (holder == running_.rend()) {
    return false;
  }
  release(at(*holder));
  newest().plan->preempted.push_back(at(*holder).id);
  ++stats_.preemptions;
  return true;
}

void Scheduler::preempt(std::vector<Slot>::iterator position) {
  const Slot slot = *position;
  running_.erase(position);
  Request& request = at(slot);
  request.running = false;
  release(request);
  // It has run already: before those that have not.
  waiting_.push_front({slot, request.generation});
  ++num_waiting_;
  newest().plan->preempted.push_back(request.id);
  ++stats_.preemptions;
}

Scheduler::Load Scheduler::load() const {
  Load load;
  for (const Slot slot : running_) {
    const Request& request = at(slot);
    const bool mine = request.lane == in_flight_plans_[static_cast<std::size_t>(newest_)].lane;
    load.size += mine ? 1 : 0;
    load.lead += request.finishing ? 0 : mine ? 1 : -1;
    load.alone = load.alone && !request.in_flight;
  }
  return load;
}

// Beside requests that run, some are left free, and as many as the candidates of each have been.
std::int64_t Scheduler::spare_pages(const Request& next) const {
  const std::size_t drafting =
      in_flight_plans_[static_cast<std::size_t>(newest_)].drafting.size() + 1;
  const double candidates = (rows_per_request_ - 1.0) * static_cast<double>(drafting);
  return pool_.num_pages() / 100 + static_cast<std::int64_t>(candidates) * row_pages(next);
}

void Scheduler::admit() {
  Load lane = load();
  while (!waiting_.empty() && !short_of_pages_ && prefill_budget_ > 0 &&
         lane.size < options_.max_rows) {
    const Waiting next = waiting_.front();
    Request& request = at(next.slot);
    if (request.generation != next.generation) {
      waiting_.pop_front();  // aborted while it waited
      continue;
    }
    // As many as this lane leads by are left to the other lane, and room for them.
    const std::int32_t left = options_.lanes == 1 ? 0 : std::max(lane.lead, 0);
    if (left >= num_waiting_) {
      return;
    }
    PagePool::Hit hit;
    if (options_.prefix_caching) {
      hit = pool_.peek(request.tokens.data(), request.prompt_length - 1);
    }
    std::int64_t needed = pages_to_draft(request) - hit.pages + hit.evictable;
    if (!lane.alone) {
      needed = needed * (1 + left) + spare_pages(request);
    }
    if (pool_.available() - reserved_ - returning_ < needed) {
      // Alone, nothing comes back by itself, unless the other lane has somebody to run.
      if (lane.alone && reserved_ == 0 && release_idle()) {
        continue;
      }
      return;
    }
    waiting_.pop_front();
    --num_waiting_;
    running_.push_back(next.slot);
    ++lane.size;
    ++lane.lead;
    lane.alone = false;
    request.running = true;
    request.lane = newest().lane;
    request.sequence.pages.reserve(
        static_cast<std::size_t>(pool_.pages_for(request.prompt_length) +
                                 pool_.pages_for(request.options.longest_response()) + 1));
    start(next.slot);
  }
}

void Scheduler::start(Slot slot) {
  InFlightPlan& flight = newest();
  Request& request = at(slot);
  request.in_flight = true;
  if (options_.prefix_caching && request.sequence.pages.empty()) {
    pool_.match(request.tokens.data(), request.prompt_length - 1, request.sequence.pages);
    request.sequence.cached =
        static_cast<std::int32_t>(request.sequence.pages.size()) * options_.page_size;
    stats_.cached_prompt_tokens += request.sequence.cached;
  }
  if (request.sequence.cached < request.prefix_length()) {
    prefill(slot);
  }
  if (request.sequence.cached == request.prefix_length()) {
    request.wanted_rows = 1;
    reserved_ += row_pages(request);
    flight.drafting.push_back(slot);
    if (std::isnan(request.prompt_reward)) {
      flight.plan->unscored.push_back(request.id);
    }
  }
}

void Scheduler::prefill(Slot slot) {
  Request& request = at(slot);
  Sequence& sequence = request.sequence;
  const std::int32_t begin = sequence.cached;
  const std::int32_t chunk = std::min(request.prefix_length() - begin, prefill_budget_);
  if (chunk == 0) {
    return;
  }
  prefill_budget_ -= chunk;
  newest().prefilling.push_back({slot, begin, chunk});
  extend(pool_, sequence, begin + chunk);
  sequence.cached += chunk;
  if (options_.prefix_caching) {
    // Findable at once: a forward pass writes the pages of all its rows before it reads any.
    const std::int32_t full =
        std::min(sequence.cached, request.prompt_length - 1) / options_.page_size;
    for (std::int32_t page = begin / options_.page_size; page < full; ++page) {
      pool_.publish(sequence.pages, static_cast<std::size_t>(page), request.tokens.data());
    }
  }
}

void Scheduler::list_prefill() {
  const InFlightPlan& flight = newest();
  Plan& plan = *flight.plan;
  std::int32_t columns = 0;
  std::int32_t width = 0;
  for (const Chunk& chunk : flight.prefilling) {
    columns = std::max(columns, chunk.length);
    width = std::max(width, pool_.pages_for(at(chunk.slot).sequence.extent(chunk.begin)));
  }
  plan.prefill.begin(columns, width, options_.page_size);
  for (const Chunk& chunk : flight.prefilling) {
    const Request& request = at(chunk.slot);
    plan.prefill.add_group(request.sequence, chunk.begin);
    plan.prefill.add_extension(request.sequence, chunk.begin, chunk.length);
    const auto first = request.tokens.begin() + chunk.begin;
    plan.prefill_tokens.insert(plan.prefill_tokens.end(), first, first + chunk.length);
  }
}

void Scheduler::allot_rows() {
  // Each request has one row. More go where they save most of the work of a segment. With n rows a
  // round passes one at rate 1 - (1 - p)^n and costs n rows and a share of what the round costs
  // beside its rows; the cost of a segment is the second over the first, and one more row lowers it
  // while p (1 - p)^n (share + n) > 1 - (1 - p)^n. With a fixed number of candidates the row is
  // given whatever it costs, with "auto" only then. Not what the round gains: a segment that seldom
  // passes has to be done as well, and waiting for it costs its pages and its prefix every round.
  const auto row_limit = [](const Request& request) {
    const std::int32_t left = request.options.max_attempts - request.attempt;
    const std::int32_t asked = request.options.candidates;
    return request.options.rule == Rule::kAlways ? 1 : asked == 0 ? left : std::min(asked, left);
  };
  const std::vector<Slot>& drafting = newest().drafting;
  if (drafting.empty()) {
    return;
  }
  auto rows = static_cast<std::int32_t>(drafting.size());
  const double share = cost_.fixed_part(rows, rows) / rows;
  const auto gain_of = [share](const Request& request, std::size_t position) {
    const double miss = std::pow(1.0 - request.pass_rate, request.wanted_rows);
    const double gain = request.pass_rate * miss * (share + request.wanted_rows) / (1.0 - miss);
    return Gain{request.options.candidates != 0, gain, position};
  };
  gains_.clear();
  for (std::size_t i = 0; i < drafting.size(); ++i) {
    const Request& request = at(drafting[i]);
    if (request.wanted_rows < row_limit(request)) {
      gains_.push_back(gain_of(request, i));
    }
  }
  std::make_heap(gains_.begin(), gains_.end());
  while (rows < options_.max_rows && !gains_.empty()) {
    std::pop_heap(gains_.begin(), gains_.end());
    const Gain gain = gains_.back();
    gains_.pop_back();
    if (!gain.asked && gain.value <= 1.0) {
      return;  // and so for every gain that is left
    }
    Request& request = at(drafting[gain.position]);
    const std::int32_t pages = row_pages(request);
    if (pool_.available() - reserved_ - returning_ < pages) {
      continue;
    }
    reserved_ += pages;
    ++rows;
    if (++request.wanted_rows < row_limit(request)) {
      gains_.push_back(gain_of(request, gain.position));
      std::push_heap(gains_.begin(), gains_.end());
    }
  }
}

void Scheduler::open_rows() {
  InFlightPlan& flight = newest();
  Plan& plan = *flight.plan;
  std::int32_t columns = 0;
  std::int32_t width = 0;
  for (const Slot slot : flight.drafting) {
    const Request& request = at(slot);
    columns = std::max(columns, request.draft_length());
    width = std::max(width, pool_.pages_for(request.sequence.extent(request.sequence.cached)));
  }
  plan.draft.begin(columns, width, options_.page_size);
  for (const Slot slot : flight.drafting) {
    Request& request = at(slot);
    plan.draft.add_group(request.sequence, request.sequence.cached);
    request.first_row = flight.num_rows;
    request.num_rows = static_cast<std::size_t>(request.wanted_rows);
    for (std::int32_t i = 0; i < request.wanted_rows; ++i) {
      if (flight.num_rows == flight.rows.size()) {
        flight.rows.emplace_back();
      }
      Branch& row = flight.rows[flight.num_rows++];
      open_branch(pool_, request.sequence, request.sequence.cached, request.draft_length(), row);
      plan.draft.add_row(row.start, row.length, row.first_slot, row.pages.data());
      plan.request.push_back(request.id);
      plan.attempt.push_back(request.attempt + i);
      plan.seed.push_back(static_cast<std::int64_t>(request.options.seed));
      plan.position.push_back(request.response_length());
      plan.stream.push_back(static_cast<std::int32_t>(request.stream));
      plan.first_token.push_back(request.tokens.back());
    }
  }
}

std::shared_ptr<const Decision> Scheduler::commit(const RoundResult& result) {
  if (num_out_ == 0) {
    throw std::logic_error("commit: there is no plan to commit");
  }
  InFlightPlan& flight = oldest();
  const std::size_t num_rows = flight.num_rows;
  require(result.rows == num_rows, "number of rows", result.rows, "that of the plan");
  require(num_rows == 0 || result.stride >= static_cast<std::size_t>(flight.plan->draft.max_new),
          "tokens per row", result.stride, "at least the plan's max_new");
  for (std::size_t row = 0; row < num_rows; ++row) {
    require(result.lengths[row] >= 1 && result.lengths[row] <= flight.rows[row].length,
            "row length", result.lengths[row], "in [1, the planned length]");
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
  cost_.observe(num_requests, static_cast<double>(num_rows), result.seconds);
  stats_.rounds += flight.plan->empty() ? 0 : 1;
  end_oldest();
  turn_groups();
  return decision_;
}

void Scheduler::decide(InFlightPlan& flight, Request& request, const RoundResult& result) {
  const std::size_t end = request.first_row + request.num_rows;
  for (std::size_t row = request.first_row; row < end; ++row) {
    stats_.drafted_tokens += result.lengths[row];
  }
  if (request.finishing) {
    return;
  }
  std::size_t improved = end;  // row that is now the best of the rejected attempts
  for (std::size_t row = request.first_row; row < end; ++row) {
    const double reward = result.rewards[row];
    ++request.attempt;
    ++stats_.attempts;
    if (!std::isfinite(reward)) {
      fail(request, row);
      return;
    }
    if (passes(request, reward, result.lengths[row], row)) {
      accept(flight, request, row, result);
      return;
    }
    const double merit = merit_of(request, reward);
    if (!request.best.any || merit > request.best.merit) {
      request.best.any = true;
      request.best.merit = merit;
      improved = row;
    }
  }
  if (improved != end) {
    keep_best(request, flight.rows[improved], improved, result);
  }
  if (request.attempt == request.options.max_attempts) {
    take_best(request, improved == end ? -1 : static_cast<std::int32_t>(improved));
  }
}

void Scheduler::fail(Request& request, std::size_t row) {
  record(request, EventKind::kFailed, static_cast<std::int32_t>(row), request.response_length(), 0,
         Finish::kNone);
  request.finishing = true;
  if (request.group != kNoGroup) {
    party(request.group).failed = true;
    turning_.push_back(request.group);
  }
}

// Of the attempt just counted, whose segment has `tokens` tokens.
bool Scheduler::passes(Request& request, double reward, std::int32_t tokens, std::size_t row) {
  const RequestOptions& options = request.options;
  if (options.rule != Rule::kTest) {
    return options.rule == Rule::kAlways;
  }
  const std::int32_t start = request.response_length();
  const double tau = options.schedule.threshold(request.prompt_reward, start + tokens);
  decision_->threshold[row] = tau;
  const double uniform =
      accept_uniform(options.seed, static_cast<std::uint32_t>(start),
                     static_cast<std::uint32_t>(request.attempt - 1), request.stream);
  const bool tested = !options.last_untested || request.attempt < options.max_attempts;
  const bool passed = tested && options.schedule.accepts(reward, tau, uniform);
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
  promote(pool_, request.sequence, flight.rows[row], result.lengths[row], copies_);
  advance(request, token_scratch_, result.stopped[row] != 0, EventKind::kAccepted,
          static_cast<std::int32_t>(row));
  if (request.group != kNoGroup) {
    Group& group = party(request.group).group;
    group.reach(request.member, result.rewards[row], request.ended);
    if (group.complete()) {
      turning_.push_back(request.group);
    }
  }
}

// The segment's attempts have all been made.
void Scheduler::take_best(Request& request, std::int32_t row) {
  Best& best = request.best;
  if (best.has_pages) {
    promote(pool_, request.sequence, best.branch, static_cast<std::int32_t>(best.tokens.size()),
            copies_);
    best.has_pages = false;
  }
  const bool chosen = request.options.rule == Rule::kChoose;
  stats_.fallbacks += chosen ? 0 : 1;
  advance(request, best.tokens, best.stopped, chosen ? EventKind::kChosen : EventKind::kFallback,
          row);
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

void Scheduler::end_oldest() {
  InFlightPlan& flight = oldest();
  for (std::size_t row = 0; row < flight.num_rows; ++row) {
    pool_.release_from(flight.rows[row].pages, 0);
  }
  flight.num_rows = 0;
  for (const Slot slot : running_) {
    Request& request = at(slot);
    if (request.in_flight && request.lane == flight.lane) {
      request.in_flight = false;
      request.num_rows = 0;
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

void Scheduler::turn_groups() {
  for (const std::int32_t number : turning_) {
    if (parties_[static_cast<std::size_t>(number)] == nullptr) {
      continue;  // two members failed, and the first has ended it
    }
    Party& turned = party(number);
    if (turned.failed) {
      end_group(number);
      continue;
    }
    const auto request_of = [this, &turned](std::int32_t member) -> Request& {
      return at(turned.members[static_cast<std::size_t>(member)]);
    };
    turned.group.turn(turn_);
    for (std::size_t i = 0; i < turn_.target.size(); ++i) {
      Request& target = request_of(turn_.target[i]);
      const Request& source = request_of(turn_.source[i]);
      decision_->copy_target.push_back(target.id);
      decision_->copy_source.push_back(source.id);
      copy_path(target, source);
      target.stream = turned.group.generation();
    }
    stats_.paths_copied += static_cast<std::int64_t>(turn_.target.size());
    for (const std::int32_t member : turn_.dropped) {
      decision_->dropped.push_back(request_of(member).id);
      remove(turned.members[static_cast<std::size_t>(member)]);
    }
    stats_.paths_dropped += static_cast<std::int64_t>(turn_.dropped.size());
    if (turn_.chosen != Group::kNone) {
      decision_->chosen.push_back(request_of(turn_.chosen).id);
      end_group(number);
      continue;
    }
    for (const Slot slot : turned.members) {
      if (slot != Party::kGone) {
        at(slot).parked = false;
      }
    }
  }
}

// A page that both hold is never written again: what follows starts in pages of its own.
void Scheduler::copy_path(Request& target, const Request& source) {
  release(target);
  target.tokens = source.tokens;
  target.sequence = source.sequence;
  for (const std::int32_t page : target.sequence.pages) {
    pool_.retain(page);
  }
  target.ended = source.ended;
}

void Scheduler::end_group(std::int32_t group) {
  // The last member's end ends the party: not to be read after.
  const std::vector<Slot> members = party(group).members;
  party(group).failed = true;
  for (const Slot slot : members) {
    if (slot != Party::kGone && !at(slot).finishing) {
      remove(slot);
    }
  }
}

void Scheduler::drop_best_pages(Request& request) {
  pool_.release_from(request.best.branch.pages, 0);
  request.best.has_pages = false;
}

void Scheduler::release(Request& request) {
  drop_best_pages(request);
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
    Party& own = party(request.group);
    own.members[static_cast<std::size_t>(request.member)] = Party::kGone;
    if (--own.num_left == 0) {
      parties_[static_cast<std::size_t>(request.group)].reset();
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
      hold(flight.rows[row].pages);
    }
    if (flight.plan != nullptr) {
      check_copies(flight.plan->copies);
    }
  }
  pool_.check(held);
}

}  // namespace stars_fast
