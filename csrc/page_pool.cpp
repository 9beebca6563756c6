#include "page_pool.h"

#include <algorithm>
#include <string>
#include <utility>

namespace stars_fast {

PagePool::PagePool(std::int32_t num_pages, std::int32_t page_size)
    : page_size_(page_size), available_(num_pages - 1) {
  if (page_size < 1) {
    throw std::invalid_argument("page_size must be at least 1, got " + std::to_string(page_size));
  }
  if (num_pages < 2) {
    throw std::invalid_argument("num_pages must be at least 2 (page 0 is the null page), got " +
                                std::to_string(num_pages));
  }
  const auto pages = static_cast<std::size_t>(num_pages);
  info_.resize(pages);
  tokens_.resize(pages * static_cast<std::size_t>(page_size));
  free_.reserve(pages);
  by_hash_.reserve(pages);
  for (std::int32_t page = num_pages - 1; page > 0; --page) {
    free_.push_back(page);
  }
}

const PagePool::Info& PagePool::info(std::int32_t page) const {
  if (page < 1 || page >= num_pages()) {
    throw std::out_of_range("page must be in [1, " + std::to_string(num_pages()) + "), got " +
                            std::to_string(page));
  }
  return info_[static_cast<std::size_t>(page)];
}

PagePool::Info& PagePool::info(std::int32_t page) {
  static_cast<void>(std::as_const(*this).info(page));
  return info_[static_cast<std::size_t>(page)];
}

std::int32_t PagePool::allocate() {
  std::int32_t page = kNone;
  if (!free_.empty()) {
    page = free_.back();
    free_.pop_back();
  } else if (oldest_ != kNone) {
    page = oldest_;
    unlink(page);
    unpublish(page);
  } else {
    throw OutOfPages("all " + std::to_string(num_pages() - 1) + " pages of the pool are held");
  }
  info_[static_cast<std::size_t>(page)].count = 1;
  --available_;
  return page;
}

void PagePool::retain(std::int32_t page) {
  Info& entry = info(page);
  if (entry.count == 0) {
    if (entry.serial == 0) {
      throw std::logic_error("retain: page " + std::to_string(page) + " is free");
    }
    unlink(page);
    --available_;
  }
  ++entry.count;
}

void PagePool::release(std::int32_t page) {
  Info& entry = info(page);
  if (entry.count == 0) {
    throw std::logic_error("release: page " + std::to_string(page) + " is not held");
  }
  if (--entry.count == 0) {
    ++available_;
    if (entry.serial == 0) {
      free_.push_back(page);
    } else {
      link(page);
    }
  }
}

void PagePool::release_from(std::vector<std::int32_t>& pages, std::size_t from) {
  while (pages.size() > from) {
    release(pages.back());
    pages.pop_back();
  }
}

std::uint64_t PagePool::hash_page(std::uint64_t parent, const std::int32_t* tokens) const {
  // FNV-1a over words with a final mix: equality is checked on the tokens, so it need not be more.
  std::uint64_t hash = 0xCBF29CE484222325U ^ (parent * 0x9E3779B97F4A7C15U);
  for (std::int32_t i = 0; i < page_size_; ++i) {
    hash = (hash ^ static_cast<std::uint32_t>(tokens[i])) * 0x100000001B3U;
    hash ^= hash >> 29U;
  }
  return hash;
}

std::int32_t PagePool::find(std::uint64_t parent, const std::int32_t* tokens) const {
  const auto found = by_hash_.find(hash_page(parent, tokens));
  if (found == by_hash_.end()) {
    return kNone;
  }
  // A serial names one exact prefix, so parent and tokens together leave no room for a collision.
  const auto page = static_cast<std::size_t>(found->second);
  const auto* stored = tokens_.data() + page * static_cast<std::size_t>(page_size_);
  const bool same = info_[page].parent == parent && std::equal(tokens, tokens + page_size_, stored);
  return same ? found->second : kNone;
}

void PagePool::match(const std::int32_t* tokens, std::int32_t limit,
                     std::vector<std::int32_t>& pages) {
  std::uint64_t parent = 0;
  for (std::int32_t start = 0; start + page_size_ <= limit; start += page_size_) {
    const std::int32_t page = find(parent, tokens + start);
    if (page == kNone) {
      return;
    }
    retain(page);
    pages.push_back(page);
    parent = info_[static_cast<std::size_t>(page)].serial;
  }
}

PagePool::Hit PagePool::peek(const std::int32_t* tokens, std::int32_t limit) const {
  Hit hit;
  std::uint64_t parent = 0;
  for (std::int32_t start = 0; start + page_size_ <= limit; start += page_size_) {
    const std::int32_t page = find(parent, tokens + start);
    if (page == kNone) {
      break;
    }
    const Info& entry = info_[static_cast<std::size_t>(page)];
    ++hit.pages;
    hit.evictable += entry.count == 0 ? 1 : 0;
    parent = entry.serial;
  }
  return hit;
}

void PagePool::publish(const std::vector<std::int32_t>& table, std::size_t index,
                       const std::int32_t* tokens) {
  const std::uint64_t parent =
      index == 0 ? 0 : info_[static_cast<std::size_t>(table[index - 1])].serial;
  if (index > 0 && parent == 0) {
    return;  // the page before is a private copy of a page that another sequence published
  }
  const auto page = static_cast<std::size_t>(table[index]);
  Info& entry = info_[page];
  const auto* begin = tokens + index * static_cast<std::size_t>(page_size_);
  const std::uint64_t hash = hash_page(parent, begin);
  if (entry.serial != 0 || !by_hash_.emplace(hash, table[index]).second) {
    return;
  }
  entry.serial = next_serial_++;
  entry.parent = parent;
  entry.hash = hash;
  std::copy(begin, begin + page_size_,
            tokens_.begin() + static_cast<std::ptrdiff_t>(page) * page_size_);
}

void PagePool::unpublish(std::int32_t page) {
  Info& entry = info_[static_cast<std::size_t>(page)];
  by_hash_.erase(entry.hash);
  entry.serial = 0;
}

void PagePool::clear_cache() {
  while (oldest_ != kNone) {
    const std::int32_t page = oldest_;
    unlink(page);
    free_.push_back(page);
  }
  for (Info& entry : info_) {
    entry.serial = 0;
  }
  by_hash_.clear();
}

void PagePool::link(std::int32_t page) {
  Info& entry = info_[static_cast<std::size_t>(page)];
  entry.previous = newest_;
  entry.next = kNone;
  (newest_ == kNone ? oldest_ : info_[static_cast<std::size_t>(newest_)].next) = page;
  newest_ = page;
}

void PagePool::unlink(std::int32_t page) {
  const Info& entry = info_[static_cast<std::size_t>(page)];
  (entry.previous == kNone ? oldest_ : info_[static_cast<std::size_t>(entry.previous)].next) =
      entry.next;
  (entry.next == kNone ? newest_ : info_[static_cast<std::size_t>(entry.next)].previous) =
      entry.previous;
}

void PagePool::check() const {
  std::int32_t evictable = 0;
  for (std::int32_t page = oldest_; page != kNone;
       page = info_[static_cast<std::size_t>(page)].next) {
    const Info& entry = info_[static_cast<std::size_t>(page)];
    if (entry.count != 0 || entry.serial == 0) {
      throw std::logic_error("page " + std::to_string(page) + " is evictable and held");
    }
    ++evictable;
  }
  std::int32_t held = 0;
  for (const Info& entry : info_) {
    held += entry.count > 0 ? 1 : 0;
  }
  const auto free = static_cast<std::int32_t>(free_.size());
  if (free + evictable != available_ || free + evictable + held != num_pages() - 1) {
    throw std::logic_error("pages do not add up: " + std::to_string(free) + " free, " +
                           std::to_string(evictable) + " evictable, " + std::to_string(held) +
                           " held of " + std::to_string(num_pages() - 1));
  }
}

void PagePool::check(const std::vector<std::int32_t>& held) const {
  check();
  for (std::size_t page = 1; page < info_.size(); ++page) {
    if (info_[page].count != held[page]) {
      throw std::logic_error("page " + std::to_string(page) + " counts " +
                             std::to_string(info_[page].count) + " holders, tables say " +
                             std::to_string(held[page]));
    }
  }
}

}  // namespace stars_fast
