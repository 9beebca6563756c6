#include "sequence_cache.h"

#include <algorithm>
#include <limits>
#include <string>
#include <unordered_set>
#include <utility>

namespace stars_fast {

SequenceCache::SequenceCache(std::int32_t num_pages, std::int32_t page_size)
    : pool_(num_pages, page_size) {}

SequenceCache::Entry& SequenceCache::entry(std::int64_t sequence) {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) {
    throw std::out_of_range("no sequence " + std::to_string(sequence));
  }
  return found->second;
}

const SequenceCache::Entry& SequenceCache::entry(std::int64_t sequence) const {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) {
    throw std::out_of_range("no sequence " + std::to_string(sequence));
  }
  return found->second;
}

void SequenceCache::open(std::int64_t sequence) {
  if (!sequences_.try_emplace(sequence).second) {
    throw std::invalid_argument("sequence " + std::to_string(sequence) + " is open already");
  }
}

void SequenceCache::close(std::int64_t sequence) {
  Entry& closing = entry(sequence);
  while (!closing.branches.empty()) {
    drop(closing.branches.back());
  }
  pool_.release_from(closing.sequence.pages, 0);
  sequences_.erase(sequence);
}

void SequenceCache::copy(std::int64_t source, std::int64_t target) {
  const Entry& from = entry(source);
  Entry& into = entry(target);
  if (source == target || !into.branches.empty()) {
    throw std::invalid_argument("sequence " + std::to_string(target) +
                                " must be another than the source and have no branches");
  }
  // Retained first: the two may share pages already.
  for (const std::int32_t page : from.sequence.pages) {
    pool_.retain(page);
  }
  pool_.release_from(into.sequence.pages, 0);
  into.sequence = from.sequence;
  into.tokens = from.tokens;
}

bool SequenceCache::contains(std::int64_t sequence) const {
  return sequences_.count(sequence) != 0;
}

const std::vector<std::int32_t>& SequenceCache::tokens(std::int64_t sequence) const {
  return entry(sequence).tokens;
}

std::int32_t SequenceCache::common_prefix(std::int64_t sequence, const std::int64_t* ids,
                                          std::int64_t length) const {
  const auto& tokens = entry(sequence).tokens;
  const auto end = static_cast<std::ptrdiff_t>(
      std::min<std::int64_t>(length, static_cast<std::int64_t>(tokens.size())));
  const auto mismatch = std::mismatch(tokens.begin(), tokens.begin() + end, ids);
  return static_cast<std::int32_t>(mismatch.first - tokens.begin());
}

void SequenceCache::truncate(std::int64_t sequence, std::int32_t length) {
  Entry& target = entry(sequence);
  if (length < 0 || static_cast<std::size_t>(length) > target.tokens.size()) {
    throw std::invalid_argument("length must be in [0, " + std::to_string(target.tokens.size()) +
                                "], got " + std::to_string(length));
  }
  if (!target.branches.empty()) {
    throw std::invalid_argument("sequence " + std::to_string(sequence) + " has branches");
  }
  stars_fast::truncate(pool_, target.sequence, length);
  target.tokens.resize(static_cast<std::size_t>(length));
}

void SequenceCache::seal_prompt(std::int64_t sequence) {
  Entry& target = entry(sequence);
  if (!target.branches.empty()) {
    throw std::invalid_argument("sequence " + std::to_string(sequence) + " has branches");
  }
  if (target.sequence.padding_start < target.sequence.cached &&
      target.sequence.padding_length > 0) {
    throw std::invalid_argument("sequence " + std::to_string(sequence) + " is padded already");
  }
  target.sequence.set_padding(target.sequence.cached, pool_.page_size());
}

void SequenceCache::validate(const Rows& rows) const {
  std::size_t ids = 0;
  std::unordered_set<std::int64_t> names;
  for (std::size_t i = 0; i < rows.count; ++i) {
    const Entry& parent = entry(rows.sequences[i]);
    if (rows.starts[i] < 0 || rows.starts[i] > parent.sequence.cached) {
      throw std::invalid_argument("starts[" + std::to_string(i) + "] must be in [0, " +
                                  std::to_string(parent.sequence.cached) + "], got " +
                                  std::to_string(rows.starts[i]));
    }
    if (rows.lengths[i] < 1) {
      throw std::invalid_argument("lengths[" + std::to_string(i) + "] must be at least 1, got " +
                                  std::to_string(rows.lengths[i]));
    }
    if (branches_.count(rows.branches[i]) != 0 || !names.insert(rows.branches[i]).second) {
      throw std::invalid_argument("branch " + std::to_string(rows.branches[i]) +
                                  " is open already or given twice");
    }
    ids += static_cast<std::size_t>(rows.lengths[i]);
  }
  if (ids != rows.num_ids) {
    throw std::invalid_argument("token_ids must hold the sum of lengths, " + std::to_string(ids) +
                                ", got " + std::to_string(rows.num_ids));
  }
  for (std::size_t i = 0; i < rows.num_ids; ++i) {
    if (rows.ids[i] < 0 || rows.ids[i] > std::numeric_limits<std::int32_t>::max()) {
      throw std::invalid_argument("token_ids[" + std::to_string(i) +
                                  "] is out of range: " + std::to_string(rows.ids[i]));
    }
  }
}

void SequenceCache::branch(const Rows& rows, Batch& batch) {
  validate(rows);
  std::int64_t needed = 0;
  for (std::size_t i = 0; i < rows.count; ++i) {
    needed +=
        branch_pages(pool_, entry(rows.sequences[i]).sequence, rows.starts[i], rows.lengths[i]);
  }
  if (needed > pool_.available()) {
    throw OutOfPages(std::to_string(needed) + " pages asked for, " +
                     std::to_string(pool_.available()) + " available");
  }
  std::int32_t columns = 0;
  std::int32_t width = 0;
  for (std::size_t i = 0; i < rows.count; ++i) {
    const Sequence& sequence = entry(rows.sequences[i]).sequence;
    columns = std::max(columns, rows.lengths[i]);
    width = std::max(width, pool_.pages_for(sequence.extent(rows.starts[i])));
  }
  batch.begin(columns, width, pool_.page_size());
  const std::int64_t* ids = rows.ids;
  for (std::size_t i = 0; i < rows.count; ++i) {
    Entry& parent = entry(rows.sequences[i]);
    Leaf& row = branches_[rows.branches[i]];
    row.sequence = rows.sequences[i];
    row.tokens.assign(ids, ids + rows.lengths[i]);
    ids += rows.lengths[i];
    open_branch(pool_, parent.sequence, rows.starts[i], rows.lengths[i], row.branch);
    parent.branches.push_back(rows.branches[i]);
    const bool joins =
        i > 0 && rows.sequences[i - 1] == rows.sequences[i] && rows.starts[i - 1] == rows.starts[i];
    if (!joins) {
      batch.add_group(parent.sequence, rows.starts[i]);
    }
    batch.add_row(rows.starts[i], rows.lengths[i], row.branch.first_slot, row.branch.pages.data());
  }
}

SequenceCache::Leaf SequenceCache::detach(std::int64_t branch) {
  const auto found = branches_.find(branch);
  if (found == branches_.end()) {
    throw std::out_of_range("no branch " + std::to_string(branch));
  }
  Leaf leaf = std::move(found->second);
  branches_.erase(found);
  auto& siblings = entry(leaf.sequence).branches;
  siblings.erase(std::find(siblings.begin(), siblings.end(), branch));
  return leaf;
}

void SequenceCache::promote(std::int64_t branch, std::int32_t length) {
  const auto found = branches_.find(branch);
  if (found == branches_.end()) {
    throw std::out_of_range("no branch " + std::to_string(branch));
  }
  if (length < 0 || length > found->second.branch.length) {
    throw std::invalid_argument("length must be in [0, " +
                                std::to_string(found->second.branch.length) + "], got " +
                                std::to_string(length));
  }
  Leaf leaf = detach(branch);
  Entry& parent = entry(leaf.sequence);
  stars_fast::promote(pool_, parent.sequence, leaf.branch, length, copies_);
  parent.tokens.resize(static_cast<std::size_t>(leaf.branch.start));
  parent.tokens.insert(parent.tokens.end(), leaf.tokens.begin(), leaf.tokens.begin() + length);
}

void SequenceCache::drop(std::int64_t branch) {
  Leaf leaf = detach(branch);
  pool_.release_from(leaf.branch.pages, 0);
}

Copies SequenceCache::take_copies() {
  Copies taken;
  std::swap(taken, copies_);
  return taken;
}

void SequenceCache::check() const {
  std::vector<std::int32_t> held(static_cast<std::size_t>(pool_.num_pages()), 0);
  for (const auto& [id, item] : sequences_) {
    for (const std::int32_t page : item.sequence.pages) {
      ++held[static_cast<std::size_t>(page)];
    }
    if (item.tokens.size() != static_cast<std::size_t>(item.sequence.cached)) {
      throw std::logic_error("sequence " + std::to_string(id) + " has tokens without KV");
    }
  }
  for (const auto& [id, leaf] : branches_) {
    for (const std::int32_t page : leaf.branch.pages) {
      ++held[static_cast<std::size_t>(page)];
    }
  }
  pool_.check(held);
}

}  // namespace stars_fast
