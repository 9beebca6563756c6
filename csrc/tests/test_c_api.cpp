// What the C boundary adds to the scheduler: checks, sizes, error texts, lifetimes.
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "c_api.h"
#include "check.h"

namespace {

constexpr std::array<std::int64_t, 3> kPrompt = {1, 2, 3};

bool last_error_has(const char* text) {
  return std::string(stars_last_error()).find(text) != std::string::npos;
}

stars_scheduler* create(std::int32_t lanes = 1) {
  stars_scheduler_options options = STARS_SCHEDULER_OPTIONS_INIT;
  options.num_pages = 32;
  options.page_size = 4;
  options.lanes = lanes;
  stars_scheduler* scheduler = nullptr;
  CHECK(stars_scheduler_create(&options, &scheduler) == STARS_OK);
  return scheduler;
}

stars_request_options request_options() {
  stars_request_options options = STARS_REQUEST_OPTIONS_INIT;
  options.segment_length = 4;
  options.max_tokens = 8;
  options.max_attempts = 4;
  options.target_reward = 1.0;
  return options;
}

stars_plan plan_of(stars_scheduler* scheduler) {
  stars_plan plan{};
  plan.size = sizeof(plan);
  CHECK(stars_scheduler_plan(scheduler, &plan) == STARS_OK);
  return plan;
}

// Results for a plan, each row whole.
struct Results {
  explicit Results(const stars_plan& plan, double reward = 2.0)
      : tokens(static_cast<std::size_t>(plan.draft.num_rows * plan.draft.max_new), 7),
        lengths(plan.draft.new_lengths, plan.draft.new_lengths + plan.draft.num_rows),
        stopped(lengths.size(), 0),
        rewards(lengths.size(), reward),
        prompt_rewards(static_cast<std::size_t>(plan.num_unscored), 0.0) {
    round.size = sizeof(round);
    round.num_rows = plan.draft.num_rows;
    round.stride = plan.draft.max_new;
    round.num_prompt_rewards = plan.num_unscored;
    round.tokens = tokens.data();
    round.lengths = lengths.data();
    round.stopped = stopped.data();
    round.rewards = rewards.data();
    round.prompt_rewards = prompt_rewards.data();
  }

  std::vector<std::int64_t> tokens;
  std::vector<std::int32_t> lengths;
  std::vector<std::uint8_t> stopped;
  std::vector<double> rewards;
  std::vector<double> prompt_rewards;
  stars_round round{};
};

stars_status commit(stars_scheduler* scheduler, const stars_round& round,
                    stars_decision* into = nullptr) {
  stars_decision decision{};
  decision.size = sizeof(decision);
  const stars_status status = stars_scheduler_commit(scheduler, &round, &decision);
  if (into != nullptr) {
    *into = decision;
  }
  return status;
}

void test_arguments() {
  stars_scheduler* scheduler = nullptr;
  CHECK(stars_scheduler_create(nullptr, &scheduler) == STARS_INVALID_ARGUMENT);
  CHECK(last_error_has("options must not be NULL"));
  stars_scheduler_options options = STARS_SCHEDULER_OPTIONS_INIT;
  options.num_pages = 32;
  options.lanes = 3;
  CHECK(stars_scheduler_create(&options, &scheduler) == STARS_INVALID_ARGUMENT);
  CHECK(last_error_has("lanes must be 1 or 2, got 3") && scheduler == nullptr);
  stars_scheduler_destroy(nullptr);

  scheduler = create();
  stars_request_options request = request_options();
  CHECK(stars_scheduler_add(nullptr, 1, kPrompt.data(), kPrompt.size(), &request) ==
        STARS_INVALID_ARGUMENT);
  CHECK(stars_scheduler_add(scheduler, 1, nullptr, 0, &request) == STARS_INVALID_ARGUMENT);
  request.rule = 3;
  CHECK(stars_scheduler_add(scheduler, 1, kPrompt.data(), kPrompt.size(), &request) ==
        STARS_INVALID_ARGUMENT);
  CHECK(last_error_has("rule must be one of STARS_RULE_*, got 3"));
  request = request_options();
  request.max_tokens = 1000;
  CHECK(stars_scheduler_add(scheduler, 1, kPrompt.data(), kPrompt.size(), &request) ==
        STARS_REQUEST_TOO_LARGE);
  CHECK(stars_scheduler_abort(scheduler, 1) == STARS_UNKNOWN_REQUEST);
  CHECK(last_error_has("no request 1"));
  CHECK(stars_scheduler_cancel(scheduler) == STARS_WRONG_STATE);

  // Texts are the thread's own, and a success leaves them.
  std::thread([] { CHECK(*stars_last_error() == '\0'); }).join();
  request = request_options();
  CHECK(stars_scheduler_add(scheduler, 1, kPrompt.data(), kPrompt.size(), &request) == STARS_OK);
  CHECK(last_error_has("cancel"));
  stars_scheduler_destroy(scheduler);
}

void test_sizes() {
  stars_scheduler* scheduler = create();
  stars_request_options request = request_options();
  request.size = 0;
  CHECK(stars_scheduler_add(scheduler, 1, kPrompt.data(), kPrompt.size(), &request) ==
        STARS_INVALID_ARGUMENT);
  CHECK(last_error_has("options->size must be sizeof the struct"));
  request.size = sizeof(request) + 8;  // of a later version, with what this one cannot do
  CHECK(stars_scheduler_add(scheduler, 1, kPrompt.data(), kPrompt.size(), &request) ==
        STARS_INVALID_ARGUMENT);

  // An answer ends where the caller's struct does.
  stars_state state{};
  std::memset(&state, 0x55, sizeof(state));
  state.size = sizeof(state) - 1;
  CHECK(stars_scheduler_query(scheduler, &state) == STARS_INVALID_ARGUMENT);
  CHECK(state.pages_free == 0x55555555);
  state.size = sizeof(state);
  CHECK(stars_scheduler_query(scheduler, &state) == STARS_OK);
  CHECK(state.size == sizeof(state) && state.pages_free == 31 && state.num_waiting == 0);
  stars_plan plan{};
  CHECK(stars_scheduler_plan(scheduler, &plan) == STARS_INVALID_ARGUMENT);
  plan = plan_of(scheduler);  // the one before was not made
  CHECK(plan.draft.num_rows == 0 && plan.prefill.num_rows == 0);
  stars_scheduler_destroy(scheduler);
}

void test_results() {
  stars_scheduler* scheduler = create();
  const stars_request_options request = request_options();
  CHECK(stars_scheduler_add(scheduler, 5, kPrompt.data(), kPrompt.size(), &request) == STARS_OK);
  const stars_plan plan = plan_of(scheduler);
  CHECK(plan.draft.num_rows >= 1 && plan.num_unscored == 1 && plan.unscored[0] == 5);
  Results results(plan);
  const stars_round good = results.round;

  const auto refused = [&](const char* reason) {
    const bool is = commit(scheduler, results.round) == STARS_INVALID_ARGUMENT;
    results.round = good;
    return is && last_error_has(reason);
  };
  results.round.num_rows = -1;
  CHECK(refused("num_rows must be"));
  results.round.stride = 3;
  CHECK(refused("stride must be at least"));
  results.round.rewards = nullptr;
  CHECK(refused("rewards must not be NULL"));
  results.round.num_prompt_rewards = 0;
  CHECK(refused("num_prompt_rewards must be"));
  results.prompt_rewards[0] = std::numeric_limits<double>::infinity();
  CHECK(refused("prompt reward must be finite"));
  results.prompt_rewards[0] = 0.0;
  results.tokens[0] = -1;
  CHECK(refused("token must be in [0, 2**31), got -1"));
  results.tokens[0] = 7;
  results.lengths[0] = 0;
  CHECK(refused("row length must be"));
  results.lengths[0] = 4;

  // Nothing was changed: the same round is taken, and the plan can be read beside its decision.
  stars_decision decision{};
  CHECK(commit(scheduler, good, &decision) == STARS_OK);
  CHECK(decision.num_rows == good.num_rows && decision.num_events == 1);
  CHECK(decision.request[0] == 5 && decision.kind[0] == STARS_EVENT_ACCEPTED);
  CHECK(decision.length[0] == 4 && decision.row[0] == 0 && plan.request[decision.row[0]] == 5);
  CHECK(commit(scheduler, good) == STARS_WRONG_STATE);
  stars_scheduler_destroy(scheduler);
}

// A row that breaks a constraint passes no test, whatever its reward.
void test_breaks() {
  stars_scheduler* scheduler = create();
  const stars_request_options request = request_options();
  CHECK(stars_scheduler_add(scheduler, 5, kPrompt.data(), kPrompt.size(), &request) == STARS_OK);
  const stars_plan plan = plan_of(scheduler);
  Results results(plan);
  const std::vector<std::uint8_t> breaks(results.lengths.size(), 1);
  results.round.breaks = breaks.data();
  stars_decision decision{};
  CHECK(commit(scheduler, results.round, &decision) == STARS_OK);
  CHECK(decision.num_rows == results.round.num_rows);
  for (std::int32_t i = 0; i < decision.num_events; ++i) {
    CHECK(decision.kind[i] != STARS_EVENT_ACCEPTED);
  }
  stars_scheduler_destroy(scheduler);
}

// With two lanes: a plan outlives the next, commits take the oldest, a cancel gives all back.
void test_lanes() {
  stars_scheduler* scheduler = create(2);
  const stars_request_options request = request_options();
  for (std::int64_t id = 0; id < 4; ++id) {
    CHECK(stars_scheduler_add(scheduler, id, kPrompt.data(), kPrompt.size(), &request) == STARS_OK);
  }
  const stars_plan first = plan_of(scheduler);
  const stars_plan second = plan_of(scheduler);
  stars_plan third = second;
  CHECK(stars_scheduler_plan(scheduler, &third) == STARS_WRONG_STATE);
  const Results of_first(first);
  Results of_second(second);

  // An id of a plan that is out is not to be had again; the reward of its prompt is ignored.
  const std::int64_t gone = second.unscored[0];
  CHECK(stars_scheduler_abort(scheduler, gone) == STARS_OK);
  CHECK(stars_scheduler_add(scheduler, gone, kPrompt.data(), kPrompt.size(), &request) ==
        STARS_INVALID_ARGUMENT);
  of_second.prompt_rewards[0] = std::numeric_limits<double>::quiet_NaN();

  stars_decision decision{};
  CHECK(commit(scheduler, of_first.round, &decision) == STARS_OK);
  CHECK(decision.num_rows == first.draft.num_rows && decision.request[0] == first.request[0]);
  CHECK(commit(scheduler, of_second.round) == STARS_OK);
  CHECK(stars_scheduler_add(scheduler, gone, kPrompt.data(), kPrompt.size(), &request) == STARS_OK);

  const stars_plan undone = plan_of(scheduler);
  const std::vector<std::int64_t> requests(undone.request, undone.request + undone.draft.num_rows);
  CHECK(stars_scheduler_cancel(scheduler) == STARS_OK);
  CHECK(stars_scheduler_cancel(scheduler) == STARS_WRONG_STATE);
  std::int64_t committed = 0;
  for (;;) {
    const stars_plan plan = plan_of(scheduler);
    if (plan.draft.num_rows + plan.prefill.num_rows == 0) {
      break;
    }
    const Results results(plan);
    CHECK(commit(scheduler, results.round, &decision) == STARS_OK);
    for (std::int32_t i = 0; i < decision.num_events; ++i) {
      committed += decision.length[i];
    }
  }
  stars_state state{};
  state.size = sizeof(state);
  CHECK(stars_scheduler_query(scheduler, &state) == STARS_OK);
  CHECK(state.pages_used == 0 && state.num_running == 0 && committed > 0);
  stars_scheduler_destroy(scheduler);
}

}  // namespace

void test_c_api() {
  CHECK(*stars_version() != '\0');
  test_arguments();
  test_sizes();
  test_results();
  test_breaks();
  test_lanes();
}
