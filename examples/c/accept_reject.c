// The accept/reject loop over pages, in C99. The model is a fake: its "keys and values" are the
// token ids themselves, and what it draws next is a hash of all it reads from the pages.
#include <stars_fast/c_api.h>
#include <stdio.h>
#include <stdlib.h>

enum { kPages = 14, kPageSize = 4, kMaxRows = 16 };
enum { kRequests = 6, kPrompt = 7, kSegment = 6, kMaxTokens = 20, kVocabulary = 24 };

static int64_t pages[kPages * kPageSize];

typedef struct request {
  int64_t prompt[kPrompt];
  int64_t kept[kSegment];  // the best of the rejected attempts so far
} request;

static void check(stars_status status) {
  if (status != STARS_OK) {
    fprintf(stderr, "%s\n", stars_last_error());
    exit(1);
  }
}

// A step of splitmix64.
static uint64_t mix(uint64_t state, uint64_t value) {
  state = (state ^ value) + 0x9E3779B97F4A7C15U;
  state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9U;
  state = (state ^ state >> 27) * 0x94D049BB133111EBU;
  return state ^ state >> 31;
}

// Stands for a reward model: in [0, 1).
static double reward_of(uint64_t digest) { return (double)(digest >> 11) * 0x1p-53; }

static uint64_t read_prefix(const stars_batch* batch, int32_t group) {
  uint64_t digest = 0;
  for (int32_t slot = 0; slot < batch->group_extent[group]; ++slot) {
    if (slot < batch->padding_start[group] || slot >= batch->padding_end[group]) {
      const int32_t page = batch->group_pages[group * batch->table_width + slot / kPageSize];
      digest = mix(digest, (uint64_t)pages[page * kPageSize + slot % kPageSize]);
    }
  }
  return digest;
}

static void copy_and_prefill(const stars_plan* plan) {
  for (int32_t i = 0; i < plan->num_copies; ++i) {
    for (int32_t j = 0; j < plan->copy_count[i]; ++j) {
      pages[plan->copy_target[i] * kPageSize + j] = pages[plan->copy_source[i] * kPageSize + j];
    }
  }
  const int64_t* token = plan->prefill_tokens;
  for (int32_t row = 0; row < plan->prefill.num_rows; ++row) {
    for (int32_t i = 0; i < plan->prefill.new_lengths[row]; ++i) {
      pages[plan->prefill.slots[row * plan->prefill.max_new + i]] = *token++;
    }
  }
}

// Draws one row; token 0 ends the response. Returns the number of tokens drawn.
static int32_t draw(const stars_plan* plan, int32_t row, int64_t* tokens, double* reward) {
  const stars_batch* batch = &plan->draft;
  uint64_t digest = read_prefix(batch, batch->row_group[row]);
  int64_t fed = plan->first_token[row];
  int32_t drawn = 0;
  do {
    pages[batch->slots[row * batch->max_new + drawn]] = fed;
    digest = mix(digest, (uint64_t)fed);
    uint64_t noise = mix(digest, (uint64_t)plan->seed[row]);
    noise = mix(noise, (uint64_t)plan->stream[row]);
    noise = mix(noise, (uint64_t)plan->attempt[row]);
    fed = (int64_t)(noise % kVocabulary);
    tokens[drawn++] = fed;
  } while (fed != 0 && drawn < batch->new_lengths[row]);
  *reward = reward_of(mix(digest, (uint64_t)fed));
  return drawn;
}

int main(void) {
  stars_scheduler_options options = STARS_SCHEDULER_OPTIONS_INIT;
  options.num_pages = kPages;
  options.page_size = kPageSize;
  options.max_rows = kMaxRows;
  stars_scheduler* scheduler = NULL;
  check(stars_scheduler_create(&options, &scheduler));

  static request requests[kRequests];
  for (int i = 0; i < kRequests; ++i) {
    for (int j = 0; j < kPrompt; ++j) {
      requests[i].prompt[j] = j < 5 ? j + 1 : i + j;  // what they share is prefilled once
    }
    stars_request_options request_options = STARS_REQUEST_OPTIONS_INIT;
    request_options.rule = i % 3;
    request_options.segment_length = kSegment;
    request_options.max_tokens = kMaxTokens;
    request_options.max_attempts = 4;
    request_options.candidates = 2;
    request_options.seed = (uint64_t)i;
    request_options.target_reward = 0.9;
    request_options.beta = 0.2;
    check(stars_scheduler_add(scheduler, i, requests[i].prompt, kPrompt, &request_options));
  }

  for (;;) {
    stars_plan plan = {.size = sizeof(plan)};
    check(stars_scheduler_plan(scheduler, &plan));
    if (plan.prefill.num_rows + plan.draft.num_rows == 0) {
      break;
    }
    copy_and_prefill(&plan);

    int64_t tokens[kMaxRows][kSegment];
    int32_t lengths[kMaxRows];
    uint8_t stopped[kMaxRows];
    double rewards[kMaxRows];
    for (int32_t row = 0; row < plan.draft.num_rows; ++row) {
      lengths[row] = draw(&plan, row, tokens[row], &rewards[row]);
      stopped[row] = tokens[row][lengths[row] - 1] == 0;
    }
    double prompt_rewards[kRequests];
    for (int32_t i = 0; i < plan.num_unscored; ++i) {
      uint64_t digest = 0;
      for (int j = 0; j < kPrompt; ++j) {
        digest = mix(digest, (uint64_t)requests[plan.unscored[i]].prompt[j]);
      }
      prompt_rewards[i] = reward_of(digest);
    }

    const stars_round round = {.size = sizeof(round),
                               .num_rows = plan.draft.num_rows,
                               .stride = kSegment,
                               .num_prompt_rewards = plan.num_unscored,
                               .tokens = tokens[0],
                               .lengths = lengths,
                               .stopped = stopped,
                               .rewards = rewards,
                               .prompt_rewards = prompt_rewards};
    stars_decision decision = {.size = sizeof(decision)};
    check(stars_scheduler_commit(scheduler, &round, &decision));

    for (int32_t row = 0; row < decision.num_rows; ++row) {
      if (decision.outcome[row] == STARS_ROW_KEPT) {
        for (int i = 0; i < lengths[row]; ++i) {
          requests[plan.request[row]].kept[i] = tokens[row][i];
        }
      }
    }
    static const char* const kinds[] = {"accepted", "fallback", "failed", "chosen"};
    for (int32_t i = 0; i < decision.num_events; ++i) {
      const int64_t id = decision.request[i];
      const int32_t row = decision.row[i];
      const int64_t* segment = row >= 0 ? tokens[row] : requests[id].kept;
      printf("%d %s at %d after %d:", (int)id, kinds[decision.kind[i]], (int)decision.start[i],
             (int)decision.attempts[i]);
      for (int32_t j = 0; j < decision.length[i]; ++j) {
        printf(" %d", (int)segment[j]);
      }
      printf(decision.finish[i] == STARS_FINISH_NONE ? "\n" : " (end)\n");
    }
  }
  stars_scheduler_destroy(scheduler);
  return 0;
}
