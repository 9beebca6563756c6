// The scheduler for other languages, in C99: ten functions, plain structs, no exceptions.
// docs/embedding.md has the order of the calls, examples/c/accept_reject.c a whole loop.
//
// Threads: calls on one scheduler must not overlap, whichever threads they come from; calls on
// different schedulers may. stars_version and stars_last_error may be called at any time.
//
// Memory: what a call is given is read before it returns and not kept. What a plan or a decision
// points to belongs to the scheduler. It stays until the first call of stars_scheduler_plan,
// _commit or _cancel that follows the round's commit, or until the round is cancelled or the
// scheduler destroyed. Arrays are row-major; one whose count is 0 may be NULL.
//
// Structs: `size` is sizeof the struct as the caller was compiled. Later versions add fields at the
// end; a library takes every size since its first version, and leaves out or sets to its default
// what a smaller one does not have. A bool is an int32_t, 0 or 1.
#pragma once

// NOLINTBEGIN(modernize-*,cppcoreguidelines-macro-usage,cppcoreguidelines-use-enum-class): C
#include <stddef.h>
#include <stdint.h>

#ifdef __GNUC__
#define STARS_API __attribute__((visibility("default")))
#else
#define STARS_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct stars_scheduler stars_scheduler;

// What a call returns; stars_last_error has the text. But for STARS_OUT_OF_MEMORY and
// STARS_INTERNAL, a call that fails has changed nothing.
typedef int32_t stars_status;
enum {
  STARS_OK = 0,
  STARS_INVALID_ARGUMENT = 1,   // names the argument, its value and what is allowed
  STARS_REQUEST_TOO_LARGE = 2,  // could not run even with the whole pool to itself
  STARS_UNKNOWN_REQUEST = 3,
  STARS_WRONG_STATE = 4,    // as many plans are out as there are lanes, or none is
  STARS_OUT_OF_MEMORY = 5,  // the scheduler can only be destroyed
  STARS_INTERNAL = 6        // likewise: a defect of this library
};

typedef struct stars_scheduler_options {
  uint32_t size;
  int32_t num_pages;           // page 0 is padding's, and never given to a request
  int32_t page_size;           // tokens
  int32_t max_rows;            // rows of a round, and running requests of a lane
  int32_t max_prefill_tokens;  // of a round
  int32_t prefix_caching;      // bool
  int32_t lanes;               // plans that may be out at once: 1 or 2
  double fixed_cost_rows;      // rows that cost as much as a round's fixed part, until learned
} stars_scheduler_options;

// Initialisers with the defaults; num_pages, segment_length and max_tokens have none.
#define STARS_SCHEDULER_OPTIONS_INIT {sizeof(stars_scheduler_options), 0, 16, 256, 8192, 1, 1, 16.0}
#define STARS_REQUEST_OPTIONS_INIT \
  {sizeof(stars_request_options), STARS_RULE_TEST, 0, 0, 1, 0, 0, 0.0, 0.5, 1.0, 0, 0, 0}

// What becomes of a segment's attempts.
enum {
  STARS_RULE_ALWAYS = 0,  // the first is accepted
  STARS_RULE_TEST = 1,    // the first to pass the accept test; if none does, the best
  STARS_RULE_CHOOSE = 2   // all are made; one is drawn by exp(reward / beta)
};

typedef struct stars_request_options {
  uint32_t size;
  int32_t rule;            // STARS_RULE_*
  int32_t segment_length;  // tokens
  int32_t max_tokens;      // of the response, in [1, 2^28)
  int32_t max_attempts;    // of a segment
  int32_t candidates;      // rows of a round; 0: as many as pay off
  uint64_t seed;           // key of the request's draws
  double target_reward;    // the test's threshold at the end of the schedule
  double alpha;            // where the schedule starts, in [0, 1]; 1: flat, no prompt reward needed
  double beta;             // softness, in units of reward
  int32_t hard;            // bool: the test is reward >= threshold, the choice the largest reward
  int32_t overrun;         // bool: a segment that begins within max_tokens may end past them
  int32_t last_untested;   // bool: the last attempt is drawn and not tested
} stars_request_options;

// One forward pass: G groups of rows that read the same cached tokens, R rows of at most L new
// tokens. A group reads the first `group_extent` slots of its pages, those in
// [padding_start, padding_end) left out. A slot is page * page_size + offset.
typedef struct stars_batch {
  int32_t num_groups;            // G
  int32_t num_rows;              // R
  int32_t max_new;               // L
  int32_t table_width;           // P
  int32_t num_tokens;            // new tokens of all rows
  const int32_t* group_pages;    // [G, P] padded with 0
  const int32_t* group_extent;   // [G] slots
  const int32_t* padding_start;  // [G] slot
  const int32_t* padding_end;    // [G] slot; padding_start: there is no padding
  const int32_t* row_group;      // [R] ascending
  const int32_t* row_start;      // [R] position of the first new token, in tokens
  const int32_t* new_lengths;    // [R]
  const int64_t* slots;          // [R, L] where each new token's keys and values go
} stars_batch;

// A round: run the copies, then the prefill, then the draft, each after the whole of the one
// before. Plans without prefill and draft rows are empty: with no other plan out, all requests are
// over (commit it all the same, with no rows).
typedef struct stars_plan {
  uint32_t size;
  int32_t num_copies;                // C
  int32_t num_unscored;              // U
  int32_t num_preempted;             // Q
  const int32_t* copy_source;        // [C] page; no page is a target twice, or source and target
  const int32_t* copy_target;        // [C] page
  const int32_t* copy_count;         // [C] its first slots, to be copied
  stars_batch prefill;               // of prompts
  const int64_t* prefill_tokens;     // [prefill.num_tokens] one row after the other
  stars_batch draft;                 // its rows draw new_lengths tokens each, R rows
  const int64_t* request;            // [R] id
  const int32_t* attempt;            // [R] of the segment, from 0; with seed, stream and the
  const int64_t* seed;               // [R] position in the response it names the row's draws:
  const int32_t* stream;             // [R] csrc/philox.h
  const int32_t* response_position;  // [R] of the first token drawn
  const int64_t* first_token;        // [R] fed first, in the row's first slot
  const int64_t* unscored;           // [U] requests of the round whose prompt reward is not known
  const int64_t* preempted;          // [Q] requests that lost their pages; they are run again
} stars_plan;

// What the oldest plan that is out gave. Rows may be shorter than planned, never empty.
typedef struct stars_round {
  uint32_t size;
  int32_t num_rows;              // R of the plan's draft
  int32_t stride;                // of tokens, at least L of the plan's draft
  int32_t num_prompt_rewards;    // U of the plan
  const int64_t* tokens;         // [R, stride] drawn, each in [0, 2^31)
  const int32_t* lengths;        // [R] tokens drawn
  const uint8_t* stopped;        // [R] 1: the row's last token ends the response
  const double* rewards;         // [R] of the prompt and the response up to the row's end; not
                                 // finite: no valid result, the request fails at the row's turn
  const double* prompt_rewards;  // [U] in the order of the plan; ignored for requests aborted since
  double seconds;                // that the round took, by token position; 0: not measured
  const uint8_t* breaks;         // [R] 1: the row breaks a constraint: it passes no test, and is
                                 // worse than any that keeps all; NULL: none does
} stars_round;

enum { STARS_ROW_PRUNED = 0, STARS_ROW_WINNER = 1, STARS_ROW_KEPT = 2 };
enum {
  STARS_EVENT_ACCEPTED = 0,
  STARS_EVENT_FALLBACK = 1,  // no attempt passed: the best of them
  STARS_EVENT_FAILED = 2,    // the request is over, without this segment
  STARS_EVENT_CHOSEN = 3
};
enum { STARS_FINISH_NONE = 0, STARS_FINISH_STOP = 1, STARS_FINISH_LENGTH = 2 };

// Rows first, then an event for each request whose segment was committed or that failed.
typedef struct stars_decision {
  uint32_t size;
  int32_t num_rows;         // R
  int32_t num_events;       // E
  const int8_t* outcome;    // [R] STARS_ROW_*; KEPT: the best of the rejected so far
  const double* threshold;  // [R] NaN: not tested
  const int64_t* request;   // [E] id
  const int8_t* kind;       // [E] STARS_EVENT_*
  const int32_t* row;       // [E] winner, or the row that failed; -1: the request's last KEPT row,
                            // of an earlier round
  const int32_t* start;     // [E] of the segment, in response tokens
  const int32_t* length;    // [E] tokens of the segment
  const int32_t* attempts;  // [E] made for the segment
  const int8_t* finish;     // [E] STARS_FINISH_*; but NONE, the request is over and forgotten
} stars_decision;

// Counts since the start, but for the first five.
typedef struct stars_state {
  uint32_t size;
  int32_t pages_used;
  int32_t pages_free;
  int32_t reserved;  // 0
  int64_t num_running;
  int64_t num_waiting;
  int64_t rounds;
  int64_t drafted_tokens;
  int64_t accepted_tokens;
  int64_t prefill_tokens;
  int64_t cached_prompt_tokens;
  int64_t attempts;
  int64_t segments;
  int64_t fallbacks;
  int64_t preemptions;
  int64_t page_copies;
} stars_state;

// The library's version, "major.minor.patch"; static.
STARS_API const char* stars_version(void);
// Why the last call in this thread that failed did; "" if none has. Valid until the next that does.
STARS_API const char* stars_last_error(void);

// Sets *scheduler, to be destroyed by the caller; to NULL on failure.
STARS_API stars_status stars_scheduler_create(const stars_scheduler_options* options,
                                              stars_scheduler** scheduler);
// Frees the scheduler and all that it has given out. NULL is taken, and nothing done.
STARS_API void stars_scheduler_destroy(stars_scheduler* scheduler);

// Queues a request. Its id must not be that of one unfinished, or of a row of a plan that is out.
STARS_API stars_status stars_scheduler_add(stars_scheduler* scheduler, int64_t request,
                                           const int64_t* prompt, size_t prompt_length,
                                           const stars_request_options* options);
// Forgets a request in any state. The rows and pages of one in flight are its own until its plan
// ends. STARS_UNKNOWN_REQUEST: there is none, or it is over.
STARS_API stars_status stars_scheduler_abort(stars_scheduler* scheduler, int64_t request);
// The next round. The caller sets plan->size.
STARS_API stars_status stars_scheduler_plan(stars_scheduler* scheduler, stars_plan* plan);
// Commits the oldest plan that is out. The caller sets decision->size.
STARS_API stars_status stars_scheduler_commit(stars_scheduler* scheduler, const stars_round* round,
                                              stars_decision* decision);
// Gives every plan that is out back undone: what it was to do is planned again, and drawn the same.
STARS_API stars_status stars_scheduler_cancel(stars_scheduler* scheduler);
// The caller sets state->size.
STARS_API stars_status stars_scheduler_query(const stars_scheduler* scheduler, stars_state* state);

#ifdef __cplusplus
}
#endif
// NOLINTEND(modernize-*,cppcoreguidelines-macro-usage,cppcoreguidelines-use-enum-class)
