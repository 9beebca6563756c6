// Paged token sequences under ids of the caller's choosing: what a reward model's cache is made of.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "batch.h"
#include "page_pool.h"
#include "sequence.h"

namespace stars_fast {

// Unknown ids are std::out_of_range, ids in use std::invalid_argument.
class SequenceCache {
 public:
  SequenceCache(std::int32_t num_pages, std::int32_t page_size);

  void open(std::int64_t sequence);
  // Frees the sequence and its branches.
  void close(std::int64_t sequence);
  // `target`, open and without branches, becomes a copy of `source`: they share its pages.
  void copy(std::int64_t source, std::int64_t target);
  [[nodiscard]] bool contains(std::int64_t sequence) const;
  // Committed tokens.
  [[nodiscard]] const std::vector<std::int32_t>& tokens(std::int64_t sequence) const;
  // How many tokens at the start of `ids` are committed in the sequence already.
  [[nodiscard]] std::int32_t common_prefix(std::int64_t sequence, const std::int64_t* ids,
                                           std::int64_t length) const;
  void truncate(std::int64_t sequence, std::int32_t length);
  // Pads the present end: the next token starts a fresh page. Once a sequence:
  // std::invalid_argument if tokens lie behind one already.
  void seal_prompt(std::int64_t sequence);

  // Forks row i from the first starts[i] tokens of sequences[i] and gives it pages for lengths[i]
  // tokens, those of `ids` row after row. All or nothing: throws OutOfPages with nothing changed.
  // Neighbouring rows of one sequence and start share a group of the batch.
  struct Rows {
    const std::int64_t* sequences = nullptr;
    const std::int64_t* branches = nullptr;
    const std::int32_t* starts = nullptr;
    const std::int32_t* lengths = nullptr;
    std::size_t count = 0;
    const std::int64_t* ids = nullptr;
    std::size_t num_ids = 0;
  };
  void branch(const Rows& rows, Batch& batch);
  // The branch becomes its sequence's continuation; its first `length` tokens are kept.
  void promote(std::int64_t branch, std::int32_t length);
  void drop(std::int64_t branch);

  // Copies owed since the last call; they must run before the next forward pass.
  [[nodiscard]] Copies take_copies();

  [[nodiscard]] const PagePool& pool() const { return pool_; }
  // Throws std::logic_error unless every page's count equals the tables that hold it.
  void check() const;

 private:
  struct Entry {
    Sequence sequence;
    std::vector<std::int32_t> tokens;
    std::vector<std::int64_t> branches;
  };
  struct Leaf {
    std::int64_t sequence = 0;
    Branch branch;
    std::vector<std::int32_t> tokens;
  };

  Entry& entry(std::int64_t sequence);
  [[nodiscard]] const Entry& entry(std::int64_t sequence) const;
  void validate(const Rows& rows) const;
  Leaf detach(std::int64_t branch);

  PagePool pool_;
  std::unordered_map<std::int64_t, Entry> sequences_;
  std::unordered_map<std::int64_t, Leaf> branches_;
  Copies copies_;
};

}  // namespace stars_fast
