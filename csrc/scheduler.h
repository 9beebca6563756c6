// The accept/reject loop: which rows to draft, what their rewards decide, which pages they hold.
#pragma once

#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <unordered_map>
#include <vector>

#include "acceptance.h"
#include "batch.h"
#include "cost_model.h"
#include "page_pool.h"
#include "sequence.h"

namespace stars_fast {

// A request that could not run even with the whole pool to itself.
class RequestTooLarge : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

struct SchedulerOptions {
  std::int32_t num_pages = 0;
  std::int32_t page_size = 16;
  std::int32_t max_rows = 256;             // rows of a round, and requests that run at once
  std::int32_t max_prefill_tokens = 8192;  // tokens of prompts run in one round
  bool prefix_caching = true;
  double fixed_cost_rows = 16.0;  // rows that cost as much as a round's fixed part, until learned
};

struct RequestOptions {
  bool scored = true;  // false: every segment is accepted (plain sampling)
  std::int32_t segment_length = 32;
  std::int32_t max_attempts = 20;
  std::int32_t candidates = 0;  // rows of a round; 0: as many as pay off
  std::uint64_t seed = 0;
  Schedule schedule;
};

// What to run in a round. Arrays are row-major and belong to the plan.
struct Plan {
  Copies copies;  // to run before anything else
  Batch prefill;
  std::vector<std::int64_t> prefill_tokens;  // [prefill.num_tokens]
  Batch draft;
  std::vector<std::int64_t> request;      // [rows]
  std::vector<std::int32_t> attempt;      // [rows]
  std::vector<std::int64_t> seed;         // [rows] the bits of the 64-bit key
  std::vector<std::int32_t> position;     // [rows] response position of the row's first new token
  std::vector<std::int64_t> first_token;  // [rows] the last committed token, fed first
  std::vector<std::int64_t> unscored;     // requests of the round whose prompt reward is not set
  std::vector<std::int64_t> preempted;    // requests that lost their pages in this plan

  void clear();
};

enum class RowOutcome : std::int8_t { kPruned = 0, kWinner = 1, kKept = 2 };
enum class EventKind : std::int8_t { kAccepted = 0, kFallback = 1, kFailed = 2 };
enum class Finish : std::int8_t { kNone = 0, kStop = 1, kLength = 2 };

// What a round decided.
struct Decision {
  std::vector<std::int8_t> outcome;  // [rows] RowOutcome
  std::vector<double> threshold;     // [rows] tau; NaN where nothing was tested
  // One entry for each request whose segment was committed or that failed.
  std::vector<std::int64_t> request;
  std::vector<std::int8_t> kind;       // EventKind
  std::vector<std::int32_t> row;       // the winner (or the row that failed); -1: the best of an
                                       // earlier round
  std::vector<std::int32_t> start;     // of the segment, in response tokens
  std::vector<std::int32_t> length;    // of the segment
  std::vector<std::int32_t> attempts;  // made for this segment, the winner's included
  std::vector<std::int8_t> finish;     // Finish

  void clear();
};

// Filled by the caller from the round's results; arrays have one entry a row.
struct RoundResult {
  const std::int64_t* tokens = nullptr;  // [rows, stride]
  std::size_t stride = 0;
  const std::int32_t* lengths = nullptr;  // tokens drafted, 1 .. the row's planned length
  const std::uint8_t* stopped = nullptr;  // the row's last token ends the response
  const double* rewards = nullptr;        // NaN: the row has no valid result
  std::size_t rows = 0;
  double seconds = 0.0;  // that the round took per drafted token position; 0: not measured
};

struct SchedulerStats {
  std::int64_t rounds = 0;
  std::int64_t drafted_tokens = 0;
  std::int64_t accepted_tokens = 0;
  std::int64_t prefill_tokens = 0;
  std::int64_t cached_prompt_tokens = 0;  // of prompts, found in the prefix cache
  std::int64_t attempts = 0;              // tested or found wanting; a row after the winner is not
  std::int64_t segments = 0;
  std::int64_t fallbacks = 0;
  std::int64_t preemptions = 0;
  std::int64_t page_copies = 0;
};

// Requests wait, run and end; plan() and commit() alternate. One thread at a time.
// Time and memory of a round grow with the rows of that round, not with the requests that wait.
class Scheduler {
 public:
  explicit Scheduler(const SchedulerOptions& options);

  // Queues a request. Throws std::invalid_argument (an id in use, an empty prompt, a number out of
  // range) or RequestTooLarge.
  void add(std::int64_t id, const std::int64_t* prompt, std::size_t prompt_length,
           const RequestOptions& options);
  // Forgets a request, whatever its state. False if there is none of that id.
  bool abort(std::int64_t id);
  // Throws std::logic_error if the last plan has not been committed or cancelled.
  std::shared_ptr<const Plan> plan();
  // r(x) of a request listed in Plan::unscored; needed before its first commit.
  void set_prompt_reward(std::int64_t id, double reward);
  // Tests the rows in attempt order and moves the requests on. Throws std::invalid_argument,
  // nothing changed, if the result does not fit the plan.
  std::shared_ptr<const Decision> commit(const RoundResult& result);
  // Gives the plan back undone: its rows are drafted again by a later plan. The prefix cache is
  // emptied, for its newest pages may never have been written.
  void cancel();

  [[nodiscard]] bool has_unfinished() const { return !by_id_.empty(); }
  [[nodiscard]] std::int64_t num_running() const {
    return static_cast<std::int64_t>(running_.size());
  }
  [[nodiscard]] std::int64_t num_waiting() const {
    return static_cast<std::int64_t>(by_id_.size()) - num_running();
  }
  // Tokens of a request: its prompt, then its committed response.
  [[nodiscard]] const std::vector<std::int32_t>& tokens(std::int64_t id) const;
  [[nodiscard]] const PagePool& pool() const { return pool_; }
  [[nodiscard]] const SchedulerStats& stats() const { return stats_; }
  // Throws std::logic_error unless every page's count equals the tables that hold it.
  void check() const;

 private:
  using Slot = std::int32_t;  // index into requests_

  struct Best {  // of the rejected attempts of the segment at hand
    double reward = 0.0;
    bool any = false;
    bool stopped = false;
    bool has_pages = false;
    std::vector<std::int32_t> tokens;
    Branch branch;
  };

  struct Request {
    std::int64_t id = 0;
    std::uint32_t generation = 0;  // tells a reused slot from the one that was queued
    RequestOptions options;
    std::vector<std::int32_t> tokens;
    std::int32_t prompt_length = 0;
    std::int32_t attempt = 0;  // of the segment at hand, next to be made
    double prompt_reward = std::numeric_limits<double>::quiet_NaN();
    double pass_rate = 0.0;  // estimate of an attempt's chance to pass
    bool running = false;
    bool doomed = false;  // ends with the round: finished, failed, or aborted while a plan is out
    std::int32_t wanted_rows = 0;
    std::size_t first_row = 0;
    std::size_t num_rows = 0;
    Sequence sequence;
    Best best;

    [[nodiscard]] std::int32_t length() const { return static_cast<std::int32_t>(tokens.size()); }
    [[nodiscard]] std::int32_t response_length() const { return length() - prompt_length; }
    // Tokens of the next segment.
    [[nodiscard]] std::int32_t draft_length() const;
    // Tokens that need KV before the request can draft: all but the last, which the draft feeds.
    [[nodiscard]] std::int32_t prefix_length() const { return length() - 1; }
  };

  struct Waiting {
    Slot slot;
    std::uint32_t generation;
  };

  struct Chunk {  // of a prompt, to be run in this plan
    Slot slot;
    std::int32_t begin;
    std::int32_t length;
  };

  struct Gain {  // of one more row for a request
    double value;
    std::size_t position;  // in drafting_
    bool operator<(const Gain& other) const {
      return value < other.value || (value == other.value && position > other.position);
    }
  };

  Request& at(Slot slot) { return requests_[static_cast<std::size_t>(slot)]; }
  [[nodiscard]] const Request& at(Slot slot) const {
    return requests_[static_cast<std::size_t>(slot)];
  }
  [[nodiscard]] Request& find(std::int64_t id);
  [[nodiscard]] std::int32_t row_pages(const Request& request) const;
  [[nodiscard]] std::int32_t pages_to_draft(const Request& request) const;
  void validate(std::size_t prompt_length, const RequestOptions& options) const;

  // The parts of plan().
  void keep_running();
  void admit();
  void start(Slot slot);
  void prefill(Slot slot);
  void list_prefill();
  void allot_rows();
  void open_rows();
  bool make_room(std::int32_t pages, Slot for_request);
  void preempt_youngest();

  // The parts of commit().
  void decide(Request& request, const RoundResult& result);
  void keep_best(Request& request, std::size_t row, const RoundResult& result);
  void advance(Request& request, const std::vector<std::int32_t>& segment, bool stopped,
               EventKind kind, std::int32_t row);
  void record(const Request& request, EventKind kind, std::int32_t row, std::int32_t start,
              std::int32_t length, Finish finish);
  void finish_round();

  void drop_best_pages(Request& request);
  void release(Request& request);
  void forget(Slot slot);

  SchedulerOptions options_;
  PagePool pool_;
  CostModel cost_;
  SchedulerStats stats_;
  std::vector<Request> requests_;
  std::vector<Slot> free_slots_;
  std::unordered_map<std::int64_t, Slot> by_id_;
  std::vector<Slot> running_;  // oldest first
  std::deque<Waiting> waiting_;

  bool planned_ = false;
  std::int32_t prefill_budget_ = 0;
  std::int32_t reserved_ = 0;  // pages promised to the rows of this plan
  bool preempted_ = false;
  double global_pass_rate_ = 0.5;
  std::vector<Slot> drafting_;  // requests of the round, in row order
  std::vector<Chunk> prefilling_;
  std::vector<Branch> rows_;  // of the round; grows only
  std::size_t num_rows_ = 0;
  std::vector<Gain> gains_;
  std::vector<std::int32_t> token_scratch_;
  Copies copies_;  // owed by commits since the last plan
  std::shared_ptr<Plan> plan_;
  std::shared_ptr<Decision> decision_;
};

}  // namespace stars_fast
