#include "sequence.h"

#include <string>

namespace stars_fast {

namespace {

void allocate(PagePool& pool, std::int32_t pages, std::vector<std::int32_t>& into) {
  if (pages > pool.available()) {
    throw OutOfPages(std::to_string(pages) + " pages asked for, " +
                     std::to_string(pool.available()) + " available");
  }
  for (std::int32_t i = 0; i < pages; ++i) {
    into.push_back(pool.allocate());
  }
}

}  // namespace

void Copies::clear() {
  source.clear();
  target.clear();
  count.clear();
}

void Copies::add(std::int32_t from, std::int32_t to, std::int32_t slots) {
  source.push_back(from);
  target.push_back(to);
  count.push_back(slots);
}

void Copies::append(const Copies& other) {
  source.insert(source.end(), other.source.begin(), other.source.end());
  target.insert(target.end(), other.target.begin(), other.target.end());
  count.insert(count.end(), other.count.begin(), other.count.end());
}

void Sequence::set_padding(std::int32_t tokens, std::int32_t page_size) {
  padding_start = tokens;
  padding_length = (page_size - tokens % page_size) % page_size;
}

void Sequence::clear_padding() {
  padding_start = kNoPadding;
  padding_length = 0;
}

std::int32_t branch_pages(const PagePool& pool, const Sequence& sequence, std::int32_t start,
                          std::int32_t length) {
  const std::int32_t offset = sequence.slot(start) % pool.page_size();
  return pool.pages_for(offset + length);
}

void open_branch(PagePool& pool, const Sequence& sequence, std::int32_t start, std::int32_t length,
                 Branch& branch) {
  allocate(pool, branch_pages(pool, sequence, start, length), branch.pages);
  branch.start = start;
  branch.first_slot = sequence.slot(start);
  branch.length = length;
  branch.joined = false;
}

void join(const PagePool& pool, const Sequence& sequence, Branch& branch, Copies& copies) {
  const std::int32_t size = pool.page_size();
  const std::int32_t offset = branch.first_slot % size;
  if (offset > 0 && !branch.joined) {
    copies.add(sequence.pages[static_cast<std::size_t>(branch.first_slot / size)],
               branch.pages.front(), offset);
  }
  branch.joined = true;
}

void read_through(const PagePool& pool, const Sequence& sequence, const Branch& branch,
                  Sequence& table) {
  const auto own = sequence.pages.begin();
  table.pages.assign(own, own + branch.first_slot / pool.page_size());
  table.pages.insert(table.pages.end(), branch.pages.begin(), branch.pages.end());
  table.padding_start = sequence.padding_start;
  table.padding_length = sequence.padding_length;
}

void promote(PagePool& pool, Sequence& sequence, Branch& branch, std::int32_t keep,
             Copies& copies) {
  const std::int32_t size = pool.page_size();
  const auto first = static_cast<std::size_t>(branch.first_slot / size);
  const std::int32_t offset = branch.first_slot % size;
  if (keep > 0) {
    join(pool, sequence, branch, copies);
  }
  pool.release_from(branch.pages,
                    static_cast<std::size_t>(keep == 0 ? 0 : pool.pages_for(offset + keep)));
  if (keep > 0) {
    pool.release_from(sequence.pages, first);
    sequence.pages.insert(sequence.pages.end(), branch.pages.begin(), branch.pages.end());
    branch.pages.clear();
    if (branch.start < sequence.padding_start) {
      sequence.clear_padding();
    }
    sequence.cached = branch.start + keep;
  } else {
    truncate(pool, sequence, branch.start);
  }
}

void truncate(PagePool& pool, Sequence& sequence, std::int32_t tokens) {
  if (tokens < sequence.padding_start) {
    sequence.clear_padding();
  }
  pool.release_from(sequence.pages,
                    static_cast<std::size_t>(pool.pages_for(sequence.extent(tokens))));
  sequence.cached = tokens;
}

void extend(PagePool& pool, Sequence& sequence, std::int32_t tokens) {
  const auto held = static_cast<std::int32_t>(sequence.pages.size());
  const std::int32_t needed = pool.pages_for(sequence.extent(tokens));
  if (needed > held) {
    allocate(pool, needed - held, sequence.pages);
  }
}

}  // namespace stars_fast
