#include <random>
#include <vector>

#include "check.h"
#include "page_pool.h"

namespace {

using Pages = std::vector<std::int32_t>;

void exhausts_and_refuses() {
  stars_fast::PagePool pool(4, 2);
  Pages held;
  for (int i = 0; i < 3; ++i) {
    held.push_back(pool.allocate());
    CHECK(held.back() != 0);
  }
  bool refused = false;
  try {
    pool.allocate();
  } catch (const stars_fast::OutOfPages&) {
    refused = true;
  }
  CHECK(refused);
  pool.release_from(held, 0);
  CHECK(pool.available() == 3);
  pool.check();
}

void matches_exact_prefixes_only() {
  stars_fast::PagePool pool(10, 2);
  const std::vector<std::int32_t> tokens{1, 2, 3, 4, 5, 6};
  Pages table{pool.allocate(), pool.allocate(), pool.allocate()};
  for (std::size_t i = 0; i < 3; ++i) {
    pool.publish(table, i, tokens.data());
  }
  Pages found;
  pool.match(tokens.data(), 5, found);  // the third page does not fit the limit
  CHECK((found == Pages{table[0], table[1]}));
  CHECK(pool.count(table[0]) == 2);

  Pages other;
  const std::vector<std::int32_t> same_middle{9, 9, 3, 4};
  pool.match(same_middle.data(), 4, other);
  CHECK(other.empty());

  // Released pages stay findable until they are needed, the oldest released going first.
  pool.release_from(found, 0);
  pool.release_from(table, 0);
  CHECK(pool.peek(tokens.data(), 6).pages == 3);
  CHECK(pool.peek(tokens.data(), 6).evictable == 3);
  Pages all;
  for (int i = 0; i < 7; ++i) {
    all.push_back(pool.allocate());
  }
  CHECK(pool.peek(tokens.data(), 6).pages == 2);
  pool.check();
  pool.release_from(all, 0);
  pool.clear_cache();
  CHECK(pool.peek(tokens.data(), 6).pages == 0);
  CHECK(pool.available() == 9);
  pool.check();
}

void survives_random_use() {
  std::mt19937 random(1);
  stars_fast::PagePool pool(30, 2);
  std::vector<Pages> tables;
  for (int step = 0; step < 20000; ++step) {
    const auto choice = random() % 4;
    if (choice == 0 && pool.available() > 3) {
      std::vector<std::int32_t> tokens(6);
      for (auto& token : tokens) {
        token = static_cast<std::int32_t>(random() % 2);
      }
      Pages table;
      pool.match(tokens.data(), 6, table);
      const std::size_t matched = table.size();
      while (table.size() < 3) {
        table.push_back(pool.allocate());
      }
      for (std::size_t i = matched; i < 3; ++i) {
        pool.publish(table, i, tokens.data());
      }
      tables.push_back(table);
    } else if (!tables.empty()) {
      const std::size_t which = random() % tables.size();
      pool.release_from(tables[which], 0);
      tables.erase(tables.begin() + static_cast<std::ptrdiff_t>(which));
    }
    pool.check();
  }
}

}  // namespace

void test_page_pool() {
  exhausts_and_refuses();
  matches_exact_prefixes_only();
  survives_random_use();
}
