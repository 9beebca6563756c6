// Philox4x32-10, the counter-based generator of Salmon et al. (SC'11, "Parallel random numbers: as
// easy as 1, 2, 3"). Written also in Triton (kernels/philox.py) and PyTorch
// (stars_fast/ops/philox.py); all three give the same bits.
#pragma once

#include <array>
#include <cstdint>

namespace stars_fast {

using PhiloxCounter = std::array<std::uint32_t, 4>;
using PhiloxKey = std::array<std::uint32_t, 2>;

// What a draw is for: the last word of the counter.
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

// A uniform in (0, 1) with 53 bits that depends on its arguments and on nothing else.
constexpr double purpose_uniform(std::uint64_t seed, std::uint32_t position, std::uint32_t attempt,
                                 Purpose purpose) {
  const PhiloxCounter words =
      philox4x32({0, position, attempt, static_cast<std::uint32_t>(purpose)}, philox_key(seed));
  const std::uint64_t bits = (std::uint64_t{words[0]} << 32U | words[1]) >> 12U;
  return (static_cast<double>(bits) + 0.5) * 0x1p-52;
}

// That of an accept test: of the response position at which the segment starts, and the attempt.
constexpr double accept_uniform(std::uint64_t seed, std::uint32_t position, std::uint32_t attempt) {
  return purpose_uniform(seed, position, attempt, Purpose::kAccept);
}

}  // namespace stars_fast
