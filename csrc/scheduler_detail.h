// What the scheduler's files share: checks of arguments, buffers that are used again.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>

namespace stars_fast {

template <typename Value>
void require(bool holds, const char* name, Value value, const char* allowed) {
  if (!holds) {
    throw std::invalid_argument(std::string(name) + " must be " + allowed + ", got " +
                                std::to_string(value));
  }
}

// Reuses the buffers unless the caller still holds them.
template <typename Buffers>
std::shared_ptr<Buffers>& recycle(std::shared_ptr<Buffers>& buffers) {
  if (buffers == nullptr || buffers.use_count() > 1) {
    buffers = std::make_shared<Buffers>();
  }
  buffers->clear();
  return buffers;
}

}  // namespace stars_fast
