// Groups of paths at their boundaries: copies, drops, the chosen one.
#include <algorithm>
#include <cmath>
#include <utility>

#include "scheduler.h"
#include "scheduler_detail.h"

namespace stars_fast {

void Scheduler::add_group(const std::vector<std::int64_t>& ids,
                          const std::vector<std::uint64_t>& seeds, const std::int64_t* prompt,
                          std::size_t prompt_length, const RequestOptions& options,
                          const GroupOptions& group_options) {
  validate(prompt, prompt_length, options);
  require(!ids.empty() && ids.size() <= static_cast<std::size_t>(options_.max_rows),
          "number of paths", ids.size(), "at least 1 and at most max_rows");
  require(seeds.size() == ids.size(), "number of seeds", seeds.size(), "that of the paths");
  require(options.rule == Rule::kAlways, "rule of a group's paths", static_cast<int>(options.rule),
          "that every segment is accepted");
  require(std::isfinite(group_options.beta) && group_options.beta > 0.0, "beta", group_options.beta,
          "above 0");
  require(group_options.ess_threshold >= 0.0 && group_options.ess_threshold <= 1.0, "ess_threshold",
          group_options.ess_threshold, "in [0, 1]");
  require(group_options.rejection_rate >= 0.0 && group_options.rejection_rate < 1.0,
          "rejection_rate", group_options.rejection_rate, "in [0, 1)");
  for (std::size_t i = 0; i < ids.size(); ++i) {
    check_new(ids[i]);
    require(std::find(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(i), ids[i]) ==
                ids.begin() + static_cast<std::ptrdiff_t>(i),
            "request id", ids[i], "given once");
  }
  const auto free = std::find(groups_.begin(), groups_.end(), nullptr);
  const auto number = static_cast<std::int32_t>(free - groups_.begin());
  auto added = std::make_unique<Group>(Group{
      PathGroup(group_options, ids.size()), {}, static_cast<std::int32_t>(ids.size()), false});
  for (std::size_t i = 0; i < ids.size(); ++i) {
    RequestOptions own = options;
    own.seed = seeds[i];
    const Slot slot = enter(ids[i], prompt, prompt_length, own);
    at(slot).group = number;
    at(slot).member = static_cast<std::int32_t>(i);
    added->members.push_back(slot);
  }
  if (free == groups_.end()) {
    groups_.push_back(std::move(added));
  } else {
    *free = std::move(added);
  }
}

void Scheduler::turn_groups() {
  for (const std::int32_t number : turning_) {
    if (groups_[static_cast<std::size_t>(number)] == nullptr) {
      continue;  // two members failed, and the first has ended it
    }
    Group& turned = group(number);
    if (turned.failed) {
      end_group(number);
      continue;
    }
    const auto request_of = [this, &turned](std::int32_t member) -> Request& {
      return at(turned.members[static_cast<std::size_t>(member)]);
    };
    turned.paths.turn(turn_);
    for (std::size_t i = 0; i < turn_.target.size(); ++i) {
      Request& target = request_of(turn_.target[i]);
      const Request& source = request_of(turn_.source[i]);
      decision_->copy_target.push_back(target.id);
      decision_->copy_source.push_back(source.id);
      copy_path(target, source);
      target.stream = turned.paths.generation();
    }
    stats_.paths_copied += static_cast<std::int64_t>(turn_.target.size());
    for (const std::int32_t member : turn_.dropped) {
      decision_->dropped.push_back(request_of(member).id);
      remove(turned.members[static_cast<std::size_t>(member)]);
    }
    stats_.paths_dropped += static_cast<std::int64_t>(turn_.dropped.size());
    if (turn_.chosen != PathGroup::kNone) {
      decision_->chosen.push_back(request_of(turn_.chosen).id);
      end_group(number);
      continue;
    }
    for (const Slot slot : turned.members) {
      if (slot != Group::kGone) {
        at(slot).parked = false;
      }
    }
  }
}

// A page that both hold is never written again: what follows starts in pages of its own.
void Scheduler::copy_path(Request& target, const Request& source) {
  release(target);
  target.tokens = source.tokens;
  target.sequence = source.sequence;
  for (const std::int32_t page : target.sequence.pages) {
    pool_.retain(page);
  }
  target.ended = source.ended;
}

void Scheduler::end_group(std::int32_t number) {
  // The last member's end ends the group: not to be read after.
  const std::vector<Slot> members = group(number).members;
  group(number).failed = true;
  for (const Slot slot : members) {
    if (slot != Group::kGone && !at(slot).finishing) {
      remove(slot);
    }
  }
}

}  // namespace stars_fast
