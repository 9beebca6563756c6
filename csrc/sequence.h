// A token sequence in pages, and branches that continue it without touching it.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "page_pool.h"

namespace stars_fast {

// Page copies owed to the device: the first count[i] slots of page source[i] to page target[i].
struct Copies {
  std::vector<std::int32_t> source;
  std::vector<std::int32_t> target;
  std::vector<std::int32_t> count;

  void clear();
  void add(std::int32_t from, std::int32_t to, std::int32_t slots);
  void append(const Copies& other);
};

// A page table. Token i lies in slot i, or padding_length slots further from the prompt padding on:
// it pads the prompt to a page boundary, so that what follows starts on a page of its own.
struct Sequence {
  static constexpr std::int32_t kNoPadding = std::numeric_limits<std::int32_t>::max();

  std::vector<std::int32_t> pages;
  std::int32_t cached = 0;  // tokens whose KV is in the pages
  std::int32_t padding_start = kNoPadding;
  std::int32_t padding_length = 0;

  [[nodiscard]] std::int32_t slot(std::int32_t token) const {
    return token < padding_start ? token : token + padding_length;
  }
  // Slots that hold the first `tokens` tokens, the padding counted if it lies among them.
  [[nodiscard]] std::int32_t extent(std::int32_t tokens) const {
    return tokens <= padding_start ? tokens : tokens + padding_length;
  }
  // Puts padding behind the first `tokens` tokens.
  void set_padding(std::int32_t tokens, std::int32_t page_size);
  void clear_padding();
};

// Pages of tokens that continue a sequence from token `start` on. The branch owns its pages alone;
// in the first one the slots before the start are unused until join() or promote() has them copied.
struct Branch {
  std::int32_t start = 0;
  std::int32_t first_slot = 0;  // slot of the sequence's table that the first token takes
  std::int32_t length = 0;      // tokens
  bool joined = false;          // those slots have been copied, or will be by what is owed
  std::vector<std::int32_t> pages;
};

// Pages that a branch of `length` tokens from `start` takes.
[[nodiscard]] std::int32_t branch_pages(const PagePool& pool, const Sequence& sequence,
                                        std::int32_t start, std::int32_t length);
// Allocates the pages of a branch; `branch.pages` must be empty. Throws OutOfPages, having taken
// nothing.
void open_branch(PagePool& pool, const Sequence& sequence, std::int32_t start, std::int32_t length,
                 Branch& branch);
// Has the slots before the branch's start copied, once, so that its tokens can be read behind those
// of the sequence. The copy is owed as promote()'s.
void join(const PagePool& pool, const Sequence& sequence, Branch& branch, Copies& copies);
// Makes `table` the first branch.start tokens of the sequence and those of the branch, joined. It
// names their pages and holds none.
void read_through(const PagePool& pool, const Sequence& sequence, const Branch& branch,
                  Sequence& table);
// The sequence becomes its first branch.start tokens and `keep` of the branch's; what both held
// beyond that is released. Adds the copy of a partly filled page to `copies`: it must run on the
// device before anything is written to pages allocated after this call.
void promote(PagePool& pool, Sequence& sequence, Branch& branch, std::int32_t keep, Copies& copies);
// Drops the tokens from `tokens` on.
void truncate(PagePool& pool, Sequence& sequence, std::int32_t tokens);
// Makes room in the table for tokens up to `tokens`. Throws OutOfPages, having taken nothing.
void extend(PagePool& pool, Sequence& sequence, std::int32_t tokens);

}  // namespace stars_fast
