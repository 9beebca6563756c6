#include <map>
#include <random>
#include <vector>

#include "check.h"
#include "sequence_cache.h"

namespace {

// A stand-in for the device: what each slot was last written with. A forward pass that reads a
// sequence through its table must find its tokens.
class Memory {
 public:
  explicit Memory(std::int32_t page_size) : page_size_(page_size) {}

  void copy(const stars_fast::Copies& copies) {
    for (std::size_t i = 0; i < copies.count.size(); ++i) {
      for (std::int32_t slot = 0; slot < copies.count[i]; ++slot) {
        slots_[at(copies.target[i], slot)] = slots_[at(copies.source[i], slot)];
      }
    }
  }

  void write(const stars_fast::Batch& batch, const std::vector<std::int64_t>& ids) {
    std::size_t next = 0;
    for (std::size_t row = 0; row < batch.lengths.size(); ++row) {
      for (std::int32_t j = 0; j < batch.lengths[row]; ++j) {
        const auto column = static_cast<std::size_t>(j);
        slots_[batch.slots[row * static_cast<std::size_t>(batch.max_new) + column]] = ids[next++];
      }
    }
  }

  // Tokens that the row's group reads.
  std::vector<std::int64_t> prefix(const stars_fast::Batch& batch, std::size_t row) {
    const auto group = static_cast<std::size_t>(batch.row_group[row]);
    std::vector<std::int64_t> tokens;
    for (std::int32_t slot = 0; slot < batch.extent[group]; ++slot) {
      if (slot >= batch.padding_start[group] && slot < batch.padding_end[group]) {
        continue;
      }
      const auto column = static_cast<std::size_t>(slot / page_size_);
      const auto width = static_cast<std::size_t>(batch.table_width);
      tokens.push_back(slots_[at(batch.group_pages[group * width + column], slot % page_size_)]);
    }
    return tokens;
  }

 private:
  [[nodiscard]] std::int64_t at(std::int32_t page, std::int32_t offset) const {
    return std::int64_t{page} * page_size_ + offset;
  }

  std::int32_t page_size_;
  std::map<std::int64_t, std::int64_t> slots_;
};

void random_forks_read_what_was_written(std::int32_t page_size) {
  std::mt19937 random(static_cast<unsigned>(page_size));
  const auto below = [&random](std::size_t limit) {
    return static_cast<std::int32_t>(random() % limit);
  };
  stars_fast::SequenceCache cache(200, page_size);
  Memory memory(page_size);
  constexpr std::int64_t kSequences = 3;
  std::vector<std::vector<std::int64_t>> truth(kSequences);
  for (std::int64_t s = 0; s < kSequences; ++s) {
    cache.open(s);
  }
  std::int64_t next_branch = 0;
  for (int step = 0; step < 400; ++step) {
    if (below(6) == 0) {
      const std::int64_t source = below(kSequences);
      const std::int64_t target = (source + 1 + below(kSequences - 1)) % kSequences;
      cache.copy(source, target);
      cache.check();
      truth[static_cast<std::size_t>(target)] = truth[static_cast<std::size_t>(source)];
    }
    std::vector<std::int64_t> sequences;
    std::vector<std::int64_t> branches;
    std::vector<std::int32_t> starts;
    std::vector<std::int32_t> lengths;
    std::vector<std::int64_t> ids;
    for (std::int64_t s = 0; s < kSequences; ++s) {
      auto& tokens = truth[static_cast<std::size_t>(s)];
      if (tokens.size() > 40) {
        const std::int32_t kept = below(20);
        cache.truncate(s, kept);
        tokens.resize(static_cast<std::size_t>(kept));
      }
      const bool at_end = below(4) != 0;
      const std::int32_t start =
          at_end ? static_cast<std::int32_t>(tokens.size()) : below(tokens.size() + 1);
      for (std::int32_t candidate = below(3); candidate >= 0; --candidate) {
        sequences.push_back(s);
        branches.push_back(next_branch++);
        starts.push_back(start);
        lengths.push_back(1 + below(9));
        for (std::int32_t j = 0; j < lengths.back(); ++j) {
          ids.push_back(below(1000));
        }
      }
    }
    memory.copy(cache.take_copies());
    stars_fast::Batch batch;
    stars_fast::SequenceCache::Rows rows;
    rows.sequences = sequences.data();
    rows.branches = branches.data();
    rows.starts = starts.data();
    rows.lengths = lengths.data();
    rows.count = sequences.size();
    rows.ids = ids.data();
    rows.num_ids = ids.size();
    cache.branch(rows, batch);
    cache.check();
    memory.write(batch, ids);
    std::size_t offset = 0;
    for (std::size_t row = 0; row < sequences.size(); ++row) {
      auto& tokens = truth[static_cast<std::size_t>(sequences[row])];
      const std::vector<std::int64_t> expected(tokens.begin(), tokens.begin() + starts[row]);
      CHECK(memory.prefix(batch, row) == expected);
      offset += static_cast<std::size_t>(lengths[row]);
    }
    offset = 0;
    for (std::size_t row = 0; row < sequences.size(); ++row) {
      const bool last = row + 1 == sequences.size() || sequences[row + 1] != sequences[row];
      if (last && below(3) != 0) {
        const std::int32_t kept = below(static_cast<std::size_t>(lengths[row]) + 1);
        cache.promote(branches[row], kept);
        auto& tokens = truth[static_cast<std::size_t>(sequences[row])];
        tokens.resize(static_cast<std::size_t>(starts[row]));
        const auto from = ids.begin() + static_cast<std::ptrdiff_t>(offset);
        tokens.insert(tokens.end(), from, from + kept);
        if (below(5) == 0) {
          try {
            cache.seal_prompt(sequences[row]);
          } catch (const std::invalid_argument&) {
            // it is padded already
          }
        }
      } else {
        cache.drop(branches[row]);
      }
      offset += static_cast<std::size_t>(lengths[row]);
    }
    cache.check();
  }
  for (std::int64_t s = 0; s < kSequences; ++s) {
    cache.close(s);
  }
  CHECK(cache.pool().used() == 0);
}

stars_fast::Batch branch(stars_fast::SequenceCache& cache, std::int64_t sequence, std::int64_t name,
                         std::int32_t start, const std::vector<std::int64_t>& ids) {
  const auto length = static_cast<std::int32_t>(ids.size());
  stars_fast::Batch batch;
  cache.branch({&sequence, &name, &start, &length, 1, ids.data(), ids.size()}, batch);
  return batch;
}

template <typename Error, typename Call>
bool throws(Call call) {
  try {
    call();
  } catch (const Error&) {
    return true;
  }
  return false;
}

void copies_share_pages_and_refuse_what_they_cannot() {
  stars_fast::SequenceCache cache(20, 4);
  cache.open(1);
  cache.open(2);
  branch(cache, 1, 10, 0, {1, 2, 3, 4, 5, 6});
  CHECK(throws<std::invalid_argument>([&cache] { cache.copy(2, 1); }));  // it has a branch
  cache.copy(1, 2);                                                      // and its own stay its own
  CHECK(cache.tokens(2).empty());
  cache.promote(10, 6);
  branch(cache, 2, 11, 0, {9, 9, 9, 9, 9});
  cache.promote(11, 5);
  CHECK(cache.pool().used() == 4);
  cache.copy(1, 2);
  cache.copy(1, 2);  // of what it has already
  CHECK(cache.tokens(2) == cache.tokens(1));
  CHECK(cache.pool().used() == 2);
  cache.check();
  CHECK(throws<std::invalid_argument>([&cache] { cache.copy(1, 1); }));
  CHECK(throws<std::out_of_range>([&cache] { cache.copy(1, 3); }));
  CHECK(throws<std::out_of_range>([&cache] { cache.copy(3, 1); }));
  // What follows is written to pages of its own.
  const auto batch = branch(cache, 2, 12, 6, {7});
  CHECK(batch.slots[0] / 4 != batch.group_pages[1]);
  cache.promote(12, 1);
  CHECK((cache.take_copies().source == std::vector<std::int32_t>{batch.group_pages[1]}));
  CHECK(cache.pool().used() == 3);
  cache.truncate(2, 3);
  cache.close(1);
  CHECK((cache.tokens(2) == std::vector<std::int32_t>{1, 2, 3}));
  CHECK(cache.pool().used() == 1);
  cache.check();
}

}  // namespace

void test_sequence_cache() {
  copies_share_pages_and_refuse_what_they_cannot();
  for (const std::int32_t page_size : {1, 3, 4, 16}) {
    random_forks_read_what_was_written(page_size);
  }
}
