#include <atomic>
#include <cstdint>
#include <cstdlib>
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

stars_fast::Scheduler with_requests(std::int64_t count, std::int32_t max_tokens,
                                    std::int32_t candidates, std::int32_t num_pages) {
  stars_fast::SchedulerOptions options;
  options.num_pages = num_pages;
  stars_fast::Scheduler scheduler(options);
  const std::vector<std::int64_t> prompt(40, 1);
  for (std::int64_t id = 0; id < count; ++id) {
    stars_fast::RequestOptions request;
    request.segment_length = 16;
    request.candidates = candidates;
    request.seed = static_cast<std::uint64_t>(id);
    request.schedule = {1.0, 0.5, 0.5, max_tokens, true};
    scheduler.add(id, prompt.data(), prompt.size(), request);
  }
  return scheduler;
}

void steady_rounds_do_not_allocate() {
  auto scheduler = with_requests(32, 1 << 20, 4, 1 << 22);
  std::mt19937 random(3);
  Round round;
  const auto run = [&] {
    const auto plan = scheduler.plan();
    for (const std::int64_t id : plan->unscored) {
      scheduler.set_prompt_reward(id, 0.0);
    }
    const auto result = fill(round, *plan, [&random] { return random() % 4 == 0 ? 2.0 : -2.0; });
    scheduler.commit(result);
  };
  for (int i = 0; i < 200; ++i) {
    run();
  }
  const std::int64_t before = allocations;
  for (int i = 0; i < 20; ++i) {
    run();
  }
  // Page tables and buffers grow with the responses, in rare large steps: not once a row (2,560).
  CHECK(allocations - before < 100);
}

void shortage_preempts_and_everyone_ends() {
  auto scheduler = with_requests(20, 64, 0, 40);
  std::mt19937 random(4);
  Round round;
  std::size_t ended = 0;
  for (int i = 0; i < 5000 && scheduler.has_unfinished(); ++i) {
    const auto plan = scheduler.plan();
    scheduler.check();
    for (const std::int64_t id : plan->unscored) {
      scheduler.set_prompt_reward(id, 0.0);
    }
    const auto result = fill(round, *plan, [&random] { return random() % 3 == 0 ? 2.0 : -2.0; });
    const auto decision = scheduler.commit(result);
    scheduler.check();
    for (const std::int8_t finish : decision->finish) {
      ended += finish == static_cast<std::int8_t>(stars_fast::Finish::kNone) ? 0 : 1;
    }
  }
  CHECK(ended == 20);
  CHECK(scheduler.stats().preemptions > 0);
  CHECK(scheduler.pool().used() == 0);
}

}  // namespace

void test_scheduler() {
  steady_rounds_do_not_allocate();
  shortage_preempts_and_everyone_ends();
}
