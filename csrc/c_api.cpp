// The C side of the scheduler: checks what comes in, keeps what goes out, stops every exception.
#include "c_api.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "scheduler.h"
#include "scheduler_detail.h"

using stars_fast::Batch;
using stars_fast::Decision;
using stars_fast::EventKind;
using stars_fast::Finish;
using stars_fast::Plan;
using stars_fast::require;
using stars_fast::RowOutcome;
using stars_fast::Rule;
using stars_fast::Scheduler;

struct stars_scheduler {
  explicit stars_scheduler(const stars_fast::SchedulerOptions& options) : core(options) {}

  // Lets go of the round before, whose buffers serve the next.
  void forget_last() {
    ended.reset();
    decision.reset();
  }

  Scheduler core;
  std::deque<std::shared_ptr<const Plan>> out;  // oldest first
  std::shared_ptr<const Plan> ended;            // committed last: the caller reads its rows yet
  std::shared_ptr<const Decision> decision;
};

namespace {

template <typename Code, typename Value>
constexpr bool same(Code code, Value value) {
  return static_cast<int>(code) == static_cast<int>(value);
}
static_assert(same(STARS_RULE_ALWAYS, Rule::kAlways) && same(STARS_RULE_TEST, Rule::kTest) &&
              same(STARS_RULE_CHOOSE, Rule::kChoose));
static_assert(same(STARS_ROW_PRUNED, RowOutcome::kPruned) &&
              same(STARS_ROW_WINNER, RowOutcome::kWinner) &&
              same(STARS_ROW_KEPT, RowOutcome::kKept));
static_assert(same(STARS_EVENT_ACCEPTED, EventKind::kAccepted) &&
              same(STARS_EVENT_FALLBACK, EventKind::kFallback) &&
              same(STARS_EVENT_FAILED, EventKind::kFailed) &&
              same(STARS_EVENT_CHOSEN, EventKind::kChosen));
static_assert(same(STARS_FINISH_NONE, Finish::kNone) && same(STARS_FINISH_STOP, Finish::kStop) &&
              same(STARS_FINISH_LENGTH, Finish::kLength));

// Sizes of the structs' first versions: they never change.
constexpr std::size_t kSchedulerOptionsSize =
    offsetof(stars_scheduler_options, fixed_cost_rows) + sizeof(double);
constexpr std::size_t kRequestOptionsSize =
    offsetof(stars_request_options, last_untested) + sizeof(std::int32_t);
constexpr std::size_t kPlanSize = offsetof(stars_plan, preempted) + sizeof(void*);
constexpr std::size_t kRoundSize = offsetof(stars_round, breaks) + sizeof(void*);
constexpr std::size_t kDecisionSize = offsetof(stars_decision, finish) + sizeof(void*);
constexpr std::size_t kStateSize = offsetof(stars_state, page_copies) + sizeof(std::int64_t);

std::array<char, 512>& error_text() {
  thread_local std::array<char, 512> text{};
  return text;
}

stars_status failed(stars_status status, std::string_view reason) {
  std::array<char, 512>& text = error_text();
  text[reason.copy(text.data(), text.size() - 1)] = '\0';
  return status;
}

// Runs a call; nothing that it throws passes the boundary.
template <typename Call>
stars_status guarded(Call call) noexcept {
  try {
    return call();
  } catch (const stars_fast::RequestTooLarge& error) {
    return failed(STARS_REQUEST_TOO_LARGE, error.what());
  } catch (const std::invalid_argument& error) {
    return failed(STARS_INVALID_ARGUMENT, error.what());
  } catch (const std::logic_error& error) {
    return failed(STARS_WRONG_STATE, error.what());
  } catch (const std::bad_alloc&) {
    return failed(STARS_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return failed(STARS_INTERNAL, error.what());
  } catch (...) {
    return failed(STARS_INTERNAL, "an exception of unknown type");
  }
}

template <typename T>
void require_pointer(const T* pointer, const char* name) {
  if (pointer == nullptr) {
    throw std::invalid_argument(std::string(name) + " must not be NULL");
  }
}

template <typename Struct>
void check_size(const Struct* given, const char* name, std::size_t first_version) {
  require_pointer(given, name);
  if (given->size < first_version || given->size > sizeof(Struct)) {
    throw std::invalid_argument(std::string(name) + "->size must be sizeof the struct, in [" +
                                std::to_string(first_version) + ", " +
                                std::to_string(sizeof(Struct)) + "] for this library, got " +
                                std::to_string(given->size));
  }
}

// What the caller's struct has, over the defaults.
template <typename Struct>
Struct read(const Struct* given, const char* name, std::size_t first_version, Struct defaults) {
  check_size(given, name, first_version);
  std::memcpy(&defaults, given, given->size);
  return defaults;
}

// As much of the answer as the caller's struct has.
template <typename Struct>
void write(Struct answer, Struct* into) {
  answer.size = into->size;
  std::memcpy(into, &answer, into->size);
}

template <typename T>
std::int32_t count(const std::vector<T>& values) {
  return static_cast<std::int32_t>(values.size());
}

stars_batch batch_of(const Batch& batch) {
  stars_batch out{};
  out.num_groups = batch.num_groups();
  out.num_rows = batch.num_rows();
  out.max_new = batch.max_new;
  out.table_width = batch.table_width;
  out.num_tokens = batch.num_tokens;
  out.group_pages = batch.group_pages.data();
  out.group_extent = batch.extent.data();
  out.padding_start = batch.padding_start.data();
  out.padding_end = batch.padding_end.data();
  out.row_group = batch.row_group.data();
  out.row_start = batch.start.data();
  out.new_lengths = batch.lengths.data();
  out.slots = batch.slots.data();
  return out;
}

stars_plan plan_of(const Plan& plan) {
  stars_plan out{};
  out.num_copies = count(plan.copies.count);
  out.num_unscored = count(plan.unscored);
  out.num_preempted = count(plan.preempted);
  out.copy_source = plan.copies.source.data();
  out.copy_target = plan.copies.target.data();
  out.copy_count = plan.copies.count.data();
  out.prefill = batch_of(plan.prefill);
  out.prefill_tokens = plan.prefill_tokens.data();
  out.draft = batch_of(plan.draft);
  out.request = plan.request.data();
  out.attempt = plan.attempt.data();
  out.seed = plan.seed.data();
  out.stream = plan.stream.data();
  out.response_position = plan.position.data();
  out.first_token = plan.first_token.data();
  out.unscored = plan.unscored.data();
  out.preempted = plan.preempted.data();
  return out;
}

stars_decision decision_of(const Decision& decision) {
  stars_decision out{};
  out.num_rows = count(decision.outcome);
  out.num_events = count(decision.request);
  out.outcome = decision.outcome.data();
  out.threshold = decision.threshold.data();
  out.request = decision.request.data();
  out.kind = decision.kind.data();
  out.row = decision.row.data();
  out.start = decision.start.data();
  out.length = decision.length.data();
  out.attempts = decision.attempts.data();
  out.finish = decision.finish.data();
  return out;
}

bool is_known(const Scheduler& core, std::int64_t request) {
  try {
    static_cast<void>(core.tokens(request));
    return true;
  } catch (const std::out_of_range&) {
    return false;
  }
}

// The lengths themselves are the scheduler's to check, against its plan.
void check_tokens(const stars_round& round) {
  for (std::int32_t row = 0; row < round.num_rows; ++row) {
    const std::int64_t* drawn = round.tokens + std::ptrdiff_t{row} * round.stride;
    for (std::int32_t i = 0; i < std::min(round.lengths[row], round.stride); ++i) {
      require(drawn[i] >= 0 && drawn[i] <= std::numeric_limits<std::int32_t>::max(), "token",
              drawn[i], "in [0, 2**31)");
    }
  }
}

void set_prompt_rewards(Scheduler& core, const Plan& plan, const stars_round& round) {
  require(round.num_prompt_rewards == count(plan.unscored), "num_prompt_rewards",
          round.num_prompt_rewards, "the plan's num_unscored");
  if (plan.unscored.empty()) {
    return;
  }
  require_pointer(round.prompt_rewards, "prompt_rewards");
  std::vector<std::size_t> asked;  // those aborted since have no use for theirs
  for (std::size_t i = 0; i < plan.unscored.size(); ++i) {
    if (is_known(core, plan.unscored[i])) {
      require(std::isfinite(round.prompt_rewards[i]), "prompt reward", round.prompt_rewards[i],
              "finite (abort a request that has none)");
      asked.push_back(i);
    }
  }
  for (const std::size_t i : asked) {
    core.set_prompt_reward(plan.unscored[i], round.prompt_rewards[i]);
  }
}

}  // namespace

const char* stars_version() { return STARS_VERSION; }

const char* stars_last_error() { return error_text().data(); }

stars_status stars_scheduler_create(const stars_scheduler_options* options,
                                    stars_scheduler** scheduler) {
  return guarded([&] {
    require_pointer(scheduler, "scheduler");
    *scheduler = nullptr;
    const stars_scheduler_options given =
        read(options, "options", kSchedulerOptionsSize,
             stars_scheduler_options STARS_SCHEDULER_OPTIONS_INIT);
    stars_fast::SchedulerOptions core;
    core.num_pages = given.num_pages;
    core.page_size = given.page_size;
    core.max_rows = given.max_rows;
    core.max_prefill_tokens = given.max_prefill_tokens;
    core.prefix_caching = given.prefix_caching != 0;
    core.lanes = given.lanes;
    core.fixed_cost_rows = given.fixed_cost_rows;
    *scheduler = std::make_unique<stars_scheduler>(core).release();
    return STARS_OK;
  });
}

void stars_scheduler_destroy(stars_scheduler* scheduler) {
  const std::unique_ptr<stars_scheduler> owned(scheduler);
}

stars_status stars_scheduler_add(stars_scheduler* scheduler, std::int64_t request,
                                 const std::int64_t* prompt, std::size_t prompt_length,
                                 const stars_request_options* options) {
  return guarded([&] {
    require_pointer(scheduler, "scheduler");
    require_pointer(prompt, "prompt");
    const stars_request_options given = read(options, "options", kRequestOptionsSize,
                                             stars_request_options STARS_REQUEST_OPTIONS_INIT);
    require(given.rule >= STARS_RULE_ALWAYS && given.rule <= STARS_RULE_CHOOSE, "rule", given.rule,
            "one of STARS_RULE_*");
    // Aborted in flight: its plan's prompt reward and rows would be taken for the new request's.
    for (const std::shared_ptr<const Plan>& plan : scheduler->out) {
      require(std::find(plan->request.begin(), plan->request.end(), request) == plan->request.end(),
              "request id", request, "none that a plan which is out has");
    }
    stars_fast::RequestOptions core;
    core.rule = static_cast<Rule>(given.rule);
    core.segment_length = given.segment_length;
    core.max_attempts = given.max_attempts;
    core.candidates = given.candidates;
    core.seed = given.seed;
    core.schedule.target = given.target_reward;
    core.schedule.alpha = given.alpha;
    core.schedule.beta = given.beta;
    core.schedule.max_tokens = given.max_tokens;
    core.schedule.hard = given.hard != 0;
    core.overrun = given.overrun != 0;
    core.last_untested = given.last_untested != 0;
    scheduler->core.add(request, prompt, prompt_length, core);
    return STARS_OK;
  });
}

stars_status stars_scheduler_abort(stars_scheduler* scheduler, std::int64_t request) {
  return guarded([&]() -> stars_status {
    require_pointer(scheduler, "scheduler");
    if (!scheduler->core.abort(request)) {
      return failed(STARS_UNKNOWN_REQUEST, "no request " + std::to_string(request));
    }
    return STARS_OK;
  });
}

stars_status stars_scheduler_plan(stars_scheduler* scheduler, stars_plan* plan) {
  return guarded([&] {
    require_pointer(scheduler, "scheduler");
    check_size(plan, "plan", kPlanSize);
    scheduler->forget_last();
    const std::shared_ptr<const Plan> made = scheduler->core.plan();
    scheduler->out.push_back(made);
    write(plan_of(*made), plan);
    return STARS_OK;
  });
}

stars_status stars_scheduler_commit(stars_scheduler* scheduler, const stars_round* round,
                                    stars_decision* decision) {
  return guarded([&] {
    require_pointer(scheduler, "scheduler");
    const stars_round given = read(round, "round", kRoundSize, stars_round{});
    check_size(decision, "decision", kDecisionSize);
    if (scheduler->out.empty()) {
      throw std::logic_error("commit: there is no plan to commit");
    }
    const Plan& plan = *scheduler->out.front();
    require(given.num_rows == plan.draft.num_rows(), "num_rows", given.num_rows,
            "that of the plan's draft");
    require(given.stride >= plan.draft.max_new || given.num_rows == 0, "stride", given.stride,
            "at least the plan's max_new");
    if (given.num_rows > 0) {
      require_pointer(given.tokens, "tokens");
      require_pointer(given.lengths, "lengths");
      require_pointer(given.stopped, "stopped");
      require_pointer(given.rewards, "rewards");
    }
    check_tokens(given);
    set_prompt_rewards(scheduler->core, plan, given);
    stars_fast::RoundResult result;
    result.tokens = given.tokens;
    result.stride = static_cast<std::size_t>(std::max(given.stride, 0));
    result.lengths = given.lengths;
    result.stopped = given.stopped;
    result.rewards = given.rewards;
    result.rows = static_cast<std::size_t>(given.num_rows);
    result.seconds = given.seconds;
    result.breaks = given.breaks;
    scheduler->forget_last();
    scheduler->decision = scheduler->core.commit(result);
    scheduler->ended = std::move(scheduler->out.front());
    scheduler->out.pop_front();
    write(decision_of(*scheduler->decision), decision);
    return STARS_OK;
  });
}

stars_status stars_scheduler_cancel(stars_scheduler* scheduler) {
  return guarded([&] {
    require_pointer(scheduler, "scheduler");
    scheduler->forget_last();
    scheduler->core.cancel();
    scheduler->out.clear();
    return STARS_OK;
  });
}

stars_status stars_scheduler_query(const stars_scheduler* scheduler, stars_state* state) {
  return guarded([&] {
    require_pointer(scheduler, "scheduler");
    check_size(state, "state", kStateSize);
    const Scheduler& core = scheduler->core;
    const stars_fast::SchedulerStats& stats = core.stats();
    stars_state out{};
    out.pages_used = core.pool().used();
    out.pages_free = core.pool().available();
    out.num_running = core.num_running();
    out.num_waiting = core.num_waiting();
    out.rounds = stats.rounds;
    out.drafted_tokens = stats.drafted_tokens;
    out.accepted_tokens = stats.accepted_tokens;
    out.prefill_tokens = stats.prefill_tokens;
    out.cached_prompt_tokens = stats.cached_prompt_tokens;
    out.attempts = stats.attempts;
    out.segments = stats.segments;
    out.fallbacks = stats.fallbacks;
    out.preemptions = stats.preemptions;
    out.page_copies = stats.page_copies;
    write(out, state);
    return STARS_OK;
  });
}
