// Which rows a round drafts: who runs, who waits, who gives way, how many candidates each has.
#include <algorithm>
#include <cmath>
#include <utility>

#include "scheduler.h"
#include "scheduler_detail.h"

namespace stars_fast {

void Plan::clear() {
  copies.clear();
  prefill_tokens.clear();
  prefill_request.clear();
  request.clear();
  attempt.clear();
  seed.clear();
  position.clear();
  drawn.clear();
  stream.clear();
  first_token.clear();
  held.clear();
  held_attempt.clear();
  unscored.clear();
  preempted.clear();
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
    load.size += mine ? std::max(1, request.wanted_rows) : 0;
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
      // Alone, nothing comes back by itself, unless the other lane has a request to run.
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
    request.wanted_rows = std::max(1, static_cast<std::int32_t>(request.carried.size()));
    reserved_ += request.carried.empty() ? row_pages(request) : 0;
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
    plan.prefill_request.push_back(request.id);
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
    const std::int32_t left = request.attempts_left();
    const std::int32_t asked = request.options.candidates;
    return request.rule() == Rule::kAlways ? 1 : asked == 0 ? left : std::min(asked, left);
  };
  const std::vector<Slot>& drafting = newest().drafting;
  if (drafting.empty()) {
    return;
  }
  const auto requests = static_cast<double>(drafting.size());
  const double share = cost_.fixed_part(requests, requests) / requests;
  // A row is left to each request that runs and has none: those of others may go on when it drafts.
  std::int32_t rows = load().size;
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
  std::int32_t slots = 0;
  for (const Slot slot : flight.drafting) {
    const Request& request = at(slot);
    const auto cached = request.sequence.cached;
    if (static_cast<std::size_t>(request.wanted_rows) > request.carried.size()) {
      columns = std::max(columns, request.draft_length());
      slots = std::max(slots, request.sequence.extent(cached));
    }
    for (const Row& row : request.carried) {
      if (!row.ended) {
        columns = std::max(columns, row.branch.length - row.drawn);
        slots = std::max(slots, request.sequence.extent(cached + row.drawn));
      }
    }
  }
  plan.draft.begin(columns, pool_.pages_for(slots), options_.page_size);
  for (const Slot slot : flight.drafting) {
    Request& request = at(slot);
    request.rows.assign(static_cast<std::size_t>(request.wanted_rows), 0);
    for (std::size_t i = 0; i < request.rows.size(); ++i) {
      const bool fresh = i >= request.carried.size();
      if (!fresh && request.carried[i].ended) {
        continue;
      }
      request.rows[i] = flight.num_rows;
      Row& row = open_row(flight);
      if (fresh) {
        row.last_token = request.tokens.back();
        open_branch(pool_, request.sequence, request.sequence.cached, request.draft_length(),
                    row.branch);
      } else {
        std::swap(row, request.carried[i]);
      }
      draft_row(request, row, i == request.carried.size());
      plan.attempt.push_back(request.attempt + static_cast<std::int32_t>(i));
    }
  }
  for (const Slot slot : flight.drafting) {
    Request& request = at(slot);
    for (std::size_t i = 0; i < request.carried.size(); ++i) {
      if (request.carried[i].ended) {
        request.rows[i] = flight.num_rows;
        std::swap(open_row(flight), request.carried[i]);
        plan.held.push_back(request.id);
        plan.held_attempt.push_back(request.attempt + static_cast<std::int32_t>(i));
      }
    }
    request.carried.clear();
  }
}

// A row whose memory is used again; it holds no pages.
Scheduler::Row& Scheduler::open_row(InFlightPlan& flight) {
  if (flight.num_rows == flight.rows.size()) {
    flight.rows.emplace_back();
  }
  Row& row = flight.rows[flight.num_rows++];
  row.drawn = 0;
  row.ended = false;
  return row;
}

// `first`: of the rows that read the request's prefix and nothing more.
void Scheduler::draft_row(const Request& request, const Row& row, bool first) {
  Plan& plan = *newest().plan;
  const Branch& branch = row.branch;
  const std::int32_t start = branch.start + row.drawn;
  if (row.drawn > 0) {
    read_through(pool_, request.sequence, branch, table_scratch_);
    plan.draft.add_group(table_scratch_, start);
  } else if (first) {
    plan.draft.add_group(request.sequence, start);
  }
  const std::int32_t into = branch.first_slot % options_.page_size + row.drawn;
  plan.draft.add_row(start, branch.length - row.drawn, branch.first_slot + row.drawn,
                     branch.pages.data() + into / options_.page_size);
  plan.request.push_back(request.id);
  plan.seed.push_back(static_cast<std::int64_t>(request.options.seed));
  plan.position.push_back(request.response_length() + row.drawn);
  plan.drawn.push_back(row.drawn);
  plan.stream.push_back(static_cast<std::int32_t>(request.stream));
  plan.first_token.push_back(row.last_token);
}

}  // namespace stars_fast
