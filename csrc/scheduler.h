// The accept/reject loop: which rows to draft, what their rewards decide, which pages they hold.
#pragma once

#include <algorithm>
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
#include "path_group.h"
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
  std::int32_t max_rows = 256;             // rows of a round, and running requests of a lane
  std::int32_t max_prefill_tokens = 8192;  // tokens of prompts run in one round
  bool prefix_caching = true;
  double fixed_cost_rows = 16.0;  // rows that cost as much as a round's fixed part, until learned
  std::int32_t lanes = 1;         // 1 or 2: plans that may be out at once
};

// What becomes of a segment's attempts.
enum class Rule : std::int8_t {
  kAlways = 0,  // the first is accepted: plain sampling, and the paths of a group
  kTest = 1,    // the first that passes Schedule::accepts; if none does, the one of most Merit
  kChoose = 2,  // all are made, and the one of most Merit by Schedule::choice_key is taken
};

struct RequestOptions {
  Rule rule = Rule::kTest;
  std::int32_t segment_length = 32;
  std::int32_t max_attempts = 20;  // above 1: some attempts may be rejected
  std::int32_t candidates = 0;     // rows of a round; 0: as many as pay off
  std::uint64_t seed = 0;
  Schedule schedule;
  bool overrun = false;        // a segment that begins within the budget may end past it
  bool last_untested = false;  // kTest: the last attempt is drawn and not tested
  // kChoose: the first so many attempts are a choice of their own, whose reward has to reach
  // Schedule::target; if it does not, the rest are made and one of these is taken. 0: one choice.
  std::int32_t draft_attempts = 0;
  // A budget of attempts for each part of the response: entry i is of the segments that begin at
  // response tokens [i * attempts_span, (i + 1) * attempts_span), the last of those behind as well.
  // Empty: all have max_attempts.
  std::vector<std::int32_t> attempts_at;
  std::int32_t attempts_span = 1;
  // Segments that begin at this response token or behind it are accepted, whatever their reward.
  std::int32_t plain_from = std::numeric_limits<std::int32_t>::max();

  // Attempts of the segment that begins at a response token, at most.
  [[nodiscard]] std::int32_t attempts_from(std::int32_t start) const {
    if (attempts_at.empty()) {
      return max_attempts;
    }
    const auto part = static_cast<std::size_t>(start / attempts_span);
    return attempts_at[std::min(part, attempts_at.size() - 1)];
  }
  [[nodiscard]] bool needs_prompt_reward() const {
    return rule == Rule::kTest && schedule.needs_prompt_reward();
  }
  // Whether a segment may have attempts that are drawn and not taken.
  [[nodiscard]] bool may_reject() const { return rule != Rule::kAlways && max_attempts > 1; }
  // Response tokens, at most.
  [[nodiscard]] std::int32_t longest_response() const {
    return schedule.max_tokens + (overrun ? segment_length - 1 : 0);
  }
};

// What to run in a round. Arrays are row-major and belong to the plan.
struct Plan {
  Copies copies;  // to run before anything else
  Batch prefill;
  std::vector<std::int64_t> prefill_tokens;   // [prefill.num_tokens]
  std::vector<std::int64_t> prefill_request;  // [prefill.num_rows]
  Batch draft;
  std::vector<std::int64_t> request;      // [rows]
  std::vector<std::int32_t> attempt;      // [rows]
  std::vector<std::int64_t> seed;         // [rows] the bits of the 64-bit key
  std::vector<std::int32_t> position;     // [rows] response position of the row's first new token
  std::vector<std::int32_t> drawn;        // [rows] tokens of the segment drawn in earlier rounds
  std::vector<std::int32_t> stream;       // [rows] of the row's draws, see philox.h
  std::vector<std::int64_t> first_token;  // [rows] the token before the first new one, fed first
  // Rows that ended in an earlier round and wait for an attempt before theirs. They are not
  // drafted, and come behind the others in the result.
  std::vector<std::int64_t> held;          // [held] their requests
  std::vector<std::int32_t> held_attempt;  // [held]
  std::vector<std::int64_t> unscored;      // requests of the round whose prompt reward is not set
  std::vector<std::int64_t> preempted;     // requests that lost their pages in this plan

  [[nodiscard]] bool empty() const { return prefill.num_rows() + draft.num_rows() == 0; }
  void clear();
};

enum class RowOutcome : std::int8_t { kPruned = 0, kWinner = 1, kKept = 2 };
enum class EventKind : std::int8_t { kAccepted = 0, kFallback = 1, kFailed = 2, kChosen = 3 };
enum class Finish : std::int8_t { kNone = 0, kStop = 1, kLength = 2 };

// What a round decided. Its rows are those of the draft, then those held.
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
  // For groups whose members have all reached a boundary.
  std::vector<std::int64_t> copy_target;  // members that continue, tokens and all, as a copy of ...
  std::vector<std::int64_t> copy_source;  // ... these, which none of the targets is
  std::vector<std::int64_t> dropped;      // members that are over and forgotten
  std::vector<std::int64_t> chosen;       // the paths of groups that are over, all forgotten

  void clear();
};

// Filled by the caller from the round's results; arrays have one entry a row: those of the draft,
// then those held. A row is its whole segment, what earlier rounds drew included.
struct RoundResult {
  const std::int64_t* tokens = nullptr;  // [rows, stride]
  std::size_t stride = 0;
  const std::int32_t* lengths = nullptr;     // tokens, 1 .. the segment's planned length
  const std::uint8_t* stopped = nullptr;     // the row's last token ends the response
  const double* rewards = nullptr;           // NaN: the row has no valid result; read of a row only
                                             // if no attempt up to it is unfinished
  const std::uint8_t* unfinished = nullptr;  // the row goes on in the next round; null: none does
  const std::uint8_t* breaks = nullptr;      // the row breaks a constraint: it passes no test, and
                                             // loses to any row that does not; null: none does
  std::size_t rows = 0;
  double seconds = 0.0;  // that the round took per drafted token position; 0: not measured
};

struct SchedulerStats {
  std::int64_t rounds = 0;  // empty plans are none
  std::int64_t drafted_tokens = 0;
  std::int64_t accepted_tokens = 0;
  std::int64_t prefill_tokens = 0;
  std::int64_t cached_prompt_tokens = 0;  // of prompts, found in the prefix cache
  std::int64_t attempts = 0;              // tested or found wanting; a row after the winner is not
  std::int64_t segments = 0;
  std::int64_t fallbacks = 0;
  std::int64_t preemptions = 0;
  std::int64_t page_copies = 0;
  std::int64_t rows_carried = 0;   // unfinished at the end of a round
  std::int64_t paths_copied = 0;   // of groups
  std::int64_t paths_dropped = 0;  // of groups, before their end
};

// Requests wait, run and end. A plan is out from plan() until its commit() or a cancel(), and its
// work must be issued to the device in the order of the plans. Each running request belongs to a
// lane; lanes take turns, and a plan moves the requests of one, so that with two lanes a round can
// be drafted while the round before, of other requests, is scored. One thread at a time.
// Time and memory of a round grow with the requests that run, not with those that wait.
class Scheduler {
 public:
  explicit Scheduler(const SchedulerOptions& options);

  // Queues a request. Throws std::invalid_argument (an id in use, an empty prompt, a number out of
  // range) or RequestTooLarge.
  void add(std::int64_t id, const std::int64_t* prompt, std::size_t prompt_length,
           const RequestOptions& options);
  // Queues the members of a group, each a path with its own draws from one prompt. Every segment of
  // theirs is accepted; at its end a member waits for the others, and the group decides (Decision).
  // A member that fails, or is aborted, takes the group with it. Throws as add() does, and
  // std::invalid_argument for a group larger than max_rows.
  void add_group(const std::vector<std::int64_t>& ids, const std::vector<std::uint64_t>& seeds,
                 const std::int64_t* prompt, std::size_t prompt_length,
                 const RequestOptions& options, const GroupOptions& group_options);
  // Forgets a request, whatever its state. False if there is none of that id.
  bool abort(std::int64_t id);
  // With another plan out it may be empty, if its lane has nothing to do, and is committed in its
  // turn all the same; with none out it is empty only if nothing is unfinished. Throws
  // std::logic_error if as many plans are out as there are lanes.
  std::shared_ptr<const Plan> plan();
  // r(x) of a request listed in Plan::unscored; needed before its first commit.
  void set_prompt_reward(std::int64_t id, double reward);
  // Commits the oldest plan that is out: tests the rows in attempt order and moves the requests on.
  // Throws std::invalid_argument, nothing changed, if the result does not fit the plan.
  std::shared_ptr<const Decision> commit(const RoundResult& result);
  // Gives every plan that is out back undone: their rows are drafted again by later plans, from the
  // first token of the segment, as are all that earlier rounds left unfinished. What
  // may never have been written, or not whole, is prefilled again, and the prefix cache is emptied.
  void cancel();

  // Forgets the pages of prompts that are over. Throws std::logic_error if anything is unfinished.
  void clear_cache();

  [[nodiscard]] bool has_unfinished() const { return !by_id_.empty(); }
  [[nodiscard]] std::int64_t num_running() const {
    return static_cast<std::int64_t>(by_id_.size()) - num_waiting_;
  }
  [[nodiscard]] std::int64_t num_waiting() const { return num_waiting_; }
  // Tokens of a request: its prompt, then its committed response.
  [[nodiscard]] const std::vector<std::int32_t>& tokens(std::int64_t id) const;
  [[nodiscard]] const PagePool& pool() const { return pool_; }
  [[nodiscard]] const SchedulerStats& stats() const { return stats_; }
  // Throws std::logic_error unless every page's count equals the tables that hold it, and no page
  // is the target of two copies of a plan or both source and target.
  void check() const;

 private:
  using Slot = std::int32_t;  // index into requests_

  struct Row {  // an attempt under way
    Branch branch;
    std::int32_t drawn = 0;       // tokens drawn in the rounds before
    std::int64_t last_token = 0;  // of these
    bool ended = false;           // waits for an attempt before it
  };

  struct Best {   // of the attempts of the segment at hand, none of which has passed
    Merit merit;  // by reward, or key of the choice
    double reward = 0.0;
    bool any = false;
    bool stopped = false;
    bool has_pages = false;
    std::vector<std::int32_t> tokens;
    Branch branch;
  };

  static constexpr std::int32_t kNoGroup = -1;

  struct Request {
    std::int64_t id = 0;
    std::uint32_t generation = 0;  // tells a reused slot from the one that was queued
    RequestOptions options;
    std::vector<std::int32_t> tokens;
    std::int32_t prompt_length = 0;
    std::int32_t attempt = 0;  // of the segment at hand, next to be made
    std::uint32_t stream = 0;  // of its draws, see philox.h
    double prompt_reward = std::numeric_limits<double>::quiet_NaN();
    double pass_rate = 0.0;  // estimate of an attempt's chance to pass
    bool running = false;
    bool in_flight = false;  // part of a plan that is out: keeps its pages until that ends
    bool finishing = false;  // ends with the round: finished, failed, or aborted in flight
    bool parked = false;     // member of a group at a boundary: neither drafts nor is in flight
    bool ended = false;      // member of a group whose path is complete
    std::int32_t group = kNoGroup;
    std::int32_t member = 0;
    std::int32_t lane = 0;
    std::int32_t wanted_rows = 0;
    std::vector<std::size_t> rows;  // of the round, in attempt order
    std::vector<Row> carried;       // from the round before, in attempt order, the first unfinished
    Sequence sequence;
    Best best;

    [[nodiscard]] std::int32_t length() const { return static_cast<std::int32_t>(tokens.size()); }
    [[nodiscard]] std::int32_t response_length() const { return length() - prompt_length; }
    // Tokens of the next segment.
    [[nodiscard]] std::int32_t draft_length() const;
    // Attempts that may be made before something is decided.
    [[nodiscard]] std::int32_t attempts_left() const;
    // Attempts of the segment at hand, at most.
    [[nodiscard]] std::int32_t most_attempts() const {
      return options.attempts_from(response_length());
    }
    // By which it is decided.
    [[nodiscard]] Rule rule() const {
      return response_length() < options.plain_from ? options.rule : Rule::kAlways;
    }
    // Tokens that need KV before the request can draft: all but the last, which the draft feeds.
    [[nodiscard]] std::int32_t prefix_length() const { return length() - 1; }
    // Runs, and has nothing to do: its pages may be taken.
    [[nodiscard]] bool idle() const { return parked || ended; }
  };

  struct Group {  // paths and the requests that run them
    static constexpr Slot kGone = -1;
    PathGroup paths;
    std::vector<Slot> members;  // kGone: forgotten
    std::int32_t num_left = 0;  // members that are not
    bool failed = false;
  };

  struct Load {             // of the lane of the plan being made
    std::int32_t size = 0;  // its requests
    std::int32_t lead = 0;  // of those over the other lane's, those that end not counted
    bool alone = true;      // no request of either lane is in flight, but an empty plan may be out
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

  struct Gain {            // of one more row for a request
    bool asked;            // a fixed number of candidates: served before those of "auto"
    double value;          // what the row saves over what it costs
    std::size_t position;  // in InFlightPlan::drafting
    bool operator<(const Gain& other) const {
      if (asked != other.asked) {
        return other.asked;
      }
      return value < other.value || (value == other.value && position > other.position);
    }
  };

  // A plan that is out, or the buffers of one that was.
  struct InFlightPlan {
    std::int32_t lane = 0;
    std::vector<Slot> drafting;  // requests of the round, in row order
    std::vector<Chunk> prefilling;
    std::vector<Row> rows;  // of the round, those held last; grows only
    std::size_t num_rows = 0;
    std::shared_ptr<Plan> plan;
  };

  [[nodiscard]] std::int32_t other(std::int32_t lane) const { return options_.lanes - 1 - lane; }
  InFlightPlan& newest() { return in_flight_plans_[static_cast<std::size_t>(newest_)]; }
  InFlightPlan& oldest() {  // of those that are out
    return in_flight_plans_[static_cast<std::size_t>(num_out_ == 2 ? other(newest_) : newest_)];
  }
  Request& at(Slot slot) { return requests_[static_cast<std::size_t>(slot)]; }
  [[nodiscard]] const Request& at(Slot slot) const {
    return requests_[static_cast<std::size_t>(slot)];
  }
  Group& group(std::int32_t number) { return *groups_[static_cast<std::size_t>(number)]; }
  [[nodiscard]] Request& find(std::int64_t id);
  [[nodiscard]] std::int32_t row_pages(const Request& request) const;
  [[nodiscard]] std::int32_t pages_to_draft(const Request& request) const;
  void validate(const std::int64_t* prompt, std::size_t prompt_length,
                const RequestOptions& options) const;

  // The parts of plan().
  void keep_running();
  [[nodiscard]] Load load() const;
  void admit();
  [[nodiscard]] std::int64_t spare_pages(const Request& next) const;
  void start(Slot slot);
  void prefill(Slot slot);
  void list_prefill();
  void allot_rows();
  void open_rows();
  static Row& open_row(InFlightPlan& flight);
  void draft_row(const Request& request, const Row& row, bool first);
  bool make_room(std::int32_t pages, Slot for_request);
  bool release_idle();
  void preempt(std::vector<Slot>::iterator position);

  // The parts of commit().
  void decide(InFlightPlan& flight, Request& request, const RoundResult& result);
  void fail(Request& request, std::size_t row);
  bool passes(Request& request, const Merit& reward, std::int32_t tokens, std::size_t row);
  [[nodiscard]] static double merit_of(const Request& request, double reward);
  void accept(InFlightPlan& flight, Request& request, std::size_t row, const RoundResult& result);
  void carry(InFlightPlan& flight, Request& request, std::size_t first, const RoundResult& result);
  void take_best(Request& request, std::int32_t row, EventKind kind);
  void end_draft(Request& request, std::int32_t row);
  void keep_best(Request& request, Branch& branch, std::size_t row, const RoundResult& result);
  void advance(Request& request, const std::vector<std::int32_t>& segment, bool stopped,
               EventKind kind, std::int32_t row);
  void record(const Request& request, EventKind kind, std::int32_t row, std::int32_t start,
              std::int32_t length, Finish finish);
  void end_oldest();
  void turn_groups();
  void copy_path(Request& target, const Request& source);
  void end_group(std::int32_t number);

  Slot enter(std::int64_t id, const std::int64_t* prompt, std::size_t prompt_length,
             const RequestOptions& options);
  void check_new(std::int64_t id) const;
  void remove(Slot slot);
  void drop_best_pages(Request& request);
  void drop_carried(Request& request);
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
  std::int64_t num_waiting_ = 0;  // waiting_ without those aborted

  std::vector<InFlightPlan> in_flight_plans_;   // [lanes]
  std::vector<std::unique_ptr<Group>> groups_;  // null: the number is free
  std::vector<std::int32_t> turning_;           // groups that the commit at hand completes or fails
  PathGroup::Turn turn_;
  std::int32_t newest_ = 0;  // index of the last plan's
  std::int32_t num_out_ = 0;
  Copies copies_;  // owed by commits since the last plan
  std::shared_ptr<Decision> decision_;
  double global_pass_rate_ = 0.5;
  double rows_per_request_ = 1.0;  // of the rounds before, on average

  // State of the plan being made.
  std::int32_t prefill_budget_ = 0;
  std::int32_t reserved_ = 0;   // pages promised to its rows, and to requests whose turn is next
  std::int32_t returning_ = 0;  // pages that requests in flight will ask for when they come back
  bool short_of_pages_ = false;
  std::vector<Gain> gains_;
  std::vector<std::int32_t> token_scratch_;
  Sequence table_scratch_;
};

}  // namespace stars_fast
