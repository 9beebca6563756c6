#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "check.h"
#include "scheduler.h"

namespace {

std::atomic<std::int64_t> allocations{0};

}  // namespace

// Counts every allocation of the program, to prove that steady rounds make none.
void* operator new(std::size_t size) {
  ++allocations;
  void* memory = std::malloc(size);  // NOLINT: this is operator new
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }               // NOLINT
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }  // NOLINT

namespace {

struct Round {
  std::vector<std::int64_t> tokens;
  std::vector<std::int32_t> lengths;
  std::vector<std::uint8_t> stopped;
  std::vector<double> rewards;
};

template <typename Reward>
stars_fast::RoundResult fill(Round& round, const stars_fast::Plan& plan, Reward reward) {
  const auto rows = static_cast<std::size_t>(plan.draft.num_rows());
  round.tokens.assign(rows * static_cast<std::size_t>(plan.draft.max_new), 7);
  round.lengths.assign(plan.draft.lengths.begin(), plan.draft.lengths.end());
  round.stopped.assign(rows, 0);
  round.rewards.resize(rows);
  for (auto& value : round.rewards) {
    value = reward();
  }
  stars_fast::RoundResult result;
  result.tokens = round.tokens.data();
  result.stride = static_cast<std::size_t>(plan.draft.max_new);
  result.lengths = round.lengths.data();
  result.stopped = round.stopped.data();
  result.rewards = round.rewards.data();
  result.rows = rows;
  result.seconds = 1e-3;
  return result;
}

struct Load {
  std::int64_t requests = 0;
  std::int32_t max_tokens = 0;
  std::int32_t candidates = 0;
  std::int32_t num_pages = 0;
  std::int32_t lanes = 1;
  std::int32_t segment_length = 16;
};

stars_fast::Scheduler with_requests(const Load& load) {
  stars_fast::SchedulerOptions options;
  options.num_pages = load.num_pages;
  options.lanes = load.lanes;
  stars_fast::Scheduler scheduler(options);
  const std::vector<std::int64_t> prompt(40, 1);
  for (std::int64_t id = 0; id < load.requests; ++id) {
    stars_fast::RequestOptions request;
    request.segment_length = load.segment_length;
    request.candidates = load.candidates;
    request.seed = static_cast<std::uint64_t>(id);
    request.schedule = {1.0, 0.5, 0.5, load.max_tokens, true};
    scheduler.add(id, prompt.data(), prompt.size(), request);
  }
  return scheduler;
}

// Keeps as many plans out as there are lanes; one attempt in `one_in` passes.
class Rounds {
 public:
  Rounds(std::int32_t lanes, unsigned seed, unsigned one_in)
      : plans_(static_cast<std::size_t>(lanes)), random_(seed), one_in_(one_in) {}

  // Plans, and commits the oldest plan once all are out.
  std::shared_ptr<const stars_fast::Decision> step(stars_fast::Scheduler& scheduler) {
    auto& newest = plans_[next_++ % plans_.size()];
    newest.reset();  // whose buffers the plan takes
    newest = scheduler.plan();
    for (const std::int64_t id : newest->unscored) {
      scheduler.set_prompt_reward(id, 0.0);
    }
    const auto& oldest = plans_[next_ % plans_.size()];
    if (oldest == nullptr) {
      return nullptr;
    }
    const auto reward = [this] { return random_() % one_in_ == 0 ? 2.0 : -2.0; };
    return scheduler.commit(fill(round_, *oldest, reward));
  }

 private:
  std::vector<std::shared_ptr<const stars_fast::Plan>> plans_;
  std::mt19937 random_;
  unsigned one_in_;
  Round round_;
  std::size_t next_ = 0;
};

void steady_rounds_do_not_allocate(std::int32_t lanes) {
  auto scheduler = with_requests({32, 1 << 20, 4, 1 << 22, lanes});
  Rounds rounds(lanes, 3, 4);
  for (int i = 0; i < 200 * lanes; ++i) {
    rounds.step(scheduler);
  }
  const std::int64_t before = allocations;
  for (int i = 0; i < 20 * lanes; ++i) {
    rounds.step(scheduler);
  }
  // Page tables and buffers grow with the responses, in rare large steps: not once a row (2,560).
  CHECK(allocations - before < 100);
}

void shortage_preempts_and_everyone_ends(std::int32_t lanes, std::int32_t segment_length) {
  auto scheduler = with_requests({20, 64, 0, 40, lanes, segment_length});
  Rounds rounds(lanes, 4, 3);
  std::size_t ended = 0;
  for (int i = 0; i < 5000 && scheduler.has_unfinished(); ++i) {
    const auto decision = rounds.step(scheduler);
    scheduler.check();
    if (decision != nullptr) {
      for (const std::int8_t finish : decision->finish) {
        ended += finish == static_cast<std::int8_t>(stars_fast::Finish::kNone) ? 0 : 1;
      }
    }
  }
  CHECK(ended == 20);
  CHECK(scheduler.stats().preemptions > 0);
  CHECK(scheduler.pool().used() == 0);
}

// Requests of two plans that are out are other ones, and each lane has half of them.
void lanes_halve_the_requests() {
  auto scheduler = with_requests({32, 64, 2, 1 << 12, 2});
  const auto first = scheduler.plan();
  const auto second = scheduler.plan();
  CHECK(first->draft.num_groups() == 16 && second->draft.num_groups() == 16);
  CHECK(first->request.front() == 0 && first->request.back() == 15);
  CHECK(second->request.front() == 16 && second->request.back() == 31);
  scheduler.cancel();
  CHECK(scheduler.plan()->request.front() == 0);
}

// Of attempts in several rounds, the one that keeps the constraints is the fallback, whatever the
// rewards, and none that breaks one passes.
void fallbacks_remember_over_rounds_what_breaks_a_constraint() {
  const std::vector<double> rewards{5.0, -3.0, 9.0, -4.0};
  const std::vector<std::vector<std::uint8_t>> breaks{{1, 0, 1, 0}, {1, 1, 1, 1}};
  for (std::size_t which = 0; which < 2; ++which) {
    stars_fast::SchedulerOptions options;
    options.num_pages = 40;
    stars_fast::Scheduler scheduler(options);
    stars_fast::RequestOptions request;
    request.segment_length = 1;
    request.max_attempts = 4;
    request.candidates = 1;
    request.schedule = {0.0, 1.0, 0.5, 1, true};
    const std::int64_t prompt = 1;
    scheduler.add(0, &prompt, 1, request);
    Round round;
    std::shared_ptr<const stars_fast::Decision> decision;
    std::vector<int> kept;
    for (std::size_t attempt = 0; attempt < 4; ++attempt) {
      const auto plan = scheduler.plan();
      auto result = fill(round, *plan, [&] { return rewards[attempt]; });
      round.tokens[0] = static_cast<std::int64_t>(attempt);
      result.breaks = &breaks[which][attempt];
      decision = scheduler.commit(result);
      kept.push_back(decision->outcome[0]);
    }
    CHECK((kept == (which == 0 ? std::vector<int>{2, 2, 0, 0} : std::vector<int>{2, 0, 2, 0})));
    CHECK(decision->kind.at(0) == static_cast<std::int8_t>(stars_fast::EventKind::kFallback));
    CHECK(decision->row.at(0) == -1);  // of an earlier round
    CHECK(scheduler.stats().fallbacks == 1);
    CHECK(!scheduler.has_unfinished());
  }
}

stars_fast::Scheduler with_group(std::int32_t num_pages, std::int32_t lanes,
                                 const stars_fast::GroupOptions& group) {
  stars_fast::SchedulerOptions options;
  options.num_pages = num_pages;
  options.page_size = 4;
  options.lanes = lanes;
  stars_fast::Scheduler scheduler(options);
  const std::vector<std::int64_t> prompt(9, 1);
  stars_fast::RequestOptions path;
  path.rule = stars_fast::Rule::kAlways;
  path.segment_length = 6;
  path.max_attempts = 1;
  path.schedule.max_tokens = 18;
  scheduler.add_group({10, 11, 12, 13}, {0, 1, 2, 3}, prompt.data(), prompt.size(), path, group);
  return scheduler;
}

void copied_paths_share_their_pages_and_write_to_their_own() {
  stars_fast::GroupOptions group;
  group.beta = 0.1;
  auto scheduler = with_group(200, 1, group);
  Round round;
  for (int generation = 0; generation < 3; ++generation) {
    const auto plan = scheduler.plan();
    CHECK(plan->draft.num_rows() == 4);
    // Segments begin within a page from the second on: each path's first page, or that of the path
    // that it then left for another, begins with the tail of the page that all of them read.
    CHECK(plan->copies.count == std::vector<std::int32_t>(generation == 2 ? 4 : 0, 2));
    for (const std::int32_t page : plan->copies.source) {
      CHECK(page == plan->copies.source.front());
    }
    double reward = 0.0;
    const auto decision = scheduler.commit(fill(round, *plan, [&reward] { return ++reward * 9; }));
    scheduler.check();
    if (generation < 2) {  // the last is worth e^90 of the one before
      CHECK((decision->copy_target == std::vector<std::int64_t>{10, 11, 12}));
      CHECK((decision->copy_source == std::vector<std::int64_t>{13, 13, 13}));
      CHECK(scheduler.tokens(10).size() == static_cast<std::size_t>(9 + 6 * (generation + 1)));
      // 8 tokens of the prompt; one more and 5, or 11, of the response, whose last is not cached.
      CHECK(scheduler.pool().used() == 2 + (generation == 0 ? 2 : 3));
    } else {
      CHECK((decision->chosen == std::vector<std::int64_t>{13}));
    }
  }
  CHECK(!scheduler.has_unfinished());
  CHECK(scheduler.pool().used() == 0);
  CHECK(scheduler.stats().paths_copied == 6);
}

// Paths that wait for the last one hold all pages; nobody is in flight, though a plan may be out.
void waiting_paths_give_their_pages_to_the_last(std::int32_t lanes) {
  stars_fast::GroupOptions group;
  group.kind = stars_fast::GroupOptions::Kind::kPrune;
  group.rejection_rate = 0.0;
  auto scheduler = with_group(10, lanes, group);
  Rounds rounds(lanes, 5, 2);
  std::size_t chosen = 0;
  for (int i = 0; i < 200 && scheduler.has_unfinished(); ++i) {
    const auto decision = rounds.step(scheduler);
    scheduler.check();
    chosen += decision == nullptr ? 0 : decision->chosen.size();
  }
  CHECK(chosen == 1);
  CHECK(scheduler.stats().preemptions > 0);
  CHECK(scheduler.pool().used() == 0);
}

// Row 1 ends before row 0, waits for it, and is dropped or decided once row 0 has ended.
void a_row_that_ended_waits_for_the_attempt_before_it(bool first_passes) {
  auto scheduler = with_requests({1, 64, 2, 40, 1, 12});
  auto plan = scheduler.plan();
  scheduler.set_prompt_reward(0, 0.0);
  Round round;
  auto result = fill(round, *plan, [] { return std::nan(""); });
  CHECK(result.rows == 2);
  round.lengths = {5, 3};
  const std::vector<std::uint8_t> unfinished{1, 0};
  result.unfinished = unfinished.data();
  auto decision = scheduler.commit(result);
  scheduler.check();
  CHECK(decision->request.empty());
  CHECK(scheduler.stats().rows_carried == 1);
  CHECK(scheduler.stats().attempts == 0);

  plan = scheduler.plan();
  CHECK(plan->copies.count.empty());  // the prompt is padded: segments begin pages of their own
  CHECK(plan->draft.num_rows() == 1);
  CHECK(plan->drawn == std::vector<std::int32_t>{5});
  CHECK(plan->position == std::vector<std::int32_t>{5});
  CHECK(plan->first_token == std::vector<std::int64_t>{7});
  CHECK(plan->draft.lengths == std::vector<std::int32_t>{7});
  CHECK(plan->draft.start == std::vector<std::int32_t>{39 + 5});
  CHECK(plan->held == std::vector<std::int64_t>{0});
  CHECK(plan->held_attempt == std::vector<std::int32_t>{1});
  round.lengths = {12, 3};
  round.rewards = {first_passes ? 2.0 : -2.0, 2.0};
  result.rewards = round.rewards.data();
  result.unfinished = nullptr;
  decision = scheduler.commit(result);
  scheduler.check();
  CHECK(decision->row == std::vector<std::int32_t>{first_passes ? 0 : 1});
  CHECK(decision->length == std::vector<std::int32_t>{first_passes ? 12 : 3});
  CHECK(scheduler.stats().drafted_tokens == 12 + 3);
  CHECK(scheduler.stats().attempts == (first_passes ? 1 : 2));
}

void a_group_of_more_paths_than_rows_is_refused() {
  stars_fast::SchedulerOptions options;
  options.num_pages = 100;
  options.max_rows = 2;
  stars_fast::Scheduler scheduler(options);
  const std::int64_t prompt = 1;
  stars_fast::RequestOptions path;
  path.rule = stars_fast::Rule::kAlways;
  bool refused = false;
  try {
    scheduler.add_group({1, 2, 3}, {1, 2, 3}, &prompt, 1, path, {});
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
  CHECK(!scheduler.has_unfinished());
  scheduler.add_group({1, 2}, {1, 2}, &prompt, 1, path, {});
  CHECK(scheduler.abort(2));
  CHECK(!scheduler.abort(1));
  CHECK(!scheduler.has_unfinished());
}

}  // namespace

void test_scheduler() {
  for (const std::int32_t lanes : {1, 2}) {
    steady_rounds_do_not_allocate(lanes);
    shortage_preempts_and_everyone_ends(lanes, 16);
    shortage_preempts_and_everyone_ends(lanes, 11);
  }
  lanes_halve_the_requests();
  fallbacks_remember_over_rounds_what_breaks_a_constraint();
  copied_paths_share_their_pages_and_write_to_their_own();
  a_row_that_ended_waits_for_the_attempt_before_it(true);
  a_row_that_ended_waits_for_the_attempt_before_it(false);
  waiting_paths_give_their_pages_to_the_last(1);
  waiting_paths_give_their_pages_to_the_last(2);
  a_group_of_more_paths_than_rows_is_refused();
}
