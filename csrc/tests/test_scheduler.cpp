#include <atomic>
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

}  // namespace

void test_scheduler() {
  for (const std::int32_t lanes : {1, 2}) {
    steady_rounds_do_not_allocate(lanes);
    shortage_preempts_and_everyone_ends(lanes, 16);
    shortage_preempts_and_everyone_ends(lanes, 11);
  }
  lanes_halve_the_requests();
}
