// Reference-counted pages of KV slots, and the cache of full prompt pages.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <unordered_map>
#include <vector>

namespace stars_fast {

class OutOfPages : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Counts and ids only: the tensors behind the pages belong to the caller. Page 0 is the null page,
// never handed out: padding points there.
//
// A page is free (count 0, contents worthless), held (count > 0), or, if it was published,
// evictable (count 0, contents kept until the page is needed; least recently released first).
class PagePool {
 public:
  PagePool(std::int32_t num_pages, std::int32_t page_size);

  [[nodiscard]] std::int32_t num_pages() const { return static_cast<std::int32_t>(info_.size()); }
  [[nodiscard]] std::int32_t page_size() const { return page_size_; }
  // Pages that allocate() can give: free or evictable.
  [[nodiscard]] std::int32_t available() const { return available_; }
  // Pages that are held.
  [[nodiscard]] std::int32_t used() const { return num_pages() - 1 - available_; }
  [[nodiscard]] std::int32_t count(std::int32_t page) const { return info(page).count; }
  // Pages that hold `tokens` slots.
  [[nodiscard]] std::int32_t pages_for(std::int32_t slots) const {
    return (slots + page_size_ - 1) / page_size_;
  }

  // One page with count 1. Throws OutOfPages.
  std::int32_t allocate();
  void retain(std::int32_t page);
  void release(std::int32_t page);
  // Releases pages[from:], last first, so that the ends of prefixes are evicted before their
  // starts.
  void release_from(std::vector<std::int32_t>& pages, std::size_t from);

  // Prefix cache. The longest chain of published pages that begins `tokens`: its pages are retained
  // and appended to `pages`; at most limit / page_size of them.
  void match(const std::int32_t* tokens, std::int32_t limit, std::vector<std::int32_t>& pages);
  // As match, without effect: how many pages match, and how many of those are evictable now.
  struct Hit {
    std::int32_t pages = 0;
    std::int32_t evictable = 0;
  };
  [[nodiscard]] Hit peek(const std::int32_t* tokens, std::int32_t limit) const;
  // Makes table[index], full of the tokens at tokens[index * page_size], findable. Pages before it
  // in the table must have been published or matched.
  void publish(const std::vector<std::int32_t>& table, std::size_t index,
               const std::int32_t* tokens);
  // Forgets every published page.
  void clear_cache();

  // Throws std::logic_error unless free + evictable + held is all pages.
  void check() const;
  // The same, and unless each page's count is what its holders say: held[page] of them.
  void check(const std::vector<std::int32_t>& held) const;

 private:
  static constexpr std::int32_t kNone = -1;
  struct Info {
    std::int32_t count = 0;
    std::int32_t previous = kNone;  // neighbours in the evictable list
    std::int32_t next = kNone;
    std::uint64_t serial = 0;  // of the publication, 0 if not published: names the whole prefix
    std::uint64_t parent = 0;  // serial of the page before, 0 for the first
    std::uint64_t hash = 0;
  };

  [[nodiscard]] const Info& info(std::int32_t page) const;
  [[nodiscard]] Info& info(std::int32_t page);
  [[nodiscard]] std::uint64_t hash_page(std::uint64_t parent, const std::int32_t* tokens) const;
  [[nodiscard]] std::int32_t find(std::uint64_t parent, const std::int32_t* tokens) const;
  void unpublish(std::int32_t page);
  void link(std::int32_t page);
  void unlink(std::int32_t page);

  std::int32_t page_size_;
  std::int32_t available_;
  std::vector<Info> info_;
  std::vector<std::int32_t> free_;
  std::vector<std::int32_t> tokens_;  // [num_pages, page_size], of published pages
  std::unordered_map<std::uint64_t, std::int32_t> by_hash_;
  std::uint64_t next_serial_ = 1;
  std::int32_t oldest_ = kNone;
  std::int32_t newest_ = kNone;
};

}  // namespace stars_fast
