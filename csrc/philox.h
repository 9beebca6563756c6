// Philox4x32-10, the counter-based generator of Salmon et al. (SC'11, "Parallel random numbers: as
// easy as 1, 2, 3"). Written also in Triton (kernels/philox.py) and PyTorch
// (stars_fast/ops/philox.py); all three give the same bits.
#pragma once

#include <array>
#include <cstdint>

namespace stars_fast {

using PhiloxCounter = std::array<std::uint32_t, 4>;
using PhiloxKey = std::array<std::uint32_t, 2>;

// The counter of a draw, under the request's seed as key; kernels/philox.py and ops/philox.py
// follow:
//   word 0  vocabulary index / 4 of a token draw, else 0
//   word 1  position in the response
//   word 2  attempt of the segment
//   word 3  stream, then the purpose in the low bits
// The stream tells apart draws that meet at one position and attempt: attempts begin at 0 with
// every segment, and a segment may be shorter than an attempt rejected before it. It is the number
// of the segment where attempts may be rejected; of a path, the number of the boundary at which it
// last became a copy of another; 0 where nothing drawn is ever given up. So no counter is used
// twice.
enum class Purpose : std::uint32_t { kToken = 0, kAccept = 1, kChoose = 2, kResample = 3 };

constexpr PhiloxCounter philox4x32(PhiloxCounter counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t low = std::uint64_t{0xD2511F53U} * counter[0];
    const std::uint64_t high = std::uint64_t{0xCD9E8D57U} * counter[2];
    counter = {static_cast<std::uint32_t>(high >> 32U) ^ counter[1] ^ key[0],
               static_cast<std::uint32_t>(high),
               static_cast<std::uint32_t>(low >> 32U) ^ counter[3] ^ key[1],
               static_cast<std::uint32_t>(low)};
    key = {key[0] + 0x9E3779B9U, key[1] + 0xBB67AE85U};
  }
  return counter;
}

constexpr PhiloxKey philox_key(std::uint64_t seed) {
  return {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32U)};
}

constexpr std::uint32_t kPurposeBits = 3;  // streams are below 2^29, max_tokens below 2^28

// A uniform in (0, 1) with 53 bits that depends on its arguments and on nothing else.
constexpr double purpose_uniform(std::uint64_t seed, std::uint32_t position, std::uint32_t attempt,
                                 std::uint32_t stream, Purpose purpose) {
  const PhiloxCounter words = philox4x32(
      {0, position, attempt, stream << kPurposeBits | static_cast<std::uint32_t>(purpose)},
      philox_key(seed));
  const std::uint64_t bits = (std::uint64_t{words[0]} << 32U | words[1]) >> 12U;
  return (static_cast<double>(bits) + 0.5) * 0x1p-52;
}

// That of an accept test: of the response position at which the segment starts, and the attempt.
constexpr double accept_uniform(std::uint64_t seed, std::uint32_t position, std::uint32_t attempt,
                                std::uint32_t stream) {
  return purpose_uniform(seed, position, attempt, stream, Purpose::kAccept);
}

}  // namespace stars_fast
